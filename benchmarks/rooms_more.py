"""Many rooms without labels once more: depth, distant references, another backbone, fine-tuning.

    python benchmarks/rooms_more.py [--work FOLDER] [--json PATH] [--minutes N]

Written before the first run; beside `rooms_labels.py`, and as it is there in all that is not said here: 200 rooms
without labels, 300 steps, the frozen features of each condition by the probes `linear` and `nearest` with 5, 10, 20
or 40 labelled rooms, mIoU in percent on 30 others. Seeds are new, 60 to 65: six pairs. No condition's rate is tried.

    random, none, point         as there: no pre-training, no images, images as points
    none.depth, point.depth     the objective also has the depth of the target views (metres, absolute error)
    near, far                   point with 2 reference and 2 target views, not 8 and 8; a target has a reference at
                                most 1 frame away, or at most 20 of the 24 that a room has
    ptv3.random, ptv3.none,     random, none and point with the small PTv3 of `scene-ptv3-mini` (319,824 numbers; the
    ptv3.point                  SparseUNet has 617,712) for the same steps
    tuned_5.*, tuned_20.*       from random, none and point of the same seed: all of the SparseUNet is fine-tuned for
                                200 steps on 5 or 20 rooms, the first ones of the probes' order, with the values of
                                `sem-rooms-mini`; nothing is chosen, the last step counts, without voting

The weight of depth is 0.2 or 0.02: whichever has more in `linear` with 20 rooms on the 40 validation rooms of the
composition for pre-training, once, with seed 90 and images as points. The code chooses (0.2 if equal) before the
first seed, and both trials stay in the record. Test rooms have no part in it.

Why 2 views: of 24 frames, 8 references show most of a room wherever they are. Of the points that a target view shows
some reference shows 89 % if it is within 1 frame and 83 % if within 20; of 2 references it is 65 % and 40 %, and 37 %
of all points. What differs between near and far is this distance alone (on average 1 and 8 frames, to the nearest of
both references 1 and 5). Neither is comparable with point, which also has more target views.

Estimand: the mean difference of two conditions over seeds of pre-training and draws of labelled rooms, on these test
rooms. Interval: Student's over the pairs of one seed, on one computer, at 95 % and at 1 - 0.05/7. Primary, by the
linear probe with 20 rooms: point.depth - point, none.depth - none, near - far, ptv3.point - ptv3.none, ptv3.point -
ptv3.random; by the mIoU at the end of fine-tuning: point - random with 5 rooms, and the same with 20. All are
expected above zero: depth adds to colour as it did on objects, the rest is the paper's direction. An interval below
zero is a failure of that direction at this scale; one that holds zero is undecided, or level where it lies within two
points. What leaves zero out at 95 % only is said with that. No verdict with fewer than four pairs.

Fine-tuning is at a plateau if it gains less than 1 point of mIoU over the last half of its steps, in the mean of the
seeds; the rate falls to zero over all steps, so this says whether the length was enough, not that no length is
better. Without a plateau a difference is one at this length. The score at half is for the reader, as all else.

A run that diverges is a row with the message and is not replaced, and so is what should have started from it. Its
pairs are left out and counted; a comparison that has lost two or more is void. Order: the two trials, then seed after
seed all conditions as above, so pairs are whole whenever the script is stopped; the same command goes on.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import rooms_labels
import torch
from common import NotFinished, finished_run, write_record
from rooms_labels import (
    BASE,
    HOW,
    LABELLED,
    OTHER_ROOMS,
    TEST_ROOMS,
    effects,
    frozen,
    probes,
    rooms_of,
    trained,
)
from torch import nn

from unipre3d.data.readers import Subset
from unipre3d.files import read_json
from unipre3d.recipes import finetune_recipes, recipes
from unipre3d.records import data_hash, hardware, read_record
from unipre3d.runs.fit import Task
from unipre3d.runs.recipe import Recipe, change, from_values, to_values
from unipre3d.tasks.metrics import SemanticScore
from unipre3d.tasks.scenes import SceneData, ScenePoints, describe_rooms, scene_samples
from unipre3d.tasks.semantic import SemanticRecipe, point_probabilities, semantic_loss
from unipre3d.worlds.rooms.disk import embedded_rooms

PAIRS = 6  # seeds
FIRST_SEED = 60
TRIAL_SEED = 90
WEIGHTS = (0.2, 0.02)  # of depth, which are tried
TUNE_STEPS = 200
TUNED = (5, 20)  # rooms with labels
STARTS = ("random", "none", "point")
MOST_LOST = 1  # pairs that a comparison may lose to runs that diverged
PLATEAU = 1.0  # points of mIoU
SPLITS = ("train", "val", "test")
PTV3 = change(recipes["scene-ptv3-mini"], **HOW)
ARMS = (
    *("random", "none", "point", "none.depth", "point.depth", "near", "far"),
    *("ptv3.random", "ptv3.none", "ptv3.point"),
    *(f"tuned_{count}.{start}" for count in TUNED for start in STARTS),
)
PRIMARY = {
    ("point.depth", "point"): "linear_20",
    ("none.depth", "none"): "linear_20",
    ("near", "far"): "linear_20",
    ("ptv3.point", "ptv3.none"): "linear_20",
    ("ptv3.point", "ptv3.random"): "linear_20",
    ("tuned_5.point", "tuned_5.random"): "miou",
    ("tuned_20.point", "tuned_20.random"): "miou",
}
COMPARED = (
    *PRIMARY,
    *(("point", "none"), ("point", "random"), ("none", "random")),
    *(("point.depth", "none.depth"), ("ptv3.none", "ptv3.random")),
    *(
        (f"tuned_{count}.{first}", f"tuned_{count}.{second}")
        for count in TUNED
        for first, second in (("point", "none"), ("none", "random"))
    ),
)
SCORES = (*rooms_labels.SCORES, "miou", "miou_half")


def runs_of(weight: float) -> dict[str, Recipe]:
    "The pre-trainings, with a weight of depth."
    none, point = (rooms_labels.RUNS[arm] for arm in ("none", "point"))
    terms = {"colour": 1.0, "depth": weight}
    few = change(point, n_ref=2, n_target=2)
    return {
        "none": none,
        "point": point,
        "none.depth": change(none, terms=terms),
        "point.depth": change(point, terms=terms),
        "near": change(few, max_gap=1),
        "far": change(few, max_gap=20),
        "ptv3.none": change(PTV3, fusion="NoFusion"),
        "ptv3.point": change(PTV3, fusion="PointFusion"),
    }


# ---- fine-tuning


@dataclass(frozen=True)
class FewRoomsData(SceneData):
    "Some of the rooms that have labels."

    places: tuple[int, ...] = ()  # of the training rooms of OTHER_ROOMS


@dataclass(frozen=True)
class FewRooms(SemanticRecipe):
    "Semantic segmentation with few rooms, scored on all rooms of TEST_ROOMS at half of the steps and at the end."

    data: FewRoomsData = FewRoomsData()

    task: ClassVar[str] = "semantic segmentation with few rooms"

    def build_task(self, device: str | torch.device = "cpu") -> Task:
        "Readers, model, loss and scores."
        source = rooms_of(OTHER_ROOMS, ("train",))[0].source
        train = Subset(source, self.data.places)
        tests = rooms_of(TEST_ROOMS, SPLITS)

        def loss(model, batch):
            return semantic_loss(model, batch, self.objective)

        def validate(model):
            return {"val_miou": tuned_score(model, tests)}  # chooses nothing

        def test(model, folder):
            return {"miou": tuned_score(model, tests)}, {}

        return Task(
            self.task,
            self.build_model(len(train.classes)),
            scene_samples(self.data, train, self.run.seed),
            loss,
            test,
            data=describe_rooms(self.data, train, None, tests[0].source)
            | {"test": sum(len(rooms) for rooms in tests)},
            classes=train.classes,
            columns=("train_allacc", "val_miou"),
            validate=validate,
        )


def tuned_score(model: nn.Module, tests: list[ScenePoints]) -> float:
    "mIoU (0..1) over all points of rooms, of classes that occur."
    score = SemanticScore(len(tests[0].source.classes))
    for rooms in tests:
        for index in range(len(rooms)):
            truth = torch.from_numpy(rooms.rows(index)["segment"]).long()
            score.update(point_probabilities(model, rooms, index).argmax(1), truth)
    return float(score.compute()["miou_present"])


def tuning(count: int, seed: int, rooms: int) -> FewRooms:
    "The recipe of a fine-tuning with the first labelled rooms of a seed's order, of so many rooms."
    order = np.random.default_rng(seed).permutation(rooms)[: max(LABELLED)]
    usual = finetune_recipes["sem-rooms-mini"]
    return change(
        from_values(FewRooms, to_values(usual)),
        places=tuple(int(place) for place in order[:count]),
        steps=TUNE_STEPS,
        validation="none",
        validate_every=TUNE_STEPS // 2,
        save_every=TUNE_STEPS // 2,
        votes=0,
        workers=0,
        seed=seed,
    )


def tuned_row(arm: str, seed: int, work: Path, runs: dict[str, Recipe], rooms: int) -> dict:
    "A fine-tuning: mIoU (percent) at half and at the end."
    how, start = arm.split(".")
    init = "none" if start == "random" else trained(start, seed, work, runs)
    recipe = tuning(int(how.removeprefix("tuned_")), seed, rooms)
    folder = finished_run(f"rooms-{arm}", recipe, work / f"{arm}-{seed}", init)
    record = read_record(folder / "record.json")
    [half] = record["history"]["val"]["val_miou"]
    return {
        "miou_half": round(100 * half, 3),
        "miou": round(100 * record["metrics"]["miou"], 3),
        "seconds": round(record["train_seconds"], 1),
    }


# ---- the table


def probed_row(
    arm: str,
    seed: int,
    work: Path,
    runs: dict[str, Recipe],
    train: ScenePoints,
    tests: list[ScenePoints],
) -> dict:
    "Frozen features of a condition."
    row: dict[str, Any] = {}
    folder = None
    if not arm.endswith("random"):
        folder = trained(arm, seed, work, runs)
        record = read_record(folder / "record.json")
        row["psnr"] = round(record["metrics"]["psnr"], 3)
        row["seconds"] = round(record["train_seconds"], 1)
    recipe = PTV3 if arm.startswith("ptv3.") else BASE
    return row | probes(frozen(folder, seed, recipe), train, tests, seed)


def score_row(arm: str, seed: int, work: Path, runs: dict, train: ScenePoints, tests: list) -> dict:
    "Everything about a condition and a seed; of a run that diverged, the message."
    begun = time.process_time()
    try:
        if arm.startswith("tuned_"):
            row = tuned_row(arm, seed, work, runs, len(train))
        else:
            row = probed_row(arm, seed, work, runs, train, tests)
    except NotFinished as problem:
        if problem.ended != "diverged":
            raise
        row = {"failed": str(problem)}
    row["processor_seconds"] = round(time.process_time() - begun, 1)  # of this part of the script
    return {"arm": arm, "seed": seed, "cpu": hardware()["cpu"]} | row


def choose_weight(trials: list[dict]) -> float:
    "The weight of depth whose trial has the better score; the first one if they are equal. Raises: SystemExit."
    known = [row for row in trials if "linear_20" in row]
    if not known:
        raise SystemExit("rooms_more: expected a trial that did not diverge, both did")
    return max(known, key=lambda row: row["linear_20"])["weight"]


def table(rows: list[dict]) -> list[dict]:
    "Every comparison, with the pairs that it lost to runs that diverged."
    found = effects(rows, COMPARED, PRIMARY, SCORES)
    failed = {(row["arm"], row["seed"]) for row in rows if "failed" in row}
    for row in found:
        lost = {seed for arm, seed in failed if arm in (row["first"], row["second"])}
        row["failed"] = len(lost)
        if len(lost) > MOST_LOST:
            row["verdict"] = f"void: {len(lost)} pairs failed"
    return found


def plateaus(rows: list[dict]) -> list[dict]:
    "What the last half of fine-tuning gained, in the mean of the seeds."
    found = []
    for arm in ARMS:
        gains = [
            row["miou"] - row["miou_half"] for row in rows if row["arm"] == arm and "miou" in row
        ]
        if gains:
            gain = round(float(np.mean(gains)), 3)
            found.append({"arm": arm, "runs": len(gains), "gain": gain, "plateau": gain < PLATEAU})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/rooms_more"), help="run folders")
    parser.add_argument("--json", type=Path, default=Path("data/records/benchmark_rooms_more.json"))
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    before = read_json(args.json) if args.json.is_file() else {"trials": [], "rows": []}
    trials, rows = before["trials"], before["rows"]
    train = rooms_of(OTHER_ROOMS, ("train",))[0]
    tests = rooms_of(TEST_ROOMS, SPLITS)
    facts: dict[str, Any] = dict(
        task="frozen and fine-tuned features of rooms: depth, references, PTv3",
        rooms={
            "unlabelled": BASE.data.rooms * 2 // 3,
            "labelled": len(train),
            "test": sum(len(rooms) for rooms in tests),
            "sha256": data_hash(embedded_rooms(*TEST_ROOMS)),
        },
    )

    def late():
        return time.monotonic() - begun > 60 * args.minutes

    for weight in WEIGHTS:
        if any(row["weight"] == weight for row in trials):
            continue
        if late():
            return
        held_out = rooms_of((BASE.data.rooms, 0), ("val",))
        work = args.work / f"depth-{weight}"
        row = score_row("point.depth", TRIAL_SEED, work, runs_of(weight), train, held_out)
        trials.append({"weight": weight} | row)
        print(trials[-1], flush=True)
        write_record(args.json, **facts, trials=trials, rows=rows)
    weight = choose_weight(trials)
    runs = runs_of(weight)
    facts["depth_weight"] = weight
    facts["recipes"] = {arm: dict(lr=r.optimiser.lr, steps=r.run.steps) for arm, r in runs.items()}
    tuned = tuning(TUNED[0], FIRST_SEED, len(train))
    facts["recipes"]["tuned"] = dict(lr=tuned.optimiser.lr, steps=tuned.run.steps)
    for seed in range(FIRST_SEED, FIRST_SEED + PAIRS):
        for arm in ARMS:
            if any(row["arm"] == arm and row["seed"] == seed for row in rows):
                continue
            if late():
                return
            rows.append(score_row(arm, seed, args.work, runs, train, tests))
            print(rows[-1], flush=True)
            more = dict(effects=table(rows), plateaus=plateaus(rows))
            write_record(args.json, **facts, trials=trials, rows=rows, **more)


if __name__ == "__main__":
    main()
