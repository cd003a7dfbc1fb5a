"""One backbone on two kinds of clouds: batches in alternation, each kind with its own fusion, head and loss weights."""

import csv
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from warm import Launch

from unipre3d.cli import main
from unipre3d.core import to_device
from unipre3d.data.loading import StepSampler, make_loader
from unipre3d.features import FeatureExtractor
from unipre3d.recipes import finetune_recipes, load_predictor, recipes
from unipre3d.runs.checkpoint import load_tensors
from unipre3d.runs.recipe import change
from unipre3d.runs.run import build_backbone, run_recipe
from unipre3d.runs.starts import start_from
from unipre3d.tasks.pretrain import (
    PairedUniPre3D,
    pretrain_recipes,
    pretrain_task,
    second_recipe,
)

UNET = dict(base_channels=8, channels=(8, 8), layers=(1, 1), voxel_size=0.1)
SMALL = change(
    recipes["both-sparseunet-mini"],
    source="furniture",
    layout="shapenet",
    alternate="object-tiny",
    backbone_options=UNET,
    fusion="FeatureFusion",
    n_points=128,
    resolution=24,
    n_ref=1,
    n_target=2,
    batch_size=3,
    steps=8,
    warmup=2,
    workers=0,
    picture_every=0,
    validate_every=4,
    save_every=3,
    ema=0.9,
)  # furniture twice: once as a room would be fused and lit, once as objects are


@pytest.fixture(scope="module", autouse=True)
def tiny_objects():
    "A recipe of one's own, beside those of the package."
    sizes = dict(n_points=128, resolution=24, n_target=2, batch_size=4)
    options = dict(voxel_size=0.05)
    base = recipes["object-sparseunet-mini"]
    pretrain_recipes["object-tiny"] = change(base, backbone_options=options, **sizes)
    yield
    del pretrain_recipes["object-tiny"]


@pytest.fixture(scope="module")
def task():
    return SMALL.build_task()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run without a stop."
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return run_recipe("both", SMALL, folder, device="cpu").folder


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_of_every_two_steps_one_is_of_each_kind(task):
    kinds = [chosen.second for chosen in make_loader(task.samples, 0, 8, batch_size=1)]
    pairs = [set(kinds[k : k + 2]) for k in range(0, 8, 2)]
    assert pairs == [{False, True}] * 4
    later = [chosen.second for chosen in make_loader(task.samples, 3, 8, batch_size=1)]
    assert later == kinds[3:]


def test_a_kind_meets_the_batches_of_a_run_of_its_own(task):
    other = second_recipe(SMALL)
    alone = pretrain_task(other)
    order = StepSampler(len(alone.samples), other.run.batch_size, SMALL.run.seed)
    chosen = task.samples.__getitems__([(1, 3)])
    expected = alone.samples.batch(order.batch(3))
    assert torch.equal(chosen.batch.points.xyz, expected.points.xyz)
    assert torch.equal(chosen.batch.target.rgb, expected.target.rgb)
    assert chosen.batch.points.size == other.run.batch_size == 4


@pytest.mark.parametrize("second", [False, True])
def test_the_loss_of_a_batch_is_that_of_its_own_task(task, second):
    recipe = second_recipe(SMALL) if second else change(SMALL, alternate="")
    alone = pretrain_task(recipe)
    pair = task.model
    own = pair.second() if second else pair
    parts = {"backbone": own.backbone, "fusion": own.fusion, "head": own.head}
    for name, part in parts.items():
        getattr(alone.model, name).load_state_dict(part.state_dict())
    chosen = to_device(task.samples.__getitems__([(int(second), 0)]), "cpu")
    pair.train()
    alone.model.train()
    found, scores = task.loss(pair, chosen)
    expected, own_scores = alone.loss(alone.model, chosen.batch)
    assert torch.equal(found, expected) and torch.equal(scores["psnr"], own_scores["psnr"])
    assert float(scores["second"]) == second
    assert recipe.objective.background == (((1.0,) * 3), (0.0,) * 3)[second]


def test_a_step_trains_the_backbone_and_the_parts_of_its_kind(task):
    for second in (False, True):
        task.model.zero_grad()
        task.loss(task.model, task.samples.__getitems__([(int(second), 0)]))[0].backward()
        got = {name for name, p in task.model.named_parameters() if p.grad is not None}
        parts = {name.split(".")[0] for name in got}
        own = {"second_fusion", "second_head"} if second else {"fusion", "head"}
        assert parts == {"backbone"} | own


