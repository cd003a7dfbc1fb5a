"""Times neighbours and farthest points on a CPU beside scipy, pykdtree, fpsample and plain torch.

    python benchmarks/points.py [--workloads knn ball farthest interpolate] [--largest N] [--repeats 5] [--json PATH]

Clouds are points in random order on the surfaces of a room. The rows of 32 clouds of 1,024 points are what a step of
the default recipe does. A tree is planted anew in every call, also a peer's. `torch` is what graphics cards run; it
compares every query with every point and is left out where that takes minutes. pykdtree and fpsample are timed where
they can be imported. All use as many threads as torch does, which OMP_NUM_THREADS sets.
"""

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree

from unipre3d.geometry import pointops
from unipre3d.records import hardware, peak_memory_mb

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    "unipre3d/geometry/pointops.py",
    "unipre3d/kernels/points.py",
    "unipre3d/kernels/threads.py",
    "benchmarks/points.py",
]
K = 16
RADIUS = 0.1
SLOW = 10  # seconds; what takes longer runs once
MOST_PAIRS = 2e8  # that the torch functions are timed on


# ------------------------------------------------------------------------------------------------------------------ workloads


def room(n, seed=0):
    "n points on the floor and the walls of a room of 1 x 1 x 0.6, with a little noise."
    g = torch.Generator().manual_seed(seed)
    xyz = torch.rand(n, 3, generator=g)
    face = torch.randint(5, (n,), generator=g)
    xyz[face == 0, 2] = 0
    for number, (axis, at) in enumerate([(0, 0.0), (0, 1.0), (1, 0.0), (1, 1.0)], 1):
        xyz[face == number, axis] = at
    xyz = xyz * torch.tensor([1.0, 1, 0.6])
    return xyz + 0.002 * torch.randn(n, 3, generator=g)


def clouds(count, n):
    "Packed points, their clouds, the number of clouds."
    xyz = torch.cat([room(n, seed) for seed in range(count)])
    return xyz, torch.arange(count).repeat_interleave(n), count


def peers():
    "The packages that can be imported."
    return [name for name in ("pykdtree", "fpsample") if importlib.util.find_spec(name)]


def knn_rows(count, n, m):
    "The functions to time: neighbours of m points of each cloud."
    xyz, batch, size = clouds(count, n)
    rows = torch.cat([torch.randperm(n)[:m] + n * b for b in range(count)])
    place = xyz[rows], batch[rows], xyz, batch, size
    functions = {"ours": lambda: pointops.knn(*place, K)}
    if m * count * n <= MOST_PAIRS:
        functions["torch"] = lambda: pointops._search(
            *place, lambda d2: pointops._nearest_of(d2, K)
        )
    split = list(zip(xyz[rows].numpy().reshape(count, m, 3), xyz.numpy().reshape(count, n, 3)))
    threads = torch.get_num_threads()
    functions["scipy"] = lambda: [cKDTree(p).query(q, K, workers=threads)[1] for q, p in split]
    if "pykdtree" in peers():
        from pykdtree.kdtree import KDTree

        functions["pykdtree"] = lambda: [KDTree(p).query(q, K)[1] for q, p in split]
    return functions


def ball_rows(count, n, m):
    "Up to K points in balls around m points of each cloud; no peer has this order."
    xyz, batch, size = clouds(count, n)
    rows = torch.cat([torch.randperm(n)[:m] + n * b for b in range(count)])
    place = xyz[rows], batch[rows], xyz, batch, size
    functions = {"ours": lambda: pointops.ball_query(*place, RADIUS, K)}
    if m * count * n <= MOST_PAIRS:
        pick = lambda d2: pointops._first_of(d2, RADIUS, K)
        functions["torch"] = lambda: pointops._search(*place, pick)
    return functions


