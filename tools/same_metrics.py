"""Runs recipes at two commits and compares what they write into metrics.csv: every column but the clock, bit for bit.

    python tools/same_metrics.py REV_A REV_B --recipes NAME ... [--steps 60] [--edit-b PATCH] [--keep FOLDER]

Each run is what a user types, in a process of its own with one thread, on the processor, with the same Python and the
same cache. In the place of a commit may stand a folder with runs that were made before, one of each name. `--edit-b`
applies a patch to the second commit first: changes that were meant are taken back with it, to compare the rest.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from common import unpack  # noqa: E402
from steps import START  # noqa: E402

CLOCK = ("seconds",)  # columns that no two runs share
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def run(tree, name, steps, out, options):
    "The metrics.csv of a run of a checkout."
    command = "pretrain" if name.startswith(("object-", "scene-")) else "finetune"
    how = ["--steps", str(steps), "--workers", "0", "--out", str(out), *options]
    done = subprocess.run(
        [sys.executable, "-c", START, command, name, *how],
        env=os.environ | ONE_THREAD | {"PYTHONPATH": str(tree)},
        cwd=out.parent,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        raise SystemExit(f"{name}: expected a run, found {last}")
    return out / "metrics.csv"


def rows_of(path):
    "The rows of a metrics.csv, without the clock."
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def difference(first, second, names):
    "The first row and column in which two runs differ, in words; None where they are equal."
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} rows"
    for one, other in zip(first, second):
        for column in names:
            if one[column] != other[column]:
                return f"step {one['step']}, {column}: {one[column]} and {other[column]}"
    return None


def compare(first, second):
    "One line about two files, and whether they are equal."
    first, second = rows_of(first), rows_of(second)
    names = [name for name in first[0] if name in second[0]]
    alone = sorted(set(first[0]) ^ set(second[0]))
    found = difference(first, second, names)
    if found:
        return f"differs first at {found}", False
    note = f"; only one side has {', '.join(alone)}" if alone else ""
    return f"{len(first)} rows of {len(names)} columns are equal{note}", True


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revisions", nargs=2, help="commits, or folders of runs")
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--options-a", default="", help="further options of the first commit")
    parser.add_argument("--options-b", default="", help="further options of the second commit")
    parser.add_argument("--edit-b", help="a patch that the second commit gets")
    parser.add_argument("--keep", help="where the runs stay; otherwise they are removed")
    args = parser.parse_args()
    options = (args.options_a.split(), args.options_b.split())
    differ = 0
    with tempfile.TemporaryDirectory() as scratch:
        trees = []
        for side, revision in zip("ab", args.revisions):
            tree = Path(scratch) / side
            if not Path(revision).is_dir():
                tree.mkdir()
                unpack(revision, tree)
            trees.append(tree)
        if args.edit_b:
            patch = Path(args.edit_b).resolve()
            command = ["patch", "-p1", "-s", "-i", str(patch)]
            subprocess.run(command, cwd=trees[1], check=True)
        for name in args.recipes:
            found = []
            for tree, revision, more in zip(trees, args.revisions, options):
                if not tree.is_dir():
                    found.append(Path(revision) / name / "metrics.csv")
                    continue
                home = Path(args.keep or scratch).resolve() / f"runs-{tree.name}"
                home.mkdir(parents=True, exist_ok=True)
                found.append(run(tree, name, args.steps, home / name, more))
            line, same = compare(*found)
            differ += not same
            print(f"{name}: {line}", flush=True)
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