def test_voxels_of_a_kind_keep_their_size():
    pair = recipes["both-sparseunet-mini"].build_model()
    assert isinstance(pair, PairedUniPre3D)
    assert (pair.backbone.voxel_size, pair.second().backbone.voxel_size) == (0.07, 0.04)
    assert pair.fusion.voxel_size == 0.07
    names = {name.split(".")[0] for name in pair.state_dict()}
    assert names == {"backbone", "fusion", "head", "second_fusion", "second_head"}


def test_a_stopped_run_goes_on_to_the_same_numbers(whole, tmp_path, monkeypatch):
    build = type(SMALL).build_task
    calls = []

    def build_stopping(recipe, device="cpu"):
        "The task, which is interrupted in its fifth step as by a terminal."
        task = build(recipe, device)

        def loss(model, chosen):
            calls.append(chosen.second)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return task.loss(model, chosen)

        return replace(task, loss=loss)

    folder = tmp_path / "parts"
    monkeypatch.setattr(type(SMALL), "build_task", build_stopping)
    first = run_recipe("both", SMALL, folder, device="cpu")
    assert first.ended == "interrupted" and len(rows_of(folder)) == 5
    run_recipe("both", SMALL, folder, device="cpu", resume=True)
    for before, after in zip(rows_of(whole), rows_of(folder), strict=True):
        assert before | {"seconds": ""} == after | {"seconds": ""}
    ours, full = (load_tensors(f / "checkpoint.safetensors")[0] for f in (folder, whole))
    assert all(torch.equal(ours[name], full[name]) for name in full)


def test_both_kinds_are_validated_and_tested(whole):
    rows = rows_of(whole)
    assert [bool(row["val_psnr"] and row["val_second_psnr"]) for row in rows] == [
        step == 4 for step in range(1, 9)
    ]
    record = json.loads((whole / "record.json").read_text())
    assert record["data"]["second_name"] == "furniture"
    _, pair, _ = load_predictor(whole)
    second = pretrain_task(second_recipe(SMALL))
    scores, _ = second.test(pair.second(), whole)
    for name in ("psnr", "ssim", "clouds"):
        assert record["metrics"][f"second_{name}"] == scores[name]
    assert record["metrics"]["second_psnr"] != record["metrics"]["psnr"]


def test_the_weights_start_tasks_and_give_features(whole):
    for voxel_size in (0.1, 0.05):
        sizes = UNET | dict(voxel_size=voxel_size)
        features = SMALL.data.features
        mini = finetune_recipes["cls-furniture-mini"]
        how = dict(backbone="SparseUNet", backbone_options=sizes, features=features)
        assert start_from(build_backbone(change(mini, **how)), whole).coverage == 1
    xyz = torch.rand(50, 3)
    for kind, size in (
        ("objects", 0.1),
        ("object-tiny", 0.05),
    ):  # two of objects: the second by its recipe
        extractor = FeatureExtractor.from_pretrained(whole, kind)
        assert extractor(xyz).shape == (50, 8) and extractor.backbone.voxel_size == size


def test_what_cannot_alternate_is_refused(tmp_path, capsys):
    run = ["pretrain", "both-sparseunet-mini", "--device", "cpu", "--out", str(tmp_path / "run")]
    for words, expected in {
        "--alternate both-sparseunet-mini": "alternate: expected another recipe than both-sparseunet-mini",
        "--alternate object-unicorn": "alternate: expected the name of a recipe",
        "--alternate object-transformer": "data: this recipe needs the ShapeNet multi-view folder",
        "--accumulate 2": "accumulate: expected a divisor of the 1 clouds",
    }.items():
        assert main([*run, *words.split()]) == 2
        said = capsys.readouterr().err
        assert expected in said and len(said.splitlines()) == 1


def test_several_processes_are_refused(tmp_path):
    words = ["pretrain", "both-sparseunet-mini", "--device", "cpu", "--out", tmp_path / "run"]
    run = Launch(2, *words, "--data", "furniture", "--layout", "shapenet", "--batch-size", "2")
    try:
        _, errors = run.communicate(timeout=300)
    finally:
        run.kill()
    assert all(rank.returncode == 2 for rank in run.ranks), errors
    assert errors.count("alternate: expected one process") == 2
    assert not (tmp_path / "run").exists()


def test_help_and_text_name_the_other_recipe(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "both-sparseunet-mini", "--help"])
    assert not ended.value.code
    assert "alternate" in capsys.readouterr().out
    assert "alternate='object-sparseunet-mini'" in str(recipes["both-sparseunet-mini"])
