"""Fuzzing of the CPU renderer: extreme scenes with every index checked, beside the float64 reference.

The default run checks DEFAULT_SCENES scenes. The long run, for a change of the kernels, is one of

    UNIPRE3D_FUZZ=10000 python -m pytest tests/test_render_fuzz.py
    NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=/tmp/checked python tests/test_render_fuzz.py 0 10000  # seed, scenes

A scene is a function of its seed. A failure names the seed; `check_scene(seed)` repeats it. Checked kernels
need a cache folder of their own: numba does not see that others were compiled without checks.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dice import Dice, report, with_checked_indices

from unipre3d.core import CameraBatch, GaussianBatch
from unipre3d.gaussians import GaussianHead, select_cloud
from unipre3d.geometry.cameras import intrinsics_from_fov, look_at
from unipre3d.render import footprints, render, render_cpu, render_dense

NAMES = ["mean", "scale", "quat", "opacity", "sh"]
DEFAULT_SCENES = 100


# ---------------------------------------------------------------------------------------------------- the scenes


def random_cameras(dice, clouds):
    "One to three views, of ordinary and of absurd focal lengths."
    hw = (
        (dice.whole(1, 40), dice.whole(1, 40))
        if dice.chance(0.9)
        else (dice.pick(1, 63, 64, 65, 131), dice.pick(1, 7, 8, 9, 70))
    )
    batch = torch.tensor(sorted(dice.whole(0, clouds - 1) for _ in range(dice.whole(1, 3))))
    eye = dice.pick(1.75, 1.75, 0.3, 30.0) * F.normalize(dice.normal(len(batch), 3), dim=1)
    K = intrinsics_from_fov(49.134, hw).repeat(len(batch), 1, 1)
    if dice.chance(0.3):
        K[:, [0, 1], [0, 1]] *= 10 ** dice.between(-8, 8, len(batch), 2)
    if dice.chance(0.2):
        K[:, :2, 2] += 10 ** dice.between(0, 6, len(batch), 2) * dice.normal(len(batch), 2)
    return CameraBatch(look_at(eye), K, hw, batch)


def random_gaussians(dice, clouds, cameras):
    "A few dozen Gaussians: plain ones, and by chance some that are extreme in one way or another."
    batch = torch.tensor(
        sorted(dice.whole(0, clouds - 1) for _ in range(dice.whole(0, 40))), dtype=torch.long
    )
    n, k = len(batch), dice.pick(1, 4, 9, 16)
    mean = 0.5 * dice.normal(n, 3)
    scale = 0.1 * torch.exp(0.5 * dice.normal(n, 3))
    quat = dice.normal(n, 4)
    opacity = torch.sigmoid(dice.normal(n))
    sh = dice.normal(n, k, 3)
    if dice.chance(0.4):
        wild = dice.some(n, 0.3)
        scale[wild] = torch.exp(dice.between(-20, 20, n, 3))[wild]
    if dice.chance(0.3):
        long = dice.some(n, 0.2)
        scale[long, dice.whole(0, 2)] = math.exp(dice.between(0, 20, 1).item())
    if dice.chance(0.1):
        scale[dice.some(n, 0.1)] = dice.pick(1e-45, 1e-30, 1e15, 1e30, 3e38)
    if dice.chance(0.2):
        near = dice.some(n, 0.3)
        pose = cameras.world_to_cam[0]
        local = torch.cat([0.01 * dice.normal(n, 2), 0.01 + 1e-3 * dice.normal(n, 1)], 1)
        mean[near] = ((local - pose[:3, 3]) @ pose[:3, :3])[near]
    if dice.chance(0.2):
        mean[dice.some(n, 0.2)] *= 10 ** dice.between(0, 37, 1)
    if dice.chance(0.2):
        quat[dice.some(n, 0.2)] *= dice.pick(0.0, 1e-45, 1e-20, 1e-12, 1e-6, 1e18, 1e37)
    if dice.chance(0.2):
        opacity[dice.some(n, 0.3)] = dice.pick(0.0, 1.0, 1.01 / 255)
    if dice.chance(0.15):
        sh[dice.some(n, 0.2)] *= dice.pick(1e6, 1e20, 1e30, 1e38)
    return GaussianBatch(mean, scale, quat, opacity, sh.clamp(-3e38, 3e38), batch, clouds)


def scene(seed):
    dice = Dice(seed)
    clouds = dice.whole(1, 3)
    cameras = random_cameras(dice, clouds)
    return (
        dice,
        random_gaussians(dice, clouds, cameras),
        cameras,
        dict(antialiased=dice.chance(0.5), near=0.01, far=dice.pick(1e10, 1e10, 3.0)),
    )


def poisoned(dice, gaussians):
    "The same Gaussians, some of them with a value that is not a number of use, and which."
    bad = dice.some(len(gaussians), 0.3)
    name = dice.pick(*NAMES)
    tensor = getattr(gaussians, name).clone()
    rows = tensor[bad].flatten(1) if tensor.dim() > 1 else tensor[bad, None]
    if name == "quat" and dice.chance(0.3):
        rows[:] = 0.0
    elif rows.numel():
        rows[:, dice.whole(0, rows.shape[1] - 1)] = dice.pick(math.nan, math.inf, -math.inf)
    tensor[bad] = rows.reshape(tensor[bad].shape)
    return replace(gaussians, **{name: tensor}), bad


# ---------------------------------------------------------------------------------------------------- the checks


def outputs(draw, gaussians, cameras, *, dtype=torch.float32, **options):
    "Images, and gradients of a fixed random loss on all of them."
    leaves = {k: getattr(gaussians, k).to(dtype).clone().requires_grad_() for k in NAMES}
    leaves["background"] = torch.full((len(cameras), 3), 0.3, dtype=dtype, requires_grad=True)
    views = CameraBatch(
        cameras.world_to_cam.to(dtype), cameras.K.to(dtype), cameras.hw, cameras.batch
    )
    tensors = {k: leaves[k] for k in NAMES}
    out = draw(
        GaussianBatch(**tensors, batch=gaussians.batch, size=gaussians.size),
        views,
        leaves["background"],
        **options,
    )
    noise = torch.Generator().manual_seed(0)
    images = {"rgb": out.rgb, "alpha": out.alpha, "depth": out.depth}
    sum(
        (image * torch.randn(image.shape, generator=noise).to(dtype)).sum()
        for image in images.values()
    ).backward()
    grads = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}
    return {k: v.detach() for k, v in images.items()}, grads


def comparable(gaussians, cameras):
    """May float32 be compared with float64?

    Not where a centre lies so far outside that the rounding of an ellipse's slope moves its far end."""
    for v, b in enumerate(cameras.batch.tolist()):
        own = select_cloud(gaussians, b)
        exact = own.derive(**{k: getattr(own, k).double() for k in NAMES})
        pose, K = cameras.world_to_cam[v].double(), cameras.K[v].double()
        uv, _, _, z = footprints(exact, pose, K, cameras.hw)
        if bool((uv[z > 0].abs() > 1e3).any()):
            return False
    return True


