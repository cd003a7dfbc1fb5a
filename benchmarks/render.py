"""Times the CPU renderer beside a plain torch one on six workloads, forward and backward, in one run.

    python benchmarks/render.py [--workloads Os Om Ol Olt S V] [--repeats 5] [--torch-views 4] [--json PATH]
    python benchmarks/render.py --against REV [--workloads ...] [--repeats ...] [--json RECORD]
    python benchmarks/render.py --parts RECORD [--repeats ...]

Workloads (float32): O is 32 objects x 4 views of 128x128, 1,024 Gaussians in the unit sphere, camera distance 1.75,
field of view 49.134 degrees, harmonics of degree 1; Os, Om, Ol have a median scale of 0.03, 0.1, 0.37; Olt is Ol with
faint Gaussians (large and transparent: the hard case). S is a room of 6 x 5 x 3 m, 50,000 Gaussians of 0.03 m, 8
views of 160x120. V is one view of 1280x720 into that room with 200,000 Gaussians.

The torch renderer is tiled, vectorised over tiles, Gaussians and pixels, and drops tiles that are opaque; autograd
does its backward. It is timed on a few views and scaled by the number of views; every row says how many were drawn.

With --against this checkout and another commit run alternately, each in a process of its own, and ratios of their
best times are printed, with the distance of their images and gradients; --json adds the ratios of processor times to
a record. --parts measures again what processor time alone tells: the arithmetic limit, and the time of each compiled
function on one thread.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numba
import numpy as np
import torch
import torch.nn.functional as F

from unipre3d.core import CameraBatch, GaussianBatch, offsets
from unipre3d.gaussians import covariance, evaluate_sh
from unipre3d.geometry.cameras import intrinsics_from_fov, look_at
from unipre3d.render import EPS2D, project_gaussians, render

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["mean", "scale", "quat", "opacity", "sh"]
# Forward and backward arithmetic of one Gaussian at one pixel: 2 x (quadratic form, 2^x, transmittance) + sums.
FLOPS_PER_PAIR = 88


# ------------------------------------------------------------------------------------------------------------ workloads


def gaussians_at(mean, batch, size, *, scale, opacity, generator, degree=1):
    "Random Gaussians with these centres."
    n, k = len(mean), (degree + 1) ** 2
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    return GaussianBatch(
        mean,
        scale * torch.exp(0.5 * normal(n, 3)),
        F.normalize(normal(n, 4), dim=1),
        torch.sigmoid(normal(n) + opacity),
        normal(n, k, 3) * torch.tensor([1.0] + [0.3] * (k - 1))[:, None],
        batch,
        size,
    )


def objects(
    scale, opacity=0.0, *, counts=(1024,) * 32, views=(4,) * 32, hw=(128, 128), degree=1, seed=0
):
    "Clouds in the unit sphere, seen from around; one entry of counts and views for each cloud."
    g = torch.Generator().manual_seed(seed)
    index = lambda sizes: torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    n, v = sum(counts), sum(views)
    mean = F.normalize(torch.randn(n, 3, generator=g), dim=1) * torch.rand(n, 1, generator=g) ** (
        1 / 3
    )
    gaussians = gaussians_at(
        mean, index(counts), len(counts), scale=scale, opacity=opacity, generator=g, degree=degree
    )
    eye = 1.75 * F.normalize(torch.randn(v, 3, generator=g), dim=1)
    return gaussians, CameraBatch(
        look_at(eye), intrinsics_from_fov(49.134, hw).repeat(v, 1, 1), hw, index(views)
    )


def room(n=50_000, views=8, hw=(120, 160), seed=0):
    "One scene seen from inside."
    g = torch.Generator().manual_seed(seed)
    size = torch.tensor([6.0, 5, 3])
    mean = (torch.rand(n, 3, generator=g) - 0.5) * size
    gaussians = gaussians_at(
        mean, torch.zeros(n, dtype=torch.long), 1, scale=0.03, opacity=0.0, generator=g
    )
    eye, at = (
        (torch.rand(views, 3, generator=g) - 0.5) * size / 2,
        (torch.rand(views, 3, generator=g) - 0.5) * size,
    )
    return gaussians, CameraBatch(
        look_at(eye, at),
        intrinsics_from_fov(60.0, hw).repeat(views, 1, 1),
        hw,
        torch.zeros(views, dtype=torch.long),
    )


WORKLOADS = {
    "Os": lambda: objects(0.03),
    "Om": lambda: objects(0.1),
    "Ol": lambda: objects(0.37),
    "Olt": lambda: objects(0.37, -2.0),
    "S": room,
    "V": lambda: room(200_000, 1, (720, 1280)),
}


def leaves(gaussians, device="cpu"):
    "The same Gaussians as leaves that ask for gradients."
    tensors = {k: getattr(gaussians, k).detach().to(device).clone().requires_grad_() for k in NAMES}
    return GaussianBatch(**tensors, batch=gaussians.batch.to(device), size=gaussians.size), tensors


def image_gradient(cameras, device="cpu", seed=1):
    "What the backward pass starts from."
    return torch.randn(
        len(cameras), 3, *cameras.hw, generator=torch.Generator().manual_seed(seed)
    ).to(device)


# --------------------------------------------------------------------------------------------- the plain torch renderer


def torch_view(gaussians, cameras, v, gradient, tile=16, chunk=32):
    """Forward and backward of one view over black: all tiles at once, `chunk` Gaussians of each at a time, front to back; a tile
    leaves when its list ends or its pixels are opaque."""
    start, b, (h, w) = (
        offsets(gaussians.batch, gaussians.size).tolist(),
        int(cameras.batch[v]),
        cameras.hw,
    )
    mean, scale, quat, opacity, sh = (getattr(gaussians, k)[start[b] : start[b + 1]] for k in NAMES)
    uv, cov, z = project_gaussians(
        mean, covariance(scale, quat), cameras.world_to_cam[v], cameras.K[v], cameras.hw
    )
    cov = cov + EPS2D * torch.eye(2)
    det = cov[:, 0, 0] * cov[:, 1, 1] - cov[:, 0, 1] ** 2
    conic = torch.stack([cov[:, 1, 1] / det, -cov[:, 0, 1] / det, cov[:, 0, 0] / det], -1)
    packed = torch.cat([uv, conic, evaluate_sh(sh, mean - cameras.center[v]), opacity[:, None]], 1)
    rows, cols = -(-h // tile), -(-w // tile)
    with torch.no_grad():
        reach = (2 * (255 * opacity).clamp(min=1).log()).sqrt()[:, None] * cov.diagonal(
            dim1=1, dim2=2
        ).sqrt()
        order = ((z > 0.01) & (opacity >= 1 / 255)).nonzero()[:, 0]
        order = order[z[order].argsort(stable=True)]
        y, x = torch.meshgrid(
            torch.arange(rows * tile) + 0.5, torch.arange(cols * tile) + 0.5, indexing="ij"
        )
        split = lambda image: (
            image.unflatten(0, (rows, tile))
            .unflatten(2, (cols, tile))
            .transpose(1, 2)
            .flatten(0, 1)
            .flatten(1, 2)
        )
        x, y = split(x), split(y)  # [tiles, pixels]
        low, high = (uv - reach)[order], (uv + reach)[order]
        parts = []
        for first in range(0, len(x), 256):  # tiles at once: all of a large image would not fit
            left, top = x[first : first + 256], y[first : first + 256]
            hit = (high[:, 0] > left[:, :1]) & (low[:, 0] < left[:, -1:])
            hit &= (high[:, 1] > top[:, :1]) & (low[:, 1] < top[:, -1:])  # [tiles, m]
            parts.append(hit.nonzero() + torch.tensor([first, 0]))
        hits = torch.cat(parts)
        count = torch.bincount(hits[:, 0], minlength=len(x))
        begin = count.cumsum(0) - count
        lists = order[hits[:, 1]]  # front to back, one tile behind another
    rgb, T, run = x.new_zeros(*x.shape, 3), torch.ones_like(x), torch.ones_like(x)
    for k in range(0, int(count.max()), chunk):
        active = ((run > 0).any(1) & (count > k)).nonzero()[:, 0]
        if not len(active):
            break
        place = begin[active, None] + k + torch.arange(chunk)
        which = lists[place.clamp(max=len(lists) - 1)]
        g = packed.index_select(0, which.flatten()).unflatten(0, which.shape)[
            ..., None
        ]  # [tiles, chunk, 9, 1]
        real = (k + torch.arange(which.shape[1]) < count[active, None])[..., None]
        dx, dy = x[active][:, None] - g[:, :, 0], y[active][:, None] - g[:, :, 1]
        sigma = 0.5 * (g[:, :, 2] * dx * dx + g[:, :, 4] * dy * dy) + g[:, :, 3] * dx * dy
        alpha = (g[:, :, 8] * torch.exp(-sigma)).clamp(max=0.999)
        with torch.no_grad():
            counts = (alpha >= 1 / 255) & real
            alive = run[active][:, None] * (1 - alpha * counts).cumprod(1) > 1e-4
        alpha = torch.where(counts & alive, alpha, 0)
        before = T[active][:, None]
        left = before * (1 - alpha).cumprod(1)
        weight = alpha * torch.cat([before, left[:, :-1]], 1)
        rgb = rgb.index_add(0, active, weight.mT @ g[:, :, 5:8, 0])
        T = T.index_copy(0, active, left[:, -1])
        with torch.no_grad():
            run[active] = torch.where(alive[:, -1], left[:, -1], 0)
    image = (
        rgb.unflatten(0, (rows, cols))
        .unflatten(2, (tile, tile))
        .permute(4, 0, 2, 1, 3)
        .flatten(1, 2)
        .flatten(2, 3)[:, :h, :w]
    )
    image.backward(gradient)
    return image.detach()


# --------------------------------------------------------------------------------------------------------------- timing


def with_threads(threads, function, *args):
    "function(*args) while torch, and so the renderer, uses this many threads."
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(*args)
    finally:
        torch.set_num_threads(before)


def one_run(g, cameras, gradient):
    "One run of ours, seconds: wall time of forward and of backward, processor time of both."
    used, marks = time.process_time(), [time.perf_counter()]
    out = render(g, cameras, torch.zeros(3), backend="cpu")
    marks.append(time.perf_counter())
    out.rgb.backward(gradient)
    marks.append(time.perf_counter())
    return out, (marks[1] - marks[0], marks[2] - marks[1], time.process_time() - used)


def time_ours(gaussians, cameras, repeats):
    "Best of several runs, seconds: wall time of forward and of backward, processor time of both."
    g, _ = leaves(gaussians)
    gradient, best = image_gradient(cameras), [float("inf")] * 3
    for _ in range(repeats + 1):
        _, times = one_run(g, cameras, gradient)
        best = [min(b, t) for b, t in zip(best, times)]
    return best


def time_torch(gaussians, cameras, n_views):
    "Wall and processor time of forward and backward in torch for the whole batch, scaled from n_views."
    g, _ = leaves(gaussians)
    gradient, views = (
        image_gradient(cameras),
        np.linspace(0, len(cameras) - 1, n_views).astype(int).tolist(),
    )
    torch_view(g, cameras, views[0], gradient[views[0]])
    start, used = time.perf_counter(), time.process_time()
    for v in views:
        torch_view(g, cameras, v, gradient[v])
    return tuple(
        (t - t0) * len(cameras) / n_views
        for t, t0 in ((time.perf_counter(), start), (time.process_time(), used))
    )


def torch_distance(gaussians, cameras):
    "Relative distance of the two renderers: the first image, and the gradients that it gives."
    gradient, one, found = image_gradient(cameras), torch.arange(len(cameras)) == 0, []
    for draw in (
        lambda g: torch_view(g, cameras, 0, gradient[0]),
        lambda g: render(g, cameras.select(one), torch.zeros(3), backend="cpu").rgb[0],
    ):
        g, tensors = leaves(gaussians)
        image = draw(g)
        if image.requires_grad:
            image.backward(gradient[0])
        found.append([image.detach(), *(t.grad for t in tensors.values())])
    return dict(zip(["image", *NAMES], (float((b - a).norm() / a.norm()) for a, b in zip(*found))))


@numba.njit
def count_pairs(m, rec, order, H, W):
    "Gaussians that count at a pixel, summed over the pixels of a view."
    pairs = 0
    for y in range(H):
        for x in range(W):
            T = 1.0
            for t in range(m):
                i = order[t]
                dx, dy = x + 0.5 - rec[i, 0], y + 0.5 - rec[i, 1]
                q = rec[i, 5] - (rec[i, 2] * dx + rec[i, 3] * dy) ** 2 - (rec[i, 4] * dy) ** 2
                if q < -8:
                    continue
                alpha = min(2.0**q, 0.999)
                if alpha < 1 / 255:
                    continue
                if T * (1 - alpha) <= 1e-4:
                    break
                T *= 1 - alpha
                pairs += 1
    return pairs


def contributing_pairs(gaussians, cameras, n_views=4):
    "Contributing (Gaussian, pixel) pairs of the batch, estimated from a few views."
    from unipre3d.render import camera_arrays, project_views  # an older commit has them not

    g = gaussians
    none = np.empty((0, 3, 3), np.float32)
    cloud = g.mean.numpy(), g.quat.numpy(), g.scale.numpy(), none, g.opacity.numpy(), g.sh.numpy()
    camera = camera_arrays(cameras.world_to_cam, cameras.K, cameras.hw)
    rules = (0.01, 1e10, EPS2D, -1.0, False, False)
    start, owner = offsets(g.batch, g.size).numpy(), cameras.batch.numpy()
    e = project_views(cloud, camera, rules, start, owner)
    pairs = 0
    n_views = min(n_views, len(cameras))
    for v in np.linspace(0, len(cameras) - 1, n_views).astype(int):
        at = e.rows(v)
        pairs += count_pairs(e.count[v], e.rec[at], e.order[at], *cameras.hw)
    return pairs * len(cameras) // n_views


def spinning():
    "A loop of flops that never leave the registers, as wide as those of the renderer, and the flops of one turn."
    from unipre3d.kernels import splat  # an older commit has no such vectors

    load, store, all_of, n = splat.load, splat.store, splat.all_of, splat.LANES

    @numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
    def spin(turns):
        buf = splat.aligned(12 * n)
        buf[:] = np.float32(1)
        c, d = all_of(np.float32(0.999)), all_of(np.float32(1e-3))
        a0, a1, a2, a3 = load(buf, 0), load(buf, n), load(buf, 2 * n), load(buf, 3 * n)
        b0, b1, b2, b3 = load(buf, 4 * n), load(buf, 5 * n), load(buf, 6 * n), load(buf, 7 * n)
        c0, c1, c2, c3 = load(buf, 8 * n), load(buf, 9 * n), load(buf, 10 * n), load(buf, 11 * n)
        for _ in range(turns):
            a0, a1, a2, a3 = a0 * c + d, a1 * c + d, a2 * c + d, a3 * c + d
            b0, b1, b2, b3 = b0 * c + d, b1 * c + d, b2 * c + d, b3 * c + d
            c0, c1, c2, c3 = c0 * c + d, c1 * c + d, c2 * c + d, c3 * c + d
        store(buf, 0, a0 + a1 + a2 + a3 + b0 + b1 + b2 + b3 + c0 + c1 + c2 + c3)
        return buf[0]

    return spin, 2 * 12 * n


def peak_gflops():
    "Arithmetic limit of the threads in use, GFLOP/s, from the processor time of one: other programs do not count."
    (spin, flops), turns, seconds = spinning(), 1_000_000, []
    spin(1)
    for _ in range(5):
        start = time.thread_time()
        spin(turns)
        seconds.append(time.thread_time() - start)
    return flops * turns * torch.get_num_threads() / min(seconds) / 1e9


def bandwidth():
    "Bytes that the threads in use read and write in a second, GB/s: a copy of what no cache holds."
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * 4 * source.numel() / min(seconds) / 1e9


def traffic(gaussians, cameras):
    """Bytes that no order of the work avoids: Gaussians read in both passes and their gradients written; colour, alpha,
    depth and the light that is left written and read, and the gradient of the colours read."""
    numbers = sum(getattr(gaussians, name).numel() for name in NAMES)
    pixels = len(cameras) * cameras.hw[0] * cameras.hw[1]
    return 4 * (3 * numbers + (2 * 6 + 3) * pixels)


PARTS = (
    "project",
    "settle",
    "strip_lists",
    "draw",
    "draw_backward",
    "add_rows",
    "project_backward",
)  # compiled functions


def time_parts(gaussians, cameras, repeats):
    "Processor time of each compiled function and of the rest, one thread, seconds: the best of several runs each."
    from unipre3d.kernels import splat

    g, _ = leaves(gaussians)
    gradient, spent, best = image_gradient(cameras), {}, {}
    functions = {name: getattr(splat, name) for name in PARTS}

    def timed(name, function):
        def call(*args):
            start = time.thread_time()
            result = function(*args)
            spent[name] += time.thread_time() - start
            return result

        return call

    try:
        for name, function in functions.items():
            setattr(splat, name, timed(name, function))
        for _ in range(repeats + 1):
            spent |= dict.fromkeys(PARTS, 0.0)
            _, (_, _, used) = one_run(g, cameras, gradient)
            now = spent | {"rest": used - sum(spent.values())}
            best = {name: min(seconds, best.get(name, seconds)) for name, seconds in now.items()}
    finally:
        for name, function in functions.items():
            setattr(splat, name, function)
    return best


def write_parts(path, repeats):
    "Measure a record's arithmetic limit and parts again."
    record = json.loads(path.read_text())
    record["peak_gflops"] = peak_gflops()
    for row in record["rows"]:
        gaussians, cameras = WORKLOADS[row["workload"]]()
        row["limit_s"] = row["flops"] / record["peak_gflops"] / 1e9
        row["parts_s"] = with_threads(1, time_parts, gaussians, cameras, repeats)
        print(row["workload"], {name: round(1e3 * s, 1) for name, s in row["parts_s"].items()})
    now = provenance()
    record["parts"] = {"date": now["date"], "code": now["code"]}
    record["parts"]["load_before"] = now["hardware"]["load_before"]
    path.write_text(json.dumps(record, indent=1) + "\n")


TINY = "import sys; sys.path.insert(0, {here!r}); import render as r; from unipre3d.render import render"
WARM = """import time; t = time.perf_counter()
import torch; t1 = time.perf_counter()
from unipre3d.core import CameraBatch, GaussianBatch; from unipre3d.render import render
g = GaussianBatch(*(torch.rand(8, k).requires_grad_() for k in (3, 3, 4)), torch.rand(8).requires_grad_(), torch.rand(8, 4, 3).requires_grad_(), torch.zeros(8, dtype=torch.long), 1)
c = CameraBatch(torch.eye(4)[None], torch.tensor([[[9., 0, 8], [0, 9, 8], [0, 0, 1]]]), (16, 16), torch.zeros(1, dtype=torch.long))
render(g, c, torch.zeros(3)).rgb.sum().backward()
print(t1 - t, time.perf_counter() - t1)"""


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(
            f"benchmark: a child process failed: {done.stderr.strip().splitlines()[-1]}"
        )
    return [float(x) for x in done.stdout.split()]


def warm_start():
    "Seconds of a new process with compiled code on disk: importing torch, then everything up to the first gradient."
    run_python(WARM)
    torch_s, ours_s = min((run_python(WARM) for _ in range(3)), key=sum)
    return {"import_torch_s": torch_s, "to_first_gradient_s": ours_s}


def memory_growth(name):
    "Megabytes that forward and backward of a workload add to a process with its inputs and gradients of images."
    code = (
        TINY.format(here=str(Path(__file__).resolve().parent))
        + f"""
