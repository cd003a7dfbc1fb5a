"""The renderer: rules of its semantics, gradients against the float64 reference, ragged batches, repeatability."""

import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import unipre3d
from unipre3d.core import CameraBatch, GaussianBatch, PointBatch
from unipre3d.gaussians import GaussianHead, covariance, evaluate_sh
from unipre3d.geometry.cameras import intrinsics_from_fov, look_at
from unipre3d.render import EPS2D, composite, pixel_alpha, project_gaussians, render

BACKENDS = ["cpu", "dense"]
NAMES = ["mean", "scale", "quat", "opacity", "sh"]


def front_camera(hw=(9, 9), focal=10.0, n=1):
    "A camera at the origin that looks along +z; the optical axis meets the middle of the image."
    K = torch.tensor([[focal, 0, hw[1] / 2], [0, focal, hw[0] / 2], [0, 0, 1.0]])
    return CameraBatch(
        torch.eye(4).repeat(n, 1, 1), K.repeat(n, 1, 1), hw, torch.zeros(n, dtype=torch.long)
    )


def flat(mean, scale, opacity, colour, quat=None):
    "Gaussians of one cloud with plain colours."
    mean, colour = torch.tensor(mean), torch.tensor(colour)
    n = len(mean)
    sh = ((colour - 0.5) / (0.5 / math.sqrt(math.pi)))[:, None]
    return GaussianBatch(
        mean,
        torch.tensor(scale).expand(n, 3).clone(),
        torch.tensor(quat or [1.0, 0, 0, 0]).expand(n, 4).clone(),
        torch.tensor(opacity).expand(n).clone(),
        sh,
        torch.zeros(n, dtype=torch.long),
        1,
    )


def random_scene(
    seed,
    *,
    counts=(40, 25),
    views=(2, 1),
    hw=(37, 45),
    scale=0.1,
    opacity=0.0,
    degree=1,
    stretch=0.5,
):
    g = torch.Generator().manual_seed(seed)
    n, v, k = sum(counts), sum(views), (degree + 1) ** 2
    normal = lambda *shape: torch.randn(*shape, generator=g)
    index = lambda sizes: torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    mean = F.normalize(normal(n, 3), dim=1) * torch.rand(n, 1, generator=g) ** (1 / 3)
    gaussians = GaussianBatch(
        mean,
        scale * torch.exp(stretch * normal(n, 3)),
        normal(n, 4),
        torch.sigmoid(normal(n) + opacity),
        normal(n, k, 3) * torch.tensor([1.0] + [0.3] * (k - 1))[:, None],
        index(counts),
        len(counts),
    )
    eye = 1.75 * F.normalize(normal(v, 3), dim=1)
    return gaussians, CameraBatch(
        look_at(eye), intrinsics_from_fov(49.134, hw).repeat(v, 1, 1), hw, index(views)
    )


def leaves(gaussians, dtype=torch.float32):
    tensors = {k: getattr(gaussians, k).to(dtype).clone().requires_grad_() for k in NAMES}
    return GaussianBatch(**tensors, batch=gaussians.batch, size=gaussians.size), tensors


def clear_pixels(gaussians, cameras, antialiased=False, near=0.01):
    "False where some alpha is so close to 1/255, 0.999 or the last transmittance that rounding decides its side."
    masks = []
    for v, b in enumerate(cameras.batch.tolist()):
        mean, scale, quat, opacity = (
            getattr(gaussians, k)[gaussians.batch == b].double() for k in NAMES[:4]
        )
        uv, cov, z = project_gaussians(
            mean,
            covariance(scale, quat),
            cameras.world_to_cam[v].double(),
            cameras.K[v].double(),
            cameras.hw,
        )
        blurred = cov + EPS2D * torch.eye(2)
        if antialiased:
            opacity = opacity * (cov.det() / blurred.det()).sqrt()
        order = z.argsort()[int((z < near).sum()) :]
        close = lambda x, at, room: ((x / at - 1).abs() < room).any(0)
        raw = pixel_alpha(uv[order], blurred[order], opacity[order], cameras.hw, floor=0, cap=1)
        T = (1 - torch.where(raw >= 1 / 255, raw, 0).clamp(max=0.999)).cumprod(0)
        masks.append(~(close(raw, 1 / 255, 2e-5) | close(raw, 0.999, 2e-5) | close(T, 1e-4, 2e-3)))
    return torch.stack(masks)


