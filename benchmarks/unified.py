"""One backbone for objects and rooms beside one for each: are its features as good?

    python benchmarks/unified.py --scans FOLDER [--work FOLDER] [--json PATH] [--seeds N]
    python benchmarks/unified.py --scans FOLDER --shipped WEIGHTS [--json PATH] [--seeds N]

The same small SparseUNet, the same columns (normals and colours, each left out at times) and equally many steps of
each kind of cloud; batch k of a kind is the same in both runs. Each run alone has its own recipe's learning rate.
What is scored, always on clouds that no run was trained on:

    psnr_objects, psnr_rooms   held-out views (dB), by the run's own fusion and head
    objects                    a linear probe in closed form on frozen features: classes of generated shapes
    rooms                      a linear probe on frozen features of voxels: mIoU of the classes of held-out rooms
    scans                      whether another sampling of the same scanned object is nearest, without colours

Decided before the first run: one set of weights is as good if, in the mean over the seeds, it is at most 1 point
below the run on objects alone in `objects`, at most 1 point below the run on rooms alone in `rooms`, and at most 0.3
dB below either in its PSNR. The rest is for the reader: scans, each kind of weights on the other kind of task, random
weights, and `own`, where batch normalisation has the statistics of the task's own training clouds, without fusion,
instead of those of training. FOLDER is that of retrieval.py. A run or a row that is there already is not made again.

With --shipped, WEIGHTS are what tools/ship.py makes of its recipe `both` (a name or a folder) beside the two sets
that ship, each at its full length, and random weights of the same networks (mean of the seeds). Each set reads a
cloud by its own transform, as a user's features do: `objects` is the same probe on the summaries of the same
generated shapes, `rooms` is that of above, and `scans` has normals alone, or normals and colours. Decided before
WEIGHTS had any of these scores: they are as good, and ship, if they are at most 1 point below the shipped objects in
`objects` and at most 1 point below the shipped rooms in `rooms`; scans are for the reader. The shipped objects are a
Transformer, with coordinates and three times as many features a point: what is compared there is what a user would
get, not one pre-training with another.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import finished_run, write_record
from retrieval import POINTS, random_like, read_object, sample, scores
from torch import Tensor, nn

from unipre3d.backbones.backbone import Backbone
from unipre3d.core import PointBatch
from unipre3d.data.augment import Augment
from unipre3d.data.loading import make_loader
from unipre3d.data.readers import Reader
from unipre3d.data.samples import CloudSamples
from unipre3d.data.shapenet import ShapeNetViews
from unipre3d.data.transform import Transform
from unipre3d.features import FeatureExtractor, find_weights
from unipre3d.files import read_json
from unipre3d.recipes import recipes
from unipre3d.records import data_hash, read_record
from unipre3d.runs.recipe import Recipe, change
from unipre3d.runs.run import build_backbone
from unipre3d.runs.starts import WEIGHTS_FILE, start_from
from unipre3d.tasks.classification import cloud_rows, ridge_by_folds
from unipre3d.tasks.heads import propagate
from unipre3d.tasks.metrics import SemanticScore
from unipre3d.tasks.pretrain import second_recipe
from unipre3d.tasks.scenes import SceneData, ScenePoints, read_rooms
from unipre3d.worlds.shapes import embedded_shapes

STEPS = 100  # of each kind of cloud
WARMUP = 15  # of these
PROBED = 2  # a probe of rooms reads every second training room
PER_CLASS = (12, 0, 12)  # generated shapes of each class: the probe's, none, held out
VOXELS = 1000  # of each training room, which the probe reads
ADAPT = 20  # batches that statistics of their own are taken from
COLUMNS = ("normal",)  # of scanned objects; colours would tell them apart alone
LIMITS = {
    "objects": ("objects", 0.01),
    "rooms": ("rooms", 0.01),
    "psnr_objects": ("objects", 0.3),
    "psnr_rooms": ("rooms", 0.3),
}  # score -> the run beside, and how far below it is as good
SHIPPED = {"objects": LIMITS["objects"], "rooms": LIMITS["rooms"]}  # limits of weights that ship
SCANNED = {"scans": ("normal",), "scans_colours": ("normal", "color")}  # columns of scanned objects
PAIR = change(
    recipes["both-sparseunet-mini"],
    workers=0,
    picture_every=0,
    validate_every=0,
    save_every=50,
    steps=2 * STEPS,
    warmup=2 * WARMUP,
)
ALONE = dict(steps=STEPS, warmup=WARMUP)
QUIET = dict(picture_every=0, validate_every=0, save_every=50)
RUNS: dict[str, Recipe] = {
    "both": PAIR,
    "objects": change(second_recipe(PAIR), **ALONE, **QUIET),
    "rooms": change(PAIR, **ALONE, alternate="", lr=recipes["scene-sparseunet-mini"].optimiser.lr),
}
SIZES = {kind: RUNS[kind].model.backbone_options["voxel_size"] for kind in ("objects", "rooms")}


def trained(arm: str, seed: int, work: Path) -> Path:
    "A finished run."
    recipe = change(RUNS[arm], seed=seed)
    return finished_run(f"unified-{arm}", recipe, work / f"{arm}-{seed}")


def frozen(folder: Path | None, kind: str, seed: int) -> Backbone:
    "The backbone of a run, or a random one, on voxels of the size of one kind."
    backbone = build_backbone(change(RUNS[kind], seed=seed))
    if folder is not None:
        start_from(backbone, folder)
    return backbone.eval()


@torch.no_grad()
def with_own_statistics(backbone: Backbone, samples: CloudSamples, batch_size: int) -> Backbone:
    "The same weights; batch normalisation has the mean statistics of some batches."
    norms = [part for part in backbone.modules() if isinstance(part, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    backbone.train()
    for batch in make_loader(samples, 0, ADAPT, batch_size=batch_size):
        backbone(batch.points)
    return backbone.eval()


# ---- objects


def shape_samples(split: str) -> CloudSamples:
    "Generated shapes, as objects are read in pre-training; their pictures are not used."
    path = embedded_shapes(per_category=PER_CLASS, views=2, size=16)
    recipe = RUNS["objects"]
    how = dict(n_points=recipe.data.n_points, features=recipe.data.features)
    return CloudSamples(ShapeNetViews(path, split=split), augment=Augment(), **how)


def objects_score(backbone: Backbone, train: CloudSamples, test: CloudSamples) -> float:
    "The fraction of held-out shapes whose class a linear probe finds."
    known, asked = cloud_rows(backbone, train), cloud_rows(backbone, test)
    return linear_probe(known, asked, len(train.source.classes))


def linear_probe(
    known: tuple[Tensor, Tensor],  # rows of features, classes
    asked: tuple[Tensor, Tensor],
    classes: int,
) -> float:
    "The fraction of rows asked for that a layer in closed form puts into their class."
    rows, label = known
    layer, _ = ridge_by_folds(rows, label, torch.arange(len(rows)) % 5, classes)
    query, truth = asked
    return float((layer(query).argmax(1) == truth).float().mean())


def shape_summaries(extractor: FeatureExtractor, split: str) -> tuple[Tensor, Tensor]:
    "A summary and the class of each generated shape."
    path = embedded_shapes(per_category=PER_CLASS, views=2, size=16)
    reader = ShapeNetViews(path, split=split)
    rows, labels = [], []
    for index in range(len(reader)):
        cloud = reader.rows(index)
        found = extractor.summary(cloud["xyz"], cloud["color"], cloud["normal"])
        rows.append(torch.from_numpy(found))
        labels.append(reader.label(index))
    return torch.stack(rows), torch.tensor(labels)


def scans_score(backbone: Backbone, clouds: list[list[dict]]) -> float:
    "The fraction of scanned objects whose other samplings are nearest."
    recipe = RUNS["objects"]
    how = dict(features=recipe.data.features, optional=("color", "normal"))
    extractor = FeatureExtractor(backbone, Transform(**how, n_points=recipe.data.n_points))
    top = [found["top1"] for found in scores(extractor, clouds, COLUMNS).values()]
    return sum(top) / len(top)


# ---- rooms


def room_samples(reader: Reader) -> ScenePoints:
    "Whole rooms in voxels."
    return ScenePoints(reader, voxel_size=SIZES["rooms"], features=PAIR.data.features)


def logistic(rows: Tensor, label: Tensor, classes: int, penalty: float = 1e-4) -> nn.Linear:
    "A linear layer with the smallest cross-entropy and penalty."
    layer = nn.Linear(rows.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    descent = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        descent.zero_grad()
        loss = nn.functional.cross_entropy(layer(rows), label)
        loss = loss + penalty * layer.weight.square().sum()
        loss.backward()
        return loss

    descent.step(closure)
    return layer


def voxel_features(backbone: Backbone, points: PointBatch) -> Tensor:
    "A row of features for each voxel of a room."
    return propagate(backbone(points), points, voxel_size=SIZES["rooms"])


@torch.no_grad()
def room_rows(backbone: Backbone, samples: ScenePoints) -> tuple[Tensor, Tensor]:
    "Features and classes of some labelled voxels of rooms."
    rows, labels = [], []
    for index in range(0, len(samples), PROBED):
        scene = samples.scene(index)
        label = torch.full((len(scene.points),), -1)
        label = label.scatter_reduce(0, scene.inverse, scene.label, "amax")
        known = (label >= 0).nonzero()[:, 0]
        draw = torch.randperm(len(known), generator=torch.Generator().manual_seed(index))
        known = known[draw[:VOXELS]]
        rows.append(voxel_features(backbone, scene.points)[known])
        labels.append(label[known])
    return torch.cat(rows), torch.cat(labels)


def rooms_score(backbone: Backbone, train: ScenePoints, held_out: list[ScenePoints]) -> float:
    "mIoU of a linear probe over all points of held-out rooms."
    rows, label = room_rows(backbone, train)
    middle, spread = rows.mean(0), rows.std(0).clamp_min(1e-9)
    classes = len(train.source.classes)
    layer = logistic((rows - middle) / spread, label, classes)
    score = SemanticScore(classes)
    with torch.no_grad():
        for samples in held_out:
            for index in range(len(samples)):
                scene = samples.scene(index)
                feat = (voxel_features(backbone, scene.points) - middle) / spread
                score.update(layer(feat).argmax(1)[scene.inverse], scene.label)
    return float(score.compute()["miou_present"])


# ---- the table


def psnr_of(arm: str, folder: Path) -> dict[str, float]:
    "Held-out PSNR of the kinds that a run was trained on."
    metrics = read_record(folder / "record.json")["metrics"]
    names = {"both": ("psnr_rooms", "psnr_objects")}.get(arm, (f"psnr_{arm}",))
    return dict(zip(names, (metrics["psnr"], metrics.get("second_psnr"))))


def score_row(arm: str, seed: int, work: Path, clouds: list[list[dict]]) -> dict[str, Any]:
    "Everything about one run."
    folder = None if arm == "random" else trained(arm, seed, work)
    row: dict[str, Any] = {"arm": arm, "seed": seed}
    if folder is not None:
        row |= psnr_of(arm, folder)
        row["seconds"] = read_record(folder / "record.json")["train_seconds"]
    shapes = shape_samples("train"), shape_samples("test")
    rooms = SceneData(source="rooms", features=PAIR.data.features)
    train = room_samples(read_rooms(rooms, "train"))
    held_out = [room_samples(read_rooms(rooms, split)) for split in ("val", "test")]
    for own in ("", "own_"):
        of_objects = frozen(folder, "objects", seed)
        of_rooms = frozen(folder, "rooms", seed)
        if own:
            with_own_statistics(of_objects, shapes[0], 16)
            crops = dict(voxel_size=SIZES["rooms"], n_points=RUNS["rooms"].data.n_points)
            crops |= dict(features=PAIR.data.features, crop="column")
            with_own_statistics(of_rooms, ScenePoints(train.source, **crops), 1)
        row[f"{own}objects"] = objects_score(of_objects, *shapes)
        row[f"{own}rooms"] = rooms_score(of_rooms, train, held_out)
        row[f"{own}scans"] = scans_score(of_objects, clouds)
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}


def score_shipped(
    arm: str,  # "both", "objects" or "rooms"; "random" before it: nobody trained them
    weights: str,  # of both
    seed: int,  # of random weights
    clouds: list[list[dict]],
) -> dict[str, Any]:
    "Everything about one set of weights."
    name = arm.removeprefix("random ")
    row: dict[str, Any] = {"arm": arm, "seed": seed}
    for kind in SHIPPED:
        if name not in ("both", kind):
            continue
        where = (weights, kind) if name == "both" else (name,)
        extractor = FeatureExtractor.from_pretrained(*where)
        row |= {"network": type(extractor.backbone).__name__, "features": extractor.width}
        if arm != name:
            extractor = random_like(extractor, seed)
        else:
            row |= {"code": extractor.record["code"], "steps": extractor.record["steps"]}
        if kind == "objects":
            known, asked = (shape_summaries(extractor, split) for split in ("train", "test"))
            row["objects"] = linear_probe(known, asked, int(known[1].max()) + 1)
            for score, columns in SCANNED.items():
                top = [found["top1"] for found in scores(extractor, clouds, columns).values()]
                row[score] = sum(top) / len(top)
        else:
            rooms = SceneData(source="rooms", features=PAIR.data.features)
            train = room_samples(read_rooms(rooms, "train"))
            held_out = [room_samples(read_rooms(rooms, split)) for split in ("val", "test")]
            row["rooms"] = rooms_score(extractor.backbone, train, held_out)
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}


def verdict(
    rows: list[dict],
    limits: dict[str, tuple[str, float]] = LIMITS,
) -> dict[str, Any]:
    "Mean differences of both from each alone, and whether all are within their limits."

    def mean(arm, score):
        own = [row[score] for row in rows if row["arm"] == arm]
        return sum(own) / len(own)

    below = {}
    for score, (other, limit) in limits.items():
        gap = mean("both", score) - mean(other, score)
        below[score] = {"difference": round(gap, 4), "limit": -limit, "as_good": gap >= -limit}
    return {"scores": below, "as_good": all(one["as_good"] for one in below.values())}


def compare_runs(args: argparse.Namespace, clouds: list[list[dict]], scans: dict) -> None:
    "Short runs on both and on each kind, over seeds."
    facts = dict(
        task="one SparseUNet on objects and rooms in alternation, beside one on each",
        steps=STEPS,
        recipes={arm: dict(lr=r.optimiser.lr, steps=r.run.steps) for arm, r in RUNS.items()},
        scans=scans,
    )
    path = args.json or Path("data/records/benchmark_unified.json")
    rows = []
    if path.is_file():
        before = read_json(path)
        if before["steps"] != STEPS:
            found = before["steps"]
            raise SystemExit(f"unified: --json: expected a record of {STEPS} steps, found {found}")
        rows = before["rows"]
    for seed in range(args.seeds):
        for arm in (*RUNS, "random"):
            if any(row["arm"] == arm and row["seed"] == seed for row in rows):
                continue
            rows.append(score_row(arm, seed, args.work, clouds))
            print(rows[-1])
            whole = {row["arm"] for row in rows} >= set(RUNS)
            write_record(path, **facts, rows=rows, verdict=verdict(rows) if whole else None)


def compare_shipped(args: argparse.Namespace, clouds: list[list[dict]], scans: dict) -> None:
    "Weights of both beside the two sets that ship."
    path = args.json or Path("data/records/benchmark_unified_shipped.json")
    task = "weights of both kinds of cloud beside the two sets that ship"
    before = read_json(path)["rows"] if path.is_file() else []
    files = {name: args.shipped if name == "both" else name for name in ("both", *SHIPPED)}
    held = {name: data_hash(find_weights(file) / WEIGHTS_FILE) for name, file in files.items()}
    rows = [row for row in before if row["sha256"] == held.get(row["arm"])]  # of the same weights
    random = [
        (f"random {name}", seed) for seed in range(args.seeds) for name in ("both", "objects")
    ]
    for arm, seed in [("objects", 0), ("rooms", 0), *random, ("both", 0)]:
        if any(row["arm"] == arm and row["seed"] == seed for row in rows):
            continue
        row = score_shipped(arm, args.shipped, seed, clouds)
        rows.append(row | {"sha256": held.get(arm)})
        print(rows[-1])
        whole = {row["arm"] for row in rows} >= {"both", *SHIPPED}
        said = verdict(rows, SHIPPED) if whole else None
        write_record(path, task=task, scans=scans, rows=rows, verdict=said)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=Path, required=True, help="folder of scanned objects")
    parser.add_argument("--shipped", metavar="WEIGHTS", help="compare these with those that ship")
    parser.add_argument("--work", type=Path, default=Path("runs/unified"), help="folder of runs")
    parser.add_argument("--json", type=Path, help="record; default: in data/records")
    parser.add_argument("--seeds", type=int, default=2, help="runs, or random weights, of each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clouds = []
    for n, path in enumerate(sorted(args.scans.glob("*.npz"))):
        mesh = read_object(path)
        clouds.append([sample(mesh, points, 10 * n + k) for k, points in enumerate(POINTS)])
    scans = {"objects": len(clouds), "sha256": data_hash(args.scans)}
    compare = compare_shipped if args.shipped else compare_runs
    compare(args, clouds, scans)


if __name__ == "__main__":
    main()
