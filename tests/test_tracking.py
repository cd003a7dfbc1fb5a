"A tracker shows what metrics.csv has."

import csv

import pytest
import several
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unipre3d.recipes import recipes
from unipre3d.runs.recipe import change
from unipre3d.runs.run import run_recipe
from unipre3d.runs.tracking import RunTracker, check_tracker

TINY = dict(num_groups=8, group_size=8, depth=1, encoder_widths=(8, 16, 16), encoder_dims=16)
SMALL = dict(
    steps=4, picture_every=2, batch_size=2, workers=0, n_points=64, n_target=1, image="rgb"
)


def curves(folder):
    "The curves and pictures of a run, by tag: steps and values."
    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    scalars = {
        tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]
    }
    return scalars, {tag: [e.step for e in read.Images(tag)] for tag in read.Tags()["images"]}


def test_curves_are_those_of_metrics_csv(tmp_path):
    name = "object-transformer-mini"
    recipe = change(recipes[name], **SMALL, backbone_options=TINY | dict(width=16, num_heads=2))
    run = tmp_path / "run"
    run_recipe(name, recipe, run, device="cpu", tracker="tensorboard", say=lambda text: None)
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    scalars, pictures = curves(run)
    assert len(rows) == 4 and pictures == {"views": [2, 4]}
    for column in ("loss", "psnr", "lr", "grad_norm"):
        expected = [(int(row["step"]), pytest.approx(float(row[column]))) for row in rows]
        assert scalars[column] == expected
    assert [step for step, _ in scalars["test/psnr"]] == [4]


@pytest.mark.parametrize(
    "task, picture",
    [
        ("classification", "confusion"),
        ("parts", "parts"),
        ("semantic", "room"),
        ("instances", "instances"),
    ],
)
def test_fine_tuning_shows_pictures_of_its_validations_and_its_test(task, picture, tmp_path):
    recipe = change(several.cases()[task], steps=4, validate_every=2)
    run = tmp_path / "run"
    followed = run_recipe(
        task, recipe, run, device="cpu", tracker="tensorboard", say=lambda _: None
    )
    _, pictures = curves(run)
    assert pictures == {f"val_{picture}": [2, 4], picture: [4]}
    assert [path.name for path in run.glob("*.png")] == [f"{picture}.png"]
    if task == "classification":  # following a run changes no number
        alone = run_recipe(task, recipe, tmp_path / "alone", device="cpu", say=lambda _: None)
        assert alone.record["metrics"] == followed.record["metrics"]
        assert alone.record["details"] == followed.record["details"]


def test_a_run_that_goes_on_drops_what_came_after_its_save(tmp_path):
    first = RunTracker("tensorboard", tmp_path, "toy", {})
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step), "bad": float("nan")})
    first.finish()
    second = RunTracker("tensorboard", tmp_path, "toy", {}, step=2)
    second.log(3, {"loss": 30.0})
    second.finish()
    scalars, _ = curves(tmp_path)
    assert scalars == {"loss": [(1, 1.0), (2, 2.0), (3, 30.0)]}


def test_what_is_not_there_is_named_before_any_work(tmp_path):
    with pytest.raises(
        ValueError, match="expected one of none, tensorboard, trackio, wandb, got 'tensorbord'"
    ):
        check_tracker("tensorbord")
    recipe = change(recipes["object-transformer-mini"], **SMALL)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        run_recipe(
            "object-transformer-mini", recipe, tmp_path / "run", device="cpu", tracker="wandb"
        )
    assert not (tmp_path / "run").exists()
