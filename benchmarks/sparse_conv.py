"""Times the CPU sparse convolutions beside an obvious one in plain torch, forward and backward, in one run.

    python benchmarks/sparse_conv.py [--workloads M24 M32 M48 S32 S64 S96 stem down U10 U50] [--repeats 7] [--json PATH]

Workloads (float32, rows in random order): S is a sphere of about 50,000 surface voxels; S32, S64 and S96 are
submanifold convolutions of width 3 with as many channels in and out, stem has width 5 and goes from 6 to 32 channels
(its input wants no gradient), down is a strided convolution 32 to 64 and the inverse one back. U10 and U50 are a
training step of the small SparseUNet in rooms of about 10,000 and 50,000 voxels, from points to gradients, rulebooks
included.

M24, M32 and M48 are layers of the three levels of scene-sparseunet-mini in a room of 6,000 points.

`products` are the bare matrix products of a layer's forward and backward pass, one for each offset, on rows that lie
ready; `share` is their time over that of the layer. The obvious one gathers, multiplies and `index_add`s for each
offset and leaves the rest to autograd; it is given the same pairs.
"""

import argparse
import datetime
import hashlib
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from unipre3d.backbones.sparseunet import SparseUNet
from unipre3d.core import PointBatch
from unipre3d.geometry.sparse import (
    SparseConv3d,
    SparseInverseConv3d,
    SparseTensor,
    SubMConv3d,
    merge_voxels,
    point_cells,
    strided_rules,
    submanifold_rules,
)
from unipre3d.records import hardware

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    "unipre3d/geometry/sparse.py",
    "unipre3d/kernels/conv.py",
    "unipre3d/backbones/sparseunet.py",
    "benchmarks/sparse_conv.py",
]
MINI = dict(base_channels=16, channels=(16, 24, 32, 48, 48, 32, 24, 24), layers=(1,) * 8)


# ------------------------------------------------------------------------------------------------------------------ workloads


def sphere(radius=55.8, seed=0):
    "The cells of a sphere's surface in random order, one cloud."
    g = torch.Generator().manual_seed(seed)
    cells = (
        (F.normalize(torch.randn(400_000, 3, generator=g), dim=1) * radius + 64)
        .floor()
        .long()
        .unique(dim=0)
    )
    cells = cells[torch.randperm(len(cells), generator=g)]
    return F.pad(cells, (1, 0)), (128, 128, 128)


def room(voxel_size, n=400_000, seed=0):
    "Points on floor, walls and a table of a room of 4 x 3 x 2.5 m, with 5 mm of noise."
    g = torch.Generator().manual_seed(seed)
    p, face = torch.rand(n, 3, generator=g), torch.randint(6, (n,), generator=g)
    for f, (axis, at) in enumerate(((2, 0.0), (0, 0.0), (0, 1.0), (1, 0.0), (1, 1.0))):
        p[face == f, axis] = at
    table = face == 5
    p[table] = torch.stack(
        [0.3 + 0.4 * p[table, 0], 0.3 + 0.4 * p[table, 1], torch.full((int(table.sum()),), 0.3)], 1
    )
    xyz = p * torch.tensor([4.0, 3, 2.5]) + 0.005 * torch.randn(n, 3, generator=g)
    return PointBatch(xyz, torch.cat([xyz, xyz], 1), torch.zeros(n, dtype=torch.long), 1)


def level(number, voxel_size=0.07):
    "The cells of one level of a small room."
    voxels, _ = merge_voxels(room(voxel_size, n=6000), voxel_size)
    cells = point_cells(voxels, voxel_size)
    for _ in range(number):
        cells, _ = strided_rules(cells, 2, 2)
    return cells.index, cells.shape


LEVELS = {"M24": 0, "M32": 1, "M48": 2}
LAYERS = {
    "M24": (SubMConv3d, 24, 24, 3),
    "M32": (SubMConv3d, 32, 32, 3),
    "M48": (SubMConv3d, 48, 48, 3),
    "S32": (SubMConv3d, 32, 32, 3),
    "S64": (SubMConv3d, 64, 64, 3),
    "S96": (SubMConv3d, 96, 96, 3),
    "stem": (SubMConv3d, 6, 32, 5),
    "down": (SparseConv3d, 32, 64, 2),
}
STEPS = {"U10": 0.088, "U50": 0.0375}


# ------------------------------------------------------------------------------------------------------------- the obvious one


