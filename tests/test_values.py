"""Values that users have: accepted as they are meant, dropped and counted, or refused in one line."""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from plyfile import PlyData, PlyElement
from test_posed import HW, K, WALK, transforms_folder

import unipre3d
from unipre3d.cli import main
from unipre3d.core import PointBatch
from unipre3d.data.augment import Augment
from unipre3d.data.check import check_data, find_readers
from unipre3d.data.imports import ImportOptions, import_posed
from unipre3d.data.labelled import (
    S3DIS,
    ModelNet40,
    ShapeNetPart,
    write_modelnet40,
    write_s3dis,
    write_scanobjectnn,
    write_shapenetpart,
)
from unipre3d.data.readers import Concat, Store, as_views
from unipre3d.data.samples import CloudSamples, Labelled, ViewSamples
from unipre3d.data.scannet import (
    ScanNetFrames,
    box_cloud,
    box_frame,
    read_mesh,
    write_box_rooms,
    write_cloud,
)
from unipre3d.data.shapenet import ShapeNetViews, export_objects
from unipre3d.data.shards import write_shards
from unipre3d.geometry.cameras import project
from unipre3d.recipes import find_recipe, finetune_recipes
from unipre3d.runs.checkpoint import load_tensors
from unipre3d.runs.fit import MOST_SKIPPED, Task, fit
from unipre3d.runs.recipe import Optimiser, Recipe, Run, change
from unipre3d.runs.run import SMALL_BACKBONES, backbone_class, build_backbone, run_recipe
from unipre3d.tasks.parts import PartClouds, PartSamples
from unipre3d.tasks.pretrain import predict
from unipre3d.tasks.scenes import ScenePoints
from unipre3d.values import check_cloud, check_labels, color_scale
from unipre3d.worlds.mesh import read_mesh as own_mesh
from unipre3d.worlds.prepare import find_meshes, prepare_meshes

RNG = np.random.default_rng(0)
TRUE = RNG.uniform(0, 4, (2000, 3))
COLORS = ("red", "green", "blue")
UTM = TRUE + [500_000.0, 5_400_000.0, 300.0]
TINTS = RNG.random((500, 3)).astype(np.float32)
BYTES = np.round(255 * TINTS).astype(np.uint8)


def one_line(f, *words):
    "The call ends with one line that holds these words."
    with pytest.raises((ValueError, FileNotFoundError)) as info:
        f()
    text = str(info.value)
    assert "\n" not in text and len(text) < 500, text
    for word in words:
        assert str(word) in text, text


def largest_error(got, want=TRUE):
    centred = got.astype(float) - got.astype(float).mean(0)
    return np.abs(centred - (want - want.mean(0))).max()


def areas(root, **arrays):
    for area in range(1, 7):
        room = root / f"Area_{area}" / "room"
        room.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(room / f"{name}.npy", array)
    return S3DIS(root, split="train")


def scene(root, **arrays):
    folder = root / "train" / "room"
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return ScanNetFrames(root, split="train")


class Own:
    "A reader as users write them: numpy's own types, whatever columns there are."

    def __init__(self, classes=("a", "b"), label=0, **rows):
        self.classes, self.own, self.columns = list(classes), label, rows

    def __len__(self):
        return 1

    def name(self, i):
        return "my cloud"

    def label(self, i):
        return self.own

    def rows(self, i):
        return self.columns


# ---------------------------------------------------------------- coordinates


def test_map_coordinates_keep_their_differences_in_every_reader(tmp_path):
    zeros = np.zeros(2000, int)
    rooms = areas(tmp_path / "a", coord=UTM, segment=zeros, instance=zeros)
    assert largest_error(rooms.rows(0)["xyz"]) < 1e-6
    assert largest_error(scene(tmp_path / "b", coord=UTM).array(0, "coord")) < 1e-6
    samples = CloudSamples(Own(xyz=UTM), n_points=None)
    assert largest_error(samples[0].points.xyz.numpy()) < 1e-6
    found = samples.rows(0)
    assert np.abs(found["xyz"] + found["origin"] - UTM).max() < 1e-6


def test_map_coordinates_keep_their_differences_in_every_writer(tmp_path):
    for folder in (
        write_cloud(tmp_path / "a", "train", "room", coord=UTM),
        write_s3dis(tmp_path / "b", "Area_1/room", coord=UTM),
    ):
        assert largest_error(np.load(folder / "coord.npy")) < 1e-6
    vertex = np.empty(
        2000, dtype=[(n, "f8") for n in "xyz"] + [(n, "u1") for n in ("red", "green", "blue")]
    )
    for name, column in zip("xyz", UTM.T):
        vertex[name] = column
    face = np.empty(1, dtype=[("vertex_indices", "i4", (3,))])
    face["vertex_indices"] = [[0, 1, 2]]
    parts = [PlyElement.describe(vertex, "vertex"), PlyElement.describe(face, "face")]
    PlyData(parts).write(str(tmp_path / "m.ply"))
    assert largest_error(read_mesh(tmp_path / "m.ply")["coord"]) < 1e-6


def test_text_in_map_coordinates_is_the_same_object(tmp_path):
    rows = np.concatenate([TRUE, TRUE], 1)
    write_modelnet40(tmp_path, [("a", rows)], ["a"], split="train")
    local = ModelNet40(tmp_path, split="train").rows(0)["xyz"]
    far = np.stack([TRUE[:, 0], TRUE[:, 2], -TRUE[:, 1]], 1) + [5e5, 0, 5.4e6]
    table = np.concatenate([far, rows[:, 3:]], 1)
    np.savetxt(tmp_path / "a" / "a_0001.txt", table, delimiter=",", fmt="%.6f")
    assert np.abs(ModelNet40(tmp_path, split="train").rows(0)["xyz"] - local).max() < 1e-5