def check_scene(seed):
    "One scene; returns whether its images were finite and whether they were compared with the reference."
    dice, gaussians, cameras, options = scene(seed)
    if dice.chance(0.2) and len(gaussians):
        bad_gaussians, bad = poisoned(dice, gaussians)
        good = GaussianBatch(
            *(getattr(gaussians, k)[~bad] for k in NAMES), gaussians.batch[~bad], gaussians.size
        )
        images, grads = outputs(render_cpu, bad_gaussians, cameras, **options)
        wanted, wanted_grads = outputs(render_cpu, good, cameras, **options)
        for name in images:
            assert torch.equal(images[name], wanted[name]), (
                f"seed {seed}: what is not finite shows in {name}"
            )
        for name in NAMES:
            assert not bool(grads[name][bad].any()), (
                f"seed {seed}: what is not finite has a gradient of {name}"
            )
            same = torch.equal(grads[name][~bad], wanted_grads[name])
            assert same, f"seed {seed}: what is not finite moves the gradient of {name} of others"
        gaussians = good
    images, grads = outputs(render_cpu, gaussians, cameras, **options)
    finite = all(bool(image.isfinite().all()) for image in images.values())
    if not finite:
        return False, False
    for name, grad in grads.items():
        assert bool(grad.isfinite().all()), (
            f"seed {seed}: the images are finite, the gradient of {name} is not"
        )
    true, true_grads = outputs(render_dense, gaussians, cameras, dtype=torch.float64, **options)
    for name, grad in true_grads.items():
        assert bool(grad.isfinite().all()), (
            f"seed {seed}: the reference's gradient of {name} is not finite"
        )
    if not comparable(gaussians, cameras):
        return True, False
    # an alpha beside 1/255 may be on the other side of it: that much light, and all of a depth where there is no other
    images["depth"], true["depth"] = (
        images["depth"] * images["alpha"],
        true["depth"] * true["alpha"],
    )
    for name, image in images.items():
        gap = (image.double() - true[name]).abs() / (1 + true[name].abs().max())
        most, mean = float(gap.max()), float(gap.mean())
        assert most < 0.01 and mean < 1e-3, (
            f"seed {seed}: {name} is {most:.1e} off at most, {mean:.1e} in the mean"
        )
    return True, True


