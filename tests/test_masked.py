"""Masked rooms: what is hidden stays hidden; a run stops, goes on and starts other tasks."""

import csv
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from unipre3d.cli import main, next_commands
from unipre3d.core import PointBatch
from unipre3d.data.scannet import write_box_rooms
from unipre3d.recipes import finetune_recipes, load_run, recipes
from unipre3d.runs.checkpoint import load_tensors
from unipre3d.runs.recipe import change, check_changes
from unipre3d.runs.run import build_backbone, run_recipe
from unipre3d.tasks.masked import MaskedRoomModel, hidden_error, hide_blocks

UNET = dict(base_channels=8, channels=(8, 8), layers=(1, 1), voxel_size=0.2)
PTV3 = recipes["masked-rooms-ptv3-mini"].model.backbone_options
VALUES = dict(
    n_points=300, voxel_size=0.2, block_size=0.6, steps=6, warmup=2, workers=0, save_every=2
)
NETS = {"SparseUNet": UNET, "PTv3": PTV3 | dict(voxel_size=0.2, shuffle_orders=False)}


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    "Rooms of ScanNet's layout without a label."
    root = tmp_path_factory.mktemp("rooms") / "box"
    write_box_rooms(root, rooms=dict(a="train", b="train", c="val"), n_frames=2, spacing=0.15)
    for path in [*root.rglob("segment*.npy"), *root.rglob("instance.npy")]:
        path.unlink()
    return root


@pytest.fixture(scope="module")
def small(boxes):
    mini = recipes["masked-rooms-mini"]
    return change(mini, source=str(boxes), backbone_options=UNET, **VALUES)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    "A run without a stop."
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return run_recipe("masked-rooms-mini", small, folder, device="cpu")


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [row | {"seconds": ""} for row in csv.DictReader(file)]


def room_model(name):
    kind = f"masked-rooms{'' if name == 'SparseUNet' else '-ptv3'}-mini"
    recipe = change(recipes[kind], backbone_options=NETS[name])
    model = recipe.build_model().eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(model.token)
    return model


