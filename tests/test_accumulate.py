"""A step in parts is the step of the whole batch, but for what batch normalisation sees."""

import csv

import pytest
import several
import torch
from torch import nn

from unipre3d.data.loading import make_loader
from unipre3d.runs.fit import forward, new_accelerator
from unipre3d.runs.recipe import change
from unipre3d.runs.run import run_recipe

CASES = several.cases()


@pytest.fixture
def no_norms(monkeypatch):
    "Batch normalisation passes its rows on."
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        monkeypatch.setattr(kind, "forward", lambda self, x: x)


def gradients(name, parts):
    "Loss and gradients of the first step."
    recipe = CASES[name]
    task = recipe.build_task()
    accelerator = new_accelerator(device="cpu")
    batch_size = recipe.run.batch_size
    (batch,) = make_loader(task.samples, 0, 1, batch_size=batch_size, parts=parts)
    assert isinstance(batch, list) == (parts > 1)
    torch.manual_seed(1)
    loss, means = forward(task, task.model.train(), batch, accelerator)
    loss.backward()
    named = task.model.named_parameters()
    return means, {key: value.grad for key, value in named if value.grad is not None}


def distance(found, others):
    "Of the gradients, relative to the norm of all."
    whole = torch.cat([value.flatten() for value in found.values()]).norm()
    assert whole > 0 and found.keys() == others.keys()
    return max(float((value - others[key]).norm() / whole) for key, value in found.items())


@pytest.mark.parametrize("name", ["StandardTransformer", "Mamba3D", "classification"])
def test_parts_add_up_to_the_batch(name, no_norms):
    means, whole = gradients(name, 1)
    for parts in (2, 4):
        others, split = gradients(name, parts)
        assert distance(whole, split) < 1e-4
        for key, value in means.items():
            assert float(others[key]) == pytest.approx(float(value), rel=1e-4), key


def test_batch_normalisation_sees_one_part():
    "What the page says is lost is lost, so the other test compares something."
    _, whole = gradients("StandardTransformer", 1)
    _, split = gradients("StandardTransformer", 2)
    assert distance(whole, split) > 1e-3


def losses(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_a_run_in_parts_is_the_run(no_norms, tmp_path):
    found = []
    for parts in (1, 2):
        recipe = change(CASES["classification"], accumulate=parts)
        done = run_recipe("parts", recipe, tmp_path / f"{parts}", device="cpu", say=lambda _: None)
        assert done.record["values"]["accumulate"] == parts
        found.append(losses(tmp_path / f"{parts}"))
    assert found[0] == pytest.approx(found[1], rel=1e-3) and len(found[0]) == several.STEPS


@pytest.mark.parametrize("parts", [3, 8])
def test_parts_that_do_not_fit_are_refused(parts, tmp_path):
    recipe = change(CASES["classification"], accumulate=parts)
    with pytest.raises(ValueError, match="accumulate: expected a divisor of the 8 clouds"):
        run_recipe("parts", recipe, tmp_path / "run", device="cpu", say=lambda _: None)
    assert not (tmp_path / "run").exists()
