"""Rasterization with gsplat's signature: random settings of its arguments beside a dense float64 reference,
the projection beside finite differences, what `meta` holds, what is refused, and gsplat's own strategies.

UNIPRE3D_SETTINGS=200 tries that many settings (default 60), plain and extreme ones;
`NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=/tmp/checked python tests/test_rasterization.py 0 1000` from seed 0 so many extreme ones."""

import inspect
import math
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from dice import Dice, report, with_checked_indices
from torch import nn

from unipre3d.gaussians import covariance, evaluate_sh
from unipre3d.geometry.cameras import intrinsics_from_fov, look_at
from unipre3d.rasterization import (
    LATER,
    Density,
    Project,
    compute_relocation,
    rasterization,
    tiles_reached,
)
from unipre3d.render import camera_arrays, project_gaussians, project_views

SETTINGS = int(os.environ.get("UNIPRE3D_SETTINGS", 60))

# ------------------------------------------------------------------------------ settings


def colours_of(dice, batch, c, n):
    "Harmonics, colours or features, of each Gaussian or of each Gaussian and camera; and the degree."
    rows = (*batch, c, n) if dice.chance(0.3) else (*batch, n)
    degree = dice.pick(None, None, 0, 1, 2, 3, 4)
    if degree is None:
        return dice.normal(*rows, dice.pick(1, 2, 3, 3, 4, 5, 9)), None
    k = (degree + dice.pick(0, 0, 1) + 1) ** 2
    return 0.4 * dice.normal(*rows, k, 3), degree


def setting(seed):
    "Tensors, and the other arguments."
    dice = Dice(seed)
    batch = dice.pick((), (), (), (2,), (2, 1))
    c, n, hw = dice.whole(1, 3), dice.whole(1, 40), (dice.whole(4, 40), dice.whole(4, 40))
    colors, degree = colours_of(dice, batch, c, n)
    eye = dice.pick(1.75, 1.75, 0.6) * F.normalize(dice.normal(math.prod(batch) * c, 3), dim=1)
    K = intrinsics_from_fov(49.134, hw).repeat(math.prod(batch) * c, 1, 1)
    K[:, :2, 2] += dice.normal(len(K), 2)
    scales = 0.1 * torch.exp(0.5 * dice.normal(*batch, n, 3))
    quats = dice.normal(*batch, n, 4)
    options = dict(
        width=hw[1],
        height=hw[0],
        sh_degree=degree,
        near_plane=dice.pick(0.01, 0.01, 0.5, 1.6),
        far_plane=dice.pick(1e10, 1e10, 1.9),
        radius_clip=dice.pick(0.0, 0.0, 0.0, 4.0),
        eps2d=dice.pick(0.3, 0.3, 0.05, 1.0),
        packed=dice.chance(0.5),
        render_mode=dice.pick("RGB", "RGB", "D", "ED", "RGB+D", "RGB+ED"),
        rasterize_mode=dice.pick("classic", "antialiased"),
        camera_model=dice.pick("pinhole", "pinhole", "pinhole", "ortho"),
    )
    if options["camera_model"] == "ortho":
        K[:, [0, 1], [0, 1]] *= 0.5
    tensors = dict(
        means=0.5 * dice.normal(*batch, n, 3),
        quats=quats,
        scales=scales,
        opacities=torch.sigmoid(dice.normal(*batch, n) + dice.pick(0.0, -2.0)),
        colors=colors,
        viewmats=look_at(eye).unflatten(0, (*batch, c)),
        Ks=K.unflatten(0, (*batch, c)),
    )
    if dice.chance(0.5):
        tensors["backgrounds"] = dice.between(
            0, 1, *batch, c, 3 if degree is not None else colors.shape[-1]
        )
    if dice.chance(0.25):
        tensors["covars"] = covariance(scales.reshape(-1, 3), quats.reshape(-1, 4)).reshape(
            *batch, n, 3, 3
        )
    dtype = dice.pick(torch.float32, torch.float32, torch.float64)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}, options


# ----------------------------------------------------------------------------- reference