def obvious(feat, weight, pairs, rows):
    "Gather, multiply, index_add, one offset after the other."
    out = feat.new_zeros(rows, weight.shape[0])
    for w, (src, dst) in zip(weight.flatten(1, 3).unbind(1), pairs):
        out = out.index_add(0, dst, feat.index_select(0, src) @ w.T)
    return out


def pairs_of(book, volume):
    "The pairs of a rulebook by offset, as long indices."
    offset = torch.cat(
        [torch.arange(volume).repeat_interleave(torch.tensor(b.counts)) for b in book.blocks]
    )
    return [(book.src[offset == k].long(), book.dst[offset == k].long()) for k in range(volume)]


def products(pairs, c_in, c_out, want_feat):
    "The matrix products of a layer and nothing else: seconds of the forward and of the backward pass."
    most = max(len(src) for src, _ in pairs)
    x, y, w = torch.ones(most, c_in), torch.ones(most, c_out), torch.ones(c_in, c_out)
    start = time.perf_counter()
    for src, _ in pairs:
        torch.mm(x[: len(src)], w)
    middle = time.perf_counter()
    for src, _ in pairs:
        torch.mm(x[: len(src)].T, y[: len(src)])
        if want_feat:
            torch.mm(y[: len(src)], w.T)
    return middle - start, time.perf_counter() - middle


# ------------------------------------------------------------------------------------------------------------------------ timing


def with_threads(threads, function, *args):
    "function(*args) while torch uses this many threads."
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(*args)
    finally:
        torch.set_num_threads(before)


def best_of(repeats, run):
    "Best wall time of each part that `run` returns, and best processor time of all, in seconds, after one run to warm up."
    parts, used = [], []
    for i in range(repeats + 1):
        start = time.process_time()
        part = run()
        if i:
            parts.append(part), used.append(time.process_time() - start)
    return [min(column) for column in zip(*parts)], min(used)


def forward_backward(function, leaves):
    "Seconds of the forward and of the backward pass."
    for leaf in leaves:
        leaf.grad = None
    start = time.perf_counter()
    y = function()
    middle = time.perf_counter()
    y.backward(torch.ones_like(y))
    return middle - start, time.perf_counter() - middle


def seconds(function):
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start,)


def time_layer(name, repeats):
    "One row of the record."
    kind, cin, cout, width = LAYERS[name]
    index, shape = level(LEVELS[name]) if name in LEVELS else sphere()
    g = torch.Generator().manual_seed(1)
    fresh = lambda: SparseTensor(torch.randn(len(index), cin, generator=g), index, shape, 1)

    def rules(x):
        return submanifold_rules(x, width) if kind is SubMConv3d else strided_rules(x, width, 2)[1]

    def book():
        x = fresh()
        return seconds(lambda: rules(x))

    x, layer = fresh(), kind(cin, cout, width)
    x.feat.requires_grad_(name != "stem")
    leaves = [t for t in (x.feat, layer.weight) if t.requires_grad]
    forth = rules(x).forth
    (built,), _ = best_of(repeats, book)
    (forward, backward), used = best_of(
        repeats, lambda: forward_backward(lambda: layer(x).feat, leaves)
    )
    row = {
        "workload": name,
        "cells": len(x),
        "pairs": len(forth.src),
        "rulebook_s": built,
        "forward_s": forward,
        "backward_s": backward,
        "total_s": forward + backward,
        "processor_s": used,
    }
    (one_f, one_b), row["one_thread_processor_s"] = with_threads(
        1, best_of, repeats, lambda: forward_backward(lambda: layer(x).feat, leaves)
    )
    row["one_thread_s"] = one_f + one_b
    if kind is SparseConv3d:
        y, up = (
            layer(x).with_feat(torch.randn(forth.rows, cout, generator=g).requires_grad_()),
            SparseInverseConv3d(cout, cin, width),
        )
        (up_f, up_b), _ = best_of(
            repeats, lambda: forward_backward(lambda: up(y).feat, [y.feat, up.weight])
        )
        row["inverse_s"] = up_f + up_b
    pairs = pairs_of(forth, width**3)
    for key, threads in (("", torch.get_num_threads()), ("one_thread_", 1)):
        bare = lambda: products(pairs, cin, cout, x.feat.requires_grad)
        parts, used = with_threads(threads, best_of, repeats, bare)
        row[f"{key}products_s"] = sum(parts)
        row[f"{key}share"] = used / row[f"{key}processor_s"]
    with torch.no_grad():
        row["distance"] = float(
            (obvious(x.feat, layer.weight, pairs, forth.rows) - layer(x).feat).norm()
            / layer(x).feat.norm()
        )
    plain = {
        n: with_threads(
            n,
            best_of,
            repeats,
            lambda: forward_backward(
                lambda: obvious(x.feat, layer.weight, pairs, forth.rows), leaves
            ),
        )
        for n in sorted({1, torch.get_num_threads()})
    }
    row["torch_s"] = {n: sum(parts) for n, (parts, _) in plain.items()}
    row["torch_one_thread_processor_s"] = plain[1][1]
    row |= {
        "ratio": min(row["torch_s"].values()) / row["total_s"],
        "ratio_processor": row["torch_one_thread_processor_s"] / row["one_thread_processor_s"],
    }
    row["flops"] = 2 * len(forth.src) * cin * cout * (3 if x.feat.requires_grad else 2)
    return row