def backward_of(gaussians, cameras, background, backend, dtype, clear, seed=0, **kwargs):
    "Images and gradients under a fixed random loss on all three outputs, where `clear`."
    g, tensors = leaves(gaussians, dtype)
    back = background.to(dtype).clone().requires_grad_()
    cameras = CameraBatch(
        cameras.world_to_cam.to(dtype), cameras.K.to(dtype), cameras.hw, cameras.batch
    )
    out = render(g, cameras, back, backend=backend, **kwargs)
    noise = torch.Generator().manual_seed(seed)
    images = out.rgb * clear[:, None], out.alpha * clear, out.depth * clear
    sum(
        (image * torch.randn(image.shape, generator=noise).to(dtype)).sum() for image in images
    ).backward()
    return images, {k: t.grad for k, t in tensors.items()} | {"background": back.grad}


def gap(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


# ------------------------------------------------------------------------------------------------ the rules, one by one


@pytest.mark.parametrize("backend", BACKENDS)
def test_blur_of_a_point(backend):
    "A Gaussian far smaller than a pixel is a Gaussian of variance eps2d."
    alpha = render(
        flat([[0.0, 0, 1]], 1e-7, 0.8, [[1.0, 1, 1]]),
        front_camera(),
        torch.zeros(3),
        backend=backend,
    ).alpha[0]
    d2 = (torch.arange(9)[:, None] - 4.0) ** 2 + (torch.arange(9) - 4.0) ** 2
    want = 0.8 * torch.exp(-d2 / (2 * EPS2D))
    torch.testing.assert_close(alpha, torch.where(want >= 1 / 255, want, 0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_antialiased_scales_opacity(backend):
    gaussian, camera = flat([[0.0, 0, 1]], 0.05, 0.8, [[1.0, 1, 1]]), front_camera()
    classic = render(gaussian, camera, torch.zeros(3), backend=backend).alpha[0, 4, 4]
    smooth = render(gaussian, camera, torch.zeros(3), backend=backend, antialiased=True).alpha[
        0, 4, 4
    ]
    variance = (10 * 0.05) ** 2
    torch.testing.assert_close(classic, torch.tensor(0.8))
    torch.testing.assert_close(smooth, torch.tensor(0.8 * variance / (variance + EPS2D)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_is_capped(backend):
    out = render(
        flat([[0.0, 0, 1]], 1.0, 1.0, [[1.0, 1, 1]]),
        front_camera(),
        torch.zeros(3),
        backend=backend,
    )
    torch.testing.assert_close(out.alpha[0, 4, 4], torch.tensor(0.999))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("opacity, drawn", [(0.999 / 255, 0), (1.001 / 255, 1)])
def test_faint_gaussians_are_skipped(backend, opacity, drawn):
    out = render(
        flat([[0.0, 0, 1]], 1e-3, opacity, [[1.0, 1, 1]]),
        front_camera(),
        torch.zeros(3),
        backend=backend,
    )
    assert int((out.alpha > 0).sum()) == drawn


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pixel_stops_before_the_gaussian_that_would_end_it(backend):
    colours = [[1.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1]]
    out = render(
        flat([[0.0, 0, z] for z in (1, 2, 3)], 5.0, 1.0, colours),
        front_camera((1, 1)),
        torch.tensor([0.0, 0, 1]),
        backend=backend,
    )
    torch.testing.assert_close(
        out.rgb[0, :, 0, 0], torch.tensor([0.999, 0, 0.001]), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(out.depth[0, 0, 0], torch.tensor(1.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_near_and_far(backend):
    gaussians, camera = (
        flat([[0.0, 0, z] for z in (-1, 0.005, 0.5, 2)], 0.1, 0.5, [[1.0, 1, 1]] * 4),
        front_camera(),
    )
    depth = lambda **kw: float(
        render(gaussians, camera, torch.zeros(3), backend=backend, **kw).depth[0, 4, 4]
    )
    assert depth(far=1.0) == pytest.approx(0.5) and depth(near=1.0) == pytest.approx(2.0)
    assert depth() == pytest.approx((0.5 * 0.5 + 0.25 * 2) / 0.75)
    assert (
        float(render(gaussians, camera, torch.zeros(3), backend=backend, near=3.0).alpha.max()) == 0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_colour_is_clamped_at_zero_and_passes_no_gradient(backend):
    gaussians, tensors = leaves(flat([[0.0, 0, 1]], 0.2, 0.5, [[-1.0, 0.25, 2]]))
    out = render(gaussians, front_camera(), torch.zeros(3), backend=backend)
    torch.testing.assert_close(out.rgb[0, :, 4, 4], torch.tensor([0, 0.125, 1.0]))
    out.rgb.sum().backward()
    grad = tensors["sh"].grad[0, 0]
    assert grad[0] == 0 and grad[1] > 0 and grad[2] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_depths_are_drawn_by_index(backend):
    colours = [[1.0, 0, 0], [0.0, 1, 0]]
    for order in ([0, 1], [1, 0]):
        out = render(
            flat([[0.0, 0, 1]] * 2, 0.2, 0.5, [colours[i] for i in order]),
            front_camera(),
            torch.zeros(3),
            backend=backend,
        )
        want = torch.tensor(colours[order[0]]) * 0.5 + torch.tensor(colours[order[1]]) * 0.25
        torch.testing.assert_close(out.rgb[0, :, 4, 4], want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quaternions_are_normalised(backend):
    g, cameras = random_scene(0)
    longer = GaussianBatch(g.mean, g.scale, g.quat * 7, g.opacity, g.sh, g.batch, g.size)
    a, b = (render(x, cameras, torch.zeros(3), backend=backend).rgb for x in (g, longer))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_background_per_view_and_expected_depth(backend):
    back = torch.tensor([[0.2, 0.4, 0.6], [1, 0, 0]])
    out = render(
        flat([[0.0, 0, 1], [0.0, 0, 3]], 0.05, [0.5, 0.5], [[1.0, 1, 1], [0.0, 0, 0]]),
        front_camera(n=2),
        back,
        backend=backend,
    )
    torch.testing.assert_close(out.rgb[:, :, 4, 4], 0.5 + back * 0.25)
    torch.testing.assert_close(out.rgb[:, :, 0, 0], back)
    torch.testing.assert_close(out.depth[:, 4, 4], torch.full((2,), (0.5 * 1 + 0.25 * 3) / 0.75))
    assert float(out.depth[:, 0, 0].abs().max()) == 0


# ---------------------------------------------------------------------------------- values and gradients, random scenes


@pytest.mark.parametrize(
    "seed, options",
    [
        (0, dict()),
        (1, dict(antialiased=True)),
        (2, dict(scale=0.03, degree=3)),
        (3, dict(scale=0.37, degree=2)),
        (4, dict(scale=0.37, opacity=-2.0)),
        (5, dict(scale=0.05, stretch=1.5, antialiased=True)),
        (6, dict(scale=0.37, degree=0, hw=(64, 16))),
        (7, dict(hw=(1, 1), scale=0.3)),
        (8, dict(hw=(130, 7), scale=0.1)),
        (9, dict(counts=(0, 30, 0, 20), views=(1, 2, 1, 3))),
        (10, dict(views=(0, 3))),
        (11, dict(views=(9, 0))),
    ],
)
def test_values_and_gradients_match_the_reference(seed, options):
    options = dict(options)
    antialiased = options.pop("antialiased", False)
    gaussians, cameras = random_scene(seed, **options)
    back = torch.rand(len(cameras), 3, generator=torch.Generator().manual_seed(seed))
    clear = clear_pixels(gaussians, cameras, antialiased)
    assert clear.double().mean() > 0.9
    ours, grads = backward_of(
        gaussians, cameras, back, "cpu", torch.float32, clear, antialiased=antialiased
    )
    true, wanted = backward_of(
        gaussians, cameras, back, "dense", torch.float64, clear, antialiased=antialiased
    )
    for a, b in zip(ours, true):
        assert a.shape == b.shape and gap(a, b) < 2e-6
    for name in wanted:
        assert gap(grads[name], wanted[name]) < 1e-5, (name, gap(grads[name], wanted[name]))


def test_gradients_of_the_reference_match_finite_differences():
    gaussians, cameras = random_scene(
        0, counts=(3,), views=(1,), hw=(4, 5), scale=0.4, opacity=-1.0
    )
    _, tensors = leaves(gaussians, torch.float64)
    camera = CameraBatch(
        cameras.world_to_cam.double(), cameras.K.double(), cameras.hw, cameras.batch
    )

    def images(*args):
        g = GaussianBatch(**dict(zip(NAMES, args[:-1])), batch=gaussians.batch, size=1)
        out = render(g, camera, args[-1], backend="dense")
        return out.rgb, out.alpha, out.depth

    assert torch.autograd.gradcheck(
        images,
        (*tensors.values(), torch.rand(3, dtype=torch.float64, requires_grad=True)),
        eps=1e-7,
        atol=1e-5,
    )


def test_close_and_wide_gaussians_outside_the_frustum():
    "The linearised projection is held inside 1.15 times the image; values and gradients follow."
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(60, 3, generator=g) * torch.tensor([3.0, 3, 1]) + torch.tensor([0.0, 0, 1])
    gaussians, _ = random_scene(0, counts=(60,), scale=0.5)
    gaussians = GaussianBatch(
        mean,
        gaussians.scale,
        gaussians.quat,
        gaussians.opacity * 0.5,
        gaussians.sh,
        gaussians.batch,
        1,
    )
    camera = front_camera((24, 40), 20.0)
    clear = clear_pixels(gaussians, camera, near=0.2)
    assert clear.double().mean() > 0.9
    ours, grads = backward_of(
        gaussians, camera, torch.zeros(3), "cpu", torch.float32, clear, near=0.2
    )
    true, wanted = backward_of(
        gaussians, camera, torch.zeros(3), "dense", torch.float64, clear, near=0.2
    )
    for a, b in zip(ours, true):
        assert gap(a, b) < 2e-6
    for name in wanted:
        assert gap(grads[name], wanted[name]) < 1e-5, name


def room_of_gaussians(n, hw, voxel=0.08, seed=0):
    "Flat Gaussians of about a voxel's size on the six sides of a room of 4 x 5 x 2.5 m, and two cameras inside it."
    g = torch.Generator().manual_seed(seed)
    box = torch.tensor([4.0, 5.0, 2.5])
    mean, axis = torch.rand(n, 3, generator=g) * box, torch.randint(3, (n,), generator=g)
    mean[torch.arange(n), axis] = (torch.rand(n, generator=g) < 0.5) * box[axis]
    scale = voxel * torch.exp(0.3 * torch.randn(n, 3, generator=g))
    scale[torch.arange(n), axis] *= 0.1
    gaussians = GaussianBatch(
        mean,
        scale,
        torch.tensor([1.0, 0, 0, 0]).repeat(n, 1) + 0.05 * torch.randn(n, 4, generator=g),
        torch.sigmoid(torch.randn(n, generator=g)),
        torch.randn(n, 4, 3, generator=g) * torch.tensor([1.0, 0.2, 0.2, 0.2])[:, None],
        torch.zeros(n, dtype=torch.long),
        1,
    )
    eye = torch.tensor([[1.0, 1.0, 1.5], [3.0, 4.0, 1.2]])
    return gaussians, CameraBatch(
        look_at(eye, torch.tensor([[3.5, 4.0, 0.8], [0.5, 0.5, 1.0]])),
        intrinsics_from_fov(60, hw).repeat(2, 1, 1),
        hw,
        torch.zeros(2, dtype=torch.long),
    )


def test_a_room_of_twenty_thousand_gaussians():
    "Scene scale: a camera among the Gaussians, 4:3 images, near and far; against the float64 reference."
    gaussians, cameras = room_of_gaussians(20_000, (12, 16))
    clear = clear_pixels(gaussians, cameras, near=0.1)
    assert clear.double().mean() > 0.5
    ours, grads = backward_of(
        gaussians, cameras, torch.ones(3), "cpu", torch.float32, clear, near=0.1, far=4.5
    )
    true, wanted = backward_of(
        gaussians, cameras, torch.ones(3), "dense", torch.float64, clear, near=0.1, far=4.5
    )
    for a, b in zip(ours, true):
        assert gap(a, b) < 1e-5
    for name in wanted:
        assert gap(grads[name], wanted[name]) < 1e-4, (name, gap(grads[name], wanted[name]))


def test_each_output_alone_passes_its_gradient():
    gaussians, cameras = random_scene(3)
    for field in ("rgb", "alpha", "depth"):
        grads = []
        for backend in BACKENDS:
            g, tensors = leaves(gaussians)
            getattr(
                render(g, cameras, torch.zeros(3), backend=backend), field
            ).square().sum().backward()
            grads.append(
                [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors.values()]
            )
        for a, b in zip(*grads):
            assert gap(a, b) < 1e-4


def test_only_what_is_asked_for_needs_gradients():
    gaussians, cameras = random_scene(0)
    assert not render(gaussians, cameras, torch.zeros(3)).rgb.requires_grad
    back = torch.zeros(3, requires_grad=True)
    render(gaussians, cameras, back).rgb.sum().backward()
    assert back.grad.shape == (3,) and float(back.grad.min()) > 0


# ---------------------------------------------------------------------------------------------- batches and hard inputs


def test_a_batch_is_its_clouds_one_by_one():
    gaussians, cameras = random_scene(0, counts=(30, 0, 50), views=(2, 1, 3))
    whole = render(gaussians, cameras, torch.ones(3))
    for b in range(3):
        pick, mine = cameras.batch == b, gaussians.batch == b
        one = GaussianBatch(
            *(getattr(gaussians, k)[mine] for k in NAMES),
            torch.zeros(int(mine.sum()), dtype=torch.long),
            1,
        )
        camera = CameraBatch(
            cameras.world_to_cam[pick],
            cameras.K[pick],
            cameras.hw,
            torch.zeros(int(pick.sum()), dtype=torch.long),
        )
        assert torch.equal(render(one, camera, torch.ones(3)).rgb, whole.rgb[pick])
    assert torch.equal(whole.rgb[2], torch.ones_like(whole.rgb[2]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_shows_the_background(backend):
    gaussians, cameras = random_scene(0, counts=(0, 0), views=(1, 2))
    g, tensors = leaves(gaussians)
    back = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    out = render(g, cameras, back, backend=backend)
    assert (
        torch.equal(out.rgb, back.detach()[None, :, None, None].expand_as(out.rgb))
        and not out.alpha.any()
        and not out.depth.any()
    )
    out.rgb.sum().backward()
    torch.testing.assert_close(back.grad, torch.full((3,), 3.0 * 37 * 45))


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_behind_the_camera(backend):
    out = render(
        flat([[0.0, 0, -1], [1.0, 0, -3]], 0.5, 0.9, [[1.0, 1, 1]] * 2),
        front_camera(),
        torch.zeros(3),
        backend=backend,
    )
    assert float(out.rgb.abs().max()) == float(out.alpha.abs().max()) == 0


def test_no_views():
    gaussians, cameras = random_scene(0)
    none = CameraBatch(cameras.world_to_cam[:0], cameras.K[:0], cameras.hw, cameras.batch[:0])
    assert render(gaussians, none, torch.zeros(3)).rgb.shape == (0, 3, 37, 45)


@pytest.mark.parametrize(
    "name", [f"gaussians.{k}" for k in NAMES] + ["cameras.K", "cameras.world_to_cam", "background"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(name, value):
    gaussians, cameras = random_scene(0)
    back = torch.zeros(3)
    target = (
        back
        if name == "background"
        else getattr(
            {"gaussians": gaussians, "cameras": cameras}[name.split(".")[0]], name.split(".")[1]
        )
    )
    target.view(-1)[1] = value
    with pytest.raises(ValueError, match=f"render: {re.escape(name)}: .*finite.*found 1") as error:
        render(gaussians, cameras, back)
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_refused_in_one_line():
    gaussians, cameras = random_scene(0)
    double, _ = leaves(gaussians, torch.float64)
    zero = GaussianBatch(
        gaussians.mean,
        gaussians.scale,
        gaussians.quat * 0,
        gaussians.opacity,
        gaussians.sh,
        gaussians.batch,
        gaussians.size,
    )
    bright = GaussianBatch(
        gaussians.mean,
        gaussians.scale,
        gaussians.quat,
        gaussians.opacity + 1,
        gaussians.sh,
        gaussians.batch,
        gaussians.size,
    )
    stray = CameraBatch(cameras.world_to_cam, cameras.K, cameras.hw, cameras.batch + 5)
    skewed = CameraBatch(
        cameras.world_to_cam,
        cameras.K + torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 0]]),
        cameras.hw,
        cameras.batch,
    )
    moving = CameraBatch(
        cameras.world_to_cam.clone().requires_grad_(), cameras.K, cameras.hw, cameras.batch
    )
    black = torch.zeros(3)
    for args, kwargs, text in [
        ((gaussians, cameras, torch.zeros(2, 3)), {}, "background: expected shape"),
        (
            (gaussians, cameras.derive(world_to_cam=0 * cameras.world_to_cam), black),
            {},
            "world_to_cam: expected poses that have an inverse",
        ),
        ((gaussians, cameras, torch.zeros(4)), {}, "background"),
        ((double, cameras, black), {}, "float32"),
        ((zero, cameras, black), {}, "quat"),
        ((bright, cameras, black), {}, "opacity"),
        ((gaussians, stray, black), {}, "cameras.batch"),
        ((gaussians, skewed, black), {}, "skew"),
        ((gaussians, moving, black), {}, "detach"),
        ((gaussians, cameras, black), dict(backend="metal"), "backend"),
        ((gaussians, cameras, black), dict(near=0.0), "near"),
        ((gaussians, cameras, black), dict(backend="gsplat"), "CUDA"),
        ((gaussians, cameras, black.to("meta")), {}, "device"),
    ]:
        with pytest.raises(ValueError, match=text) as error:
            render(*args, **kwargs)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ repeatability and machinery


def bits(gaussians, cameras, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        images, grads = backward_of(
            gaussians,
            cameras,
            torch.full((3,), 0.3),
            "cpu",
            torch.float32,
            torch.ones(len(cameras), *cameras.hw),
        )
    finally:
        torch.set_num_threads(before)
    return [*images, *grads.values()]


@pytest.mark.parametrize("views", [(1, 0), (2, 1), (5, 6)])
def test_bitwise_the_same_for_any_number_of_threads_and_run(views):
    gaussians, cameras = random_scene(0, counts=(1500, 300), views=views, hw=(48, 75))
    first = bits(gaussians, cameras, 1)
    for threads in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, bits(gaussians, cameras, threads)))


def child(queue, gaussians, cameras):
    torch.set_num_threads(1)
    queue.put(float(render(gaussians, cameras, torch.zeros(3)).rgb.double().sum()))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_works_in_a_forked_child():
    gaussians, cameras = random_scene(0)
    want = float(render(gaussians, cameras, torch.zeros(3)).rgb.double().sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, gaussians, cameras))
    process.start()
    assert queue.get(timeout=60) == want
    process.join()


def waits(monkeypatch, call):
    "How often a call reads values of tensors; on a GPU the processor waits each time."
    found = []

    def watch(name, method):
        def read(self, *args, **options):
            found.append(name)
            return method(self, *args, **options)

        return read

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, watch(name, getattr(torch.Tensor, name)))
        call()
    return found


def test_a_step_reads_no_value_and_the_checks_read_once(monkeypatch):
    gaussians, cameras = random_scene(0)
    g, _ = leaves(gaussians)
    black = torch.zeros(3)
    points = PointBatch(g.mean.detach(), torch.rand(len(g), 8), g.batch, g.size)
    head = GaussianHead(8)

    def step():
        render(head(points), cameras, black, check=False).rgb.square().sum().backward()

    assert waits(monkeypatch, step) == []
    assert waits(monkeypatch, lambda: render(g, cameras, black)) == ["tolist"]


def test_an_error_in_a_thread_reaches_the_caller():
    from unipre3d.render import in_threads

    def task(i):
        if i == 3:
            raise RuntimeError("job 3")

    with pytest.raises(RuntimeError, match="job 3"):
        in_threads(task, [(i,) for i in range(8)])


@pytest.mark.parametrize("threads", (1, 2))
def test_a_stop_ends_what_has_not_begun(threads):
    import _thread

    from unipre3d.render import in_threads

    begun, before, own = [], torch.get_num_threads(), threading.active_count()

    def task(i):
        begun.append(i)
        time.sleep(0.01)
        if i == 4:
            _thread.interrupt_main()

    torch.set_num_threads(threads)
    try:
        with pytest.raises(KeyboardInterrupt):
            in_threads(task, [(i,) for i in range(300)])
            time.sleep(1)
    finally:
        torch.set_num_threads(before)
    assert len(begun) < 200 and threading.active_count() == own


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names registers of x86")
def test_the_inner_loops_are_vector_code():
    import llvmlite.binding as llvm

    if not llvm.get_host_cpu_features().get("avx", False):
        pytest.skip("this processor has no 256-bit vectors")
    import numba
    from unipre3d.kernels import splat

    array, whole = numba.float32[::1], numba.int64
    head = array, whole, whole, array, array, whole
    rules = dict(error_model="numpy", fastmath={"contract"})

    @numba.njit((*head, *(numba.float32,) * 6), **rules)
    def forward(buf, at, bands, C, terms, rows, e, k1, r, g, b, z):
        splat.blend_capped(buf, at, bands, C, terms, rows, e, k1, r, g, b, z)

    @numba.njit((*head, *(numba.float32,) * 9, array, whole), **rules)
    def backward(buf, at, bands, C, terms, rows, e, f, h, k1, k2, r, g, b, z, sums, own):
        splat.deep_backward_capped(
            buf, at, bands, C, terms, rows, e, f, h, k1, k2, r, g, b, z, sums, own
        )

    for function in (forward, backward):
        blocks = re.split(r"\n(?=\.LBB)", next(iter(function.inspect_asm().values())))
        loop = max(blocks, key=lambda block: len(re.findall(r"vpslld", block)))  # where 2^x is
        wide, single = (
            len(re.findall(r"[yz]mm\d", loop)),
            len(re.findall(r"\bv(?:mul|add|sub|fn?madd\d+)ss\b", loop)),
        )
        assert "vpslld" in loop and wide > 40 and single == 0


def test_two_to_the_power_is_exact_to_float32():
    import numba
    import numpy as np
    from unipre3d.kernels import splat

    table = splat.table()

    @numba.njit(**splat.RULES)
    def powers(exponents, C, out):
        for at in range(0, len(out), splat.LANES):
            splat.store(out, at, splat.exp2(splat.load(exponents, at), C))

    exponents = np.linspace(-125, 127, 2**16, dtype=np.float32)
    found = np.empty_like(exponents)
    powers(exponents, table, found)
    wanted = np.exp2(exponents.astype(np.float64))
    assert np.abs(found / wanted - 1).max() < 1.6e-7


# --------------------------------------------------------------------------------------------- an independent reference


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_against_gsplat_written_in_torch(degree):
    "Projection and harmonics of gsplat's own CPU reference; the blending of its 2-D Gaussians is ours."
    pytest.importorskip("gsplat")
    impl = pytest.importorskip("gsplat.cuda._torch_impl")
    gaussians, cameras = random_scene(degree, counts=(50,), views=(3,), degree=degree, scale=0.1)
    g = GaussianBatch(*(getattr(gaussians, k).double() for k in NAMES), gaussians.batch, 1)
    cov, _ = impl._quat_scale_to_covar_preci(g.quat, g.scale, compute_preci=False)
    torch.testing.assert_close(cov, covariance(g.scale, g.quat))
    (h, w), poses, K = cameras.hw, cameras.world_to_cam.double(), cameras.K.double()
    radii, uv, depth, conic, ratio = impl._fully_fused_projection(
        g.mean, cov, poses, K, w, h, eps2d=EPS2D, calc_compensations=True
    )
    colour = (
        impl._spherical_harmonics(
            degree, g.mean - cameras.center.double()[:, None], g.sh.expand(3, -1, -1, -1)
        )
        + 0.5
    ).clamp(min=0)
    smooth, plain = (
        render(gaussians, cameras, torch.zeros(3), antialiased=a) for a in (True, False)
    )
    for v in range(3):
        ours = project_gaussians(g.mean, cov, poses[v], K[v], (h, w))
        torch.testing.assert_close(ours[0], uv[v])
        torch.testing.assert_close(ours[2], depth[v])
        torch.testing.assert_close(
            colour[v], evaluate_sh(g.sh, g.mean - cameras.center[v].double())
        )
        blurred = torch.linalg.inv(
            torch.stack(
                [conic[v, :, 0], conic[v, :, 1], conic[v, :, 1], conic[v, :, 2]], -1
            ).unflatten(-1, (2, 2))
        )
        order = depth[v].argsort(stable=True)
        for opacity, got in ((g.opacity, plain), (g.opacity * ratio[v], smooth)):
            weight, T = composite(pixel_alpha(uv[v][order], blurred[order], opacity[order], (h, w)))
            assert gap(got.rgb[v], torch.einsum("nhw,nc->chw", weight, colour[v][order])) < 1e-5
            assert gap(got.alpha[v], 1 - T) < 1e-5


# ------------------------------------------------------------------------------------------------ the benchmark scripts

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def script(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gpu_script_accepts_what_agrees_and_nothing_else(monkeypatch):
    "Its checks, with the CPU renderer in the place of the GPU's."
    gpu = script("gpu", monkeypatch)
    rows = gpu.check_scenes("cpu", "cpu")
    assert len(rows) == 2 * len(gpu.SCENES) and all(row["passed"] for row in rows)
    gaussians, cameras = gpu.objects(0.1, counts=(60,), views=(2,), hw=(20, 20))
    same = gpu.outputs(gaussians, cameras, backend="cpu")
    assert not gpu.compare(gpu.outputs(gaussians, cameras, backend="cpu", antialiased=True), same)[
        "passed"
    ]
    broken = same[0], {**same[1], "quat": same[1]["quat"] * math.nan}
    assert not gpu.compare(broken, same)["passed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_the_gpu_script_ends_with_one_line_without_a_gpu():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stdout == ""
        and len(done.stderr.strip().splitlines()) == 1
        and "CUDA" in done.stderr
    )


def test_the_gpu_script_runs_in_small_on_a_processor(tmp_path):
    path = tmp_path / "gpu.json"
    few = ["--repeats", "2", "--cpu-repeats", "1", "--steps", "4"]  # what is timed is not compared
    words = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run", "--json", str(path), *few]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    record = json.loads(path.read_text())
    assert record["passed"] and record["left_out"] == []
    assert record["attention"]["gradient"] < 1e-5 and record["sparse"]["voxels"] > 1000
    for recipe in ("object-transformer-mini", "scene-sparseunet-mini"):
        for precision in ("no", "bf16"):
            row = record[f"steps {recipe} {precision}"]
            assert row["step_ms"] > 0 and row["loading_ms"] > 0


def test_a_part_of_the_gpu_script_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    bench = script("gpu", monkeypatch)
    path = tmp_path / "gpu.json"
    work = [("broken", lambda: bench.relative(None, None)), ("fine", lambda: {"passed": True})]
    monkeypatch.setattr(bench, "parts", lambda *_: work)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--json", str(path)])
    with pytest.raises(SystemExit) as end:
        bench.main()
    record = json.loads(path.read_text())
    assert end.value.code == 1 and not record["passed"] and record["fine"]["passed"]
    assert record["broken"]["error"].startswith("AttributeError")


def test_kernels_compile_in_memory_where_no_folder_can_be_written(tmp_path):
    "Files stand where numba would make its folders, which stops also a user who may write anywhere."
    source = Path(unipre3d.__file__).parent
    ours = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, tmp_path / "unipre3d", ignore=ours)
    (tmp_path / "unipre3d" / "kernels" / "__pycache__").write_text("no folder")
    code = """
from unipre3d.kernels import conv, points, scan, splat
print(splat.__file__, len(splat.aligned(3)))
"""
    env = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "HOME": os.devnull,
        "XDG_CACHE_HOME": os.devnull,
    }
    env["NUMBA_CACHE_DIR"] = str(Path(os.devnull) / "numba")
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(tmp_path / "unipre3d/kernels/splat.py"), "3"], done.stderr
    assert done.stderr.count("no folder for compiled functions can be written") == 1


def test_the_torch_renderer_of_the_benchmark_agrees(monkeypatch):
    bench = script("render", monkeypatch)
    gaussians, cameras = bench.objects(0.1, counts=(200,), views=(2,), hw=(40, 56))
    assert all(gap < 1e-4 for gap in bench.torch_distance(gaussians, cameras).values())


BOTH = """means quats scales opacities colors viewmats Ks width height near_plane far_plane radius_clip eps2d sh_degree
packed tile_size backgrounds render_mode sparse_grad absgrad rasterize_mode channel_chunk distributed camera_model
segmented covars with_ut with_eval3d""".split()  # arguments of gsplat 1.5.3 and of 1.6.0, in this order


def test_gsplat_is_called_by_names_that_both_versions_have():
    import ast
    import inspect

    from unipre3d import render as module

    tree = ast.parse(inspect.getsource(module.render_gsplat))
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "rasterization"
    ]
    named = [word.arg for word in call.keywords]
    assert len(call.args) == BOTH.index("near_plane") and set(named) <= set(BOTH)
    assert not set(named) & set(BOTH[: len(call.args)])


# gsplat's padding is ours: its arguments are checked with a stand-in that draws with the reference


def test_the_batch_that_gsplat_gets(monkeypatch):
    "Clouds and views padded to a rectangle, drawn by a stand-in for gsplat, give what the CPU renderer gives."
    from unipre3d import render as module

    def rasterization(
        means,
        quats,
        scales,
        opacities,
        colors,
        viewmats,
        Ks,
        width,
        height,
        *,
        near_plane,
        far_plane,
        eps2d,
        sh_degree,
        packed,
        render_mode,
        backgrounds,
        rasterize_mode,
    ):
        (B, N), C = means.shape[:2], viewmats.shape[1]
        assert (
            quats.shape == (B, N, 4)
            and scales.shape == (B, N, 3)
            and opacities.shape == (B, N)
            and Ks.shape == (B, C, 3, 3)
        )
        assert colors.shape == (B, N, (sh_degree + 1) ** 2, 3) and backgrounds.shape == (B, C, 3)
        assert (
            eps2d == EPS2D
            and not packed
            and render_mode == "RGB+ED"
            and rasterize_mode == "antialiased"
        )
        assert (
            bool((quats.norm(dim=-1) > 0).all())
            and bool((scales > 0).all())
            and bool((torch.linalg.det(viewmats) > 0.9).all())
        )
        flat = lambda x: x.flatten(0, 1)
        g = GaussianBatch(
            flat(means),
            flat(scales),
            flat(quats),
            flat(opacities),
            flat(colors),
            torch.arange(B).repeat_interleave(N),
            B,
        )
        cameras = CameraBatch(
            flat(viewmats), flat(Ks), (height, width), torch.arange(B).repeat_interleave(C)
        )
        out = module.render_dense(
            g, cameras, flat(backgrounds), antialiased=True, near=near_plane, far=far_plane
        )
        colour = torch.cat([out.rgb.permute(0, 2, 3, 1), out.depth[..., None]], -1)
        return colour.unflatten(0, (B, C)), out.alpha[..., None].unflatten(0, (B, C)), {}

    fake = types.ModuleType("gsplat")
    fake.rasterization = rasterization
    kernels = types.ModuleType("gsplat.cuda._backend")
    for name, value in (
        ("gsplat", fake),
        ("gsplat.cuda", types.ModuleType("gsplat.cuda")),
        ("gsplat.cuda._backend", kernels),
    ):
        monkeypatch.setitem(sys.modules, name, value)
    kernels._C = None
    with pytest.raises(ImportError, match="expected a CUDA toolkit with nvcc"):
        module.render_gsplat(
            *random_scene(0), torch.zeros(1, 3), antialiased=True, near=0.5, far=2.5
        )
    kernels._C = object()
    gaussians, cameras = random_scene(0, counts=(20, 0, 35), views=(1, 2, 3), degree=2)
    back, results = torch.rand(6, 3), []
    for draw in (module.render_gsplat, module.render_cpu):
        g, tensors = leaves(gaussians)
        b = back.clone().requires_grad_()
        out = draw(g, cameras, b, antialiased=True, near=0.5, far=2.5)
        (out.rgb.square().sum() + out.alpha.square().sum() + out.depth.square().sum()).backward()
        results.append([out.rgb, out.alpha, out.depth, *(t.grad for t in tensors.values()), b.grad])
    for a, b in zip(*results):
        assert a.shape == b.shape and gap(a, b) < 1e-4