class Plain:
    "Projection and harmonics from the chapters of this book."

    @staticmethod
    def project(means, covars, viewmats, Ks, hw, eps2d, ortho):
        "Centres, covariances and depths [*b c n ...]."
        if ortho:
            R, t = viewmats[..., :3, :3], viewmats[..., :3, 3]
            x = torch.einsum("...cij,...nj->...cni", R, means) + t[..., None, :]
            P = Ks[..., :2, :2] @ R[..., :2, :]
            cov = torch.einsum("...cij,...njk,...clk->...cnil", P, covars, P)
            focal, middle = Ks[..., [0, 1], [0, 1]], Ks[..., :2, 2]
            return x[..., :2] * focal[..., None, :] + middle[..., None, :], cov, x[..., 2]
        lead, c, n = viewmats.shape[:-3], viewmats.shape[-3], means.shape[-2]
        clouds = zip(means.reshape(-1, n, 3), covars.reshape(-1, n, 3, 3))
        views = list(zip(viewmats.reshape(-1, c, 4, 4), Ks.reshape(-1, c, 3, 3)))
        found = []
        for (mean, cov), (poses, intrinsics) in zip(clouds, views):
            for pose, K in zip(poses, intrinsics):
                found.append(project_gaussians(mean, cov, pose, K, hw))
        return [torch.stack(part).unflatten(0, (*lead, c)) for part in zip(*found)]

    @staticmethod
    def harmonics(degree, directions, sh):
        "Sums of harmonics, before one half is added."
        k, shape = (degree + 1) ** 2, directions.shape[:-1]
        sh = sh[..., :k, :].reshape(-1, k, 3)
        far = 100.0  # evaluate_sh is clamped at 0
        sh = torch.cat([sh[:, :1] + far, sh[:, 1:]], 1)
        colour = evaluate_sh(sh, directions.reshape(-1, 3)) - 0.5 - far * 0.5 / math.sqrt(math.pi)
        return colour.reshape(*shape, 3)


class Gsplat:
    "Those of gsplat, written in torch."

    @staticmethod
    def project(means, covars, viewmats, Ks, hw, eps2d, ortho):
        impl = pytest.importorskip("gsplat.cuda._torch_impl")
        centre_cov = impl._world_to_cam(means, covars, viewmats)
        model = impl._ortho_proj if ortho else impl._persp_proj
        centre, cov = model(*centre_cov, Ks, hw[1], hw[0])
        rules = dict(eps2d=eps2d, camera_model="ortho" if ortho else "pinhole")
        whole = impl._fully_fused_projection(means, covars, viewmats, Ks, hw[1], hw[0], **rules)
        torch.testing.assert_close(whole[1], centre)
        return centre, cov, whole[2]

    @staticmethod
    def harmonics(degree, directions, sh):
        impl = pytest.importorskip("gsplat.cuda._torch_impl")
        return impl._spherical_harmonics(degree, directions, sh)


def blend(centre, cov, opacity, colour, depth, seen, hw):
    "One image, every Gaussian at every pixel: sums of colours [h w d], alpha [h w], clear pixels."
    order = depth.argsort(stable=True)
    order = order[seen[order]]
    y, x = torch.meshgrid(*(torch.arange(s, dtype=torch.float64) + 0.5 for s in hw), indexing="ij")
    d = torch.stack([x, y], -1) - centre[order][:, None, None]
    conic = torch.linalg.inv(cov[order])
    sigma = 0.5 * torch.einsum("nhwi,nij,nhwj->nhw", d, conic, d)
    raw = opacity[order][:, None, None] * torch.exp(-sigma)
    alpha = torch.where(raw >= 1 / 255, raw.clamp(max=0.999), 0)
    left = (1 - alpha).cumprod(0)
    alpha = torch.where(left > 1e-4, alpha, 0)
    before = torch.cat([torch.ones(1, *hw, dtype=torch.float64), (1 - alpha).cumprod(0)[:-1]])
    weight = alpha * before
    clear = ~((255 * raw - 1).abs() < 1e-4).any(0) & ~((left / 1e-4 - 1).abs() < 5e-3).any(0)
    clear &= ~((raw / 0.999 - 1).abs() < 1e-4).any(0)
    return torch.einsum("nhw,nd->hwd", weight, colour[order]), weight.sum(0), clear


