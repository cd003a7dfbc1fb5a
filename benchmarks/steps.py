"""Times training steps of whole runs, of this checkout beside an older commit, alternately.

    python benchmarks/steps.py [--against REV] [--recipes NAME ...] [--steps 40] [--rounds 3] [--json PATH]

Each run is what a user types, `unipre3d pretrain NAME` or `unipre3d finetune NAME`, in a process of its own; the
older commit is unpacked into a temporary folder. A step's time is the median over the steps after the first quarter,
taken from the run's own metrics.csv; of the rounds the median counts. Both sides use the same Python, the same
threads and the same cached data. A record that is there keeps the rows of recipes that are not named; each row has
its own date and code.
"""

import argparse
import csv
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import checkouts, write_record
from tqdm import tqdm

from unipre3d.records import code_version

RECIPES = {
    "object-transformer-mini": "pretrain",
    "scene-sparseunet-mini": "pretrain",
    "cls-shapes-mini": "finetune",
    "part-shapes-mini": "finetune",
    "sem-rooms-mini": "finetune",
    "inst-rooms-mini": "finetune",
}
NOW = {  # words for this checkout, so that both sides do the same work
    "object-transformer-mini": ["--num-groups", "64"],
}
START = "import sys; from unipre3d.cli import main; sys.exit(main())"  # older commits have no -m


def step_seconds(metrics):
    "The median time of a step of a run, without its beginning."
    with open(metrics, newline="") as file:
        clock = [float(row["seconds"]) for row in csv.DictReader(file)]
    first = len(clock) // 4
    return statistics.median(b - a for a, b in zip(clock[first:], clock[first + 1 :]))


def run(tree, name, steps, words=()):
    "One run of a checkout: seconds of a step, and the record."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-c", START, RECIPES[name], name, "--steps", str(steps)]
        done = subprocess.run(
            [*command, *words, "--out", str(out), "--device", "cpu"],
            env=os.environ | {"PYTHONPATH": str(tree)},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{tree} {name}: {done.stderr.strip().splitlines()[-1]}")
        record = json.loads((out / "record.json").read_text())
        return step_seconds(out / "metrics.csv"), record


def compare(trees, name, steps, rounds, bar):
    "All rounds of a recipe: a row for each checkout."
    times = {side: [] for side in trees}
    memory = {}
    for _ in range(rounds):
        for side, tree in trees.items():
            words = NOW.get(name, []) if side == "now" else []
            seconds, record = run(tree, name, steps, words)
            times[side].append(round(seconds, 4))
            memory[side] = round(record["peak_memory_mb"])
            bar.update()
    return {
        side: {
            "step_s": statistics.median(times[side]),
            "rounds_s": times[side],
            "peak_memory_mb": memory[side],
        }
        for side in trees
    }


def earlier(path, against):
    "Rows of a record that is there already, against the same commit; recipes that are not timed again stay."
    if path is None or not Path(path).is_file():
        return {}
    record = json.loads(Path(path).read_text())
    return record["recipes"] if record["against"] == against else {}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", help="an older commit to run alternately")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="where to write the record")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trees = checkouts(args.against, folder)
        rows = earlier(args.json, args.against)
        bar = tqdm(total=len(args.recipes) * args.rounds * len(trees), desc="runs")
        for name in args.recipes:
            rows[name] = compare(trees, name, args.steps, args.rounds, bar)
            line = ", ".join(f"{side} {row['step_s']:.3f} s" for side, row in rows[name].items())
            if args.against:
                ratio = rows[name][args.against]["step_s"] / rows[name]["now"]["step_s"]
                rows[name]["ratio"] = round(ratio, 2)
                line += f", {ratio:.2f} times as fast"
            tqdm.write(f"{name}: {line}")
            when = datetime.date.today().isoformat()
            rows[name] |= dict(steps=args.steps, code=code_version(), date=when)
            write_record(args.json, against=args.against, recipes=rows)
        bar.close()


if __name__ == "__main__":
    main()
