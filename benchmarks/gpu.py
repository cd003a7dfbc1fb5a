"""Checks and times what is written for GPUs on a machine that has one; needs no network and at most 12 minutes.

    python benchmarks/gpu.py [--json PATH] [--repeats 20] [--minutes 12] [--dry-run]

In this order, until the time is up:

- builds gsplat's kernels (it compiles them at first use: set TORCH_CUDA_ARCH_LIST to the architecture of the card, for
  example 9.0, and MAX_JOBS to shorten that);
- compares images and gradients with the CPU renderer and with the float64 reference on ragged scenes and on the
  workloads of `render.py`, and times both;
- training steps of objects and rooms in float32 and bfloat16, with the share of loading and the memory;
- attention of packed sequences beside padded ones; sparse convolution beside spconv;
- a batch of views beside a loop over them; training steps again, compiled.

One record holds all; a part that fails is noted in it and does not stop the others.
It ends with exit status 0 if everything agrees, 1 if something does not, 2 if there is no CUDA device or no gsplat.
`--dry-run` does the same on a processor, in small, with the CPU renderer in gsplat's place.
"""

import argparse
import json
import math
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from render import NAMES, WORKLOADS, image_gradient, leaves, objects, provenance, time_ours

from unipre3d.backbones.ptv3 import attend, attend_rectangle, cut_patches, packed_kernel
from unipre3d.core import CameraBatch, GaussianBatch, PointBatch, to_device
from unipre3d.data.loading import make_loader
from unipre3d.geometry.sparse import SubMConv3d, merge_voxels, point_cells, spconv_build
from unipre3d.recipes import recipes
from unipre3d.render import render
from unipre3d.runs.fit import new_accelerator, parameter_groups
from unipre3d.runs.recipe import change

# Relative to the norm. Single pixels whose alpha sits on a threshold differ between any two float32 renderers.
IMAGE_TOLERANCE, GRADIENT_TOLERANCE, PIXEL_TOLERANCE = 1e-4, 5e-3, 1e-3

# name -> (scene, what render is told): every rule of the batch that padding could break
SCENES = {
    "ragged": (dict(scale=0.1, counts=(70, 0, 40, 1), views=(2, 1, 0, 3), hw=(45, 53)), {}),
    "degree 0": (dict(scale=0.05, counts=(80,), views=(2,), hw=(32, 32), degree=0), {}),
    "degree 3": (dict(scale=0.1, counts=(80, 60), views=(1, 1), hw=(40, 24), degree=3), {}),
    "antialiased": (
        dict(scale=0.02, counts=(200, 100), views=(2, 2), hw=(64, 48), degree=2),
        dict(antialiased=True),
    ),
    "near and far": (
        dict(scale=0.2, counts=(100,), views=(3,), hw=(33, 65)),
        dict(near=1.2, far=2.2),
    ),
    "opaque": (dict(scale=0.37, opacity=2.0, counts=(150,), views=(2,), hw=(50, 50)), {}),
    "empty": (dict(scale=0.1, counts=(0, 0), views=(1, 2), hw=(17, 16)), {}),
}


def as_type(gaussians, cameras, device, dtype):
    "Both on a device and in a type."
    tensors = {k: getattr(gaussians, k).to(device, dtype) for k in NAMES}
    return (
        GaussianBatch(**tensors, batch=gaussians.batch.to(device), size=gaussians.size),
        CameraBatch(
            cameras.world_to_cam.to(device, dtype),
            cameras.K.to(device, dtype),
            cameras.hw,
            cameras.batch.to(device),
        ),
    )


def outputs(
    gaussians, cameras, *, backend, device="cpu", dtype=torch.float32, only_rgb=False, **options
):
    "Images and gradients on the CPU in float64, under a fixed random loss on colour, alpha and expected depth."
    g, c = as_type(gaussians, cameras, device, dtype)
    g, tensors = leaves(g, device)
    background = (
        torch.rand(len(cameras), 3, generator=torch.Generator().manual_seed(2))
        .to(device, dtype)
        .requires_grad_()
    )
    out = render(g, c, background, backend=backend, **options)
    noise = torch.Generator().manual_seed(3)
    images = (
        {"rgb": out.rgb} if only_rgb else {"rgb": out.rgb, "alpha": out.alpha, "depth": out.depth}
    )
    sum(
        (image * torch.randn(image.shape, generator=noise).to(device, dtype)).sum()
        for image in images.values()
    ).backward()
    grads = {
        k: torch.zeros_like(t) if t.grad is None else t.grad
        for k, t in {**tensors, "background": background}.items()
    }
    host = lambda d: {k: t.detach().double().cpu() for k, t in d.items()}
    return host(images), host(grads)


