"""Groups against breadth-first search, scores of hand-made scenes with known answers, and the task from end to end on box rooms."""

import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from unipre3d.data.scannet import ScanNetFrames, box_cloud, scannet_labels, write_cloud
from unipre3d.tasks import instances
from unipre3d.tasks.instances import (
    InstanceModel,
    InstanceRecipe,
    center_offsets,
    components,
    evaluate_instances,
    final_scores,
    find_instances,
    instance_loss,
    instance_recipes,
    mask_iou,
    offset_losses,
    partners,
    proposals,
    radius_groups,
    suppress,
    thing_classes,
)
from unipre3d.tasks.metrics import InstanceScore, Instances
from unipre3d.runs.checkpoint import load_tensors
from unipre3d.runs.recipe import change
from unipre3d.runs.run import build_backbone, load_model, run_recipe
from unipre3d.runs.starts import load_weights
from unipre3d.tasks.pretrain import pretrain_recipes
from unipre3d.tasks.scenes import ScenePoints, split_rooms


def run_task(name, recipe, folder, **how):
    "The record of a run; None where it was interrupted."
    return run_recipe(name, recipe, folder, **how).record


# ---- groups


def breadth_first(xyz, label, radius):
    "Reach every point of the class from each start; groups numbered by their first point."
    xyz, group, number = xyz.astype(np.float64), np.full(len(xyz), -1), 0
    for start in range(len(xyz)):
        if group[start] >= 0 or label[start] < 0:
            continue
        queue, group[start] = [start], number
        while queue:
            i = queue.pop()
            for j in range(len(xyz)):
                if (
                    group[j] < 0
                    and label[j] == label[i]
                    and ((xyz[i] - xyz[j]) ** 2).sum() <= radius**2
                ):
                    group[j] = number
                    queue.append(j)
        number += 1
    return group


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.05, 0.2, 0.45, 1.0, 3.0]),
    st.sampled_from(["even", "balls", "line", "grid"]),
)
def test_groups_equal_breadth_first_search(seed, radius, kind):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 90))
    xyz = {
        "even": rng.uniform(-1, 1, (n, 3)),
        "balls": rng.integers(-1, 2, (n, 3)) * 0.4 + rng.normal(0, 0.01, (n, 3)),
        "line": rng.uniform(-8, 8, (n, 1)) * [1, 0, 0],
        "grid": rng.integers(-3, 4, (n, 3)) * 0.25,
    }[kind].astype(np.float32)
    label = rng.integers(-1, 3, n)
    np.testing.assert_array_equal(
        radius_groups(xyz, label, radius), breadth_first(xyz, label, radius)
    )


def test_a_step_of_exactly_the_radius_counts_and_classes_do_not_join():
    xyz = np.arange(6, dtype=np.float32)[:, None] * np.float32([0.25, 0, 0])
    assert radius_groups(xyz, np.zeros(6, int), 0.25).tolist() == [0] * 6
    assert radius_groups(xyz, np.zeros(6, int), 0.2499).tolist() == list(range(6))
    assert radius_groups(xyz, np.array([0, 0, 1, 1, -1, 0]), 0.25).tolist() == [0, 0, 1, 1, -1, 2]
    assert radius_groups(xyz * 0, np.array([0, 7, 0, 7, 0, 7]), 0.1).tolist() == [
        0,
        1,
        0,
        1,
        0,
        1,
    ]  # on one spot


def test_groups_of_dense_balls_need_no_table_of_pairs():
    rng = np.random.default_rng(0)
    xyz = np.concatenate(
        [rng.normal(0, 0.004, (60_000, 3)), [0.5, 0, 0] + rng.normal(0, 0.004, (60_000, 3))]
    )  # 3.6 billion pairs
    group = radius_groups(xyz, np.zeros(len(xyz), int), 0.03)
    assert group[:60_000].max() == 0 and (group[60_000:] == 1).all()