def test_rooms_on_a_map_keep_their_views(tmp_path):
    root = write_box_rooms(tmp_path / "here", n_frames=4, hw=(60, 80), spacing=0.2)
    far = tmp_path / "far"
    shutil.copytree(root, far)
    origin = np.array([500_000, 5_400_000, 300.0])
    for path in far.glob("*/*/coord.npy"):
        np.save(path, np.load(path) + origin)
    for path in far.glob("2D/pose/*/*.txt"):
        pose = np.loadtxt(path)
        pose[:3, 3] += origin
        path.write_text(" ".join(map(repr, pose.ravel().tolist())))
    how = dict(n_points=None, n_ref=1, n_target=1, max_gap=3, center=True)
    here, there = (
        ViewSamples(ScanNetFrames(r, split="train", hw=(30, 40)), **how)[0] for r in (root, far)
    )
    assert torch.allclose(here.points.xyz, there.points.xyz, atol=1e-5)
    poses = here.ref.camera.world_to_cam, there.ref.camera.world_to_cam
    assert torch.allclose(*poses, atol=1e-5)


def test_meshes_that_lost_their_differences_are_refused(tmp_path):
    "A scan and an own mesh in map coordinates of single precision; in double precision they are read."
    for kind in ("f8", "f4"):
        vertex = np.empty(2000, [(n, kind) for n in "xyz"] + [(n, "u1") for n in COLORS])
        for name, column in zip(("x", "y", "z", *COLORS), [*UTM.T, *[np.full(2000, 9)] * 3]):
            vertex[name] = column
        face = np.empty(3, dtype=[("vertex_indices", "i4", (3,))])
        face["vertex_indices"] = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
        path = tmp_path / f"{kind}.ply"
        PlyData([PlyElement.describe(vertex, "vertex"), PlyElement.describe(face, "face")]).write(
            str(path)
        )
    assert largest_error(read_mesh(tmp_path / "f8.ply")["coord"]) < 1e-6
    corners = own_mesh(tmp_path / "f8.ply", "z").corners.reshape(-1, 3)
    assert largest_error(corners, TRUE[:9]) < 1e-6
    for call in (read_mesh, own_mesh):
        one_line(lambda: call(path), path, "coordinates that keep their differences")
    far = UTM[:500].copy()
    one_line(
        lambda: write_cloud(tmp_path, "train", "a", coord=far.astype(np.float32)),
        "coord: expected coordinates that keep their differences",
    )
    (tmp_path / "far.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1e20 0\nf 1 2 3\n")
    one_line(lambda: own_mesh(tmp_path / "far.obj"), "far.obj: expected finite vertices below")


def test_numbers_that_lost_their_differences_are_refused(tmp_path):
    reader = scene(tmp_path, coord=UTM.astype(np.float32))
    one_line(lambda: reader.rows(0), tmp_path / "train/room/coord.npy", "steps of 0.5", "float64")


@pytest.mark.parametrize(
    "bad", (np.nan, np.inf, -np.inf, 1e20, -1e12, float(np.finfo(np.float32).max))
)
def test_missing_points_are_dropped_from_all_columns_and_counted(tmp_path, bad):
    coord = TRUE[:500].copy()
    coord[7, 1] = bad
    columns = dict(color=BYTES, segment=np.arange(500) % 13, instance=np.arange(500))
    rooms = areas(tmp_path, coord=coord, **columns)
    with pytest.warns(UserWarning, match=r"coord.npy: left out 1 of 500 points"):
        found = rooms.rows(0)
    kept = np.delete(np.arange(500), 7)
    assert np.array_equal(found["instance"], kept)
    assert np.array_equal(found["color"], BYTES[kept])
    own = Own(classes=range(13), xyz=coord, **columns)
    with pytest.warns(UserWarning, match="my cloud: xyz: left out 1 of 500"):
        batch = CloudSamples(own, n_points=None, labels=["instance"])[0]
    assert np.array_equal(batch.label.numpy(), kept) and batch.points.xyz.isfinite().all()


def test_an_own_reader_of_doubles_gives_one_type(tmp_path):
    rows = dict(xyz=TRUE, normal=TRUE, segment=np.zeros(2000, int), instance=np.zeros(2000, int))
    for how in (Augment(), Augment(scale=(0.8, 1.25))):
        samples = CloudSamples(Own(**rows), n_points=64, augment=how, features=("xyz", "normal"))
        points = samples[0].points
        assert points.xyz.dtype == points.feat.dtype == torch.float32
    assert ScenePoints(Own(**rows), features=("xyz",))[0].points.xyz.dtype == torch.float32