def reference(source, tensors, options):
    "Images, alphas, what is seen [*b c n], radii, and pixels that rounding does not decide."
    means, viewmats, Ks = tensors["means"], tensors["viewmats"], tensors["Ks"]
    batch, n, c = means.shape[:-2], means.shape[-2], viewmats.shape[-3]
    hw = options["height"], options["width"]
    covars = tensors.get("covars")
    if covars is None:
        flat = covariance(tensors["scales"].reshape(-1, 3), tensors["quats"].reshape(-1, 4))
        covars = flat.reshape(*batch, n, 3, 3)
    ortho = options["camera_model"] == "ortho"
    centre, cov, depth = source.project(means, covars, viewmats, Ks, hw, options["eps2d"], ortho)
    blurred = cov + options["eps2d"] * torch.eye(2, dtype=torch.float64)
    opacity = tensors["opacities"][..., None, :].expand(*batch, c, n)
    if options["rasterize_mode"] == "antialiased":
        opacity = opacity * (torch.det(cov).clamp(min=0) / torch.det(blurred)).sqrt()
    colors, degree = tensors["colors"], options["sh_degree"]
    if colors.dim() == len(batch) + (2 if degree is None else 3):
        colors = colors.unsqueeze(len(batch)).expand(*batch, c, *colors.shape[len(batch) :])
    if degree is not None:
        eye = torch.linalg.inv(viewmats)[..., :3, 3]
        directions = means[..., None, :, :] - eye[..., None, :]
        colors = (source.harmonics(degree, directions, colors) + 0.5).clamp(min=0)
    with torch.no_grad():
        reach = (2 * (255 * opacity).clamp(min=1).log()).sqrt().clamp(max=3.33)
        radii = (reach[..., None] * blurred.diagonal(dim1=-2, dim2=-1).sqrt()).ceil()
        seen = (opacity >= 1 / 255) & (radii > options["radius_clip"]).any(-1)
        seen &= (depth >= options["near_plane"]) & (depth <= options["far_plane"])
        size = torch.tensor([hw[1], hw[0]])
        seen &= (centre + radii > 0).all(-1) & (centre - radii < size).all(-1)
    mode = options["render_mode"]
    parts = ([colors] if "RGB" in mode else []) + ([depth[..., None]] if "D" in mode else [])
    channels = torch.cat(parts, -1)
    background = torch.zeros(*batch, c, channels.shape[-1], dtype=torch.float64)
    if "backgrounds" in tensors and "RGB" in mode:
        behind = tensors["backgrounds"]
        background = torch.cat([behind, background[..., behind.shape[-1] :]], -1)
    rows = [t.flatten(0, len(batch)) for t in (centre, blurred, opacity, channels, depth, seen)]
    images = [blend(*row, hw) for row in zip(*rows)]
    image, alpha, clear = (torch.stack(part) for part in zip(*images))
    image = image + (1 - alpha)[..., None] * background.flatten(0, len(batch))[:, None, None]
    if mode.endswith("ED"):
        expected = image[..., -1:] / alpha[..., None].clamp(min=1e-10)
        image = torch.cat([image[..., :-1], expected], -1)
    shape = (*batch, c)
    image, alpha, clear = (t.unflatten(0, shape) for t in (image, alpha[..., None], clear))
    found = dict(means2d=centre, depths=depth, opacities=opacity, radii=radii, seen=seen)
    return image, alpha, clear, found


def gap(a, b):
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-9))


def leaves(tensors, dtype=None):
    copies = {name: t.detach().clone().to(dtype or t.dtype) for name, t in tensors.items()}
    return {name: t.requires_grad_(name != "Ks") for name, t in copies.items()}


@pytest.mark.parametrize("source", [Plain, Gsplat], ids=["plain", "gsplat"])
def test_random_settings_match_the_reference(source):
    if source is Gsplat:
        pytest.importorskip("gsplat.cuda._torch_impl")
    compared = 0
    for seed in range(SETTINGS):
        tensors, options = setting(seed)
        if source is Plain and options["sh_degree"] == 4:
            continue
        ours, exact = leaves(tensors), leaves(tensors, torch.float64)
        image, alpha, meta = rasterization(**ours, **options)
        wanted, wanted_alpha, clear, found = reference(source, exact, options)
        where = f"seed {seed}: {options}"
        assert image.shape == wanted.shape and alpha.shape == wanted_alpha.shape, where
        assert image.dtype == tensors["means"].dtype
        compared += int(clear.sum())
        with torch.no_grad():
            size = 1 + wanted.abs().max()
            far = ((image - wanted) * clear[..., None]).abs().max()
            alpha_far = ((alpha - wanted_alpha) * clear[..., None]).abs().max()
        assert float(far / size) < 1e-4 and float(alpha_far) < 1e-4, where
        seen = found.pop("seen")
        for name, values in found.items():
            shown = values[seen]
            other = meta[name] if options["packed"] else meta[name][seen]
            torch.testing.assert_close(other.double(), shown, rtol=1e-4, atol=1e-4, msg=where)
        noise = torch.Generator().manual_seed(seed)
        draw = torch.randn(wanted.shape, generator=noise, dtype=torch.float64) * clear[..., None]
        veil = torch.randn(wanted_alpha.shape, generator=noise).double() * clear[..., None]
        weight = torch.randn(int(seen.sum()), generator=noise).double()
        depths = meta["depths"] if options["packed"] else meta["depths"][seen]
        ((image * draw).sum() + (alpha * veil).sum() + (depths * weight).sum()).backward()
        loss = (wanted * draw).sum() + (wanted_alpha * veil).sum()
        (loss + (found["depths"][seen] * weight).sum()).backward()
        for name, tensor in ours.items():
            want = exact[name].grad
            if want is None or not want.norm() > 1e-6:
                continue
            got = tensor.grad
            if name == "covars":
                want = (want + want.mT) / 2
            assert gap(got, want) < 1e-3, (name, gap(got, want), where)
    assert compared > 100 * SETTINGS