def rooms(*sizes):
    gen = torch.Generator().manual_seed(0)
    index = [torch.randperm(12**3, generator=gen)[:n] for n in sizes]
    cells = [torch.stack([i // 144, i // 12 % 12, i % 12], 1) for i in index]
    xyz = [0.2 * (c + torch.rand(len(c), 3, generator=gen)) for c in cells]  # one point a voxel
    return PointBatch.pack(xyz, [torch.rand(n, 6, generator=gen) for n in sizes])


@pytest.mark.parametrize("name", NETS)
def test_what_is_hidden_is_not_read(name):
    model, points = room_model(name), rooms(150, 90)
    hidden = torch.arange(240) % 3 == 0
    with torch.no_grad():
        first = model(points, hidden)
        feat = torch.where(hidden[:, None], torch.rand(240, 6), points.feat)
        assert torch.equal(model(points.with_feat(feat), hidden), first)
        feat = torch.where(hidden[:, None], points.feat, torch.rand(240, 6))
        assert not torch.allclose(model(points.with_feat(feat), hidden), first, atol=1e-4)


def test_rows_of_a_room_may_come_in_any_order_and_rooms_do_not_mix():
    model, points = room_model("SparseUNet"), rooms(150, 90)
    hidden = torch.arange(240) % 3 == 0
    order = torch.cat([torch.randperm(150), 150 + torch.randperm(90)])
    shuffled = PointBatch(points.xyz[order], points.feat[order], points.batch, 2)
    second = PointBatch.pack([points.xyz[150:]], [points.feat[150:]])
    with torch.no_grad():
        found = torch.zeros(240, 6)
        found[hidden] = model(points, hidden)
        again = torch.zeros(240, 6)
        again[order[hidden[order]]] = model(shuffled, hidden[order])
        assert torch.allclose(found, again, atol=1e-5)
        alone = model(second, hidden[150:])
        assert torch.allclose(found[150:][hidden[150:]], alone, atol=1e-5)


def test_blocks_are_hidden_whole_and_as_many_as_was_said():
    xyz = np.random.default_rng(0).random((2000, 3), dtype=np.float32)
    hidden = hide_blocks(xyz, 0.25, 0.5, np.random.default_rng(3))
    block = np.floor(xyz / 0.25).astype(int) @ [16, 4, 1]
    share = np.array([hidden[block == b].mean() for b in range(64)])
    assert set(share) == {0.0, 1.0} and share.sum() == 32
    assert hide_blocks(xyz, 0.25, 1.0, np.random.default_rng(3)).all()


def test_a_turned_normal_costs_what_its_angle_says():
    true = torch.tensor([[0.2, 0.4, 0.6, 0.0, 0.0, 1.0]])
    for angle in (0.0, 0.5, 1.5):
        angle = torch.tensor(angle)
        normal = torch.stack([angle.sin(), torch.tensor(0.0), angle.cos()])[None]
        predicted = torch.cat([true[:, :3] + 0.1, normal], 1)
        expected = 0.03 + 2.0 * (1 - angle.cos())
        assert torch.allclose(hidden_error(predicted, true, 2.0), expected, atol=1e-6)


# ---------------------------------------------------------------- a run


def test_rooms_without_labels_are_enough(whole):
    assert whole.record["task"] == "masked rooms"
    assert set(whole.record["metrics"]) == {"psnr_colour", "psnr_mean_colour", "cosine_normal"}
    assert whole.record["data"]["train"] == 2
    _, model, _ = load_run(whole.folder)
    assert isinstance(model, MaskedRoomModel) and model.token.abs().sum() > 0


def test_a_stopped_run_goes_on_to_the_same_numbers(whole, small, tmp_path, monkeypatch):
    build = type(small).build_task
    calls = []

    def build_stopping(recipe, device="cpu"):
        "The task, which is interrupted in its fifth step as by a terminal."
        task = build(recipe, device)

        def loss(model, batch):
            calls.append(len(batch.points))
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return task.loss(model, batch)

        return replace(task, loss=loss)

    folder = tmp_path / "parts"
    monkeypatch.setattr(type(small), "build_task", build_stopping)
    first = run_recipe("masked-rooms-mini", small, folder, device="cpu")
    assert first.ended == "interrupted" and len(rows_of(folder)) == 5
    run_recipe("masked-rooms-mini", small, folder, device="cpu", resume=True)
    assert rows_of(folder) == rows_of(whole.folder)
    ours, full = (load_tensors(f / "checkpoint.safetensors")[0] for f in (folder, whole.folder))
    assert all(torch.equal(ours[name], full[name]) for name in full)


@pytest.mark.parametrize("name", ["sem-rooms-mini", "inst-rooms-mini"])
def test_the_backbone_starts_a_fine_tuning(name, whole, tmp_path):
    split = dict(a="train", c="val")
    source = write_box_rooms(tmp_path / "box", rooms=split, n_frames=2, spacing=0.15)
    values = dict(source=str(source), steps=1, batch_size=2)
    values |= dict(n_points=300, voxel_size=0.2, validate_every=0, workers=0)
    values |= dict(test_split="val", validation="none")
    recipe = change(finetune_recipes[name], backbone_options=UNET, **values)
    said = []
    folder = tmp_path / "run"
    done = run_recipe(name, recipe, folder, init=whole.folder, device="cpu", say=said.append)
    assert done.record["start"]["coverage"] == 1 and done.ended == "finished"
    fresh = build_backbone(recipe).state_dict()
    _, model, _ = load_run(whole.folder)
    assert model.backbone.state_dict().keys() == fresh.keys()


def test_the_fine_tunings_that_fit_are_proposed(tmp_path):
    lines = next_commands(recipes["masked-rooms-mini"], tmp_path)
    assert f"unipre3d finetune sem-rooms-mini --init {tmp_path}" in lines
    ptv3 = finetune_recipes["sem-rooms-ptv3-mini"].model.backbone_options
    assert recipes["masked-rooms-ptv3-mini"].model.backbone_options == ptv3


REFUSED = {
    "masked-rooms-mini --features normal": "features: expected normal, and color or color_signed",
    "masked-rooms-mini --masked-fraction 0": "masked_fraction: expected above 0 and at most 1",
    "masked-rooms-mini --block-size 0": "block_size: expected above 0, got 0.0",
    "masked-rooms-mini --backbone PointMLP": "features: PointMLP reads coordinates first",
    "masked-rooms-mini --labels 200": "labels: counts only with other recipes",
    "masked-rooms-mini --test-area 2": "test-area: counts only with --layout s3dis",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_is_one_line(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", *words.split(), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert REFUSED[words] in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_area_counts_where_there_are_areas():
    usual = change(recipes["masked-rooms-mini"], layout="s3dis", source="s3dis")
    check_changes(change(usual, val_area=2), usual)