def test_columns_of_other_lengths_are_refused():
    one_line(
        lambda: CloudSamples(Own(xyz=TRUE, color=BYTES), features=("color",))[0],
        "my cloud: color: expected an array [2000 3]",
        "[500, 3]",
    )
    one_line(lambda: check_cloud(dict(color=BYTES), "c"), "c: expected a column xyz, found color")


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize(
    "form",
    (TINTS, BYTES, BYTES.astype(float), BYTES.astype(np.int64), BYTES.astype(np.uint16) * 257),
    ids=("fractions", "bytes", "bytes as floats", "bytes as integers", "16 bits"),
)
def test_colours_are_the_same_in_every_form(tmp_path, form):
    xyz, zeros = TRUE[:500], np.zeros(500, int)
    labels = dict(segment=zeros, instance=zeros)
    found = {
        "S3DIS": areas(tmp_path / "a", coord=xyz, color=form, **labels).rows(0)["color"],
        "ScanNet": scene(tmp_path / "b", coord=xyz, color=form).array(0, "color"),
    }
    for writer, folder in (
        ("write_s3dis", write_s3dis(tmp_path / "c", "Area_1/room", coord=xyz, color=form)),
        ("write_cloud", write_cloud(tmp_path / "d", "train", "room", coord=xyz, color=form)),
    ):
        found[writer] = np.load(folder / "color.npy")
    for kind in (ScenePoints, CloudSamples):
        how = dict(n_points=None, features=("color",))
        samples = kind(Own(xyz=xyz, color=form, **labels), **how)
        seen = samples.take(samples.rows(0), ["color"])["color"]
        assert seen.dtype == np.float32 and samples[0].points.feat.dtype == torch.float32
        found[kind.__name__] = np.round(255 * seen)
    for name, color in found.items():
        assert np.array_equal(color, BYTES), name


def test_a_mesh_with_colours_as_floats(tmp_path):
    names = ("x", "y", "z", "red", "green", "blue")
    vertex = np.empty(500, dtype=[(n, "f4") for n in names])
    for name, column in zip(names, np.concatenate([TRUE[:500], TINTS], 1).T):
        vertex[name] = column
    face = np.empty(1, dtype=[("vertex_indices", "i4", (3,))])
    face["vertex_indices"] = [[0, 1, 2]]
    parts = [PlyElement.describe(vertex, "vertex"), PlyElement.describe(face, "face")]
    PlyData(parts).write(str(tmp_path / "m.ply"))
    assert np.array_equal(read_mesh(tmp_path / "m.ply")["color"], BYTES)


@pytest.mark.parametrize(
    "color",
    (TINTS * 1.2, TINTS * 2 - 1, np.full((4, 3), 300), (TINTS > 0.5).astype(int), TINTS * np.nan),
    ids=("above one", "below zero", "above 255", "cut to 0 and 1", "no numbers"),
)
def test_colours_that_could_mean_two_things_are_refused(tmp_path, color):
    one_line(
        lambda: color_scale(np.asarray(color), "color.npy"), "color.npy: expected colours in 0..255"
    )
    one_line(lambda: write_s3dis(tmp_path, "Area_1/a", color=color), "Area_1/a: color: expected")


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("wrong", (3.7, 13, -5, -25_536, 1e9, np.nan))
def test_labels_are_never_cut_or_wrapped(tmp_path, wrong):
    segment = np.zeros(2000)
    segment[5] = wrong
    rooms = areas(tmp_path, coord=TRUE, segment=segment, instance=np.zeros(2000))
    one_line(lambda: rooms.rows(0), "segment.npy", "labels in -1..12", f"found {wrong:g}")
    own = Own(classes=range(13), xyz=TRUE, segment=segment, instance=np.zeros(2000))
    one_line(lambda: ScenePoints(own, features=("xyz",))[0], "my cloud: segment")


@pytest.mark.parametrize("kind", ("i1", "i2", "i4", "i8", "u1", "u2", "u8", "f4", "f8"))
def test_not_labelled_in_every_type(tmp_path, kind):
    "-1 put into bytes was 255 again."
    none = [n for n in (-1, -100, 255) if np.float64(np.array(n).astype(kind)) == n]
    segment = np.resize([*none, 3], 2000).astype(kind)
    want = set(segment[segment != 3].tolist()) and {-1, 3}
    rooms = areas(tmp_path, coord=TRUE, segment=segment, instance=np.resize([0, 40_000], 2000))
    rows = rooms.rows(0)
    assert set(rows["segment"].tolist()) == want
    assert set(rows["instance"].tolist()) == {0, 40_000}
    own = Own(classes=range(13), xyz=TRUE, segment=segment, instance=segment)
    assert set(ScenePoints(own, voxel_size=1e-3, features=("xyz",))[0].label.tolist()) == want


def test_three_numbers_mean_not_labelled():
    segment = np.resize([-1, -100, 255, 3], 2000)
    own = Own(classes=range(13), xyz=TRUE, segment=segment, instance=segment)
    batch = ScenePoints(own, voxel_size=1e-3, features=("xyz",))[0]
    assert set(batch.label.tolist()) == {-1, 3} and set(batch.instance.tolist()) == {-1, 3, 255}
    assert check_labels(np.array([255]), "200 classes and more", 300) == 255


def test_parts_may_be_not_labelled(tmp_path):
    rows = np.concatenate([TRUE[:64], np.tile([0, 0, 1.0], (64, 1)), np.zeros((64, 1))], 1)
    rows[:, 6] = np.resize([-1, -100, 255, 12], 64)
    shapes = dict(train=[("03001627", "a", rows)])
    write_shapenetpart(tmp_path, shapes, dict(Chair="03001627"))
    reader = ShapeNetPart(tmp_path, split="train")
    assert set(reader.rows(0)["part"].tolist()) == {-1, 12}
    names = {kind: [str(n) for n in range(len(own))] for kind, own in reader.parts.items()}
    batch = PartSamples(PartClouds(reader, names, numbered=True), n_points=None)[0]
    assert sorted(set(batch.label.tolist())) == [-1, 12]
    rows[5, 6] = 16  # of a lamp
    write_shapenetpart(tmp_path, shapes, dict(Chair="03001627"))
    one_line(lambda: ShapeNetPart(tmp_path, split="train").rows(0), "a.txt", "12..15", "found 16")
    own = Own(["a", "b"], xyz=TRUE[:64], part=np.resize([-1, -100, 255, 0, 2], 64))
    found = PartClouds(own, dict(a=["top", "leg"], b=["all"])).rows(0)["part"]
    assert found[:5].tolist() == [-1, -1, -1, -1, 1]
    one_line(lambda: PartClouds(own, dict(a=["top"], b=["all"])).rows(0), "my cloud: part", "-1..1")