def test_components_and_errors():
    assert components(4, np.zeros((0, 2), int)).tolist() == [0, 1, 2, 3]
    assert radius_groups(np.zeros((0, 3)), np.zeros(0, int), 0.1).shape == (0,)
    for radius in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="^radius: expected a length above 0"):
            radius_groups(np.zeros((1, 3)), np.zeros(1, int), radius)


# ---- offsets


def test_offsets_point_to_the_mean_of_each_instance_of_each_scene():
    gen = torch.Generator().manual_seed(0)
    xyz, batch, instance = (
        torch.rand(200, 3, generator=gen),
        torch.arange(2).repeat_interleave(100),
        torch.randint(-1, 4, (200,), generator=gen),
    )
    offset = center_offsets(xyz, batch, instance)
    for b in range(2):
        for k in range(-1, 4):
            own = (batch == b) & (instance == k)
            want = xyz[own].mean(0) - xyz[own] if k >= 0 else torch.zeros(int(own.sum()), 3)
            torch.testing.assert_close(offset[own], want)
    turned = center_offsets(
        xyz @ torch.diag(torch.tensor([-1.0, -1, 1])) + 3, batch, instance
    )  # turns with the scene, and does not move with it
    torch.testing.assert_close(turned, offset * torch.tensor([-1.0, -1, 1]), rtol=1e-4, atol=1e-5)
    assert not center_offsets(xyz, batch, instance * 0 - 1).any()


def test_offset_losses_by_hand_and_without_a_thing():
    offset, target = (
        torch.tensor([[3.0, 4, 0], [0, 0, 1], [9, 9, 9]], requires_grad=True),
        torch.tensor([[4.0, 4, 0], [0, 0, -1], [0, 0, 0]]),
    )
    distance, direction = offset_losses(offset, target, torch.tensor([True, True, False]))
    assert distance.item() == pytest.approx((1 + 2) / 2) and direction.item() == pytest.approx(
        -((12 + 16) / 5 / 32**0.5 - 1) / 2, abs=1e-5
    )
    (distance + direction).backward()
    assert not offset.grad[2].any() and offset.grad[:2].any(1).all()
    offset.grad = None
    sum(offset_losses(offset, target, torch.zeros(3, dtype=torch.bool))).backward()
    assert not offset.grad.any()


# ---- proposals and doubles: hand-made rooms with answers that follow from ScanNet's rules

THINGS = torch.tensor([False, True, True])


