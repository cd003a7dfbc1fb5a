"""Times the compiled selective scan beside plain torch, forward and backward, in one run.

    python benchmarks/scan.py [--workloads long object paper] [--repeats 5] [--json PATH]

Workloads (float32, clouds x tokens x channels, states): long is 16 x 1,024 x 192, 16; object is a layer of
object-mamba3d-mini, 16 x 65 x 192, 8; paper a layer of Mamba3D as published, 8 x 129 x 768, 16.

Beside it: the scan in chunks, in plain torch (what runs on a GPU without mamba-ssm), and mambapy's parallel scan
where that package can be imported. Runs alternate; the best of each counts. `distance` is the largest one, relative
to the norm, of output and gradients from float64.
"""

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from unipre3d.backbones.mamba import selective_scan
from unipre3d.records import hardware

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["unipre3d/backbones/mamba.py", "unipre3d/kernels/scan.py", "benchmarks/scan.py"]
WORKLOADS = {
    "long": (16, 1024, 192, 16),
    "object": (16, 65, 192, 8),
    "paper": (8, 129, 768, 16),
}


def inputs(b, length, d, n):
    "Random tensors of the right signs."
    g = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=g)
    return [
        normal(b, length, d),
        F.softplus(normal(b, length, d) - 1),
        -torch.exp(0.5 * normal(d, n)),
        normal(b, length, n),
        normal(b, length, n),
        normal(d),
    ]


def by_mambapy(u, delta, A, B, C, D):
    "mambapy's scan, from the decays and what is written to the states at the outputs."
    from mambapy.pscan import pscan

    decay = torch.exp(delta[..., None] * A)
    states = pscan(decay, (delta * u)[..., None] * B[:, :, None])
    return (states @ C[..., None])[..., 0] + D * u


def programs():
    "What is timed, by name."
    found = {
        "compiled": partial(selective_scan, backend="cpu"),
        "torch": partial(selective_scan, backend="torch"),
    }
    if importlib.util.find_spec("mambapy"):
        found["mambapy"] = by_mambapy
    return found


def results(scan, tensors, gradient):
    "Output and gradients; seconds of wall time forward and backward, and of processor time."
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    used, start = time.process_time(), time.perf_counter()
    y = scan(*leaves)
    middle = time.perf_counter()
    gradients = torch.autograd.grad(y, leaves, gradient)
    end = time.perf_counter()
    return [y.detach(), *gradients], (middle - start, end - middle, time.process_time() - used)


def time_workload(name, repeats, threads):
    "One row of the record."
    tensors = inputs(*WORKLOADS[name])
    gradient = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(threads)
    best = {}
    for _ in range(repeats + 1):
        for program, scan in programs().items():
            found, took = results(scan, tensors, gradient)
            if program not in best:  # a run to warm up
                best[program] = [float("inf")] * 3
                last = found
                continue
            best[program] = [min(pair) for pair in zip(best[program], took)]
            if program == "compiled":
                last = found
    row = {"workload": name, "shape": WORKLOADS[name], "threads": threads}
    for program, (forward, backward, used) in best.items():
        row[program] = {"forward_s": forward, "backward_s": backward, "processor_s": used}
        if program != "compiled":
            row[program]["ratio"] = used / best["compiled"][2]
    if name == "object":
        double = [x.double() for x in tensors]
        exact, _ = results(partial(selective_scan, backend="torch"), double, gradient.double())
        row["distance"] = max(float((a - b).norm() / b.norm()) for a, b in zip(last, exact))
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", default=[*WORKLOADS], choices=[*WORKLOADS])
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; the best counts")
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    most = torch.get_num_threads()
    record = {
        "benchmark": "scan_cpu",
        "date": datetime.date.today().isoformat(),
        "hardware": {**hardware(), "load_before": round(os.getloadavg()[0], 2)},
        "code": {s: hashlib.sha256((ROOT / s).read_bytes()).hexdigest()[:16] for s in SOURCES},
        "rows": [],
    }
    print("milliseconds: forward, backward, processor time of both; ratio of processor times")
    for name in args.workloads:
        for threads in sorted({1, most}):
            row = time_workload(name, args.repeats, threads)
            record["rows"].append(row)
            for program in programs():
                one = row[program]
                parts = [one[key] * 1e3 for key in ("forward_s", "backward_s", "processor_s")]
                print(
                    f"{name:7} {threads} threads  {program:9}",
                    *(f"{part:8.1f}" for part in parts),
                    f"{one.get('ratio', 1):7.1f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
