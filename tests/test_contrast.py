"""Two views of rooms: pairs hold the same point; the loss is its definition; a run stops, goes on and starts other tasks."""

import csv
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from unipre3d.cli import main, next_commands
from unipre3d.data.augment import Augment
from unipre3d.data.scannet import write_box_rooms
from unipre3d.recipes import finetune_recipes, load_run, recipes
from unipre3d.runs.checkpoint import load_tensors
from unipre3d.runs.recipe import change
from unipre3d.runs.run import build_backbone, run_recipe
from unipre3d.tasks.contrast import ContrastRoomModel, TwiceRead, contrast, matched_rows
from unipre3d.tasks.scenes import read_rooms

UNET = dict(base_channels=8, channels=(8, 8), layers=(1, 1), voxel_size=0.2)
PTV3 = recipes["masked-rooms-ptv3-mini"].model.backbone_options
PTV3 = PTV3 | dict(voxel_size=0.2, shuffle_orders=False)
NETS = {"SparseUNet": UNET, "PTv3": PTV3}
VALUES = dict(n_points=300, voxel_size=0.2, anchors=40, steps=6, warmup=2, workers=0, save_every=2)
CHANGES = Augment(rotate="up", scale=(0.8, 1.25), mirror=True, jitter=0.01, drop=0.5, color=0.3)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    "Rooms of ScanNet's layout without a label."
    root = tmp_path_factory.mktemp("rooms") / "box"
    write_box_rooms(root, rooms=dict(a="train", b="train", c="val"), n_frames=2, spacing=0.1)
    for path in [*root.rglob("segment*.npy"), *root.rglob("instance.npy")]:
        path.unlink()
    return root


@pytest.fixture(scope="module")
def small(boxes):
    mini = recipes["contrast-rooms-mini"]
    return change(mini, source=str(boxes), backbone_options=UNET, **VALUES)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    "A run without a stop."
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return run_recipe("contrast-rooms-mini", small, folder, device="cpu")


def samples(small, kept=0.6, **how):
    how = dict(n_points=300, crop="column", augment=CHANGES, voxel_size=0.2) | how
    return TwiceRead(read_rooms(small.data, "train", labelled=False), 40, kept, **how)


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [row | {"seconds": ""} for row in csv.DictReader(file)]


# ---------------------------------------------------------------- pairs


def test_matched_voxels_hold_the_same_point(small):
    two = samples(small)
    for draw in range(5):
        rng = two.rng(0, draw)
        crop = two.crop_of(0, rng)
        (first, row), (second, other) = (two.view(crop, rng) for _ in range(2))
        clouds, pairs = two.pair(0, draw)
        assert np.array_equal(clouds[0]["xyz"], first["xyz"])
        assert np.array_equal(clouds[1]["xyz"], second["xyz"])
        held = set(zip(row.tolist(), other.tolist()))
        assert len(pairs) == 40 and all(pair in held for pair in map(tuple, pairs.tolist()))
        assert all(len(set(column)) == len(column) for column in pairs.T.tolist())


def test_a_view_that_is_not_changed_matches_each_voxel_with_itself(small):
    two = samples(small, kept=1.0, augment=Augment())
    [first, second], pairs = two.pair(0, 0)
    cells = [np.floor(cloud["xyz"] / np.float32(0.2)) for cloud in (first, second)]
    assert np.array_equal(cells[0][pairs[:, 0]], cells[1][pairs[:, 1]])
    assert len(first["xyz"]) == len(second["xyz"]) == 300
    assert not np.array_equal(first["xyz"], second["xyz"])  # other points of the same voxels


def test_a_view_has_one_point_a_voxel_and_the_points_that_its_rows_name(small):
    two = samples(small, augment=replace(CHANGES, jitter=0.0, mirror=False, drop=0.0))
    rng = two.rng(1, 3)
    crop = two.crop_of(1, rng)
    cloud, row = two.view(crop, rng)
    cell = np.floor(cloud["xyz"] / np.float32(0.2))
    assert len(np.unique(cell, axis=0)) == len(cell) == row.max() + 1
    held = row >= 0
    far = np.linalg.norm(crop["xyz"][held, :2], axis=1), np.linalg.norm(cloud["xyz"][:, :2], axis=1)
    factor = np.median(far[1][row[held]] / far[0])
    assert np.abs(far[1][row[held]] - factor * far[0]).max() < 0.3  # the width of a voxel, slanted


def test_rows_are_matched_once():
    rng = np.random.default_rng(0)
    first, second = rng.integers(-1, 30, (2, 200))
    pairs = matched_rows(first, second, rng)
    assert len(pairs) > 10 and pairs.min() >= 0
    assert set(map(tuple, pairs.tolist())) <= set(zip(first.tolist(), second.tolist()))
    assert all(len(set(column)) == len(column) for column in pairs.T.tolist())
    gone = np.full(200, -1)
    assert matched_rows(first, gone, rng).shape == (0, 2)