def block(x, n=200):
    "A plate of points a centimetre apart, its low corner at x."
    k = torch.arange(n)
    return torch.stack([x + 0.01 * (k % 10), 0.01 * (k // 10), 0.0 * k], 1)


def scored(xyz, offset, label, instance, probability=None, **how):
    probability = F.one_hot(label, 3).float() if probability is None else probability
    found = suppress(
        proposals(xyz, offset, probability, THINGS, **dict(radius=0.015, min_points=50) | how)
    )
    return found, InstanceScore(3, skip=(0,)).update(found, label, instance).compute()


def two_chairs(gap):
    xyz = torch.cat([block(0), block(0.1 + gap), block(9.0)])
    label, instance = (
        torch.tensor([1, 1, 0]).repeat_interleave(200),
        torch.tensor([0, 1, -1]).repeat_interleave(200),
    )
    return xyz, label, instance, center_offsets(xyz, torch.zeros_like(label), instance)


def test_perfect_classes_and_offsets_give_one():
    for gap in (0.0, 0.1, 1.0):
        xyz, label, instance, offset = two_chairs(gap)
        found, score = scored(xyz, offset, label, instance)
        assert len(found.label) == 2 and [score[k] for k in ("map", "ap50", "ap25")] == [1, 1, 1]


def test_touching_things_without_offsets_are_one():
    xyz, label, instance, offset = two_chairs(0.0)
    found, score = scored(xyz, offset * 0, label, instance)
    assert len(found.label) == 1 and found.mask.sum() == 400
    assert (score["ap25"], score["ap50"], score["map"]) == (
        0.5,
        0,
        0,
    )  # half of each: right once at 25 %, and half is not more than half
    found, score = scored(
        *two_chairs(0.1)[:1], offset * 0, label, instance
    )  # apart they are two without any offset
    assert len(found.label) == 2 and score["map"] == 1


def test_a_thing_in_two_pieces_needs_offsets():
    xyz, label, _, _ = two_chairs(0.5)
    instance = torch.tensor([0, 0, -1]).repeat_interleave(200)
    whole = center_offsets(xyz, label * 0, instance)
    found, score = scored(xyz, whole * 0, label, instance)
    assert len(found.label) == 2 and (score["ap50"], score["ap25"]) == (
        0,
        0.75,
    )  # half of it twice, equally sure: at 25 % one point of the curve, recall 1 and precision 1/2
    found, score = scored(xyz, whole, label, instance, group_unmoved=False)
    assert len(found.label) == 1 and score["map"] == 1
    found, score = scored(
        xyz, whole, label, instance
    )  # the halves overlap the whole by one half: doubles
    assert len(found.label) == 1 and score["map"] == 1


def test_confidence_is_the_mean_probability_of_the_class_and_orders_the_list():
    xyz, label, instance, offset = two_chairs(0.3)
    probability = torch.tensor([[0.1, 0.6, 0.3], [0.0, 0.9, 0.1], [1, 0, 0]]).repeat_interleave(
        200, 0
    )
    probability[:100] = torch.tensor([0.1, 0.8, 0.1])
    found, score = scored(xyz, offset, label, instance, probability)
    torch.testing.assert_close(found.score, torch.tensor([0.9, 0.7]))
    assert found.mask[0, 200:400].all() and score["map"] == 1


def test_small_groups_and_other_classes():
    xyz, label, instance, offset = two_chairs(0.3)
    label[200:400] = 2
    assert proposals(
        xyz,
        offset,
        F.one_hot(label, 3).float(),
        THINGS,
        radius=0.015,
        min_points=200,
        group_unmoved=False,
    ).label.tolist() == [1, 2]
    assert not len(
        proposals(
            xyz, offset, F.one_hot(label, 3).float(), THINGS, radius=0.015, min_points=201
        ).label
    )
    nothing = proposals(xyz, offset, F.one_hot(label * 0, 3).float(), THINGS, radius=0.015)
    assert nothing.mask.shape == (0, 600) and len(suppress(nothing).score) == 0
    score = InstanceScore(3, skip=(0,)).update(nothing, label, instance).compute()
    assert score["map"] == 0  # nothing found, two things there


@pytest.mark.parametrize("seed", range(5))
def test_suppression_keeps_no_two_that_overlap_and_drops_none_without_reason(seed):
    gen = torch.Generator().manual_seed(seed)
    start, length = (
        torch.randint(0, 90, (40,), generator=gen),
        torch.randint(1, 40, (40,), generator=gen),
    )
    mask = (torch.arange(130) >= start[:, None]) & (torch.arange(130) < (start + length)[:, None])
    pred = Instances(mask, start * 0, torch.rand(40, generator=gen))
    kept = suppress(pred, 0.3)
    iou = mask_iou(kept.mask, kept.mask)
    assert (
        not (iou - torch.eye(len(iou)) > 0.3 + 1e-6).any()
        and (kept.score[1:] <= kept.score[:-1]).all()
    )
    cover = mask_iou(pred.mask, kept.mask)
    assert (
        ((cover > 0.3) & (kept.score >= pred.score[:, None])).any(1).all()
    )  # each is kept or a double of a more confident one
    sets = [set(m.nonzero().flatten().tolist()) for m in mask]
    torch.testing.assert_close(
        mask_iou(mask, mask), torch.tensor([[len(a & b) / len(a | b) for b in sets] for a in sets])
    )


# ---- the task, on box rooms: one block each, the only thing

TOY = dict(base_channels=4, channels=(4, 8, 8, 4), layers=(1, 1, 1, 1), voxel_size=0.25)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    "Five rooms of walls and a floor with a block that is a table, without frames; the last two rooms of `bare` have no block."
    root, cloud = tmp_path_factory.mktemp("boxes"), box_cloud(0.1)
    for n, split in enumerate(("train", "train", "train", "val", "test")):
        write_cloud(root / "rooms", split, f"box{n:04d}_00", **cloud)
    keep = cloud["instance"] < 0
    for n, split in enumerate(("train", "train", "val", "test")):
        write_cloud(
            root / "bare",
            split,
            f"box{n:04d}_00",
            **{k: v[keep] if n != 0 else v for k, v in cloud.items()},
        )
    return root


def recipe(root, **changes):
    return change(
        instance_recipes["inst-rooms-mini"],
        **dict(
            source=str(root),
            backbone_options=TOY,
            voxel_size=0.25,
            batch_size=1,
            steps=6,
            validate_every=2,
            save_every=1,
            warmup=1,
            radius=0.4,
            min_points=3,
        )
        | changes,
    )


def quiet(text):
    pass


@pytest.fixture(scope="module")
def straight(boxes):
    "A run without a stop: its folder and its record."
    return boxes / "run", run_task(
        "inst-rooms-mini",
        recipe(boxes / "rooms"),
        boxes / "run",
        say=quiet,
        device="cpu",
    )


def test_recipes_are_plain_values_and_come_back(tmp_path, boxes, straight):
    folder, record = straight
    assert (
        record["task"] == "instance segmentation"
        and record["chosen"]["chosen_by"] == "val_ap50"
        and set(record["metrics"]) == {"map", "ap50", "ap25"}
    )
    assert (
        record["details"]["classes"]["table"]["things"] == 1
        and list(record["details"]["classes"]) == ["table"]
        and (folder / "instances.png").stat().st_size > 5000
    )
    back, model, names = load_model(folder, {InstanceRecipe.task: InstanceRecipe})
    assert back == recipe(boxes / "rooms") and len(names) == 20
    metrics, details = final_scores(model, back, split_rooms(back.data)[2], tmp_path)
    assert metrics == record["metrics"] and details == record["details"]
    again = run_task(
        "again",
        recipe(boxes / "rooms", steps=1),
        tmp_path / "again",
        init=folder,
        say=quiet,
        device="cpu",
    )
    assert again["start"]["coverage"] == 1


def test_resume_equals_straight(tmp_path, boxes, straight, monkeypatch):
    real, calls = instances.instance_loss, []

    def stopping(*a, **k):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*a, **k)

    with monkeypatch.context() as m:
        m.setattr(instances, "instance_loss", stopping)
        assert (
            run_task(
                "x",
                recipe(boxes / "rooms"),
                tmp_path / "parts",
                say=quiet,
                device="cpu",
            )
            is None
        )
    run_task(
        "x",
        recipe(boxes / "rooms"),
        tmp_path / "parts",
        resume=True,
        say=quiet,
        device="cpu",
    )
    a, b = (
        load_tensors(f / "checkpoint.safetensors")[0] for f in (straight[0], tmp_path / "parts")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    losses = [
        pd.read_csv(f / "metrics.csv").loss.tolist() for f in (straight[0], tmp_path / "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_perfect_model_scores_one_on_every_point(boxes):
    class Knows(torch.nn.Module):
        def forward(self, points):
            inside = (
                ((points.xyz[:, :2] - (middle := torch.tensor([-0.1, -0.1]))).abs() < 0.62).all(1)
                & (points.xyz[:, 2] > 0.02)
                & (points.xyz[:, 2] < 1)
            )
            offset = torch.where(
                inside[:, None], torch.cat([middle, torch.tensor([0.5])]) - points.xyz, 0.0
            )
            return 9.0 * F.one_hot(torch.where(inside, 6, 0), 20).float(), offset

    samples = ScenePoints(ScanNetFrames(boxes / "rooms", split="test", labels=20), voxel_size=0.1)
    got = evaluate_instances(Knows(), samples, scannet_labels(20), radius=0.12, min_points=5)
    assert got["map"] == 1 and got["ap"].isfinite().sum() == 1 and got["things"][6] == 1
    scene = samples.scene(0)
    found = find_instances(
        Knows(),
        scene,
        thing_classes(scannet_labels(20)),
        radius=0.12,
        min_points=5,
        group_unmoved=False,
    )
    assert found.mask.shape == (1, len(scene.label)) and torch.equal(
        partners(found, scene.label, scene.instance) >= 0, found.mask[0]
    )


def test_rooms_without_a_thing(tmp_path, boxes):
    samples = ScenePoints(ScanNetFrames(boxes / "bare", split="train", labels=20), voxel_size=0.25)
    model, things = (
        InstanceModel(build_backbone(recipe(boxes)), 20),
        thing_classes(scannet_labels(20)),
    )
    loss, scores = instance_loss(model, samples.batch([(1, 0), (1, 1)]), things)
    loss.backward()
    assert (
        loss.isfinite()
        and scores["train_distance"] == scores["train_direction"] == 0
        and not any(p.grad.any() for p in model.offset.parameters())
    )
    with pytest.raises(ValueError) as error:
        run_task("x", recipe(boxes / "bare"), tmp_path / "run", say=quiet, device="cpu")
    assert "validation: expected rooms with labels (instance), found none" in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    empty = ScenePoints(ScanNetFrames(boxes / "bare", split="val", labels=20), voxel_size=0.25)
    with pytest.raises(ValueError) as error:
        evaluate_instances(model, empty, scannet_labels(20), radius=0.12, min_points=5)
    assert "expected at least one thing of 100 points in 1 rooms, found none" in str(
        error.value
    ) and "\n" not in str(error.value)
    shown = partners(
        Instances(torch.ones(1, 5, dtype=torch.bool), torch.tensor([6]), torch.ones(1)),
        torch.zeros(5, dtype=torch.long),
        torch.full((5,), -1),
    )
    assert shown.tolist() == [-2] * 5


def test_partners_are_of_the_same_class_and_the_most_confident_one_is_on_top():
    segment, instance = torch.tensor([1, 1, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 3, 3])
    found = Instances(
        torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]).bool(),
        torch.tensor([2, 1, 2]),
        torch.tensor([0.9, 0.8, 0.7]),
    )
    assert partners(found, segment, instance).tolist() == [-2, -2, 0, 0, 3, 3]


@pytest.mark.parametrize("name", ["inst-scannet20", "inst-scannet200"])
def test_missing_data_is_one_line_that_says_where_it_comes_from(name):
    with pytest.raises(ValueError) as error:
        change(instance_recipes[name], backbone_options=TOY).build_task()
    assert (
        str(error.value).startswith("data: this recipe needs ScanNet")
        and "pass --data" in str(error.value)
        and "\n" not in str(error.value)
    )
    with pytest.raises(FileNotFoundError, match="nowhere"):
        change(instance_recipes[name], backbone_options=TOY, source="nowhere").build_task()


def test_what_is_not_supported_says_so():
    for changes in (dict(votes=8), dict(layout="s3dis")):
        with pytest.raises(ValueError, match="layout, votes: instances are scored as ScanNet does"):
            change(instance_recipes["inst-rooms-mini"], **changes).build_model(20)


def test_the_mini_recipe_takes_the_pretraining_checkpoint():
    ours, theirs = instance_recipes["inst-rooms-mini"], pretrain_recipes["scene-sparseunet-mini"]
    assert ours.data.features == theirs.data.features
    assert ours.model.backbone == theirs.model.backbone
    assert ours.model.backbone_options == theirs.model.backbone_options
    pretrained = theirs.build_model(8)
    assert (
        load_weights(
            ours.build_model(20).backbone, pretrained.backbone.state_dict(), init="a run"
        ).coverage
        == 1
    )