def time_step(name, repeats):
    "A training step of the small SparseUNet."
    torch.manual_seed(0)
    points, model = room(STEPS[name]), SparseUNet(**MINI, voxel_size=STEPS[name])

    def step():
        start = time.perf_counter()
        p = model.stem(points)
        stem = time.perf_counter()
        y = model.body(p).feat
        body = time.perf_counter()
        y.square().mean().backward()
        return stem - start, body - stem, time.perf_counter() - body

    parts, used = best_of(repeats, step)
    alone, alone_used = with_threads(1, best_of, repeats, step)
    with torch.no_grad():
        cells = len(model.stem(points))
    return {
        "workload": name,
        "points": len(points),
        "cells": cells,
        "parameters": sum(p.numel() for p in model.parameters()),
        **dict(zip(("stem_s", "body_s", "backward_s"), parts)),
        "total_s": sum(parts),
        "processor_s": used,
        "one_thread_s": sum(alone),
        "one_thread_processor_s": alone_used,
    }


def peak_gflops(n=1024):
    "What a large matrix product of torch reaches with the threads in use, GFLOP/s."
    a, b = torch.randn(n, n), torch.randn(n, n)
    (best,), _ = best_of(10, lambda: seconds(lambda: a @ b))
    return 2 * n**3 / best / 1e9


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workloads", nargs="+", default=[*LAYERS, *STEPS], choices=[*LAYERS, *STEPS]
    )
    parser.add_argument("--repeats", type=int, default=7, help="runs of each; the best counts")
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    record = {
        "benchmark": "sparse_cpu",
        "date": datetime.date.today().isoformat(),
        "hardware": {**hardware(), "load_before": round(os.getloadavg()[0], 2)},
        "code": {s: hashlib.sha256((ROOT / s).read_bytes()).hexdigest()[:16] for s in SOURCES},
        "peak_gflops": peak_gflops(),
        "rows": [],
    }
    print(
        f"{record['hardware']['cpu']}, {torch.get_num_threads()} threads, {record['peak_gflops']:.0f} GFLOP/s in a large product. Milliseconds;"
    )
    print(
        "limit: the arithmetic at that speed; torch: the obvious one, faster of one and all threads; ratios: wall time, processor time with one thread"
    )
    print("share: processor time of the bare matrix products over that of the layer, one thread")
    print(
        f"{'':5} {'cells':>7} {'pairs':>9} {'rulebook':>9} {'forward':>8} {'backward':>9} {'sum':>6} {'1 thread':>9} {'limit':>6} {'torch':>6} {'ratio':>6} {'processor':>10} {'share':>6}"
    )
    for name in args.workloads:
        row = time_layer(name, args.repeats) if name in LAYERS else time_step(name, args.repeats)
        record["rows"].append(row)
        ms = lambda key: f"{row[key] * 1e3:.0f}"
        if name in LAYERS:
            row["limit_s"] = row["flops"] / record["peak_gflops"] / 1e9
            print(
                f"{name:5} {row['cells']:7,} {row['pairs']:9,} {ms('rulebook_s'):>9} {ms('forward_s'):>8} {ms('backward_s'):>9} {ms('total_s'):>6} {ms('one_thread_s'):>9} {ms('limit_s'):>6} "
                f"{min(row['torch_s'].values()) * 1e3:6.0f} {row['ratio']:6.1f} {row['ratio_processor']:10.1f} {row['one_thread_share']:6.2f}"
                + (f"   and back up {ms('inverse_s')}" if "inverse_s" in row else ""),
                flush=True,
            )
        else:
            print(
                f"{name:5} {row['cells']:7,} a step: stem {ms('stem_s')}, body {ms('body_s')}, backward {ms('backward_s')}, sum {ms('total_s')}; one thread {ms('one_thread_s')}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
