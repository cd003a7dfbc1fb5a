"""Checks and times the CUDA backend of the renderer (gsplat) on a machine with a GPU; needs no network.

    python benchmarks/gpu.py [--json PATH] [--repeats 20]

What it does, in one run of a few minutes: builds gsplat's kernels (it compiles them at first use: set TORCH_CUDA_ARCH_LIST to the
architecture of the card, for example 9.0, and MAX_JOBS to shorten that), compares images and gradients with the CPU renderer and
with the float64 reference on ragged scenes and on the five workloads of `render.py`, times both, and writes one record.
It ends with exit status 0 if everything agrees, 1 if something does not, 2 if there is no CUDA device or no gsplat.
"""

import argparse
import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from render import NAMES, WORKLOADS, image_gradient, leaves, objects, provenance, time_ours

from unipre3d.core import CameraBatch, GaussianBatch
from unipre3d.render import render

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
    parser.add_argument(
        "--json", type=Path, default=Path("render_gpu.json"), help="write the record here"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        stop("no CUDA device here; the CPU renderer is timed by benchmarks/render.py")
    try:
        installed = version("gsplat")
    except PackageNotFoundError:
        stop(
            "gsplat is not installed; pip install -e '.[gpu]', or bring its wheel (pure Python, compiled at first use)"
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    record = {
        "benchmark": "render_gpu",
        **provenance(),
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "gsplat": installed,
        "tolerance": {
            "image": IMAGE_TOLERANCE,
            "gradient": GRADIENT_TOLERANCE,
            "odd_pixels": PIXEL_TOLERANCE,
        },
    }
    record["build_s"] = build()
    print(
        f"{record['gpu']}, gsplat {installed}, torch {torch.__version__}: ready after {record['build_s']:.0f} s",
        flush=True,
    )
    record["scenes"] = check_scenes("gsplat", "cuda")
    record["rows"] = []
    for name in WORKLOADS:
        forward, backward, _ = time_ours(*WORKLOADS[name](), args.cpu_repeats)
        row = {
            **check_workload(name, "gsplat", "cuda"),
            **time_cuda(name, args.repeats),
            "cpu_s": forward + backward,
        }
        record["rows"].append(row)
        print(
            f"{name:4} gpu {row['forward_ms']:.1f} + {row['backward_ms']:.1f} ms, cpu {row['cpu_s'] * 1e3:.0f} ms, image {row['images']['rgb']:.1e}, "
            f"worst gradient {max(row['gradients'].values()):.1e}",
            flush=True,
        )
    failed = [
        r.get("scene", r.get("workload"))
        for r in record["scenes"] + record["rows"]
        if not r["passed"]
    ]
    record["passed"] = not failed
    args.json.write_text(json.dumps(record, indent=1) + "\n")
    print("all agree" if not failed else f"DIFFERENT: {', '.join(failed)}", "-> ", args.json)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