import torch
torch.set_num_threads({torch.get_num_threads()})
g, c = r.objects(.1, counts=(8,), views=(1,), hw=(8, 8)); r.time_ours(g, c, 1)
gaussians, cameras = r.WORKLOADS[{name!r}]()
leaf, _ = r.leaves(gaussians); gradient = r.image_gradient(cameras)
now = lambda key: int([l for l in open("/proc/self/status") if l.startswith(key)][0].split()[1])
open("/proc/self/clear_refs", "w").write("5")
before = now("VmRSS")
for _ in range(3): render(leaf, cameras, torch.zeros(3)).rgb.backward(gradient)
print((now("VmHWM") - before) / 1024)"""
    )
    return run_python(code)[0]


# -------------------------------------------------------------------------------------------------------- another build

WORKER = """import sys
sys.path[:0] = [{root!r}, {here!r}]
import render
render.work()"""


def work():
    """Of a child process: one run for every line `workload threads [path]`.

    Its times are the answer; images and gradients lie at the path."""
    ready = {}
    for line in sys.stdin:
        name, threads, *path = line.split()
        if name not in ready:
            gaussians, cameras = WORKLOADS[name]()
            ready = {name: (*leaves(gaussians), cameras, image_gradient(cameras))}
        g, tensors, cameras, gradient = ready[name]
        for tensor in tensors.values():
            tensor.grad = None
        out, times = with_threads(int(threads), one_run, g, cameras, gradient)
        if path:
            images = {"rgb": out.rgb, "alpha": out.alpha, "depth": out.depth}
            found = {name: image.detach() for name, image in images.items()}
            torch.save(found | {name: t.grad for name, t in tensors.items()}, path[0])
        print(*times, flush=True)


class Build:
    "A checkout whose renderer runs in a process of its own."

    def __init__(self, root):
        code = WORKER.format(root=str(root), here=str(Path(__file__).resolve().parent))
        command, pipe = [sys.executable, "-c", code], subprocess.PIPE
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, cwd=root, env=environment
        )

    def run(self, *words):
        "Times of one run: forward, backward, processor."
        print(*words, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().split()
        if not answer:
            raise RuntimeError("benchmark: a child process failed; its message stands above")
        return [float(number) for number in answer]

    def close(self):
        "End the process."
        self.process.stdin.close()
        self.process.wait()


def compare_builds(against, workloads, repeats):
    """Print how many times faster this checkout is than another commit: ratios of the best of alternate runs.

    Returns those of processor times, by workload."""
    from common import checkouts

    many = torch.get_num_threads()
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        older = Path(folder) / "older"
        older.mkdir()
        builds = {name: Build(root) for name, root in checkouts(against, older).items()}
        print(
            f"times faster than {against}; distance: relative, of the images and of the gradients"
        )
        print(
            f"{'':4} {f'wall, {many} threads':>16} {'processor, 1 thread':>20} {'images':>9} {'gradients':>10}"
        )
        for workload in workloads:
            results, best = [], {}
            for name, build in builds.items():
                path = Path(folder) / "results.pt"
                build.run(workload, many, path)
                results.append(torch.load(path))
                best[name] = [float("inf")] * 2
            for _ in range(repeats):
                for name, build in builds.items():
                    forward, backward, _ = build.run(workload, many)
                    best[name][0] = min(best[name][0], forward + backward)
                    *_, used = build.run(workload, 1)
                    best[name][1] = min(best[name][1], used)
            now, then = results
            gaps = {k: float((now[k] - then[k]).norm() / then[k].norm()) for k in now}
            images = max(gaps[k] for k in gaps if k not in NAMES)
            gradients = max(gaps[k] for k in NAMES)
            wall, used = (best[against][i] / best["now"][i] for i in range(2))
            ratios[workload] = used
            print(
                f"{workload:4} {wall:16.2f} {used:20.2f} {images:9.1e} {gradients:10.1e}",
                flush=True,
            )
        for build in builds.values():
            build.close()
    return ratios


def write_ratios(path, against, ratios):
    "Add the ratios to another commit to a record."
    record, now = json.loads(path.read_text()), provenance()
    record["against"] = {"commit": against, "ratio_processor": ratios, "date": now["date"]}
    record["against"] |= {"code": now["code"], "load_before": now["hardware"]["load_before"]}
    path.write_text(json.dumps(record, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------------------- record


def processor():
    "Name of the processor."
    info = Path("/proc/cpuinfo")
    names = (
        [
            l.split(":", 1)[1].strip()
            for l in info.read_text().splitlines()
            if l.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def provenance():
    "What a reader needs to judge or repeat a timing."
    sources = ["unipre3d/render.py", "unipre3d/kernels/splat.py", "benchmarks/render.py"]
    import llvmlite.binding as llvm

    return {
        "date": datetime.date.today().isoformat(),
        "hardware": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "llvm_cpu": llvm.get_host_cpu_name(),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "numba", "llvmlite", "numpy")},
        },
        "code": {s: hashlib.sha256((ROOT / s).read_bytes()).hexdigest()[:16] for s in sources},
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=5, help="our runs; the best counts")
    parser.add_argument(
        "--torch-views",
        type=int,
        default=4,
        help="views that the torch renderer draws; 0 leaves it out",
    )
    parser.add_argument(
        "--torch-threads",
        type=int,
        nargs="+",
        default=sorted({1, torch.get_num_threads()}),
        help="the fastest counts; must hold 1",
    )
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--against", help="a commit; only ratios to its renderer")
    parser.add_argument("--parts", type=Path, help="a record; only its limit and its parts")
    args = parser.parse_args()
    if args.against:
        ratios = compare_builds(args.against, args.workloads, args.repeats)
        if args.json:
            write_ratios(args.json, args.against, ratios)
        return
    if args.parts:
        return write_parts(args.parts, args.repeats)
    many = torch.get_num_threads()
    record = {
        "benchmark": "render_cpu",
        **provenance(),
        "peak_gflops": peak_gflops(),
        "bandwidth_gbs": bandwidth(),
        "flops_per_pair": FLOPS_PER_PAIR,
        "rows": [],
    }
    print(
        f"{record['hardware']['processor']}, {many} threads, {record['peak_gflops']:.0f} GFLOP/s at most. "
        f"Seconds; limit: {FLOPS_PER_PAIR} flops a pair;"
    )
    print(
        f"ratio: torch with the best of {sorted({1, *args.torch_threads})} threads over ours; processor: the same "
        "from processor time with 1 thread each"
    )
    print(
        f"{'':4} {'forward':>8} {'backward':>9} {'sum':>7} {'1 thread':>9} {'processor':>10} {'limit':>7} "
        f"{'pair':>8} {'torch':>8} {'ratio':>6} {'processor':>10} {'memory':>8}"
    )
    for name in args.workloads:
        gaussians, cameras = WORKLOADS[name]()
        forward, backward, used = time_ours(gaussians, cameras, args.repeats)
        alone = with_threads(1, time_ours, gaussians, cameras, args.repeats)
        pairs = contributing_pairs(gaussians, cameras)
        row = {
            "workload": name,
            "forward_s": forward,
            "backward_s": backward,
            "total_s": forward + backward,
            "processor_s": used,
            "one_thread_s": alone[0] + alone[1],
            "one_thread_processor_s": alone[2],
            "pairs": pairs,
            "limit_s": pairs * FLOPS_PER_PAIR / record["peak_gflops"] / 1e9,
            "pair_ns": 1e9 * alone[2] / pairs,
            "flops": pairs * FLOPS_PER_PAIR,
            "bytes": traffic(gaussians, cameras),
            "parts_s": with_threads(1, time_parts, gaussians, cameras, args.repeats),
        }
        if args.torch_views:
            views = min(args.torch_views, len(cameras))
            row["torch_views"], row["torch_distance"] = views, torch_distance(gaussians, cameras)
            times = {
                n: with_threads(n, time_torch, gaussians, cameras, views)
                for n in {1, *args.torch_threads}
            }
            row |= {
                "torch_s": {n: wall for n, (wall, _) in times.items()},
                "torch_one_thread_processor_s": times[1][1],
            }
            row |= {
                "ratio": min(row["torch_s"].values()) / row["total_s"],
                "ratio_processor": times[1][1] / row["one_thread_processor_s"],
            }
        row["memory_growth_mb"] = memory_growth(name)
        record["rows"].append(row)
        print(
            f"{name:4} {forward:8.3f} {backward:9.3f} {row['total_s']:7.3f} {row['one_thread_s']:9.3f} "
            f"{row['one_thread_processor_s']:10.3f} {row['limit_s']:7.3f} {row['pair_ns']:5.2f} ns "
            f"{min(row['torch_s'].values()) if args.torch_views else float('nan'):8.1f} "
            f"{row.get('ratio', float('nan')):6.0f} {row.get('ratio_processor', float('nan')):10.0f} "
            f"{row['memory_growth_mb']:5.0f} MB",
            flush=True,
        )
    record["warm_start"] = warm_start()
    print(
        "new process: import torch {import_torch_s:.2f} s, then {to_first_gradient_s:.2f} s to the first gradient".format(
            **record["warm_start"]
        )
    )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
