"""Many rooms without labels, then few with: what do frozen features of a small SparseUNet know?

    python benchmarks/rooms_labels.py [--work FOLDER] [--json PATH] [--minutes N]

Written before the first run. 200 rooms are seen in pre-training, without their labels, by four conditions which
differ in nothing but what is said here; the rates and all else are those of `scene-sparseunet-mini`:

    random     no pre-training
    none       the paper's objective without images
    feature    images by feature fusion, which the paper has for objects
    point      images as points, which the paper has for rooms

Other rooms have labels: 5, 10, 20 or 40 of them, the first ones in an order that the seed draws, and 30 for the test.
Their frozen features are probed in two ways, neither of which has a rate: `linear`, a layer with the smallest
cross-entropy and penalty on up to 1,000 labelled voxels of each room, and `nearest`, the class of the most alike
voxel (cosine) among up to 250 of each. The score is mIoU over all points of the test rooms, of classes that occur, in
percent.

Estimand: the mean difference of two conditions over seeds of pre-training and draws of labelled rooms, on these test
rooms. Interval: Student's over six pairs of one seed, on one computer. Primary, with 20 rooms and the linear probe,
at 95 % and at 1 - 0.05/4: point - none, feature - none, point - feature, point - random. The paper's directions are
all above zero. An interval below it is a failure of that direction at this scale; one that holds zero is undecided,
or level where it lies within two points. No verdict with fewer than four pairs. The rest is for the reader. Seeds go
round the conditions, so pairs are whole whenever the script is stopped; the same command goes on.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import finished_run, write_record
from torch import Tensor, nn
from unified import logistic

from unipre3d.backbones.backbone import Backbone
from unipre3d.data.readers import Reader
from unipre3d.data.scannet import ScanNetFrames
from unipre3d.files import read_json
from unipre3d.recipes import recipes
from unipre3d.records import data_hash, hardware, read_record
from unipre3d.reproduce.second import judge, paired_interval
from unipre3d.runs.recipe import Recipe, change
from unipre3d.runs.run import build_backbone
from unipre3d.runs.starts import start_from
from unipre3d.tasks.heads import propagate
from unipre3d.tasks.metrics import SemanticScore
from unipre3d.tasks.scenes import ScenePoints
from unipre3d.worlds.rooms.disk import embedded_rooms

PAIRS = 6  # seeds
FIRST_SEED = 50
LABELLED = (5, 10, 20, 40)  # rooms with labels
VOXELS = {"linear": 1000, "nearest": 250}  # of a labelled room that a probe reads
HOW: dict[str, Any] = dict(
    rooms=300,  # 200 of them to train on
    steps=300,
    warmup=20,
    workers=0,
    picture_every=0,
    validate_every=0,
    save_every=100,
)  # what the recipe of a small backbone on rooms is changed to
BASE = change(recipes["scene-sparseunet-mini"], **HOW)
OTHER_ROOMS = (
    60,
    1,
)  # with labels: how many, and the seed that composes them; the 40 training rooms are used
TEST_ROOMS = 30, 2  # how many and their seed; all of them are test rooms
RUNS: dict[str, Recipe] = {
    "none": change(BASE, fusion="NoFusion"),
    "feature": change(BASE, fusion="FeatureFusion"),
    "point": change(BASE, fusion="PointFusion"),
}
ARMS = ("random", *RUNS)
PRIMARY = (("point", "none"), ("feature", "none"), ("point", "feature"), ("point", "random"))
COMPARED = (*PRIMARY, ("none", "random"), ("feature", "random"))
SCORES = (*(f"{probe}_{count}" for probe in VOXELS for count in LABELLED), "psnr")
VOXEL_SIZE = BASE.model.backbone_options["voxel_size"]


def trained(arm: str, seed: int, work: Path, runs: dict[str, Recipe] = RUNS) -> Path:
    "A finished run."
    recipe = change(runs[arm], seed=seed)
    return finished_run(f"rooms-{arm}", recipe, work / f"{arm}-{seed}")


def frozen(folder: Path | None, seed: int, recipe: Recipe = BASE) -> Backbone:
    "The backbone of a run, or a random one."
    backbone = build_backbone(change(recipe, seed=seed))
    if folder is not None:
        start_from(backbone, folder)
    return backbone.eval()


def whole_rooms(reader: Reader) -> ScenePoints:
    "Rooms in voxels, with a label for every point."
    return ScenePoints(reader, voxel_size=VOXEL_SIZE, features=BASE.data.features)


@torch.no_grad()
def room_features(backbone: Backbone, rooms: ScenePoints, index: int) -> tuple[Tensor, Any]:
    "A row for each voxel of a room, and the room."
    scene = rooms.scene(index)
    return propagate(backbone(scene.points), scene.points, voxel_size=VOXEL_SIZE), scene


def voxel_labels(scene) -> Tensor:
    "The class of each voxel; -1 where no point has one."
    label = torch.full((len(scene.points),), -1)
    return label.scatter_reduce(0, scene.inverse, scene.label, "amax")


def labelled_rows(backbone: Backbone, rooms: ScenePoints, index: int) -> tuple[Tensor, Tensor]:
    "Features and classes of some voxels of a room, in an order that depends on the room only."
    feat, scene = room_features(backbone, rooms, index)
    label = voxel_labels(scene)
    known = (label >= 0).nonzero()[:, 0]
    draw = torch.randperm(len(known), generator=torch.Generator().manual_seed(index))
    known = known[draw[: max(VOXELS.values())]]
    return feat[known], label[known]


def largest(layer: nn.Linear, query: Tensor) -> Tensor:
    "The class with the largest logit."
    return layer(query).argmax(1)


def nearest(rows: Tensor, label: Tensor, query: Tensor) -> Tensor:
    "The class of the most alike row, by cosine."
    rows = F.normalize(rows)
    found = [(part @ rows.T).argmax(1) for part in F.normalize(query).split(4096)]
    return label[torch.cat(found)]


def probes(backbone: Backbone, train: ScenePoints, tests: list[ScenePoints], seed: int) -> dict:
    "mIoU (percent) for each probe and number of labelled rooms."
    order = np.random.default_rng(seed).permutation(len(train))[: max(LABELLED)]
    rows = [labelled_rows(backbone, train, int(index)) for index in order]
    everything = torch.cat([feat for feat, _ in rows])
    middle, spread = everything.mean(0), everything.std(0).clamp_min(1e-9)
    classes = len(train.source.classes)
    answer = {}
    for count in LABELLED:
        some = {}
        for probe, most in VOXELS.items():
            feat = torch.cat([(feat[:most] - middle) / spread for feat, _ in rows[:count]])
            some[probe] = feat, torch.cat([label[:most] for _, label in rows[:count]])
        answer["linear", count] = partial(largest, logistic(*some["linear"], classes))
        answer["nearest", count] = partial(nearest, *some["nearest"])
    score = {key: SemanticScore(classes) for key in answer}
    with torch.no_grad():
        for rooms in tests:
            for index in range(len(rooms)):
                feat, scene = room_features(backbone, rooms, index)
                feat = (feat - middle) / spread
                for key, probe in answer.items():
                    score[key].update(probe(feat)[scene.inverse], scene.label)
    return {
        f"{probe}_{count}": round(100 * float(s.compute()["miou_present"]), 3)
        for (probe, count), s in score.items()
    }


def rooms_of(how: tuple[int, int], splits: tuple[str, ...]) -> list[ScenePoints]:
    "Composed rooms of some splits."
    rooms, seed = how
    root = embedded_rooms(rooms=rooms, seed=seed)
    return [whole_rooms(ScanNetFrames(root, split=split, labels=20)) for split in splits]


def effects(
    rows: list[dict],
    compared: Sequence[tuple[str, str]] = COMPARED,  # conditions: first - second
    primary: Mapping[tuple[str, str], str] = dict.fromkeys(PRIMARY, "linear_20"),  # by which score
    scores: Sequence[str] = SCORES,
) -> list[dict]:
    "Every comparison by every score that both conditions have."
    by = {(row["arm"], row["seed"]): row for row in rows}
    found = []
    for first, second in compared:
        for score in scores:
            seeds = sorted({seed for _, seed in by})
            pairs = [(by.get((first, s), {}), by.get((second, s), {})) for s in seeds]
            d = np.array([a[score] - b[score] for a, b in pairs if score in a and score in b])
            if not len(d):
                continue
            row: dict[str, Any] = {"first": first, "second": second, "score": score}
            row |= {"pairs": len(d), "mean": round(float(d.mean()), 3)}
            row["primary"] = primary.get((first, second)) == score
            for name, level in (("", 0.95), ("_strict", 1 - 0.05 / len(primary))):
                if len(d) >= 4:
                    i = paired_interval(d, level)
                    row |= {f"low{name}": round(i.low, 3), f"high{name}": round(i.high, 3)}
            row["verdict"] = judge(d, 4) if score != "psnr" else ""
            found.append(row)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/rooms_labels"), help="run folders")
    parser.add_argument("--json", type=Path, default=Path("data/records/benchmark_rooms.json"))
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    rows = read_json(args.json)["rows"] if args.json.is_file() else []
    train = rooms_of(OTHER_ROOMS, ("train",))[0]
    tests = rooms_of(TEST_ROOMS, ("train", "val", "test"))
    facts = dict(
        task="frozen features of rooms by number of labelled rooms",
        recipes={arm: dict(lr=r.optimiser.lr, steps=r.run.steps) for arm, r in RUNS.items()},
        rooms={
            "unlabelled": BASE.data.rooms * 2 // 3,
            "labelled": len(train),
            "test": sum(len(rooms) for rooms in tests),
            "sha256": data_hash(embedded_rooms(*TEST_ROOMS)),
        },
    )
    for seed in range(FIRST_SEED, FIRST_SEED + PAIRS):
        for arm in ARMS:
            if any(row["arm"] == arm and row["seed"] == seed for row in rows):
                continue
            if time.monotonic() - begun > 60 * args.minutes:
                return
            row: dict[str, Any] = {"arm": arm, "seed": seed, "cpu": hardware()["cpu"]}
            folder = None
            if arm != "random":
                folder = trained(arm, seed, args.work)
                record = read_record(folder / "record.json")
                row["psnr"] = round(record["metrics"]["psnr"], 3)
                row["seconds"] = round(record["train_seconds"], 1)
            rows.append(row | probes(frozen(folder, seed), train, tests, seed))
            print(rows[-1], flush=True)
            write_record(args.json, **facts, rows=rows, effects=effects(rows))


if __name__ == "__main__":
    main()
