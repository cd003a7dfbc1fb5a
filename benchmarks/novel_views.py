"""How near do Gaussians of scanned objects come to unseen views? Shipped weights beside random ones.

    python benchmarks/novel_views.py --data FOLDER [--work FOLDER] [--json PATH] [--steps N] [--seeds N]

FOLDER is that of retrieval.py, which holds YCB's objects. Shipped weights are a backbone alone, and
Gaussians need a fusion and a head. So these are trained for some steps on the embedded objects, never on
the scans, while the backbone stays as it is: behind the shipped weights and behind random ones, with the
same seeds. Each scan then has one reference view, which the image model reads, and four others are
rendered. Scans of one number in YCB, such as ten cups, count as one object. What lies finished in the
folder of --work is not made again.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from common import write_record
from retrieval import read_object

from unipre3d.data.objects import add_member, add_tables, convention
from unipre3d.data.samples import ViewSamples
from unipre3d.data.shapenet import ShapeNetViews
from unipre3d.features import load_weights
from unipre3d.losses import psnr
from unipre3d.recipes import load_predictor
from unipre3d.records import data_hash, written_whole
from unipre3d.render import render
from unipre3d.reproduce.statistics import around
from unipre3d.runs.checkpoint import is_finished
from unipre3d.runs.recipe import change, from_values
from unipre3d.runs.run import run_recipe
from unipre3d.tasks.pretrain import PretrainRecipe, build_image_net, predict
from unipre3d.worlds.prepare import prepare_own

VIEWS, SIZE = 8, 64  # of each scan: pictures, and pixels along an edge
SCORES = {"psnr": False, "psnr_foreground": True}  # name -> on the object's pixels only


def draw_scans(paths: list[Path], out: Path) -> Path:
    "Views and clouds of scanned objects as a data set."
    if out.is_file():
        return out
    rows = []
    with written_whole(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        for path in paths:
            files, facts = prepare_own(read_object(path), path.stem, "scan", views=VIEWS, size=SIZE)
            for name, data in files.items():
                add_member(archive, name, data)
            rows.append({"id": path.stem, "class": "scan", "split": "test"} | facts)
        add_tables(archive, convention(".png", VIEWS, SIZE), rows, {})
    return out


def open_samples(path: Path, recipe: PretrainRecipe) -> ViewSamples:
    "One reference and four target views of each scan, always the same."
    return ViewSamples(
        ShapeNetViews(path, split="test"),
        n_points=recipe.data.n_points,
        n_ref=recipe.data.n_ref,
        n_target=recipe.data.n_target,
        sampling=recipe.data.sampling,
        features=recipe.data.features,
    )


@torch.no_grad()
def scores_of(model, image_net, samples: ViewSamples, background) -> dict[str, list[float]]:
    "Mean PSNR over the target views of each scan."
    found = {name: [] for name in SCORES}
    for sample in (samples[i] for i in range(len(samples))):
        gaussians = predict(sample.points, sample.ref, image_net, model)
        rgb = render(gaussians, sample.target.camera, torch.tensor(background)).rgb
        for name, inside in SCORES.items():
            mask = sample.target.mask if inside else None
            found[name].append(float(psnr(rgb, sample.target.rgb, mask).nanmean()))
    return found


def mean_image_scores(samples: ViewSamples) -> dict[str, list[float]]:
    "The same of the mean of all target views, which knows the test set and nothing of a scan."
    targets = [samples[i].target for i in range(len(samples))]
    mean = torch.cat([one.rgb for one in targets]).mean(0)
    found = {name: [] for name in SCORES}
    for target in targets:
        rgb = mean.expand_as(target.rgb)
        for name, inside in SCORES.items():
            mask = target.mask if inside else None
            found[name].append(float(psnr(rgb, target.rgb, mask).nanmean()))
    return found


def of_objects(values: np.ndarray, numbers: list[str]) -> np.ndarray:
    "Values of scans [s n] as means over the scans of each object [s m]."
    kinds = sorted(set(numbers))
    own = np.array(numbers)
    return np.stack([values[:, own == kind].mean(1) for kind in kinds], 1)


def summary(values: np.ndarray) -> dict:
    "Mean, its 95 % interval over objects (of each the mean over seeds), and the mean of each seed."
    own = values.mean(0)
    count = len(own)
    found = around(float(own.mean()), own.var(ddof=1) / count, count - 1, 0.95, count)
    rounded = {name: round(float(getattr(found, name)), 3) for name in ("mean", "low", "high")}
    return rounded | {"by_seed": values.mean(1).round(3).tolist()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of scanned objects")
    parser.add_argument("--weights", default="objects", help="shipped weights, by name")
    parser.add_argument("--steps", type=int, default=60, help="of fusion and head")
    parser.add_argument("--batch-size", type=int, default=8, help="of these steps")
    parser.add_argument("--seeds", type=int, default=3, help="of fusion, head and random weights")
    parser.add_argument(
        "--work", type=Path, help="keep pictures and runs here, and go on with them"
    )
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    paths = sorted(args.data.glob("*.npz"))
    if len(paths) < 2 or args.seeds < 2:
        parser.error(f"expected 2 objects <id>.npz and 2 seeds, found {len(paths)}, {args.seeds}")
    _, _, trained, _ = load_weights(args.weights)
    recipe = from_values(PretrainRecipe, trained["values"])
    how = dict(probe=True, steps=args.steps, ema=0.9, validate_every=0, save_every=args.steps)
    recipe = change(recipe, **how, warmup=args.steps // 10, batch_size=args.batch_size)
    image_net = build_image_net(recipe.model)
    background = recipe.objective.background
    scores = {"shipped": [], "random": [], "untrained": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = args.work or Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        samples = open_samples(draw_scans(paths, folder / "scans.zip"), recipe)
        for seed in range(args.seeds):
            own = change(recipe, seed=seed)
            model = own.build_predictor(image_net.width).eval()
            scores["untrained"].append(scores_of(model, image_net, samples, background))
            for name, init in (("shipped", args.weights), ("random", "none")):
                run = folder / f"{name}-{seed}"
                if not is_finished(run):
                    run_recipe(f"head-{name}", own, run, init=init, say=lambda line: None)
                _, model, _ = load_predictor(run)
                scores[name].append(scores_of(model, image_net, samples, background))
                print(seed, name, {k: round(np.mean(v), 2) for k, v in scores[name][-1].items()})
        scores["mean image"] = [mean_image_scores(samples)]
    numbers = [path.stem.split("_")[0].split("-")[0] for path in paths]
    rows = {}
    for score in SCORES:
        by_name = {
            name: of_objects(np.array([one[score] for one in found]), numbers)
            for name, found in scores.items()
        }
        rows[score] = {name: summary(values) for name, values in by_name.items()}
        for other in ("random", "untrained", "mean image"):
            rows[score][f"shipped - {other}"] = summary(by_name["shipped"] - by_name[other])
        print(score, rows[score])
    record = {
        "task": "PSNR (dB) of four unseen views of each scan from one view and its points",
        "data": {
            "name": "YCB objects (CC BY 4.0)",
            "scans": len(paths),
            "objects": len(set(numbers)),
            "sha256": data_hash(args.data),
        },
        "weights": {"name": args.weights, "recipe": trained["recipe"], "code": trained["code"]},
        "head": {
            "steps": args.steps,
            "batch_size": recipe.run.batch_size,
            "data": recipe.data.source,
            "backbone": "as it was, in evaluation mode",
        },
        "seeds": args.seeds,
        "rows": rows,
    }
    write_record(args.json, **record)


if __name__ == "__main__":
    main()