# ------------------------------------------------------------------------------- extreme


def extreme_setting(seed):
    "A setting of which some finite numbers are extreme, up to the ends of its type."
    tensors, options = setting(seed)
    dice = Dice(seed + 10**6)
    dtype = tensors["means"].dtype
    end = 37 if dtype == torch.float32 else 300

    def some(name):
        return dice.some(tensors[name][..., 0].numel(), 0.3).reshape(tensors[name].shape[:-1])

    def power(low, high, *shape):
        return 10 ** dice.between(low, high, *(shape or (1,))).to(dtype)

    if dice.chance(0.4):
        scales = tensors["scales"]
        scales[some("scales")] *= power(-9, 9, 3)
    if dice.chance(0.2):
        tensors["scales"][some("scales")] = float(power(-end, end))
    if dice.chance(0.4):
        flat = covariance(tensors["scales"].reshape(-1, 3), tensors["quats"].reshape(-1, 4))
        tensors["covars"] = flat.reshape(*tensors["scales"].shape, 3).nan_to_num()
    if "covars" in tensors and dice.chance(0.4):
        any_matrix = dice.normal(*tensors["covars"].shape).to(dtype) * power(-end, end)
        tensors["covars"] = (any_matrix + any_matrix.mT) / 2  # seldom a covariance
    if dice.chance(0.3):
        tensors["means"][some("means")] *= power(0, end)
    if dice.chance(0.2):
        tensors["quats"][some("quats")] *= power(-end, end)
    if dice.chance(0.2):
        opacities = tensors["opacities"]
        opacities[dice.some(opacities.numel(), 0.3).reshape(opacities.shape)] = dice.pick(0, 1, -1)
    if dice.chance(0.3):
        tensors["colors"][some("colors")] *= power(0, end)
    if dice.chance(0.3):
        tensors["Ks"][..., [0, 1], [0, 1]] *= power(-8, 8, 2)
    if dice.chance(0.2):
        tensors["Ks"][..., :2, 2] += power(0, 6) * dice.normal(2).to(dtype)
    if dice.chance(0.2):
        tensors["viewmats"][..., :3, :] *= power(-6, 6)
    if dice.chance(0.2):
        tensors["viewmats"][..., :3, 3] += power(0, end) * dice.normal(3).to(dtype)
    if "backgrounds" in tensors and dice.chance(0.2):
        tensors["backgrounds"] *= power(0, end)
    options["eps2d"] = dice.pick(options["eps2d"], options["eps2d"], 0.0, 1e-12, 1e12)
    options["near_plane"] = dice.pick(options["near_plane"], 1e-9)
    return {
        name: tensor.clamp(-(10.0**end), 10.0**end) for name, tensor in tensors.items()
    }, options


def check_extreme(first, count):
    "So many extreme settings: no gradient is NaN or infinite where the images are finite."
    torch.set_num_threads(1)
    finite, wrong = 0, []
    for seed in range(first, first + count):
        tensors, options = extreme_setting(seed)
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values()), seed
        inputs = leaves(tensors)
        image, alpha, meta = rasterization(**inputs, **options)
        assert bool((meta["tiles_per_gauss"] >= 0).all() and (meta["radii"] >= 0).all()), seed
        if not bool(image.isfinite().all() and alpha.isfinite().all()):
            continue
        finite += 1
        noise = torch.Generator().manual_seed(seed)
        draw = torch.randn(image.shape, generator=noise, dtype=torch.float64)
        ((image * draw).sum() + alpha.sum()).backward()
        for name, tensor in inputs.items():
            if tensor.grad is not None and not bool(tensor.grad.isfinite().all()):
                wrong.append(f"seed {seed}: the gradient of {name} is not finite; {options}")
    summary = f"{count} extreme settings from seed {first}: {finite} with finite images"
    return f"{summary}, {len(wrong)} gradients wrong", wrong


def test_extreme_settings(request):
    with_checked_indices(__file__, SETTINGS, request)