def farthest_rows(count, n, m):
    "m farthest points of each cloud."
    xyz, batch, size = clouds(count, n)
    functions = {"ours": lambda: pointops.farthest_point_sample(xyz, batch, size, m)}
    if m * count * n <= MOST_PAIRS:
        functions["torch"] = lambda: pointops._farthest_torch(xyz, batch, size, m)
    if "fpsample" in peers():
        import fpsample

        split = list(xyz.numpy().reshape(count, n, 3))
        # its bucket functions do not begin at the point that is given
        height = max(1, int(np.log2(n / 64)))
        bucket = fpsample.bucket_fps_kdline_sampling
        functions["fpsample"] = lambda: [fpsample.fps_sampling(p, m, start_idx=0) for p in split]
        functions["fpsample, buckets"] = lambda: [bucket(p, m, h=height) for p in split]
    return functions


def interpolate_rows(count, n, m):
    "64 features from m points of each cloud to all n."
    xyz, batch, size = clouds(count, n)
    rows = torch.cat([torch.randperm(n)[:m] + n * b for b in range(count)])
    known = xyz[rows], torch.randn(len(rows), 64), batch[rows], size
    return {"ours": lambda: pointops.interpolate(xyz, batch, *known)}


KINDS = {
    "knn": knn_rows,
    "ball": ball_rows,
    "farthest": farthest_rows,
    "interpolate": interpolate_rows,
}
TRAIN = (32, 1024, 64)
OTHERS = {
    "knn": [(1, n, n) for n in (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)],
    "ball": [(1, n, n) for n in (1_000, 10_000, 100_000, 1_000_000)],
    "farthest": [
        (32, 4096, 1024),
        *((1, n, 1024) for n in (3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)),
    ],
    "interpolate": [(1, n, n // 10) for n in (10_000, 100_000, 1_000_000)],
}


# --------------------------------------------------------------------------------------------------------------------- timing


def time_row(kind, count, n, m, repeats):
    "Best wall and processor time of each function, taken in turns."
    functions = KINDS[kind](count, n, m)
    wall = {name: np.inf for name in functions}
    processor = dict(wall)
    slow = set()
    for _ in range(
        repeats + 1
    ):  # the first round compiles and fills caches, and counts for slow ones alone
        for name, function in functions.items():
            if name in slow:
                continue
            start, began = time.perf_counter(), time.process_time()
            function()
            seconds = time.perf_counter() - start
            wall[name] = min(wall[name], seconds)
            processor[name] = min(processor[name], time.process_time() - began)
            if seconds > SLOW:
                slow.add(name)
    row = dict(kind=kind, clouds=count, points=n, queries=m)
    row["wall_s"] = {name: round(value, 6) for name, value in wall.items()}
    row["processor_s"] = {name: round(value, 6) for name, value in processor.items()}
    row["peak_mb"] = round(peak_memory_mb())  # of the process, all rows so far
    return row


def line(row):
    "One printed line: milliseconds of ours, and the others as multiples of it."
    ours = row["wall_s"]["ours"]
    beside = []
    for name, seconds in row["wall_s"].items():
        if name != "ours":
            by_processor = row["processor_s"][name] / row["processor_s"]["ours"]
            beside.append(f"{name} {seconds / ours:.1f} ({by_processor:.1f})")
    sizes = f"{row['kind']:12} {row['clouds']:3} x {row['points']:9,} {row['queries']:9,}"
    return f"{sizes} {ours * 1e3:9.1f} ms   {', '.join(beside)}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--largest", type=int, default=1_000_000, help="points of a cloud, at most")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; the best counts")
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    record = {
        "benchmark": "points_cpu",
        "date": datetime.date.today().isoformat(),
        "hardware": {**hardware(), "load_before": round(os.getloadavg()[0], 2)},
        "versions": {name: version(name) for name in ("numba", "scipy", *peers())},
        "code": {s: hashlib.sha256((ROOT / s).read_bytes()).hexdigest()[:16] for s in SOURCES},
        "rows": [],
    }
    print(
        f"{record['hardware']['cpu']}, {torch.get_num_threads()} threads. Best wall time of ours;"
    )
    print("the others as multiples of it, and in brackets the same for processor time")
    print(f"{'':12} {'clouds x points':>15} {'queries':>9}")
    for kind in args.workloads:
        for function in KINDS[kind](1, 100, 10).values():
            function()  # compiles
        for sizes in (TRAIN, *OTHERS[kind]):
            if sizes[1] <= args.largest:
                row = time_row(kind, *sizes, args.repeats)
                record["rows"].append(row)
                print(line(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
