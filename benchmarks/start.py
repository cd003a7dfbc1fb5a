"""Processor time of what a user waits for before any work: help, mistakes, imports.

    python benchmarks/start.py [--repeats 5] [--json PATH] [--old CHECKOUT]

The least of several runs counts, user and system time of the new process. With an older checkout, its runs alternate
with ours.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from common import ROOT, write_record

COMMANDS = (
    "--help",
    "pretrain --help",
    "finetune --help",
    "finetune cls-shapes-mini --help",
    "reproduce --help",
    "render --help",
    "data prepare --help",
    "data rooms --help",
    "doctor --help",
    "pretrain object-transformer-min",
    "pretrain --stepz 3",
)
IMPORTS = ("torch", "unipre3d.recipes")


def processor_time(words, package):
    "User and system seconds of one new Python process that sees the package of a checkout."
    env = os.environ | {
        "PYTHONPATH": str(package),
        "OMP_NUM_THREADS": "1",
    }  # the same Python for both
    before = os.times()
    subprocess.run([sys.executable, *words], env=env, capture_output=True, cwd=package, timeout=300)
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--old", type=Path, help="an older checkout, timed alternately")
    args = parser.parse_args()
    runs = {f"unipre3d {words}": ["-m", "unipre3d", *words.split()] for words in COMMANDS}
    runs |= {f"import {module}": ["-c", f"import {module}"] for module in IMPORTS}
    packages = {"seconds": ROOT} | ({"old_seconds": args.old.resolve()} if args.old else {})
    rows = {}
    for name, words in runs.items():
        found = {column: [] for column in packages}
        for _ in range(args.repeats):
            for column, package in packages.items():
                found[column].append(processor_time(words, package))
        rows[name] = {column: round(min(times), 3) for column, times in found.items()}
        print(f"{name:45}" + "".join(f"{value:8.2f}" for value in rows[name].values()))
    write_record(args.json, repeats=args.repeats, rows=rows)


if __name__ == "__main__":
    main()