def test_a_batch_is_its_rooms_and_pairs_stay_in_their_room(small):
    two = samples(small)
    both, alone = two.batch([(0, 1), (1, 2)]), [two.batch([(0, 1)]), two.batch([(1, 2)])]
    points = both.points
    assert points.size == 4 and both.pairs.shape == (80, 2)
    room = points.batch[both.pairs]
    assert torch.equal(room[:, 0] + 2, room[:, 1])
    for column in range(2):
        own = torch.cat([one.points.xyz[one.pairs[:, column]] for one in alone])
        assert torch.equal(points.xyz[both.pairs[:, column]], own)


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("name", NETS)
def test_the_loss_is_its_definition(small, name):
    recipe = change(small, backbone=name, backbone_options=NETS[name])
    batch = samples(small).batch([(0, 1), (1, 2)])
    model = recipe.build_model().eval()
    task_loss = contrast(*model(batch.points, batch.pairs), 0.4)
    task_loss.backward()
    found = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    unit = torch.nn.functional.normalize(model.head(model.features(batch.points)), dim=1)
    terms = []
    for i, j in batch.pairs.tolist():
        there = torch.stack([(unit[i] @ unit[k] / 0.4).exp() for k in batch.pairs[:, 1]])
        back = torch.stack([(unit[k] @ unit[j] / 0.4).exp() for k in batch.pairs[:, 0]])
        own = (unit[i] @ unit[j] / 0.4).exp()
        terms += [-(own / there.sum()).log(), -(own / back.sum()).log()]
    plain = torch.stack(terms).mean()
    assert torch.allclose(plain, task_loss, atol=1e-5)
    plain.backward()
    for key, gradient in found.items():
        again = dict(model.named_parameters())[key].grad
        assert torch.allclose(gradient, again, atol=1e-5, rtol=1e-3), key


def test_a_crop_without_a_match_is_said_and_left_out(small, monkeypatch):
    two = samples(small)
    view = TwiceRead.view
    calls = []

    def parted(self, crop, rng):
        "The second view of the first room holds nothing of the first view."
        cloud, row = view(self, crop, rng)
        calls.append(row)
        return cloud, np.full_like(row, -1) if len(calls) == 2 else row

    monkeypatch.setattr(TwiceRead, "view", parted)
    with pytest.warns(UserWarning, match="two views share no voxel, left out"):
        batch = two.batch([(0, 1), (1, 2)])
    assert batch.points.batch[batch.pairs].unique().tolist() == [1, 3]
    model = small.build_model()
    assert contrast(*model(batch.points, batch.pairs), 0.4).isfinite()
    loss = contrast(*model(batch.points, batch.pairs[:0]), 0.4)
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_validation_rooms_without_any_match_are_refused_and_not_nan(small, monkeypatch, tmp_path):
    task = small.build_task()
    pair = TwiceRead.pair
    monkeypatch.setattr(TwiceRead, "pair", lambda *key: (pair(*key)[0], np.zeros((0, 2), int)))
    with pytest.raises(ValueError, match="validation: expected rooms of which two views share"):
        task.test(task.model, tmp_path)


# ---------------------------------------------------------------- a run


def test_rooms_without_labels_are_enough_and_scores_do_not_vary(whole, small):
    assert whole.record["task"] == "two views of rooms"
    scores = whole.record["metrics"]
    assert set(scores) == {"contrast", "matched", "chance"}
    assert scores["chance"] == pytest.approx(1 / 40) and 0 <= scores["matched"] <= 1
    _, model, _ = load_run(whole.folder)
    assert isinstance(model, ContrastRoomModel)
    again = [change(small, seed=seed).build_task().test(model, whole.folder)[0] for seed in (0, 5)]
    assert again[0] == again[1] == pytest.approx(scores, rel=1e-5)


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
    first = run_recipe("contrast-rooms-mini", small, folder, device="cpu")
    assert first.ended == "interrupted" and len(rows_of(folder)) == 5
    run_recipe("contrast-rooms-mini", small, folder, device="cpu", resume=True)
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
    folder = tmp_path / "run"
    done = run_recipe(name, recipe, folder, init=whole.folder, device="cpu", say=lambda text: None)
    assert done.record["start"]["coverage"] == 1 and done.ended == "finished"
    fresh = build_backbone(recipe).state_dict()
    _, model, _ = load_run(whole.folder)
    assert model.backbone.state_dict().keys() == fresh.keys()


def test_the_backbone_is_that_of_the_other_baseline_and_fine_tunings_are_proposed(tmp_path):
    ours, masked = recipes["contrast-rooms-mini"], recipes["masked-rooms-mini"]
    assert ours.model.backbone_options == masked.model.backbone_options
    lines = next_commands(ours, tmp_path)
    assert f"unipre3d finetune sem-rooms-mini --init {tmp_path}" in lines


REFUSED = {
    "contrast-rooms-mini --kept 0.5": "kept: expected above 0.5 and at most 1, got 0.5",
    "contrast-rooms-mini --temperature 0": "temperature: expected above 0, got 0.0",
    "contrast-rooms-mini --anchors 0": "anchors: expected at least 1, got 0",
    "contrast-rooms-mini --accumulate 2": "accumulate: expected 1: anchors are told from all others",
    "contrast-rooms-mini --backbone PointMLP": "features: PointMLP reads coordinates first",
    "contrast-rooms-mini --backbone PointNet2 --features xyz": "expected SparseUNet or PTv3, got PointNet2",
    "contrast-rooms-mini --labels 200": "labels: counts only with other recipes",
    "contrast-rooms-mini --block-size 0.3": "block-size",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_is_one_line(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", *words.split(), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert REFUSED[words] in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())