def compare(ours, other):
    "Distances of two results of `outputs`, relative to the norm of the second, and whether all are within tolerance."
    distance = lambda a, b: float((a - b).norm() / b.norm().clamp(min=1e-12)) if b.numel() else 0.0
    images = {k: distance(ours[0][k], other[0][k]) for k in other[0]}
    grads = {k: distance(ours[1][k], other[1][k]) for k in other[1]}
    odd = float(((ours[0]["rgb"] - other[0]["rgb"]).abs().amax(1) > 1e-3).double().mean())
    finite = all(bool(t.isfinite().all()) for part in (*ours, *other) for t in part.values())
    good = (
        finite
        and max(images.values()) < IMAGE_TOLERANCE
        and max(grads.values()) < GRADIENT_TOLERANCE
        and odd < PIXEL_TOLERANCE
    )
    return {
        "images": images,
        "gradients": grads,
        "odd_pixels": odd,
        "finite": finite,
        "passed": good,
    }


def check_scenes(backend, device):
    "Every small scene: this backend against the float64 reference, and against the CPU renderer."
    rows = []
    for name, (scene, options) in SCENES.items():
        gaussians, cameras = objects(**scene)
        got = outputs(gaussians, cameras, backend=backend, device=device, **options)
        for other, dtype in (("dense", torch.float64), ("cpu", torch.float32)):
            rows.append(
                {
                    "scene": name,
                    "against": other,
                    **compare(
                        got, outputs(gaussians, cameras, backend=other, dtype=dtype, **options)
                    ),
                }
            )
    return rows


def check_workload(name, backend, device):
    "A full workload: colour and its gradients against the CPU renderer."
    gaussians, cameras = WORKLOADS[name]()
    got, want = (
        outputs(gaussians, cameras, backend=b, device=d, only_rgb=True)
        for b, d in ((backend, device), ("cpu", "cpu"))
    )
    return {"workload": name, **compare(got, want)}


def time_cuda(name, repeats):
    "Median milliseconds of forward and of backward on the device, and the memory that they add at most."
    gaussians, cameras = WORKLOADS[name]()
    g, _ = leaves(gaussians, "cuda")
    cameras, gradient, black = (
        cameras.to("cuda"),
        image_gradient(cameras, "cuda"),
        torch.zeros(3, device="cuda"),
    )
    times = []
    for i in range(repeats + 3):
        if i == 3:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        torch.cuda.synchronize()
        marks = [time.perf_counter()]
        out = render(g, cameras, black, backend="gsplat")
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        out.rgb.backward(gradient)
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        times.append([marks[1] - marks[0], marks[2] - marks[1]])
        del out
    forward, backward = torch.tensor(times[3:], dtype=torch.float64).median(0).values.tolist()
    return {
        "forward_ms": forward * 1e3,
        "backward_ms": backward * 1e3,
        "memory_mb": (torch.cuda.max_memory_allocated() - before) / 2**20,
    }


def median_ms(device, work, repeats):
    "Median milliseconds of a call, after three that do not count."
    times = []
    for _ in range(repeats + 3):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return torch.tensor(times[3:], dtype=torch.float64).median().item() * 1e3


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def peak_mb(device):
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None


def relative(a, b):
    "The distance of two tensors, relative to the norm of the second."
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def batch_or_loop(device, backend, small, repeats):
    "All views of a batch at once, and one view after another: milliseconds of forward and backward."
    views = 4 if small else 32
    gaussians, cameras = objects(0.1, counts=(64,) * views, views=(1,) * views, hw=(64, 64))
    g, _ = leaves(gaussians, device)
    cameras = cameras.to(device)
    black = torch.zeros(3, device=device)
    single = [cameras.select(torch.tensor([v], device=device)) for v in range(views)]

    def whole():
        render(g, cameras, black, backend=backend).rgb.sum().backward()

    def loop():
        for camera in single:
            render(g, camera, black, backend=backend).rgb.sum().backward()

    times = {
        "batch_ms": median_ms(device, whole, repeats),
        "loop_ms": median_ms(device, loop, repeats),
    }
    return {"views": views} | times