def test_large_numbers_of_objects_survive_writing(tmp_path):
    instance = np.resize([-1, 36_001, 40_000], 500)
    for folder in (
        write_cloud(tmp_path / "a", "train", "room", coord=TRUE[:500], instance=instance),
        write_s3dis(tmp_path / "b", "Area_1/room", coord=TRUE[:500], instance=instance),
    ):
        assert np.array_equal(np.load(folder / "instance.npy").reshape(-1), instance)
    one_line(
        lambda: write_cloud(tmp_path, "train", "b", instance=[0, 3.7]), "instance", "found 3.7"
    )


@pytest.mark.parametrize("label", (2, -1, 0.5))
def test_a_class_outside_the_list_is_refused(label):
    one_line(lambda: CloudSamples(Own(label=label, xyz=TRUE))[0], "my cloud: label", "0..1")


@pytest.mark.parametrize(
    "rows, label, text",
    (
        (dict(xyz=TRUE.tolist()), np.array([1]), ""),
        (dict(xyz=torch.from_numpy(TRUE)), torch.tensor(1), ""),
        (dict(xyz=TRUE.astype(">f4"), normal=UTM.astype(">f8")), 1.0, ""),
        (dict(xyz=[[1, 2, 3], [1, 2]]), 0, "xyz: expected an array of numbers"),
        (dict(xyz=torch.ones(4, 3, requires_grad=True)), 0, "xyz: expected an array of numbers"),
        (dict(xyz=np.ma.masked_less(TRUE, 3)), 0, "xyz: expected finite numbers below"),
        (dict(xyz=UTM.astype(">f4")), 0, "coordinates that keep their differences"),
        (dict(xyz=TRUE), "a", "label: expected finite numbers, found <U1"),
        (dict(xyz=TRUE), [0, 1], "label: expected an array [1] as in one object, found [2]"),
        (dict(xyz=TRUE), 2**70, "label: expected"),
        (dict(xyz=TRUE, segment=["wall"] * 2000), 0, "segment: expected finite numbers"),
    ),
)
def test_rows_of_an_own_reader_in_other_forms(rows, label, text):
    "Lists, tensors, other byte orders; what is no array is one line with the cloud."
    samples = CloudSamples(Own(label=label, **rows), n_points=None)
    if text:
        return one_line(lambda: samples[0], "my cloud: ", text)
    assert samples[0].label.tolist() == [1] and samples[0].points.xyz.dtype == torch.float32
    assert largest_error(samples[0].points.xyz.numpy()) < 1e-5


# ---------------------------------------------------------------- runs


def spoiled(name, tmp_path, bad, steps, resume=False):
    "A fit of a small backbone whose batches of some steps are no numbers."
    options = SMALL_BACKBONES[name]
    options = options | dict(voxel_size=0.1) if name in ("SparseUNet", "PTv3") else options
    model = torch.nn.Module()
    model.backbone = backbone_class(name)(in_channels=3, **options)
    xyz = torch.from_numpy(RNG.uniform(-0.5, 0.5, (512, 3)).astype(np.float32))
    batch = torch.arange(2).repeat_interleave(256)

    def batches(start, stop):
        for step in range(start, stop):
            yield Labelled(PointBatch(xyz, xyz, batch, 2), torch.tensor([step in bad, 0]))

    def loss(module, found):
        points = found.points
        if found.label[0]:
            points = points.with_feat(points.feat * torch.nan)
        out = module.backbone(points).feat.square().mean()
        return (out * torch.nan if found.label[0] else out), {}

    task = Task("bad", model, None, loss, lambda m, f: ({}, {}), data={})
    how = dict(optimiser=Optimiser(ema=0.5, lr=1e-4), run=Run(steps=steps, save_every=0))
    return model, fit(task, batches, tmp_path, resume=resume, **how)


@pytest.mark.parametrize("name", SMALL_BACKBONES)
def test_a_bad_batch_leaves_no_trace_in_any_backbone(name, tmp_path):
    model, done = spoiled(name, tmp_path, bad=(1,), steps=3)
    assert (done.skipped, done.in_a_row, done.ended) == (1, 0, "finished")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    for file in ("checkpoint", "resume"):
        weights, _ = load_tensors(tmp_path / f"{file}.safetensors")
        assert all(value.isfinite().all() for value in weights.values()), file