@pytest.mark.parametrize("covars", [False, True])
@pytest.mark.parametrize("ortho", [False, True])
def test_gradients_of_the_projection_match_finite_differences(ortho, covars):
    "Every output of the projection by every input, cameras that are no rotations included."
    dice = Dice(3)
    n, hw = 4, (30, 40)
    pose = look_at(1.75 * F.normalize(dice.normal(2, 3), dim=1)).double()
    pose[:, :3] += 0.02 * dice.normal(2, 3, 4)
    K = intrinsics_from_fov(49.134, hw).repeat(2, 1, 1).double()
    mean, quat = 0.3 * dice.normal(n, 3).double(), dice.normal(n, 4).double()
    scale = 0.1 * torch.exp(0.5 * dice.normal(n, 3)).double()
    sh = 0.3 * dice.normal(n, 25, 3).double()
    cov = covariance(scale, quat) if covars else torch.empty(0, 3, 3).double()
    if covars:
        quat, scale = quat[:0], scale[:0]
    rules = 0.01, 1e10, 0.3, 0.0, True, ortho

    def project(*tensors):
        mean, quat, scale, cov, sh, pose = tensors
        cov = (cov + cov.mT) / 2
        centre = torch.linalg.inv(pose)[:, :3, 3]
        arrays = (mean, quat, scale, cov, torch.full((n,), 0.9).double(), sh)
        cloud = tuple(t.detach().contiguous().numpy() for t in arrays)
        start, owner = torch.tensor([0, n]).numpy(), torch.zeros(2).long().numpy()
        views = cloud, camera_arrays(pose, K, hw), rules, start, owner
        ellipses = project_views(*views, shape=True).packed()
        return Project.apply(mean, quat, scale, cov, sh, pose, centre, ellipses, views)[:4]

    inputs = [t.requires_grad_() for t in (mean, quat, scale, cov, sh, pose)]
    if not covars:
        inputs[3].requires_grad_(False)
    assert torch.autograd.gradcheck(project, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------- meta


def some_cloud(n=60, seed=0):
    dice = Dice(seed)
    return dict(
        means=0.4 * dice.normal(n, 3),
        quats=dice.normal(n, 4),
        scales=0.05 + 0.05 * dice.between(0, 1, n, 3),
        opacities=dice.between(0, 1, n),
        colors=dice.between(0, 1, n, 3),
    )


def some_views(c=2, hw=(32, 40), seed=0):
    eye = 1.75 * F.normalize(Dice(seed).normal(c, 3), dim=1)
    K = intrinsics_from_fov(49.134, hw).repeat(c, 1, 1)
    return dict(viewmats=look_at(eye), Ks=K, width=hw[1], height=hw[0])


def test_packed_rows_and_whole_tables_hold_the_same():
    cloud = {name: t.requires_grad_() for name, t in some_cloud().items()}
    metas, grads = [], []
    for packed in (True, False):
        image, _, meta = rasterization(**cloud, **some_views(), packed=packed, render_mode="RGB+D")
        meta["means2d"].retain_grad()
        image.square().sum().backward()
        metas.append(meta)
        grads.append({name: t.grad.clone() for name, t in cloud.items()})
        for t in cloud.values():
            t.grad = None
    rows, tables = metas
    assert rows.keys() == tables.keys()
    at = rows["camera_ids"], rows["gaussian_ids"]
    assert (rows["batch_ids"] == 0).all() and tables["gaussian_ids"] is None
    order = rows["camera_ids"] * 60 + rows["gaussian_ids"]
    assert (order.diff() > 0).all()
    for name in ("means2d", "depths", "conics", "opacities", "radii", "tiles_per_gauss"):
        assert torch.equal(rows[name], tables[name][at])
    assert int((tables["radii"] > 0).all(-1).sum()) == len(order)
    assert torch.equal(rows["means2d"].grad, tables["means2d"].grad[at])
    assert float(rows["means2d"].grad.norm()) > 0
    for name in grads[0]:
        torch.testing.assert_close(*(g[name] for g in grads))
    assert rows["n_cameras"] == 2 and rows["tile_width"] == 3 and rows["tile_height"] == 2
    size = rows["width"], rows["height"]
    tiles = tiles_reached(rows["means2d"], rows["radii"], 16, *size)
    assert torch.equal(tiles, rows["tiles_per_gauss"]) and int(tiles.min()) >= 1


def test_nothing_to_see_is_background():
    cloud, views = some_cloud(), some_views()
    back = torch.rand(2, 3)
    for shift in (50.0, None):
        part = {name: t[:0] if shift is None else t for name, t in cloud.items()}
        part["means"] = (part["means"] + (shift or 0.0)).requires_grad_()
        image, alpha, meta = rasterization(**part, **views, backgrounds=back)
        assert torch.equal(image, back[:, None, None].expand(2, 32, 40, 3))
        assert not bool(alpha.any()) and len(meta["gaussian_ids"]) == 0
        image.sum().backward()
        assert float(part["means"].grad.abs().sum()) == 0
    harmonics = {name: t[:0] for name, t in cloud.items()} | dict(colors=torch.zeros(0, 4, 3))
    image, alpha, _ = rasterization(**harmonics, **views, backgrounds=back, sh_degree=1)
    assert torch.equal(image, back[:, None, None].expand(2, 32, 40, 3)) and not bool(alpha.any())


@pytest.mark.parametrize("name", ["means", "quats", "scales", "opacities", "colors"])
def test_what_is_not_finite_is_left_out_counted_and_said(name):
    cloud, views = some_cloud(), some_views()
    bad = torch.zeros(len(cloud["means"]), dtype=torch.bool)
    bad[[3, 7]] = True
    broken = {key: tensor.clone() for key, tensor in cloud.items()}
    broken[name][bad] = math.nan
    degree = 0
    for part in (cloud, broken):
        part["colors"] = part["colors"][:, None, :3]
    inputs = leaves(broken)
    with pytest.warns(UserWarning, match=f"{name}: found 2 Gaussians") as said:
        image, _, meta = rasterization(**inputs, **views, sh_degree=degree)
    assert len(said) == 1 and meta["not_finite"] == 2
    rest = {key: tensor[~bad] for key, tensor in cloud.items()}
    wanted, _, other = rasterization(**rest, **views, sh_degree=degree)
    assert torch.equal(image, wanted) and other["not_finite"] == 0
    image.sum().backward()
    for tensor in inputs.values():
        assert bool(tensor.grad.isfinite().all()) and float(tensor.grad[bad].abs().sum()) == 0


def test_ellipses_too_wide_for_an_integer_reach_every_tile():
    cloud, views = some_cloud(3), some_views(1)
    huge = cloud | dict(means=torch.zeros(3, 3), covars=1e20 * torch.eye(3).repeat(3, 1, 1))
    meta = rasterization(**huge, **views)[2]
    tiles = meta["tile_width"] * meta["tile_height"]
    assert meta["radii"].unique().tolist() == [2**31 - 1]
    assert meta["tiles_per_gauss"].tolist() == [tiles] * len(meta["radii"])


def test_gradients_of_cameras_stay_finite():
    tensors, options = extreme_setting(1333)  # with a background of 1e32
    inputs = leaves(tensors)
    image, alpha, _ = rasterization(**inputs, **options)
    (image.sum() + alpha.sum()).backward()
    assert all(bool(t.grad.isfinite().all()) for t in inputs.values() if t.grad is not None)


def test_the_number_of_threads_changes_no_bit():
    cloud = {name: t.requires_grad_() for name, t in some_cloud(5000).items()}
    cloud["colors"] = torch.rand(5000, 9, requires_grad=True)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            image = rasterization(**cloud, **some_views(1, (64, 90)))[0]
            grads = torch.autograd.grad(image.sin().sum(), cloud.values())
            found.append([image.detach(), *grads])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


# ------------------------------------------------------------------------------- refused

UNSUPPORTED = [
    ("absgrad", True),
    ("sparse_grad", True),
    ("distributed", True),
    ("with_ut", True),
    ("with_eval3d", True),
    ("radial_coeffs", torch.zeros(2, 6)),
    ("tangential_coeffs", torch.zeros(2, 2)),
    ("thin_prism_coeffs", torch.zeros(2, 4)),
    ("ftheta_coeffs", "any"),
    ("rolling_shutter", "ROLLING_TOP_TO_BOTTOM"),
    ("viewmats_rs", torch.eye(4).repeat(2, 1, 1)),
    ("return_normals", True),
    ("global_z_order", False),
    ("rays", torch.zeros(2, 40, 50, 6)),
    ("extra_signals", torch.zeros(60, 2)),
    ("renderer_config", "any"),
]


@pytest.mark.parametrize("name, value", UNSUPPORTED)
def test_what_only_gsplat_does_is_refused_by_name(name, value):
    with pytest.raises(NotImplementedError, match=f"rasterization: {name}: ") as error:
        rasterization(**some_cloud(), **some_views(), **{name: value})
    assert "\n" not in str(error.value)


OLD = """means quats scales opacities colors viewmats Ks width height near_plane far_plane radius_clip eps2d sh_degree
packed tile_size backgrounds render_mode sparse_grad absgrad rasterize_mode channel_chunk distributed camera_model
segmented covars with_ut with_eval3d"""  # of both, in this order
OF_1_5_3 = f"""{OLD} radial_coeffs tangential_coeffs thin_prism_coeffs ftheta_coeffs rolling_shutter viewmats_rs"""
OF_1_6 = f"""{OLD} return_normals global_z_order rays radial_coeffs tangential_coeffs thin_prism_coeffs ftheta_coeffs
lidar_coeffs external_distortion_coeffs rolling_shutter viewmats_rs ut_params extra_signals extra_signals_sh_degree
renderer_config"""  # read from its source, version 1.6.0 of 2026-08-14


def test_arguments_are_those_of_gsplat():
    "All of 1.5.3 in their order; those that 1.6 added by name, with its defaults, change nothing; others are none."
    *own, rest = inspect.signature(rasterization).parameters.values()
    assert [p.name for p in own] == OF_1_5_3.split() and rest.kind is rest.VAR_KEYWORD
    assert set(OF_1_6.split()) - set(OF_1_5_3.split()) == set(LATER)
    given = some_cloud() | some_views()
    plain = rasterization(**given)
    again = rasterization(**given, **LATER, tile_size=None)
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], again[:2]))
    assert plain[2]["tile_size"] == again[2]["tile_size"] == 16
    with pytest.raises(TypeError, match="unexpected keyword argument 'ray'"):
        rasterization(**given, ray=None)