def attention(device, small, repeats):
    "Packed attention beside the padded rectangle, in patches of unequal length: values, gradients, milliseconds."
    rows = [500, 30, 800] if small else [60_000, 900, 40_000, 17]
    half = torch.bfloat16 if device == "cuda" else torch.float32
    patches = cut_patches(
        torch.arange(sum(rows), device=device), torch.tensor(rows, device=device), 1024
    )
    torch.manual_seed(0)
    qkv = torch.randn(len(patches.rows), 3, 4, 16, device=device, dtype=half).requires_grad_()
    into = torch.randn(len(patches.rows), 4, 16, device=device, dtype=half)
    found = {}
    for name, function in (("packed", attend), ("rectangle", attend_rectangle)):
        out = function(qkv, patches)
        found[name] = out, torch.autograd.grad(out, qkv, into)[0]
    value, gradient = (relative(*pair) for pair in zip(found["packed"], found["rectangle"]))
    row = {
        "kernel": packed_kernel() is not None and device == "cuda",
        "value": value,
        "gradient": gradient,
    }
    for name, function in (("packed", attend), ("rectangle", attend_rectangle)):
        row[f"{name}_ms"] = median_ms(
            device, lambda: function(qkv, patches).backward(into), repeats
        )
    return row | {"passed": max(value, gradient) < 2e-2}


def sparse(device, small, repeats):
    "A submanifold convolution by our rulebooks beside spconv, where that is built for the device."
    g = torch.Generator().manual_seed(0)
    xyz = F.normalize(torch.randn(4_000 if small else 400_000, 3, generator=g), dim=1)
    xyz = xyz * (0.4 if small else 1.1)
    points = PointBatch(xyz, xyz, torch.zeros(len(xyz), dtype=torch.long), 1).to(device)
    voxels, _ = merge_voxels(points, 0.02)
    cells = point_cells(voxels, 0.02)
    torch.manual_seed(0)
    feat = torch.randn(len(cells), 32, device=device).requires_grad_()
    layer = SubMConv3d(32, 64).to(device)
    row = {"voxels": len(cells), "spconv": spconv_build() or "not installed"}
    found = {}
    backends = ["torch"] + ["spconv"] * (device == "cuda" and spconv_build() == "CUDA")
    for backend in backends:
        layer.backend = backend

        def step():
            x = cells.with_feat(feat)
            layer(x).feat.square().sum().backward()

        feat.grad = None
        step()
        found[backend] = feat.grad.clone()
        row[f"{backend}_ms"] = median_ms(device, step, repeats)
    if len(found) == 2:
        row["gradient"] = relative(found["spconv"], found["torch"])
    return row | {"passed": row.get("gradient", 0.0) < 1e-3}