def check_scenes(first, count):
    "Check this many scenes; returns a summary, and what was wrong with any."
    torch.set_num_threads(1)
    results, wrong = [], []
    for seed in range(first, first + count):
        try:
            results.append(check_scene(seed))
        except AssertionError as error:
            wrong.append(str(error).splitlines()[0])
    finite, compared = sum(r[0] for r in results), sum(r[1] for r in results)
    summary = f"{count} scenes from seed {first}: {finite} with finite images, {compared} compared with the reference"
    return f"{summary}, {len(wrong)} wrong", wrong


def test_random_and_extreme_scenes(request):
    with_checked_indices(__file__, int(os.environ.get("UNIPRE3D_FUZZ", DEFAULT_SCENES)), request)


def needle_scene(antialiased):
    "49 plain Gaussians and one that is e^16 long, seen by two cameras."
    dice = Dice(7)
    scale = 0.1 * torch.exp(0.3 * dice.normal(50, 3))
    scale[20] = torch.tensor([0.05, 0.05, math.exp(16)])
    gaussians = GaussianBatch(
        0.4 * dice.normal(50, 3),
        scale,
        dice.normal(50, 4),
        torch.sigmoid(dice.normal(50)),
        0.5 * dice.normal(50, 4, 3),
        torch.zeros(50, dtype=torch.long),
        1,
    )
    hw = (33, 43)
    pose = look_at(1.75 * F.normalize(dice.normal(2, 3), dim=1))
    K = intrinsics_from_fov(49.134, hw).repeat(2, 1, 1)
    cameras = CameraBatch(pose, K, hw, torch.zeros(2, dtype=torch.long))
    return gaussians, cameras, dict(antialiased=antialiased, near=0.01, far=1e10)


@pytest.mark.parametrize("antialiased", [False, True])
def test_a_needle_among_plain_gaussians_renders_like_the_reference(antialiased):
    gaussians, cameras, options = needle_scene(antialiased)
    ours, grads = outputs(render, gaussians, cameras, backend="cpu", **options)
    true, wanted = outputs(
        render, gaussians, cameras, backend="dense", dtype=torch.float64, **options
    )
    for name in ours:
        torch.testing.assert_close(ours[name].double(), true[name], rtol=1e-4, atol=1e-5)
    for name in NAMES:
        gap = (grads[name] - wanted[name]).norm() / wanted[name].norm()
        assert float(gap) < 1e-4, (name, float(gap))
        gap = (grads[name][20] - wanted[name][20]).norm() / wanted[name][20].norm()
        assert float(gap) < 1e-3, (name, float(gap))