def test_a_run_ends_after_some_bad_steps_in_a_row(tmp_path):
    bad = range(3, 60)
    model, done = spoiled("PointNet2", tmp_path, bad=bad, steps=60)
    assert (done.ended, done.step, done.skipped) == ("diverged", 3 + MOST_SKIPPED, MOST_SKIPPED)
    weights, _ = load_tensors(tmp_path / "checkpoint.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_run_of_mostly_bad_steps_has_failed(tmp_path):
    model, done = spoiled("PointNet2", tmp_path, bad=[k for k in range(40) if k % 3], steps=40)
    assert (done.ended, done.step, done.skipped) == ("diverged", 40, 26)
    model, done = spoiled("PointNet2", tmp_path, bad=(), steps=40, resume=True)
    assert (done.ended, done.step) == ("diverged", 40)  # its record had been cut short


def test_a_run_that_diverges_ends_with_a_failing_status(tmp_path, capsys):
    words = "finetune cls-furniture-mini --device cpu --steps 40 --batch-size 8 --n-points 64"
    words += f" --workers 0 --lr 1e30 --clip 1e38 --warmup 0 --out {tmp_path / 'run'}"
    assert main(words.split()) == 1
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["ended"] == "diverged" and record["metrics"] == {}
    assert MOST_SKIPPED <= record["skipped"] <= record["steps"] < 40
    said = capsys.readouterr().out
    assert "20 steps in a row" in said and "lower --lr" in said


class Six:
    "Six clouds, one of which a model cannot take."

    classes = ["a"]

    def __len__(self):
        return 6

    def name(self, i):
        return f"cloud {i}"

    def label(self, i):
        return 0

    def rows(self, i):
        return dict(xyz=TRUE[i : i + 100] * (30 if i == 4 else 0.1))

    def fingerprint(self):
        return "six"


@dataclass(frozen=True)
class Fragile(Recipe):
    "A loss that is not finite for large clouds."

    task: ClassVar[str] = "fragile"

    def build_model(self, classes):
        model = torch.nn.Module()
        model.backbone = build_backbone(self)
        return model

    def build_task(self, device="cpu"):
        samples = CloudSamples(Six(), n_points=64)

        def loss(model, batch):
            far = batch.points.xyz.abs().amax()
            return model.backbone(batch.points).feat.square().mean() * (0 * far.exp()).exp(), {}

        data = dict(name="six", sha256="six", train=6, val=0, test=0)
        test = lambda model, folder: ({}, {})
        return Task(self.task, self.build_model(1), samples, loss, test, data=data, classes=["a"])


def test_the_cloud_of_steps_that_are_skipped_is_named(tmp_path):
    options = SMALL_BACKBONES["StandardTransformer"]
    recipe = change(Fragile(), backbone_options=options, steps=12, batch_size=2)
    said = []
    record = run_recipe("fragile", recipe, tmp_path / "run", device="cpu", say=said.append).record
    first, *others = record["suspects"]
    assert record["skipped"] == record["suspects"][first] == 4 and first == "cloud 4"
    assert all(record["suspects"][name] < 4 for name in others)
    assert any("4 of 12 steps were skipped" in line and "cloud 4 (4)" in line for line in said)
    clean = change(recipe, steps=1, seed=1)
    assert run_recipe("fragile", clean, tmp_path / "b", device="cpu").record["suspects"] == {}


def test_one_missing_point_costs_a_point_and_no_step():
    xyz = TRUE[:200].copy()
    xyz[3, 0] = np.nan
    samples = CloudSamples(Own(xyz=xyz), n_points=96)
    with pytest.warns(UserWarning, match="my cloud: xyz: left out 1 of 200 points"):
        drawn = [samples[0, k].points.xyz for k in range(5)]
    assert all(x.isfinite().all() and len(x) == 96 for x in drawn)
    assert set(map(tuple, torch.cat(drawn).tolist())) <= set(map(tuple, np.float32(xyz).tolist()))


# ---------------------------------------------------------------- classes, missing labels


def test_readers_of_other_classes_are_not_joined():
    one_line(lambda: Concat(Own(["a", "b"]), Own(["b", "c"])), "classes a, b, found one of b, c")


def test_a_folder_numbers_classes_by_its_training_split(tmp_path):
    from unipre3d.data.clouds import write_cloud
    from unipre3d.data.folder import FolderClouds

    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for kind in ("ball", "box", "rod") if split == "train" else ("box", "rod"):
            (tmp_path / split / kind).mkdir(parents=True)
            write_cloud(tmp_path / split / kind / "0.ply", rng.normal(size=(20, 3)))
    readers = {split: FolderClouds(tmp_path, split=split) for split in ("train", "val", "test")}
    assert all(r.classes == ["ball", "box", "rod"] for r in readers.values())
    assert {readers["test"].label(i) for i in range(len(readers["test"]))} == {1, 2}
    (tmp_path / "val" / "cone").mkdir()
    shutil.copy(tmp_path / "val" / "box" / "0.ply", tmp_path / "val" / "cone")
    one_line(lambda: FolderClouds(tmp_path, split="val"), "val: expected", "found cone")


@pytest.mark.parametrize("bare", ("train", "val", "test"))
@pytest.mark.parametrize("name", ("sem-rooms-mini", "inst-rooms-mini"))
def test_rooms_without_labels_are_refused_before_training(tmp_path, bare, name):
    for split in ("train", "val", "test"):
        cloud = box_cloud(0.3)
        if split == bare:
            cloud["segment20"] = np.full(len(cloud["coord"]), -1)
            cloud["instance"] = cloud["segment20"]
        write_cloud(tmp_path, split, f"{split}_00", **cloud)
    recipe = change(finetune_recipes[name], source=str(tmp_path))
    role = dict(train="training", val="validation", test="test")[bare]
    one_line(recipe.build_task, f"{tmp_path}: {role}: expected rooms with labels", f"{bare}_00")


def test_rooms_whose_things_are_too_small_are_refused_before_training(tmp_path):
    for split in ("train", "val", "test"):
        write_cloud(tmp_path, split, f"{split}_00", **box_cloud(0.1 if split == "val" else 0.3))
    recipe = change(finetune_recipes["inst-rooms-mini"], source=str(tmp_path))
    one_line(recipe.build_task, f"{tmp_path}: test: expected rooms with at least one thing of 100")


# ---------------------------------------------------------------- geometry of views


@pytest.mark.parametrize("size", (None, 64, 48))
def test_views_that_are_not_square_keep_their_camera(tmp_path, size):
    source = ShapeNetViews(classes=["lamp"])
    export_objects(source, tmp_path, "released", [0])
    for path in tmp_path.rglob("*.png"):
        wide = Image.new("RGBA", (192, 128))
        wide.paste(Image.open(path), (32, 0))
        wide.save(path)
    fov = 2 * math.degrees(math.atan(math.tan(math.radians(source.fov) / 2) * 1.5))
    reader = ShapeNetViews(tmp_path, convention="released", fov=fov, size=size)
    samples = ViewSamples(reader, n_points=None, n_ref=4, n_target=8)
    sample = samples[0]
    views, xyz = sample.target, sample.points.xyz
    uv, *_ = project(xyz, torch.zeros(len(xyz), dtype=torch.long), views.camera)
    for axis in (0, 1):  # across and down
        seen = [mask.any(axis).nonzero() for mask in views.mask]
        seen = torch.tensor([float(rows[-1] - rows[0] + 1) for rows in seen])
        said = uv[..., axis].amax(1) - uv[..., axis].amin(1)
        assert (seen - said).abs().mean() < 0.04 * views.camera.hw[1 - axis]


def test_an_object_with_views_of_two_sizes_is_refused(tmp_path):
    export_objects(ShapeNetViews(classes=["lamp"]), tmp_path, "released", [0])
    path = sorted(tmp_path.rglob("*.png"))[1]
    Image.open(path).resize((128, 96)).save(path)
    reader = ShapeNetViews(tmp_path, convention="released", size=64)
    one_line(lambda: reader.view(0, 1), path, "expected 128 x 128", "found 128 x 96")


def five(path, factor=5):
    depth = np.round(np.asarray(Image.open(path)) * factor).astype(np.int64)
    Image.fromarray(depth.clip(0, 65535).astype(np.uint16)).save(path)


def rewrite_pose(change):
    def edit(path):
        pose = change(np.loadtxt(path))
        path.write_text("\n".join(" ".join(map(repr, row)) for row in pose.tolist()))

    return edit


FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
WRONG = {
    "depth": (five, "5000 units a metre (--depth-scale)"),
    "depth of Matterport": (lambda path: five(path, 4), "4000 units a metre (--depth-scale)"),
    "depth of Replica": (lambda path: five(path, 6.5535), "6553.5 units a metre (--depth-scale)"),
    "inverse": (rewrite_pose(np.linalg.inv), "poses that are inverted would fit"),
    "axes": (rewrite_pose(lambda pose: pose @ FLIP), "OpenGL axes (y up, z backward) would fit"),
    "both": (
        rewrite_pose(lambda pose: np.linalg.inv(pose @ FLIP)),
        "inverted poses with OpenGL axes would fit",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_views_that_miss_their_cloud_name_the_reading_that_fits(tmp_path, name):
    root = write_box_rooms(tmp_path, n_frames=8, hw=(60, 80), spacing=0.2)
    how = dict(n_points=800, n_ref=2, n_target=2, max_gap=5, center=True)
    assert ViewSamples(ScanNetFrames(root, split="train", hw=(30, 40)), **how)[0]
    edit, text = WRONG[name]
    for path in (root / "2D" / ("depth" if "depth" in name else "pose")).glob("*/*"):
        edit(path)
    samples = ViewSamples(ScanNetFrames(root, split="train", hw=(30, 40)), **how)
    one_line(lambda: samples[0], "box0000_00: expected views that show the cloud", text)


def test_a_room_in_millimetres_is_not_near_every_pixel(tmp_path):
    root = write_box_rooms(tmp_path, n_frames=8, hw=(60, 80), spacing=0.2)
    for path in root.glob("*/*/coord.npy"):
        np.save(path, 1000 * np.load(path))
    how = dict(n_points=800, n_ref=2, n_target=2, max_gap=5, center=True)
    samples = ViewSamples(ScanNetFrames(root, split="train", hw=(30, 40)), **how)
    one_line(lambda: samples[0], "box0000_00: expected views that show the cloud", "in metres?")


def test_views_all_over_which_an_object_lies(tmp_path):
    "A white background is no background: everything would count as the object."
    export_objects(ShapeNetViews(classes=["lamp"]), tmp_path, "released", [0])
    for path in tmp_path.rglob("*.png"):
        picture = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        Image.alpha_composite(white, picture).convert("RGB").save(path)
    reader = ShapeNetViews(tmp_path, convention="released", size=64)
    samples = ViewSamples(reader, n_points=64, n_ref=2, n_target=2)
    one_line(lambda: samples[0], "expected views of an object on a black", "100% of all pixels")


def test_the_depth_scale_of_a_recipe_is_the_readers(tmp_path):
    root = write_box_rooms(tmp_path, n_frames=8, hw=(60, 80), spacing=0.2)
    for path in (root / "2D" / "depth").glob("*/*"):
        five(path)
    for name in ("scene-sparseunet-mini", "scene-sparseunet", "scene-ptv3"):
        recipe = change(find_recipe(name), source=str(root), resolution=30, image="rgb")
        recipe = change(recipe, depth_scale=5000.0, n_ref=2, n_target=2, workers=0)
        sample = recipe.build_task().samples[0]
        assert 0.5 < float(sample.ref.depth.median()) < 5
    wrong = change(find_recipe("object-transformer-mini"), depth_scale=5000.0)
    one_line(wrong.build_task, "depth_scale: expected 1000 with layout shapenet")


@pytest.mark.parametrize(
    "color, depth, pose",
    (
        ("{}.JPG", "{}.PNG", "{}.txt"),
        ("{}.jpeg", "{}.png", "{}.TXT"),
        ("frame-{:06d}.color.jpg", "frame-{:06d}.depth.png", "frame-{:06d}.pose.txt"),
    ),
)
def test_frames_are_found_under_the_names_that_people_have(tmp_path, color, depth, pose):
    root = write_box_rooms(tmp_path, n_frames=3, hw=(60, 80), spacing=0.3)
    for kind, form in dict(color=color, depth=depth, pose=pose).items():
        for path in (root / "2D" / kind).glob("*/*"):
            path.rename(path.with_name(form.format(int(path.stem))))
    reader = ScanNetFrames(root, split="train", hw=(30, 40))
    assert reader.frames(0) == [0, 20, 40]
    assert reader.view(0, 20).rgb.shape == (30, 40, 3)


@pytest.mark.parametrize(
    "name, value, text",
    (
        ("world_to_cam", 2 * np.eye(4), "world_to_cam: expected a rigid"),
        ("world_to_cam", np.eye(4) * np.nan, "world_to_cam: expected finite"),
        ("K", np.diag([0.0, 1, 1]), "K: expected intrinsics of images"),
        ("depth", -1.0, "depth: expected depth of at least 0"),
        ("depth", 2000.0, "divide millimetres by 1000"),
    ),
)
def test_cameras_and_depth_of_an_own_reader_are_checked(tmp_path, monkeypatch, name, value, text):
    reader = ScanNetFrames(
        write_box_rooms(tmp_path, n_frames=4, hw=(30, 40)), split="train", hw=(30, 40)
    )
    right = getattr(reader, "view" if name == "depth" else name)
    if name == "depth":

        def wrong(i, frame):
            view = right(i, frame)
            return replace(view, depth=np.full_like(view.depth, value))

    else:

        def wrong(i):
            return np.broadcast_to(value, right(i).shape)

    monkeypatch.setattr(reader, "view" if name == "depth" else name, wrong)
    samples = ViewSamples(reader, n_points=100, n_ref=1, n_target=1, max_gap=3)
    one_line(lambda: samples[0], "box0000_00: " if name != "depth" else "box0000_00", text)


@pytest.mark.parametrize(
    "name, change, text",
    (
        ("view", lambda v: replace(v, rgb=v.rgb[..., 0]), "rgb: expected an array [30, 40, 3]"),
        ("view", lambda v: replace(v, rgb=v.rgb[:20]), "rgb: expected an array [30, 40, 3]"),
        ("view", lambda v: replace(v, depth=v.depth[:20]), "depth: expected an array [30, 40]"),
        ("view", lambda v: replace(v, rgb=v.rgb * np.nan), "rgb: expected colours in 0..255"),
        ("K", lambda K: np.tile(K, (4, 1, 1)), "K: expected one matrix of 3 x 3, found [4, 3, 3]"),
        ("world_to_cam", lambda pose: pose[:1], "expected one pose for each of 4 frames, found 1"),
        ("world_to_cam", lambda pose: pose[:, :3], "world_to_cam: expected matrices of 4 x 4"),
        ("world_to_cam", lambda pose: pose.tolist(), ""),
        ("K", lambda K: K.astype(np.float32).tolist(), ""),
        ("view", lambda v: replace(v, rgb=v.rgb / 255, depth=v.depth.astype(float)), ""),
        ("view", lambda v: replace(v, mask=np.uint8(255) * (v.depth > 0)), ""),
    ),
)
def test_views_of_an_own_reader_in_other_forms(tmp_path, monkeypatch, name, change, text):
    "What is meant is taken; anything else is one line with the room, at the first batch."
    root = write_box_rooms(tmp_path, n_frames=4, hw=(30, 40), spacing=0.2)
    reader = ScanNetFrames(root, split="train", hw=(30, 40))
    right = getattr(reader, name)
    monkeypatch.setattr(reader, name, lambda i, *frame: change(right(i, *frame)))
    samples = ViewSamples(reader, n_points=100, n_ref=1, n_target=1, max_gap=3)
    if text:
        return one_line(lambda: samples[0], "box0000_00: ", text)
    ref = samples[0].ref
    assert ref.rgb.shape == (1, 3, 30, 40) and ref.camera.K.shape == (1, 3, 3)
    assert ref.mask is None or ref.mask.dtype == torch.bool


# ---------------------------------------------------------------- the command


def test_a_whole_data_set_is_checked_and_what_is_refused_is_named(tmp_path, capsys):
    root = write_box_rooms(tmp_path / "set", n_frames=4, hw=(30, 40), spacing=0.2)
    assert main(["data", "check", str(root)]) == 0
    path = root / "val/box0002_00/coord.npy"
    coord = np.load(path)
    coord[:3] = np.nan
    np.save(path, coord)
    segment = root / "train/box0001_00/segment20.npy"
    np.save(segment, np.load(segment) + 0.5)
    for pose in (root / "2D/pose/box0000_00").iterdir():
        rewrite_pose(np.linalg.inv)(pose)
    capsys.readouterr()
    assert main(["data", "check", str(root)]) == 1
    said = capsys.readouterr().out
    assert f"dropped: {path}: left out 3 of {len(coord)} points" in said
    assert f"refused: {segment}: expected labels in -1..19, found" in said
    assert "refused: box0000_00: expected views that show the cloud" in said
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line}
    assert rows["points"][1:] == ["3", "0"] and rows["labels"][2] == "1"
    assert rows["views"][2] == "1" and rows["files"][2] == "0"
    assert main(["data", "check", str(root), "--no-views"]) == 1
    assert "show the cloud" not in capsys.readouterr().out


def test_a_folder_without_a_known_layout_is_refused(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "expected a data set in the layout of" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "none")]) == 2


