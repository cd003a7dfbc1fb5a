"""Rendering, masked reconstruction and contrast on rooms: what do frozen features of one small SparseUNet know?

    python benchmarks/rooms_paradigms.py [--work FOLDER] [--json PATH] [--minutes N]

Written before the first run; the rules are those of the chapter *Three ways to pre-train*, of which this is the half
on rooms, and all that is not said here is as in `rooms_labels.py`: 200 rooms without labels, 300 steps, the probes
`linear` and `nearest` with 5, 10, 20 or 40 labelled rooms, mIoU in percent on 30 others.

    random      no pre-training
    colour      the paper's task, images as points; a step has one crop, eight reference and eight target frames
    masked      masked reconstruction, as in `masked-rooms-mini`; a step has two crops
    contrast    two augmented views, as in `contrast-rooms-mini`; a step has two crops

Rates: half, all and twice the rate of the recipes, for each of the three with seed 91, which nothing else has. The one
with more in `linear` with 20 rooms on the 40 validation rooms of the composition for pre-training is taken, by code,
before the first pair (the smaller one if equal). All tries stay in the record; test rooms have no part in it.

Estimand: the mean difference of two conditions over seeds of pre-training and draws of labelled rooms, on these test
rooms. Interval: Student's over the pairs of one seed, 70 to 75, on one computer, at 95 % and at 1 - 0.05/4. Primary, by
the linear probe with 20 rooms: colour - random, masked - contrast, colour - masked, colour - contrast. No verdict with
fewer than four pairs. A run that diverges is a row with the message and is not replaced; its pairs are left out and
counted. Seed after seed all conditions, so pairs are whole whenever the script is stopped; the same command goes on.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import NotFinished, write_record
from rooms_labels import (
    BASE,
    HOW,
    OTHER_ROOMS,
    RUNS,
    TEST_ROOMS,
    effects,
    frozen,
    probes,
    rooms_of,
    trained,
)

from unipre3d.files import read_json
from unipre3d.recipes import recipes
from unipre3d.records import data_hash, hardware, read_record
from unipre3d.runs.recipe import Recipe, change
from unipre3d.tasks.scenes import ScenePoints
from unipre3d.worlds.rooms.disk import embedded_rooms

PAIRS = 6  # seeds
FIRST_SEED = 70
TRIAL_SEED = 91
RATES = (0.002, 0.004, 0.008)
PEER = {
    name: value for name, value in HOW.items() if name not in ("picture_every", "validate_every")
}
BASES: dict[str, Recipe] = {
    "colour": RUNS["point"],
    "masked": change(recipes["masked-rooms-mini"], **PEER),
    "contrast": change(recipes["contrast-rooms-mini"], **PEER),
}
ARMS = ("random", *BASES)
PRIMARY = dict.fromkeys(
    [("colour", "random"), ("masked", "contrast"), ("colour", "masked"), ("colour", "contrast")],
    "linear_20",
)
COMPARED = (*PRIMARY, ("masked", "random"), ("contrast", "random"))


def score_row(
    arm: str,  # of ARMS
    seed: int,
    work: Path,
    runs: dict[str, Recipe],
    train: ScenePoints,
    tests: list[ScenePoints],
) -> dict[str, Any]:
    "Frozen features of a condition; of a run that diverged, the message."
    row: dict[str, Any] = {"arm": arm, "seed": seed, "cpu": hardware()["cpu"]}
    folder = None
    if arm != "random":
        try:
            folder = trained(arm, seed, work, runs)
        except NotFinished as problem:
            if problem.ended != "diverged":
                raise
            return row | {"failed": str(problem)}
        row["seconds"] = round(read_record(folder / "record.json")["cpu_seconds"], 1)
    return row | probes(frozen(folder, seed), train, tests, seed)


def chosen_rates(tries: list[dict]) -> dict[str, float]:
    "For each task the rate with the best score on validation rooms, the smaller one if equal. Raises: SystemExit."
    chosen = {}
    for arm in BASES:
        known = [row for row in tries if row["arm"] == arm and "linear_20" in row]
        if not known:
            raise SystemExit(
                f"rooms_paradigms: {arm}: expected a rate that does not diverge, all of {RATES} did"
            )
        chosen[arm] = max(known, key=lambda row: (row["linear_20"], -row["lr"]))["lr"]
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/rooms_paradigms"), help="run folders"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("data/records/benchmark_rooms_paradigms.json")
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    before = read_json(args.json) if args.json.is_file() else {"tries": [], "rows": []}
    tries, rows = before["tries"], before["rows"]
    train = rooms_of(OTHER_ROOMS, ("train",))[0]
    tests = rooms_of(TEST_ROOMS, ("train", "val", "test"))
    held_out = rooms_of((BASE.data.rooms, 0), ("val",))
    facts: dict[str, Any] = dict(
        task="rendering, masked reconstruction and contrast: frozen features of rooms",
        rooms={
            "unlabelled": BASE.data.rooms * 2 // 3,
            "labelled": len(train),
            "test": sum(len(rooms) for rooms in tests),
            "sha256": data_hash(embedded_rooms(*TEST_ROOMS)),
        },
    )

    def late():
        return time.monotonic() - begun > 60 * args.minutes

    for arm, recipe in BASES.items():
        for rate in RATES:
            if any(row["arm"] == arm and row["lr"] == rate for row in tries):
                continue
            if late():
                return
            work, runs = args.work / f"rate-{rate}", {arm: change(recipe, lr=rate)}
            tries.append({"lr": rate} | score_row(arm, TRIAL_SEED, work, runs, train, held_out))
            print(tries[-1], flush=True)
            write_record(args.json, **facts, tries=tries, rows=rows)
    rates = chosen_rates(tries)
    runs = {arm: change(recipe, lr=rates[arm]) for arm, recipe in BASES.items()}
    facts["recipes"] = {arm: dict(lr=r.optimiser.lr, steps=r.run.steps) for arm, r in runs.items()}
    for seed in range(FIRST_SEED, FIRST_SEED + PAIRS):
        for arm in ARMS:
            if any(row["arm"] == arm and row["seed"] == seed for row in rows):
                continue
            if late():
                return
            rows.append(score_row(arm, seed, args.work, runs, train, tests))
            print(rows[-1], flush=True)
            found = effects(rows, COMPARED, PRIMARY)
            write_record(args.json, **facts, tries=tries, rows=rows, effects=found)


if __name__ == "__main__":
    main()
