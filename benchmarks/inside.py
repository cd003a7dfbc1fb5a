"""Two sentences of the paper, looked at inside checkpoints: is colour in frozen features, and how large are Gaussians?

    python benchmarks/inside.py STUDY [--json PATH]

STUDY is the folder of `unipre3d reproduce second --only more`. Written before its first run.

colour: a linear layer in closed form from the frozen features of a group of points to the mean colour of its points,
from the shapes of pre-training; R^2 on held-out shapes. The backbone reads places only, so what it knows of colour it
has guessed from shape. The paper's direction: `none` (no images, colours must be guessed) knows more than `paper`
(images bring them).

size: the median over held-out shapes of the size of Gaussians (the geometric mean of their three standard
deviations, world units) with 16, 32 and 64 of them. The paper's direction: more points, smaller Gaussians.

Intervals are Student's over pairs of one seed.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import write_record
from torch import Tensor

from unipre3d.backbones.backbone import Backbone
from unipre3d.core import PointBatch
from unipre3d.data.augment import Augment
from unipre3d.data.samples import CloudSamples, ViewSamples
from unipre3d.data.shapenet import ShapeNetViews
from unipre3d.geometry.pointops import knn
from unipre3d.recipes import load_predictor
from unipre3d.records import hardware
from unipre3d.reproduce.more import COUNTS, COUNTS_PAIRS, MORE
from unipre3d.reproduce.plan import SEEN_KINDS, plan_recipe
from unipre3d.reproduce.run import run_path
from unipre3d.reproduce.second import paired_interval
from unipre3d.runs.run import build_backbone
from unipre3d.tasks.classification import ridge
from unipre3d.tasks.heads import own_batches
from unipre3d.tasks.pretrain import predict
from unipre3d.worlds.shapes import embedded_shapes

PER_CLASS = (25, 0, 12)  # shapes of each class: those of pre-training, none, held out
POINTS = 1024  # of a shape
GROUP = 16  # points whose mean colour belongs to a feature, as in the backbone
PENALTY = 1e-3  # of the linear layer
COLOUR_ARMS = ("random", "none", "paper")
SIZES = {"groups16": 16, "paper": 32, "groups64": 64}  # condition -> Gaussians


def readers() -> tuple[ShapeNetViews, ShapeNetViews]:
    "Shapes of pre-training, and held-out ones of the same classes."
    path = embedded_shapes(categories=list(SEEN_KINDS), per_category=PER_CLASS, views=6, size=64)
    return ShapeNetViews(path, split="train"), ShapeNetViews(path, split="test")


def backbone_of(arm: str, seed: int, study: Path) -> Backbone:
    "The backbone of a run, or a random one."
    if arm == "random":
        row = MORE.train("paper", seed)
        return build_backbone(plan_recipe(row.recipe, row.changes | {"seed": seed})).eval()
    model = load_predictor(run_path(f"more-pre-{arm}-{seed}", study))[1]
    return model.backbone.eval()


@torch.no_grad()
def feature_rows(backbone: Backbone, reader: ShapeNetViews) -> tuple[Tensor, Tensor]:
    "Features of all groups of all shapes, and the mean colours of their points."
    how = dict(n_points=POINTS, features=("xyz", "color_signed"), augment=Augment())
    rows, colours = [], []
    for batch in own_batches(CloudSamples(reader, **how), 16):
        points = batch.points
        places: PointBatch = points.with_feat(points.feat[:, :3])
        found = backbone(places)
        near = knn(found.xyz, found.batch, points.xyz, points.batch, points.size, GROUP)
        rows.append(found.feat)
        colours.append(points.feat[:, 3:6][near].mean(1))
    return torch.cat(rows), torch.cat(colours)


def colour_score(backbone: Backbone, train: ShapeNetViews, test: ShapeNetViews) -> float:
    "R^2 of a linear layer, over all groups and the three channels."
    weight, bias = ridge(*feature_rows(backbone, train), PENALTY)
    rows, colour = feature_rows(backbone, test)
    colour = colour.double()
    left = (rows.double() @ weight.T + bias - colour).square().sum()
    return 1 - float(left / (colour - colour.mean(0)).square().sum())


@torch.no_grad()
def median_size(arm: str, seed: int, study: Path, test: ShapeNetViews) -> float:
    "The middle of all Gaussians of held-out shapes, world units."
    recipe, model, image_net = load_predictor(run_path(f"more-pre-{arm}-{seed}", study))
    how = dict(n_points=POINTS, n_ref=1, n_target=1, features=recipe.data.features)
    samples = ViewSamples(test, sampling=recipe.data.sampling, **how)
    found = []
    for index in range(len(samples)):
        sample = samples[index]
        gaussians = predict(sample.points, sample.ref, image_net, model)
        found.append(gaussians.scale.log().mean(1).exp())
    return float(torch.cat(found).median())


def pairs(rows: list[dict], first: str, second: str, score: str) -> dict:
    "First minus second: mean, interval and every pair."
    by = {(row["arm"], row["seed"]): row.get(score) for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    both = [(by.get((first, s)), by.get((second, s))) for s in seeds]
    d = np.array([a - b for a, b in both if a is not None and b is not None])
    found = {"first": first, "second": second, "score": score, "pairs": len(d)}
    if len(d) >= 2:
        i = paired_interval(d)
        found |= {"mean": round(i.mean, 4), "low": round(i.low, 4), "high": round(i.high, 4)}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("--json", type=Path, default=Path("data/records/benchmark_inside.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = readers()
    rows: list[dict] = []
    for seed in MORE.seeds:
        for arm in dict.fromkeys((*COLOUR_ARMS, *COUNTS)):
            row: dict = {"arm": arm, "seed": seed, "cpu": hardware()["cpu"]}
            if arm in COLOUR_ARMS:
                score = colour_score(backbone_of(arm, seed, args.study), train, test)
                row["colour_r2"] = round(score, 4)
            if arm in SIZES and seed in MORE.seeds[:COUNTS_PAIRS]:
                row["median_size"] = round(median_size(arm, seed, args.study, test), 5)
            if len(row) > 3:
                rows.append(row)
                print(row, flush=True)
    effects = [
        pairs(rows, "none", "paper", "colour_r2"),
        pairs(rows, "none", "random", "colour_r2"),
    ]
    effects += [pairs(rows, "groups16", "paper", "median_size")]
    effects += [pairs(rows, "paper", "groups64", "median_size")]
    facts = dict(task="colour in frozen features, and sizes of Gaussians", gaussians=SIZES)
    write_record(args.json, **facts, rows=rows, effects=effects)


if __name__ == "__main__":
    main()