LAYOUTS = {
    "scanobjectnn": 0,
    "modelnet40": 0,
    "modelnet40 h5": 0,
    "shapenetpart": 0,
    "s3dis": 0,
    "released": 24,
    "exported": 24,
    "archive": 24,
    "prepared": 12,
    "rooms": 4,
    "rooms of 200": 4,
    "shards": 4,
    "shards of objects": 24,
    "imported": 4,
}  # layout -> views that it has


def write_layout(folder, kind):
    "A small data set; a path to it."
    cloud = np.concatenate([TRUE[:64], np.tile([0, 0, 1.0], (64, 1))], 1)
    home = folder / "set"
    if kind == "scanobjectnn":
        write_scanobjectnn(home, TRUE[None, :64], [3], split="train")
    if kind.startswith("modelnet40"):
        form = "ply_hdf5" if kind.endswith("h5") else "normal_resampled"
        for split in ("train", "test"):
            write_modelnet40(home, [("a", cloud)], ["a"], split=split, form=form)
    if kind == "shapenetpart":
        one = np.concatenate([cloud, np.full((64, 1), 12)], 1)
        shapes = {split: [("03001627", split, one)] for split in ("train", "val", "test")}
        write_shapenetpart(home, shapes, dict(Chair="03001627"))
    if kind == "released":
        export_objects(ShapeNetViews(classes=["lamp"]), home, "released", [0])
    if kind == "s3dis":
        areas(home, coord=TRUE[:64], segment=np.zeros(64), instance=np.zeros(64))
    if kind in ("exported", "archive", "shards of objects"):
        export_objects(ShapeNetViews(classes=["lamp"]), home, "unipre3d", [0])
    if kind == "archive":
        return shutil.make_archive(folder / "packed", "zip", home)
    if kind == "prepared":
        for k in range(3):
            (home / "box").mkdir(parents=True, exist_ok=True)
            trimesh.creation.box((1, 2, 3 + k)).export(home / "box" / f"{k}.ply")
        return prepare_meshes(find_meshes(home), folder / "made.zip", views=4, size=32, points=256)
    if kind.startswith("rooms") or kind == "shards":
        rooms = dict(a="train", b="val")
        write_box_rooms(home, rooms=rooms, n_frames=2, hw=(60, 80), spacing=0.2)
    if kind == "rooms of 200":
        for path in home.glob("*/*/segment20.npy"):
            path.rename(path.with_name("segment200.npy"))
    if kind.startswith("shards"):
        return write_shards(Store(home), folder / "shards", progress=False)
    if kind == "imported":
        film = [box_frame(pose, K, HW) for pose in WALK[:4]]
        how = ImportOptions(out=str(folder / "out"), height=60, hold_out=0)
        import_posed(transforms_folder(home, film), how, progress=False)
        return folder / "out"
    return home


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_is_recognised_and_clean(tmp_path, kind):
    report = check_data(find_readers(write_layout(tmp_path, kind)), progress=False)
    assert not report.refused and not report.dropped and not report.lines
    assert report.accepted["points"] and report.accepted["views"] == LAYOUTS[kind]
    assert report.accepted["labels"] or kind == "imported"