def test_a_needle_of_any_length_is_drawn():
    "An ellipse longer than the image does not change any more when it grows."
    gaussians, cameras, options = needle_scene(False)
    images = []
    for power in (12, 16, 20):
        gaussians.scale[20, 2] = math.exp(power)
        images.append(render(gaussians, cameras, torch.zeros(3), **options).rgb)
    for image in images[1:]:
        torch.testing.assert_close(image, images[0], rtol=1e-3, atol=1e-4)


USELESS = [
    ("mean", math.nan),
    ("scale", math.inf),
    ("quat", math.nan),
    ("quat", 0.0),
    ("opacity", math.nan),
    ("sh", math.inf),
    ("sh", 1e30),
]


@pytest.mark.parametrize("name, value", USELESS)
@pytest.mark.parametrize("draw", [render_cpu, render_dense])
def test_what_is_not_finite_is_left_out(draw, name, value):
    gaussians, cameras, options = needle_scene(True)
    bad = torch.zeros(50, dtype=torch.bool)
    bad[[3, 31]] = True
    tensor = getattr(gaussians, name).clone()
    tensor[bad] = value
    images, grads = outputs(draw, replace(gaussians, **{name: tensor}), cameras, **options)
    rest = GaussianBatch(*(getattr(gaussians, k)[~bad] for k in NAMES), gaussians.batch[~bad], 1)
    wanted, wanted_grads = outputs(draw, rest, cameras, **options)
    for k in images:
        assert torch.equal(images[k], wanted[k])
    for k in NAMES:
        assert not bool(grads[k][bad].any()) and torch.equal(grads[k][~bad], wanted_grads[k])


@pytest.mark.parametrize("value", [0.0, -0.1])
def test_scales_that_are_not_above_zero_are_refused(value):
    gaussians, cameras, _ = needle_scene(False)
    gaussians.scale[4, 1] = value
    message = f"render: gaussians.scale: expected .* above 0, found {value:g}"
    with pytest.raises(ValueError, match=message) as error:
        render(gaussians, cameras, torch.zeros(3))
    assert "\n" not in str(error.value)


def test_the_head_makes_no_needle():
    from unipre3d.core import PointBatch

    points = PointBatch(torch.zeros(2, 3), torch.zeros(2, 8), torch.zeros(2, dtype=torch.long), 1)
    raw = torch.tensor([[1e6], [-1e6]]).expand(2, 23)
    scale = GaussianHead(8, max_scale=100.0).activate(raw, points).scale
    torch.testing.assert_close(scale, torch.tensor([[100.0], [math.exp(-20)]]).expand(2, 3))
    from unipre3d.tasks.pretrain import pretrain_recipes

    assert {recipe.model.max_scale for recipe in pretrain_recipes.values()} == {100.0}


def test_vector_loads_are_checked_too(tmp_path):
    "With NUMBA_BOUNDSCHECK the loads of eight floats are: the fuzzing would see one outside its array."
    code = """
import numpy as np, numba
from unipre3d.kernels import splat
@numba.njit
def read(array, index): return splat.alive(array[index:], 1)
@numba.njit
def write(array, index): splat.store8(array, index, splat.splat8(np.float32(1)))
row = np.zeros(20, np.float32)
for call, index in ((read, 13), (write, 13), (write, -1)):
    try: call(row, index)
    except IndexError: print("refused")
write(row, 12)
"""
    env = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["refused"] * 3, done.stdout + done.stderr[-2000:]


if __name__ == "__main__":
    report(*check_scenes(int(sys.argv[1]), int(sys.argv[2])))