@pytest.mark.parametrize("mode", ["D", "ED"])
def test_depth_alone_needs_no_colours(mode):
    given = some_cloud() | some_views()
    depth, alpha, _ = rasterization(**given, render_mode=mode)
    for degree in (None, 2):
        found = rasterization(**given | dict(colors=None), render_mode=mode, sh_degree=degree)
        assert torch.equal(found[0], depth) and torch.equal(found[1], alpha)
    with pytest.raises(ValueError, match="colors: expected a tensor for RGB[+]D, got None"):
        rasterization(**given | dict(colors=None), render_mode="RGB+D")


WRONG = [
    (dict(camera_model="fisheye"), "camera_model: expected one of"),
    (dict(render_mode="N"), "render_mode: expected one of"),
    (dict(rasterize_mode="smooth"), "rasterize_mode: expected one of"),
    (dict(near_plane=0.0), "near_plane"),
    (dict(far_plane=0.005), "far_plane"),
    (dict(eps2d=-0.1), "eps2d"),
    (dict(width=0), "width"),
    (dict(height=2**15), "height"),
    (dict(means=torch.zeros(59, 3)), r"quats: expected shape \[59, 4\], got \[60, 4\]"),
    (dict(opacities=torch.full((60,), 1.5)), "opacities: expected at most 1, found 1.5"),
    (dict(scales=torch.ones(60, 3).double()), "scales: expected torch.float32"),
    (dict(means=torch.zeros(60, 3).half()), "means: expected torch.float32"),
    (dict(colors=torch.full((60, 3), math.nan)), "colors: expected finite"),
    (dict(quats=torch.zeros(60, 4)), "quats: expected quaternions that are not zero, found 60"),
    (dict(viewmats=torch.full((2, 4, 4), math.nan)), "viewmats: expected finite values"),
    (dict(Ks=torch.full((2, 3, 3), math.nan)), "Ks: expected finite values, found 18"),
    (dict(backgrounds=torch.full((2, 3), math.inf)), "backgrounds: expected finite values"),
    (dict(colors=torch.zeros(60, 0)), "colors: expected at least one channel"),
    (dict(sh_degree=1), "colors: expected shape"),
    (dict(sh_degree=1, colors=torch.zeros(60, 1, 3)), "sh_degree"),
    (dict(sh_degree=5, colors=torch.zeros(60, 36, 3)), "sh_degree"),
    (dict(backgrounds=torch.zeros(2, 4)), "backgrounds: expected shape"),
    (dict(Ks=torch.eye(3).repeat(2, 1, 1).requires_grad_()), "Ks: gradients"),
    (dict(Ks=torch.eye(3).repeat(2, 1, 1) + 1), "Ks: expected no skew"),
    (dict(viewmats=torch.zeros(0, 4, 4), Ks=torch.zeros(0, 3, 3)), "viewmats: expected at least"),
    (dict(quats=None), "quats"),
    (dict(viewmats=torch.eye(4)), "viewmats: expected 3 dimensions"),
    (dict(viewmats=torch.zeros(2, 4, 4)), "viewmats: expected matrices that have an inverse"),
]