def test_a_folder_of_posed_images_is_told_from_a_data_set(tmp_path):
    film = [box_frame(pose, K, HW) for pose in WALK[:2]]
    folder = transforms_folder(tmp_path / "film", film)
    one_line(lambda: find_readers(folder), "posed images (transforms)", "unipre3d data import")


def test_the_embedded_objects_pass(capsys):
    reader = ShapeNetViews(classes=["lamp"])
    report = check_data(dict(all=reader), progress=False)
    assert not report.lines and report.accepted["views"] == 24 * len(reader)


# ---------------------------------------------------------------- what a user calls


def test_views_of_a_user_are_checked():
    rgb = np.zeros((2, 30, 40, 3), np.uint8)
    poses, K, batch = (
        np.tile(np.eye(4), (2, 1, 1)),
        np.float64([[30, 0, 20], [0, 30, 15], [0, 0, 1]]),
        np.zeros(2, int),
    )
    views = as_views(rgb, poses, K, batch, depth=np.full((2, 30, 40), np.inf))
    assert views.depth.eq(0).all() and torch.equal(views.camera.K[1], torch.tensor(K).float())
    pixels = RNG.integers(1, 255, rgb.shape)
    seen = [
        as_views(p, poses, K, batch).rgb
        for p in (pixels.astype(np.uint8), pixels * 1.0, pixels / 255)
    ]
    assert torch.equal(seen[0], seen[1]) and torch.allclose(seen[0], seen[2].float())
    one_line(lambda: as_views(pixels * 2.0, poses, K, batch), "as_views: rgb: expected colours")
    one_line(lambda: as_views(rgb, 2 * poses, K, batch), "as_views: world_to_cam: expected a rigid")
    one_line(lambda: as_views(rgb, poses, -K, batch), "as_views: K: expected intrinsics")
    one_line(
        lambda: as_views(rgb, poses, K, batch, depth=np.full((2, 30, 40), 2e3)),
        "divide millimetres",
    )


def test_a_prediction_of_no_numbers_is_refused_and_a_step_is_skipped():
    recipe = change(
        find_recipe("object-transformer-mini"), image="none", fusion="NoFusion", n_points=64
    )
    model = recipe.build_model()
    xyz = torch.rand(64, 3)
    xyz[3, 1] = torch.nan
    points = PointBatch(xyz, xyz, torch.zeros(64, dtype=torch.long), 1)
    one_line(lambda: predict(points, None, None, model.eval()), "points.xyz", "1 that are not")
    assert not predict(points, None, None, model.train()).mean.isfinite().all()
