"""Semantic segmentation: labels that stay with their points, an answer for every point, and whole runs on tiny rooms of each layout."""

import json
import os
import signal
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_jaccard_index,
)

import unipre3d.tasks.semantic as semantic
from unipre3d.backbones import PointNet2, PTv3, SparseUNet, StandardTransformer
from unipre3d.core import data_dir, to_device
from unipre3d.data.augment import Augment, mirror
from unipre3d.data.labelled import S3DIS, write_s3dis
from unipre3d.data.loading import make_loader
from unipre3d.data.samples import Labelled
from unipre3d.data.readers import Subset, hold_out_places
from unipre3d.data.scannet import ScanNetFrames, box_cloud, scannet_labels, write_cloud
from unipre3d.runs.checkpoint import load_tensors, save_tensors
from unipre3d.runs.recipe import change
from unipre3d.runs.run import load_model, run_recipe
from unipre3d.runs.starts import start_from
from unipre3d.tasks.heads import propagate
from unipre3d.tasks.pretrain import pretrain_recipes
from unipre3d.tasks.scenes import (
    PointModel,
    SceneObjective,
    ScenePoints,
    crop_rows,
    lovasz_loss,
    one_per_voxel,
    paint_room,
    read_rooms,
    scene_samples,
    split_rooms,
)
from unipre3d.tasks.semantic import (
    SemanticRecipe,
    evaluate_semantic,
    point_probabilities,
    save_voxels,
    semantic_loss,
    semantic_recipes,
    show_voxels,
)
from unipre3d.viewer import label_palette

UNET = dict(base_channels=8, channels=(8, 8, 8, 8), layers=(1, 1, 1, 1), voxel_size=0.2)
STRONG = Augment(rotate="up", scale=(0.8, 1.2), translate=0.3, jitter=0.01, drop=0.4, color=0.2)


def box(seed):
    "The box room, with 200 classes too and some points without any; colours tell the points apart."
    cloud, rng = box_cloud(0.16), np.random.default_rng(seed)
    n = len(cloud["coord"])
    cloud["segment20"] = np.where(rng.random(n) < 0.05, -1, cloud["segment20"])
    return cloud | dict(
        segment200=np.where(cloud["segment20"] == 6, 70, cloud["segment20"].clip(max=2))
    )


@pytest.fixture(scope="module")
def scannet(tmp_path_factory):
    root = tmp_path_factory.mktemp("scannet")
    for k, split in enumerate(("train", "train", "train", "val", "test")):
        write_cloud(root, split, f"scene{k // 2:04d}_{k % 2:02d}", **box(k))
    return root


@pytest.fixture(scope="module")
def s3dis(tmp_path_factory):
    root = tmp_path_factory.mktemp("s3dis")
    for area in range(1, 7):
        cloud = box(area)
        write_s3dis(
            root,
            f"Area_{area}/office_1",
            coord=cloud["coord"],
            color=cloud["color"],
            normal=cloud["normal"],
            segment=cloud["segment20"],
            instance=cloud["instance"],
        )
    return root


def run_task(name, recipe, folder, **how):
    "The record of a run on the CPU; None where it was interrupted."
    return run_recipe(name, recipe, folder, device="cpu", **how).record


def rooms(root, split="train", **how):
    return ScanNetFrames(root, split=split, **dict(labels=20) | how)


def tiny(root, **values):
    return change(
        SemanticRecipe(),
        **dict(
            source=str(root),
            backbone="SparseUNet",
            backbone_options=UNET,
            features=("normal", "color_signed"),
            voxel_size=0.2,
            n_points=400,
            steps=6,
            batch_size=2,
            lr=3e-3,
            validate_every=3,
            augment=Augment(rotate="up", mirror=True),
            lovasz=1.0,
        )
        | values,
    )


# ---------------------------------------------------------------- labels stay with their points