@pytest.mark.parametrize("change, message", WRONG, ids=[m for _, m in WRONG])
def test_mistakes_are_one_line(change, message):
    with pytest.raises(ValueError, match="rasterization: .*" + message) as error:
        rasterization(**(some_cloud() | some_views() | change))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------- strategies


def test_relocation_is_the_double_sum_of_the_paper():
    n_max = 51
    binoms = torch.tensor([[float(math.comb(i, j)) for j in range(n_max)] for i in range(n_max)])
    opacity, scale = torch.tensor([0.05, 0.4, 0.95]), torch.rand(3, 3) + 0.1
    ratios = torch.tensor([1, 3, 60])
    part, size = compute_relocation(opacity, scale, ratios, binoms)
    for i, n in enumerate((1, 3, 51)):
        o = 1 - (1 - float(opacity[i])) ** (1 / n)
        total = 0.0
        for a in range(1, n + 1):
            for k in range(a):
                total += math.comb(a - 1, k) * (-1) ** k / math.sqrt(k + 1) * o ** (k + 1)
        assert float(part[i]) == pytest.approx(o, rel=1e-4)
        wanted = scale[i] * float(opacity[i]) / total
        torch.testing.assert_close(size[i], wanted, rtol=1e-3, atol=0)


def parameters(n=80):
    cloud = some_cloud(n)
    return {
        "means": nn.Parameter(cloud["means"]),
        "scales": nn.Parameter(cloud["scales"].log()),
        "quats": nn.Parameter(cloud["quats"]),
        "opacities": nn.Parameter(torch.logit(0.02 + 0.9 * cloud["opacities"])),
        "colors": nn.Parameter(cloud["colors"]),
    }


