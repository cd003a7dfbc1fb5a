"""How long saving a run takes, of this checkout beside an older commit, alternately.

    python benchmarks/saving.py [--against REV] [--rounds 5] [--saves 20] [--json PATH]

A save is what the loop does every `save_every` steps: the state of the run, and the checkpoint. Each process makes a
backbone with its optimiser's memory and the running average of its weights, and saves it again and again; the median
of all saves counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from common import checkouts, write_record

SIZES = {
    "mini": dict(width=96, depth=4, num_heads=4, encoder_widths=[32, 64, 64], encoder_dims=96),
    "large": dict(width=256, depth=8, num_heads=4, encoder_dims=256),
}
PROGRAM = """
import json, sys, time
from pathlib import Path
import torch
from torch.optim.swa_utils import AveragedModel
from unipre3d.backbones import StandardTransformer
try:
    from unipre3d.runs.checkpoint import run_state, save_state, save_tensors
except ImportError:  # the older commit
    from unipre3d.pretrain import run_state, save_tensors

    def save_state(folder, state, meta):
        save_tensors(folder / "resume.safetensors", state, meta)

folder, count, sizes = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
model = StandardTransformer(**sizes)
average = AveragedModel(model)
adamw = torch.optim.AdamW(model.parameters())
sum(p.square().sum() for p in model.parameters()).backward()
adamw.step()
times = []
for step in range(count + 2):
    start = time.perf_counter()
    save_state(folder, run_state(model, average, adamw), {"step": step})
    save_tensors(folder / "checkpoint.safetensors", average.module.state_dict(), {"step": step})
    times.append(time.perf_counter() - start)
print(json.dumps(times[2:]))
"""


def save_times(tree, sizes, saves):
    "Seconds of the saves of one process of a checkout."
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", PROGRAM, folder, str(saves), json.dumps(sizes)]
        env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", help="an older commit to run alternately")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--saves", type=int, default=20, help="in each process")
    parser.add_argument("--json", help="where to write the record")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        trees = checkouts(args.against, folder)
        for name, sizes in SIZES.items():
            times = {side: [] for side in trees}
            for _ in range(args.rounds):
                for side, tree in trees.items():
                    times[side] += save_times(tree, sizes, args.saves)
            rows[name] = {side: round(statistics.median(own), 5) for side, own in times.items()}
            if args.against:
                rows[name]["ratio"] = round(rows[name]["now"] / rows[name][args.against], 2)
            print(name, rows[name])
    write_record(args.json, against=args.against, median_s=rows)


if __name__ == "__main__":
    main()