class Numbered:
    "A room in which class, object and colour of a point all say which point it is."

    classes = [str(k) for k in range(1000)]

    def __len__(self):
        return 2

    def name(self, i):
        return f"room{i}"

    def rows(self, i):
        rng, number = np.random.default_rng(i), np.arange(1000, dtype=np.int32)
        color = np.stack([number % 10, number // 10 % 10, number // 100], 1).astype(np.uint8)
        return dict(
            xyz=(rng.random((1000, 3), np.float32) * [4, 3, 2]).astype(np.float32),
            color=color,
            normal=np.float32([[0, 0, 1]] * 1000),
            segment=number,
            instance=999 - number,
        )


@pytest.mark.parametrize("crop", ["ball", "column"])
def test_labels_follow_points_through_changes_and_crops(crop):
    samples = ScenePoints(
        Numbered(),
        voxel_size=0.1,
        n_points=200,
        crop=crop,
        features=("xyz", "normal", "color"),
        augment=replace(STRONG, color=0.0, mirror=True),
    )
    b = samples.batch([(0, 0), (1, 5)])
    digits = (b.points.feat[:, 6:] * 255).round().long()
    number = digits @ torch.tensor([1, 10, 100])
    assert (
        torch.equal(number, b.label)
        and torch.equal(999 - number, b.instance)
        and b.points.counts.tolist() == [200, 200]
    )
    assert torch.equal(b.points.feat[:, :3], b.points.xyz) and torch.allclose(
        b.points.feat[:, 5], torch.ones(400)
    )
    for k in range(2):
        assert len(b.label[b.points.batch == k].unique()) == 200  # no point twice


def test_shape_survives_changes():
    "Distances between points are those of the room, times one factor."
    reader = Numbered()
    samples = ScenePoints(
        reader,
        voxel_size=0.01,
        augment=Augment(rotate="up", scale=(0.8, 1.2), mirror=True, translate=0.3),
    )
    for draw in range(4):
        cloud = samples.cloud(1, draw)
        before, after = (
            np.linalg.norm(np.diff(x[:100], axis=0), axis=1)
            for x in (reader.rows(1)["xyz"][cloud["segment"]], cloud["xyz"])
        )
        assert np.ptp(after / before) < 1e-3 and 0.8 <= np.mean(after / before) <= 1.2
        if draw == 0:
            first = cloud
    assert len(first["xyz"]) == len(one_per_voxel(samples.room(1)["xyz"], 0.01)) == 1000


def test_samples_depend_on_seed_index_and_draw_alone(scannet):
    how = dict(voxel_size=0.2, n_points=300, augment=replace(STRONG, mirror=True))
    samples = ScenePoints(rooms(scannet), **how)
    a, b = samples[1, 2], samples.batch([(0, 0), (1, 2)])
    second = b.points.batch == 1
    for x, y in (
        (a.points.feat, b.points.feat[second]),
        (a.label, b.label[second]),
        (a.instance, b.instance[second]),
    ):
        assert torch.equal(x, y)
    assert not torch.equal(samples[1, 3].points.xyz, a.points.xyz) and not torch.equal(
        ScenePoints(rooms(scannet), **how, seed=1)[1, 2].points.xyz, a.points.xyz
    )
    loaded = [next(iter(make_loader(samples, first, 4, batch_size=2))) for first in (3, 3)] + list(
        make_loader(samples, 0, 4, batch_size=2)
    )[3:]
    assert all(
        torch.equal(loaded[0].points.feat, x.points.feat)
        and torch.equal(loaded[0].instance, x.instance)
        for x in loaded[1:]
    )
    assert torch.equal(to_device(a, "cpu").instance, a.instance)


def test_grid_and_crop():
    rng = np.random.default_rng(0)
    xyz = rng.random((500, 3)).astype(np.float32)
    keep = one_per_voxel(xyz, 0.25, rng)
    assert (
        len(keep)
        == len(np.unique((xyz // 0.25).astype(int), axis=0))
        == len(np.unique((xyz[keep] // 0.25).astype(int), axis=0))
    )
    assert one_per_voxel(xyz, 0.25).tolist() == sorted(
        one_per_voxel(xyz, 0.25).tolist(), key=lambda r: tuple((xyz[r] // 0.25).astype(int))
    )
    ball = crop_rows(xyz, 50, np.random.default_rng(3))
    centre = xyz[np.random.default_rng(3).integers(500)]
    far = np.linalg.norm(xyz - centre, axis=1)
    assert sorted(far[ball]) == sorted(far)[:50] and (np.diff(ball) > 0).all()
    column = crop_rows(xyz, 50, np.random.default_rng(3), "column")
    assert (
        np.abs(xyz[column] - centre)[:, :2].max() <= np.sort(np.abs(xyz - centre)[:, :2].max(1))[49]
    )
    with pytest.raises(ValueError, match='crop: expected "ball" or "column", got'):
        crop_rows(xyz, 5, rng, "cube")
    assert (mirror(dict(xyz=xyz, segment=keep))["xyz"][:, 0] == -xyz[:, 0]).all()


# ---------------------------------------------------------------- readers


def test_scannet_labels_of_both_sets(scannet):
    small, large = rooms(scannet), rooms(scannet, labels=200)
    assert small.classes == scannet_labels().names and len(large.classes) == 200
    assert (
        set(small.rows(0)["segment"]) == {-1, 0, 1, 6}
        and set(large.rows(0)["segment"]) == {-1, 0, 1, 70}
        and set(small.rows(0)["instance"]) == {-1, 0}
    )


def test_scannet_without_objects_and_with_foreign_labels(tmp_path):
    cloud = box(0)
    write_cloud(
        tmp_path,
        "train",
        "a",
        coord=cloud["coord"],
        color=cloud["color"],
        normal=cloud["normal"],
        segment20=cloud["segment20"],
    )
    assert (rooms(tmp_path).rows(0)["instance"] == -1).all()
    write_cloud(tmp_path, "val", "b", coord=cloud["coord"], segment20=cloud["segment20"] + 100)
    with pytest.raises(ValueError, match=r"b/segment20.npy: expected labels in -1..19, found 100"):
        rooms(tmp_path, "val").rows(0)
    write_cloud(tmp_path, "test", "c", coord=cloud["coord"], segment20=cloud["segment20"])
    with pytest.raises(ValueError, match="features: expected a cloud with normal"):
        ScenePoints(rooms(tmp_path, "test"), voxel_size=0.2)[0]


def test_s3dis_gives_the_same_as_scannet(scannet, s3dis):
    a, b = (
        ScenePoints(rooms(scannet), voxel_size=0.2).room(1),
        ScenePoints(S3DIS(s3dis, split="train", val_area=2), voxel_size=0.2).room(0),
    )
    assert all(
        np.array_equal(a[k], b[k]) for k in ("xyz", "color", "normal", "segment", "instance")
    )


# ---------------------------------------------------------------- features for points

BACKBONES = {
    "voxels": lambda: SparseUNet(in_channels=6, **UNET),
    "voxels in order": lambda: PTv3(
        in_channels=6,
        voxel_size=0.2,
        stride=(2,),
        enc_depths=(1, 1),
        enc_channels=(8, 16),
        enc_num_head=(1, 2),
        enc_patch_size=(32, 32),
        dec_depths=(1,),
        dec_channels=(16,),
        dec_num_head=(2,),
        dec_patch_size=(32,),
        order=("z",),
        drop_path=0.0,
    ),
    "all points": lambda: PointNet2(
        in_channels=6,
        centres=(16, 8),
        radii=(1.0, 2.0),
        neighbours=(8, 8),
        widths=((8,), (8,), (8,)),
        decoder_widths=((8,), (8,), (8,)),
    ),
    "group centres": lambda: StandardTransformer(
        in_channels=6,
        num_groups=8,
        group_size=8,
        radius=None,
        encoder_widths=(8, 16, 16),
        encoder_dims=16,
        width=16,
        depth=1,
        num_heads=2,
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_batch_equals_its_rooms_for_any_backbone(scannet, name):
    torch.manual_seed(0)
    net = PointModel(BACKBONES[name](), 20).eval()
    samples = ScenePoints(
        rooms(scannet),
        voxel_size=0.1,
        n_points=120,
        features=("xyz", "normal"),
        augment=Augment(rotate="up"),
    )  # a finer grid than the backbone's: several points share a row
    with torch.no_grad():
        together, alone = (
            net(samples.batch([(0, 0), (1, 0), (2, 0)]).points),
            torch.cat([net(samples[i].points) for i in range(3)]),
        )
    assert together.shape == (360, 20) and torch.allclose(together, alone, atol=1e-4)


def test_a_point_gets_the_row_of_its_voxel(scannet):
    points = ScenePoints(rooms(scannet), voxel_size=0.05).batch([(0, 0), (1, 0)]).points
    backbone = BACKBONES["voxels"]()
    p = backbone.stem(points).with_feat(torch.zeros(len(backbone.stem(points)), 0))
    marked = p.with_feat(torch.cat([(p.xyz / 0.2).floor(), p.batch[:, None].float()], 1))
    assert torch.equal(
        propagate(marked, points, voxel_size=0.2),
        torch.cat([(points.xyz / 0.2).floor(), points.batch[:, None].float()], 1),
    ) and len(p) < len(points)


# ---------------------------------------------------------------- losses and scores


def test_lovasz_is_one_minus_iou_where_all_is_certain():
    rng = np.random.default_rng(0)
    truth, hard = rng.integers(-1, 4, 300), rng.integers(0, 5, 300)
    ours = float(lovasz_loss(torch.eye(5)[torch.from_numpy(hard)], torch.from_numpy(truth)))
    assert ours == pytest.approx(
        1
        - float(
            multiclass_jaccard_index(
                *map(torch.from_numpy, (hard, truth)), 5, average=None, ignore_index=-1
            )[:4].mean()
        ),
        abs=1e-5,
    )


def test_points_without_a_label_change_nothing(scannet):
    torch.manual_seed(0)
    net = PointModel(BACKBONES["voxels"](), 20).eval()
    batch = ScenePoints(rooms(scannet), voxel_size=0.2).batch([(0, 0)])
    logits, known = net(batch.points), batch.label >= 0
    loss, scores = semantic_loss(net, batch, SceneObjective(lovasz=1.0))
    plain = torch.nn.functional.cross_entropy(logits[known], batch.label[known]) + lovasz_loss(
        logits[known].softmax(1), batch.label[known]
    )
    assert (
        float(loss.detach()) == pytest.approx(float(plain.detach()), abs=1e-5)
        and 0 <= scores["train_allacc"] <= 1
    )
    loss, scores = semantic_loss(
        net, Labelled(batch.points, batch.label.fill_(-1)), SceneObjective(lovasz=1.0)
    )
    loss.backward()
    assert (
        float(loss.detach()) == 0.0
        and scores["train_allacc"] == 0.0
        and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    )


class Position(torch.nn.Module):
    "Tells the class from the place: whatever a room is turned by, two views at least disagree."

    def forward(self, points):
        return (
            torch.nn.functional.one_hot(
                (points.xyz[:, 0] > 0).long() + 5 * (points.xyz[:, 2] > 1.0).long(), 20
            )
            * 4.0
        )


def test_every_point_has_an_answer_and_scores_are_torchmetrics(scannet):
    reader = rooms(scannet)
    samples, found = ScenePoints(reader, voxel_size=0.3), []
    for i in range(len(reader)):
        scene, p = samples.scene(i), point_probabilities(Position(), samples, i)
        assert (
            p.shape == (len(reader.rows(i)["xyz"]), 20)
            and torch.allclose(p.sum(1), torch.ones(len(p)))
            and torch.equal(scene.label, torch.from_numpy(reader.rows(i)["segment"]).long())
        )
        assert (
            scene.points.xyz[scene.inverse] - torch.from_numpy(samples.room(i)["xyz"])
        ).abs().max() < 0.3 and torch.bincount(scene.inverse).min() > 0
        found.append(p.argmax(1).numpy())
    truth, found = (
        np.concatenate([reader.rows(i)["segment"] for i in range(3)]),
        np.concatenate(found),
    )
    known, ours = truth >= 0, evaluate_semantic(Position(), samples, groups={"head": [0, 1]})
    pair = torch.from_numpy(found), torch.from_numpy(truth)
    assert torch.equal(ours["confusion"], multiclass_confusion_matrix(*pair, 20, ignore_index=-1))
    seen = sorted({*truth[known], *found[known]})
    iou = multiclass_jaccard_index(*pair, 20, average=None, ignore_index=-1)[seen]
    assert (
        ours["miou"] == pytest.approx(float(iou.mean()))
        and ours["miou_head"] == pytest.approx(float(iou[:2].mean()))
        and ours["allacc"] == pytest.approx((truth == found)[known].mean())
    )


def test_voting_averages_views_and_says_so(scannet):
    samples = ScenePoints(rooms(scannet, "test"), voxel_size=0.3)
    scenes = [samples.scene(0, np.pi * k, bool(k)) for k in range(2)]
    mean = sum(Position()(s.points).softmax(1)[s.inverse] for s in scenes) / 2
    assert torch.allclose(point_probabilities(Position(), samples, 0, votes=2), mean, atol=1e-6)
    xyz = samples.room(0)["xyz"]
    assert (
        np.allclose(scenes[1].points.feat[:, 2].abs().max(), 1)
        and (
            scenes[1].points.xyz[scenes[1].inverse] - torch.from_numpy(xyz * np.float32([1, -1, 1]))
        )
        .abs()
        .max()
        < 0.3
    )
    voted = evaluate_semantic(Position(), samples, votes=2, groups={"head": [0]})
    assert {"miou_voting2", "macc_voting2", "allacc_voting2", "miou_head_voting2"} <= set(
        voted
    ) and all(k.endswith("_voting2") for k in voted)
    with pytest.raises(ValueError, match="votes: expected 0"):
        evaluate_semantic(Position(), samples, votes=1)


# ---------------------------------------------------------------- pictures


def test_the_near_point_is_painted_and_backs_are_left_out():
    xyz, rgb = (
        np.float32([[0, 0, 0], [0, 0, 1], [1, 1, 0], [-1, -1, 0]]),
        np.uint8([[9, 0, 0], [0, 9, 0], [0, 0, 9], [0, 0, 9]]),
    )
    image = paint_room(xyz, rgb, azimuth=0.0, elevation=np.pi / 2, hw=(21, 21), dot=1)
    assert image[10, 10].tolist() == [0, 9, 0] and (image == 255).all(2).sum() == 21 * 21 - 3
    assert (paint_room(xyz, rgb, np.float32([[0, 0, -1]] * 4)) == 255).all()


def test_the_committed_picture_has_the_colours_of_its_legend():
    picture = plt.imread(data_dir() / "records" / "sem-rooms-mini.png")[..., :3]
    with np.load(data_dir() / "records" / "sem-rooms-mini.npz") as room:
        kinds = np.union1d(room["truth"], room["found"])
    rows = np.round(255 * picture).astype(np.uint8).reshape(-1, 3)
    assert [k for k in kinds if (rows == label_palette(20)[k]).all(1).sum() < 20] == []


# ---------------------------------------------------------------- runs


def test_a_run_leaves_what_it_promises_and_comes_back(scannet, tmp_path):
    recipe, said = tiny(scannet, votes=2), []
    record = run_task("sem-test", recipe, tmp_path / "run", say=said.append)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json",
        "metrics.csv",
        "checkpoint.safetensors",
        "resume.safetensors",
        "room.png",
        "room.npz",
        "record.json",
    }
    assert {
        f"{k}{end}"
        for k in ("miou", "miou_present", "miou_all", "macc", "allacc")
        for end in ("", "_voting2")
    } == set(record["metrics"]) and record["data"] | {"sha256": 0, "name": 0} == dict(
        train=3, val=1, test=1, sha256=0, name=0
    )
    points = (rooms(scannet, "test").rows(0)["segment"] >= 0).sum()
    assert np.sum(record["details"]["confusion"]) == points == sum(
        c["points"] for c in record["details"]["classes"].values()
    ) and record["details"]["classes"]["toilet"] == dict(iou=None, acc=None, points=0)
    assert (
        record["chosen"]["chosen_by"] == "val_miou"
        and len(json.dumps(record)) < 60_000
        and set(record["history"]["val"]) == {"step", "val_miou", "val_macc", "val_allacc"}
    )
    again, net, names = load_model(tmp_path / "run", {SemanticRecipe.task: SemanticRecipe})
    assert again == recipe and evaluate_semantic(
        net, scene_samples(recipe.data, split_rooms(recipe.data)[2])
    )["miou"] == pytest.approx(record["metrics"]["miou"])
    assert "<canvas" in show_voxels(tmp_path / "run" / "room.npz", names)

    second = run_task(
        "sem-test",
        change(recipe, probe=True, votes=0, steps=2),
        tmp_path / "probe",
        init=tmp_path / "run",
        say=said.append,
    )
    a, b = (load_tensors(tmp_path / f / "checkpoint.safetensors")[0] for f in ("run", "probe"))
    assert (
        all(torch.equal(a[k], b[k]) for k in a if k.startswith("backbone."))
        and second["start"]["coverage"] == 1.0
    )


def test_an_interrupted_run_goes_on_to_the_same_end(scannet, tmp_path, monkeypatch):
    recipe = tiny(scannet, steps=4, validate_every=2)
    whole = run_task("sem-test", recipe, tmp_path / "whole", say=lambda text: None)
    plain, seen = semantic.semantic_loss, []

    def stops(*args):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)

    monkeypatch.setattr(semantic, "semantic_loss", stops)
    assert run_task("sem-test", recipe, tmp_path / "parts", say=lambda text: None) is None
    parts = run_task("sem-test", recipe, tmp_path / "parts", resume=True, say=lambda text: None)
    assert parts["resumed"] and all(
        parts[k] == whole[k] for k in ("metrics", "details", "history", "chosen", "start")
    )


def test_scannet200_reports_its_groups_and_holds_out_training_rooms(scannet, tmp_path):
    recipe = tiny(
        scannet,
        labels=200,
        validation="share",
        validation_fraction=0.4,
        test_split="val",
        steps=2,
        validate_every=2,
    )
    parts = split_rooms(recipe.data)
    assert [[r.name(i) for i in range(len(r))] for r in parts] in (
        [["scene0000_00", "scene0000_01"], ["scene0001_00"], ["scene0001_01"]],
        [["scene0001_00"], ["scene0000_00", "scene0000_01"], ["scene0001_01"]],
    )
    record = run_task("sem-200", recipe, tmp_path / "run", say=lambda text: None)
    assert (
        {"miou", "miou_head"} <= set(record["metrics"])
        and "confusion" not in record["details"]
        and len(record["details"]["classes"]) == 200
    )


def test_s3dis_runs_from_a_folder(s3dis, tmp_path):
    record = run_task(
        "sem-s3dis",
        tiny(s3dis, layout="s3dis", steps=2, validate_every=2),
        tmp_path / "run",
        say=lambda text: None,
    )
    assert (
        record["classes"] == S3DIS.classes
        and record["data"] | {"sha256": 0, "name": 0}
        == dict(train=4, val=1, test=1, sha256=0, name=0)
        and record["details"]["room"] == "Area_5/office_1"
    )
    train, val, test = split_rooms(
        change(semantic_recipes["sem-s3dis"], source=str(s3dis)).data
    )  # the full recipe: rooms of all five other areas train, but for a share
    names = lambda reader: {reader.name(i) for i in range(len(reader))}
    assert (
        names(train) | names(val) == {f"Area_{a}/office_1" for a in (1, 2, 3, 4, 6)}
        and len(names(val)) == 1
        and names(test) == {"Area_5/office_1"}
    )


def test_a_room_without_a_column_is_named(tmp_path):
    cloud = box(1)
    write_s3dis(
        tmp_path,
        "Area_5/office_1",
        coord=cloud["coord"],
        color=cloud["color"],
        segment=cloud["segment20"],
        instance=cloud["instance"],
    )
    with pytest.raises(
        ValueError,
        match="^Area_5/office_1: features: expected a cloud with normal.*--raw_root and --parse_normal",
    ):
        ScenePoints(S3DIS(tmp_path, split="test"), features=("normal", "color_signed"))[0]


def test_voxels_of_many_classes_keep_the_truth(tmp_path):
    cloud = ScenePoints(Numbered()).room(0)
    truth = np.full(len(cloud["xyz"]), 198, dtype=np.int32)
    with np.load(
        save_voxels(
            cloud
            | {
                "segment": truth,
                "color": np.ones((len(truth), 3), np.float32),
                "normal": np.ones((len(truth), 3), np.float32),
            },
            np.zeros_like(truth),
            0.1,
            tmp_path / "room.npz",
        )
    ) as file:
        assert set(file["truth"].tolist()) == {198} and set(file["found"].tolist()) == {0}


@pytest.mark.parametrize(
    "values, says",
    [
        (dict(source=""), "data: this recipe needs ScanNet: <root>/"),
        (dict(layout="kitti"), "layout: expected one of scannet, s3dis"),
        (dict(validation="test"), 'validation: expected "split"'),
        (dict(test_split="val"), 'test_split: expected "test"'),
        (dict(source="no/such/folder"), "request it at www.scan-net.org"),
        (dict(labels=40), "classes: expected 20 or 200"),
        (dict(crop="cube"), "crop: expected"),
    ],
)
def test_mistakes_are_one_line(scannet, values, says):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        tiny(scannet, **values).build_task()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_missing_s3dis_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="get it from its authors"):
        read_rooms(change(semantic_recipes["sem-s3dis"], source=str(tmp_path)).data, "train")
    with pytest.raises(ValueError, match="share: expected rooms of at least 2 places"):
        hold_out_places(["scene0000_00", "scene0000_01"], 0.1)
    with pytest.raises(ValueError, match="expected at least one cloud, got none"):
        ScenePoints(Subset(Numbered(), []))


def test_recipes_fit_the_backbones_that_pretraining_made():
    recipes = pretrain_recipes
    for name, start in {
        "sem-rooms-mini": "scene-sparseunet-mini",
        "sem-rooms-ptv3-mini": "scene-ptv3-mini",
        "sem-scannet20": "scene-sparseunet",
        "sem-scannet200": "scene-sparseunet",
        "sem-s3dis": "scene-sparseunet",
    }.items():
        after, before = semantic_recipes[name], recipes[start]
        options = after.model.backbone_options
        assert (after.model.backbone, options) == (
            before.model.backbone,
            before.model.backbone_options,
        )
        assert after.data.features == before.data.features
        assert after.data.voxel_size == options["voxel_size"]


def test_a_pretrained_checkpoint_loads_whole(tmp_path):
    before = change(pretrain_recipes["scene-sparseunet-mini"], seed=7).build_model(32)
    save_tensors(tmp_path / "checkpoint.safetensors", before.state_dict(), {"step": 1})
    after = semantic_recipes["sem-rooms-mini"].build_model(20)
    start = start_from(after.backbone, tmp_path)
    assert (
        start.coverage == 1.0
        and not start.unexpected
        and all(
            torch.equal(v, after.backbone.state_dict()[k])
            for k, v in before.backbone.state_dict().items()
        )
    )