def fit(strategy, steps, **after):
    "Fit random pictures; returns the number of Gaussians before and after, and the losses."
    torch.manual_seed(0)
    params = parameters()
    rates = dict(means=5e-3, scales=1e-2, quats=1e-2, opacities=5e-2, colors=2e-2)
    optimizers = {name: torch.optim.Adam([p], lr=rates[name]) for name, p in params.items()}
    if hasattr(strategy, "check_sanity"):
        strategy.check_sanity(params, optimizers)
    state = strategy.initialize_state()
    with torch.no_grad():
        target = rasterization(**some_cloud(80, seed=1), **some_views())[0]
    losses = []
    for step in range(steps):
        image, _, info = rasterization(
            params["means"],
            params["quats"],
            params["scales"].exp(),
            params["opacities"].sigmoid(),
            params["colors"],
            packed=after.get("packed", True),
            **some_views(),
        )
        strategy.step_pre_backward(params, optimizers, state, step, info)
        loss = F.l1_loss(image, target)
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        strategy.step_post_backward(params, optimizers, state, step, info, **after)
        losses.append(loss.item())
    assert {len(p) for p in params.values()} == {len(params["means"])}
    return len(params["means"]), losses


def test_density_grows_and_fits():
    plain = fit(Density(start=10**6), 60)
    grown = fit(Density(start=10, stop=50, every=10, grow=1e-5, small=0.05), 60)
    capped = fit(Density(start=10, stop=50, every=10, grow=1e-5, small=0.05, most=90), 60)
    assert plain[0] == 80 < grown[0] and capped[0] <= 90
    for _, losses in (plain, grown):
        assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("packed", [True, False])
def test_the_default_strategy_of_gsplat(packed):
    gsplat = pytest.importorskip("gsplat")
    strategy = gsplat.DefaultStrategy(
        refine_start_iter=10, refine_every=10, refine_stop_iter=50, grow_grad2d=1e-5, verbose=False
    )
    count, losses = fit(strategy, 60, packed=packed)
    assert count > 80 and losses[-1] < 0.7 * losses[0]


def test_the_mcmc_strategy_of_gsplat(monkeypatch):
    gsplat = pytest.importorskip("gsplat")
    from gsplat.cuda._torch_impl import _quat_scale_to_covar_preci
    from gsplat.strategy import ops

    monkeypatch.setattr(ops, "compute_relocation", compute_relocation)
    monkeypatch.setattr(ops, "quat_scale_to_covar_preci", _quat_scale_to_covar_preci)
    strategy = gsplat.MCMCStrategy(
        cap_max=100, refine_start_iter=10, refine_every=10, refine_stop_iter=50, min_opacity=0.1
    )
    count, losses = fit(strategy, 60, lr=1e-4)
    assert 80 < count <= 100 and losses[-1] < 0.8 * losses[0]


if __name__ == "__main__":
    report(*check_extreme(int(sys.argv[1]), int(sys.argv[2])))
