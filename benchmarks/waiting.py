"""How long a training step takes beside a busy process, by how OpenMP's waiting threads behave.

    python benchmarks/waiting.py [--seconds 6] [--rounds 5] [--busy 1] [--json PATH]

Each setting gets a new process of the default recipe with two threads; settings alternate, and the median of all its
steps counts. `--busy 0` is the quiet machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import ROOT, write_record

SETTINGS = {
    "default": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
STEPS = """
import json, sys, time, torch
from unipre3d.recipes import recipes
from unipre3d.runs.recipe import change

torch.set_num_threads(2)
task = change(recipes["object-transformer-mini"], workers=0, batch_size=16).build_task()
batch = task.samples.__getitems__([(i, 1) for i in range(16)])
adamw = torch.optim.AdamW(task.model.parameters())
times = []
end = None
while end is None or time.perf_counter() < end:
    start = time.perf_counter()
    for p in task.model.parameters():
        p.grad = None
    task.loss(task.model, batch)[0].backward()
    adamw.step()
    times.append(time.perf_counter() - start)
    if len(times) == 2:
        end = time.perf_counter() + float(sys.argv[1])
print(json.dumps(times[2:]))
"""


def step_times(setting, seconds):
    "Seconds of the steps of one new process."
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env |= setting | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    words = [sys.executable, "-c", STEPS, str(seconds)]
    return json.loads(
        subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6, help="of steps in each process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=1, help="processes that do nothing but compute")
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    found = {name: [] for name in SETTINGS}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        for _ in range(args.rounds):
            for name, setting in SETTINGS.items():
                found[name] += step_times(setting, args.seconds)
    finally:
        for process in busy:
            process.kill()
    medians = {name: round(statistics.median(times), 4) for name, times in found.items()}
    for name, median in medians.items():
        print(f"{name:26}{1000 * median:9.1f} ms a step   {median / medians['default']:.2f}")
    write_record(args.json, busy=args.busy, medians=medians)


if __name__ == "__main__":
    main()