def training(device, small, recipe, precision, compiled, steps):
    "Steps of a recipe as a run takes them: milliseconds, the share that loading would take alone, memory."
    recipe = change(recipe, mixed_precision=precision, steps=steps, workers=0)
    accelerator = new_accelerator(precision, "cpu" if device == "cpu" else "cuda")
    task = recipe.build_task(accelerator.device)
    model = task.model.to(device)
    if compiled:
        model.backbone = torch.compile(model.backbone, dynamic=True)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader = make_loader(task.samples, 0, steps, batch_size=recipe.run.batch_size)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loading, stepping, losses = [], [], []
    batches = iter(loader)
    for _ in range(steps):
        start = time.perf_counter()
        batch = to_device(next(batches), accelerator.device)
        wait(device)
        loading.append(time.perf_counter() - start)
        start = time.perf_counter()
        with accelerator.autocast():
            loss, _ = task.loss(model, batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        wait(device)
        stepping.append(time.perf_counter() - start)
        losses.append(loss.item())
    seconds = (
        torch.tensor([loading, stepping], dtype=torch.float64)[:, steps // 3 :].median(1).values
    )
    return {
        "precision": precision,
        "compiled": compiled,
        "loading_ms": seconds[0].item() * 1e3,
        "step_ms": seconds[1].item() * 1e3,
        "first_step_s": stepping[0],
        "memory_mb": peak_mb(device),
        "loss": [losses[0], losses[-1]],
        "passed": all(map(math.isfinite, losses)),
    }


def recipes_here(small):
    "The recipes whose steps are timed, on data that the package has."
    if small:
        short = dict(batch_size=2, n_target=1)
        return {
            "object-transformer-mini": change(
                recipes["object-transformer-mini"], **short, n_points=128
            ),
            "scene-sparseunet-mini": change(recipes["scene-sparseunet-mini"], **short, rooms=3),
        }
    objects = dict(source="furniture", image="mini", convention="", workers=0)
    return {
        "object-transformer-mini": recipes["object-transformer-mini"],
        "object-transformer": change(recipes["object-transformer"], **objects),
        "scene-sparseunet-mini": change(recipes["scene-sparseunet-mini"], rooms=12),
        "scene-ptv3-mini": change(recipes["scene-ptv3-mini"], rooms=12),
    }


def build():
    "Seconds until gsplat's kernels have drawn and differentiated a first image."
    start = time.perf_counter()
    gaussians, cameras = objects(0.1, counts=(8,), views=(1,), hw=(16, 16))
    outputs(gaussians, cameras, backend="gsplat", device="cuda")
    torch.cuda.synchronize()
    return time.perf_counter() - start


def stop(message):
    print(f"gpu.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=20, help="timed runs on the GPU; the median counts"
    )
    parser.add_argument(
        "--cpu-repeats", type=int, default=3, help="timed runs on the CPU; the best counts"
    )
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="write the record here")
    parser.add_argument("--minutes", type=float, default=12, help="no part begins after that")
    parser.add_argument("--steps", type=int, default=30, help="training steps of each setting")
    parser.add_argument("--dry-run", action="store_true", help="on a processor, in small")
    args = parser.parse_args()
    small = args.dry_run
    device = "cpu" if small else "cuda"
    installed = None if small else gsplat_version()
    end = time.perf_counter() + 60 * args.minutes
    torch.backends.cuda.matmul.allow_tf32 = False
    record = {
        "benchmark": "gpu",
        "dry_run": small,
        **provenance(),
        "gpu": None if small else torch.cuda.get_device_name(),
        "capability": None if small else list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "gsplat": installed,
        "tolerance": {
            "image": IMAGE_TOLERANCE,
            "gradient": GRADIENT_TOLERANCE,
            "odd_pixels": PIXEL_TOLERANCE,
        },
        "left_out": [],
    }
    for name, part in parts(device, small, args):
        if time.perf_counter() > end:
            record["left_out"].append(name)
            continue
        start = time.perf_counter()
        try:
            record[name] = part()
        except Exception as error:  # of one part: the others are worth their time
            record[name] = {"error": f"{type(error).__name__}: {error}"[:500], "passed": False}
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    failed = [name for name in record if not passed(record[name])]
    record["passed"] = not failed
    args.json.write_text(json.dumps(record, indent=1) + "\n")
    print("all agree" if not failed else f"DIFFERENT: {', '.join(failed)}", "-> ", args.json)
    if record["left_out"]:
        print(f"no time was left for {', '.join(record['left_out'])}; --minutes gives more")
    raise SystemExit(bool(failed))


def gsplat_version():
    "Of the installed package; ends the script where it, or a GPU, is not there."
    if not torch.cuda.is_available():
        stop(
            "no CUDA device here; the CPU renderer is timed by benchmarks/render.py (--dry-run tries the script)"
        )
    try:
        return version("gsplat")
    except PackageNotFoundError:
        stop(
            "gsplat is not installed; pip install -e '.[gpu]', or bring its wheel (pure Python, compiled at first use)"
        )


def passed(part):
    "Whether everything in a part of the record that says so has passed."
    if isinstance(part, dict):
        return part.get("passed", True) and all(map(passed, part.values()))
    return all(map(passed, part)) if isinstance(part, list) else True


def workload(name, device, repeats, cpu_repeats):
    "A workload of the renderer: how well it agrees, and its times beside the CPU's."
    forward, backward, _ = time_ours(*WORKLOADS[name](), cpu_repeats)
    agreement = check_workload(name, "gsplat", device)
    return {**agreement, **time_cuda(name, repeats), "cpu_s": forward + backward}


def parts(device, small, args):
    "Names and work, in order of importance."
    backend = "cpu" if small else "gsplat"
    repeats = 1 if small else args.repeats
    steps = 3 if small else args.steps
    if not small:
        yield "build_s", build
    yield "scenes", lambda: check_scenes(backend, device)
    for name in [] if small else WORKLOADS:
        yield (
            f"workload {name}",
            lambda name=name: workload(name, device, repeats, args.cpu_repeats),
        )
    for name, recipe in recipes_here(small).items():
        for precision in ("no", "bf16"):
            work = lambda r=recipe, p=precision: training(device, small, r, p, False, steps)
            yield f"steps {name} {precision}", work
    yield "attention", lambda: attention(device, small, repeats)
    yield "sparse", lambda: sparse(device, small, repeats)
    yield "batch or loop", lambda: batch_or_loop(device, backend, small, repeats)
    for name, recipe in [] if small else recipes_here(small).items():
        work = lambda r=recipe: training(device, small, r, "bf16", True, steps)
        yield f"steps {name} bf16 compiled", work


if __name__ == "__main__":
    main()
