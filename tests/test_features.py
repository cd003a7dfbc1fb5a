"""Features of clouds from outside: independent of order, unit, axes and bytes; in tiles as in one; and what is refused."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement
from torch import nn
from untrained import save_run

from unipre3d import backbones
from unipre3d.backbones.adapter import PointAdapter, as_pyg
from unipre3d.cli import cloud_paths, main, next_commands
from unipre3d.core import PointBatch, data_dir
from unipre3d.data.augment import Augment, augment
from unipre3d.data.clouds import read_cloud, write_cloud
from unipre3d.data.shapenet import ShapeNetViews
from unipre3d.data.transform import Transform, estimate_normals
from unipre3d.features import (
    FeatureExtractor,
    cut_tiles,
    fetch_weights,
    find_weights,
    in_tiles,
    kinds_of,
    load_weights,
    shipped_weights,
    transform_of,
)
from unipre3d.files import read_json
from unipre3d.predictions import Predictor
from unipre3d.recipes import finetune_recipes, recipes
from unipre3d.records import data_hash
from unipre3d.runs.recipe import change, check_changes, from_values
from unipre3d.runs.run import SMALL_BACKBONES, backbone_class, build_backbone, run_recipe
from unipre3d.runs.starts import start_from, start_summary
from unipre3d.tasks.classification import class_samples, nearest_probabilities, read_clouds

NOBODY = "http://127.0.0.1:9"  # a port that nobody listens on
RNG = np.random.default_rng(0)
CHAIR = ShapeNetViews(split="train", classes=["chair"]).rows(0)
XYZ = CHAIR["xyz"].astype(np.float64)
VOXELS = {"SparseUNet": dict(voxel_size=0.04), "PTv3": dict(voxel_size=0.04)}


def small(name, **options):
    torch.manual_seed(0)
    return backbone_class(name)(**SMALL_BACKBONES[name] | VOXELS.get(name, {}) | options)


def room_net():
    return small("SparseUNet", voxel_size=0.07, in_channels=6)


ROOM = Transform(
    features=("normal", "color_signed"), radius=0.0, centre="mean", n_points=0, voxel_size=0.07
)


def box_room(n=8000, seed=0):
    "Points on the walls, floor and ceiling of a room of 5 x 4 x 2.5 metres."
    rng = np.random.default_rng(seed)
    xyz, side = rng.random((n, 3)), rng.integers(0, 6, n)
    xyz[np.arange(n), side % 3] = side // 3
    return xyz * [5.0, 4.0, 2.5], rng.integers(0, 256, (n, 3)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ invariance


@pytest.mark.parametrize("name", sorted(SMALL_BACKBONES))
def test_rows_go_with_their_points(name):
    xyz = XYZ[::4]
    extractor = FeatureExtractor(small(name, in_channels=3), Transform(n_points=256))
    feat = extractor(xyz)
    assert feat.shape == (len(xyz), extractor.width) and np.isfinite(feat).all()
    order = RNG.permutation(len(xyz))
    assert np.array_equal(extractor(xyz[order]), feat[order])


def test_points_that_coincide_and_small_clouds():
    extractor = FeatureExtractor(small("StandardTransformer"), Transform())
    twice = np.concatenate([XYZ[:300], XYZ[:300]])
    feat = extractor(twice)
    assert np.array_equal(feat[:300], feat[300:])
    order = RNG.permutation(600)
    assert np.array_equal(extractor(twice[order]), feat[order])
    grid = np.stack(np.meshgrid(*[np.arange(6.0)] * 3), -1).reshape(-1, 3)  # equal distances
    order = RNG.permutation(len(grid))
    assert np.array_equal(extractor(grid[order]), extractor(grid)[order])
    assert extractor(XYZ[:2]).shape == (2, 96)
    with pytest.raises(ValueError, match="expected points in more than one place"):
        extractor(np.ones((5, 3)))


def test_an_object_of_very_many_points():
    extractor = FeatureExtractor(small("StandardTransformer"), Transform(n_points=256))
    ball = RNG.normal(size=(140_000, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    order = RNG.permutation(len(ball))
    assert np.array_equal(extractor(ball[order]), extractor(ball)[order])


def test_unit_axes_and_place_of_an_object_have_no_effect():
    extractor = FeatureExtractor(small("StandardTransformer"), Transform(n_points=512))
    feat = extractor(XYZ)
    order = RNG.permutation(len(XYZ))
    assert np.array_equal(extractor.summary(XYZ[order]), extractor.summary(XYZ))
    y_up = np.stack([XYZ[:, 0], XYZ[:, 2], -XYZ[:, 1]], 1)
    for other in (
        extractor(1000 * XYZ),
        extractor(1000 * XYZ, scale=0.001),
        extractor(XYZ + [512.0, -256.0, 64.0]),
        extractor(y_up, up="y"),
    ):
        assert np.abs(other - feat).max() < 1e-5


def test_millimetres_of_a_room():
    extractor = FeatureExtractor(room_net(), ROOM)
    xyz, rgb = box_room()
    normal = estimate_normals(xyz, inside=True)
    feat = extractor(xyz, rgb, normal)
    order = RNG.permutation(len(xyz))
    again = extractor(1000 * xyz[order], rgb[order], normal[order], scale=0.001)
    assert np.abs(again - feat[order]).max() < 1e-5
    assert np.abs(extractor(xyz, rgb / 255, normal) - feat).max() < 1e-4
    assert np.abs(extractor(xyz, rgb, normals="estimate") - feat).max() < 1e-3


@pytest.mark.parametrize("order", ["<", ">"])
def test_bytes_of_a_file_have_no_effect(tmp_path, order):
    extractor = FeatureExtractor(small("StandardTransformer"), Transform(n_points=256))
    table = np.rec.fromarrays(XYZ.T, dtype=[(axis, "f8") for axis in "xyz"])
    PlyData([PlyElement.describe(table, "vertex")], byte_order=order).write(str(tmp_path / "a.ply"))
    assert np.array_equal(extractor(read_cloud(tmp_path / "a.ply").xyz), extractor(XYZ))


# ------------------------------------------------------------------------------------------------ columns


def test_missing_columns_are_refused_filled_or_estimated():
    both = Transform(features=("xyz", "normal", "color_signed"))
    extractor = FeatureExtractor(small("StandardTransformer", in_channels=9), both)
    with pytest.raises(ValueError, match="color: these weights read colours.*add them") as problem:
        extractor(XYZ, normal=CHAIR["normal"])
    assert "\n" not in str(problem.value)
    with pytest.raises(ValueError, match="--normals estimate"):
        extractor(XYZ, CHAIR["color"])
    assert np.isfinite(extractor(XYZ, CHAIR["color"], normals="estimate")).all()
    lenient = replace(both, optional=("color", "normal"))
    extractor = FeatureExtractor(extractor.backbone, lenient)
    grey, none = np.full_like(XYZ, 0.5), np.zeros_like(XYZ)
    assert np.array_equal(extractor(XYZ), extractor(XYZ, grey, none))
    assert np.abs(extractor(XYZ) - extractor(XYZ, CHAIR["color"], CHAIR["normal"])).max() > 1e-3
    with pytest.raises(ValueError, match="normals: these weights read xyz"):
        FeatureExtractor(small("StandardTransformer"), Transform())(XYZ, normals="estimate")


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(xyz=XYZ[:, :2]), r"cloud: xyz: expected an array \[n 3\]"),
        (dict(xyz=np.zeros((0, 3))), "expected at least one point"),
        (dict(xyz=np.concatenate([XYZ, [[np.nan] * 3]])), "found 1 points that are not"),
        (dict(xyz=XYZ, color=CHAIR["color"][:5]), r"cloud: color: expected an array"),
        (dict(xyz=XYZ, up="w"), "up: expected"),
        (dict(xyz=XYZ, scale=0.0), "scale: expected a factor above 0"),
    ],
)
@pytest.mark.filterwarnings("ignore::unipre3d.values.MissingPoints")
def test_values_that_no_cloud_has(given, says):
    with pytest.raises(ValueError, match=says) as problem:
        FeatureExtractor(small("StandardTransformer"), Transform())(**given)
    assert "\n" not in str(problem.value)


def test_estimated_normals():
    ball = RNG.normal(size=(3000, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    normal = estimate_normals(ball)
    assert (normal * ball).sum(1).min() > 0.9
    assert np.array_equal(normal, estimate_normals(ball.astype(np.float32)))
    two = np.concatenate([ball, ball + [5.0, 0, -7.0]])  # pieces that no neighbour joins
    assert (estimate_normals(two) * np.concatenate([ball, ball])).sum(1).min() > 0.9
    xyz, _ = box_room()
    inward = (estimate_normals(xyz, inside=True) * (xyz.mean(0) - xyz)).sum(1)
    assert (inward > 0).mean() > 0.99
    assert not estimate_normals(ball[:2]).any()


def test_clouds_lose_columns_in_training():
    cloud = dict(xyz=CHAIR["xyz"], normal=CHAIR["normal"], color=CHAIR["color"] / np.float32(255))
    draws = [augment(cloud, np.random.default_rng(k), Augment(blank=0.5)) for k in range(40)]
    grey = [bool((draw["color"] == 0.5).all()) for draw in draws]
    flat = [not draw["normal"].any() for draw in draws]
    assert 8 < sum(grey) < 32 and 8 < sum(flat) < 32 and grey != flat
    assert augment(cloud, np.random.default_rng(0), Augment()) is cloud
    with pytest.raises(ValueError, match="augment.blank: expected a fraction"):
        Augment(blank=1.0)
    data = change(
        recipes["object-transformer-mini"], features=("xyz", "color"), augment=Augment(blank=0.2)
    )
    net = small("StandardTransformer", in_channels=6)
    assert transform_of(data, net).optional == ("color",)


# ------------------------------------------------------------------------------------------------ as trained


def test_the_transform_reads_what_training_read():
    recipe = change(finetune_recipes["cls-furniture-mini"], n_points=0)
    samples = class_samples(recipe.data, read_clouds(recipe.data, "val"))
    transform = transform_of(recipe, small("StandardTransformer"))
    trained = samples[3].points.xyz
    read = transform.prepare(samples.rows(3)["xyz"]).read.xyz
    apart = torch.cdist(trained, read).amin(1)
    assert len(read) == len(trained) and apart.max() < 0.05  # the box of points, not of the mesh


def test_a_room_is_read_as_its_task_reads_it():
    from unipre3d.data.readers import Cache, FileReader
    from unipre3d.tasks.scenes import ScenePoints

    xyz, rgb = box_room()
    normal = estimate_normals(xyz, inside=True)

    class One(FileReader):
        classes = ["wall"]
        items = [("room", None, None)]

        def __init__(self):
            self.cache = Cache(0)

        def rows(self, i):
            nobody = np.zeros(len(xyz), np.int32)
            return dict(xyz=xyz, color=rgb, normal=normal, segment=nobody, instance=nobody)

    transform = transform_of(finetune_recipes["sem-rooms-mini"], room_net())
    scene = ScenePoints(One(), voxel_size=0.07).scene(0)
    prepared = transform.prepare(xyz, rgb, normal)
    mine = prepared.read.feat[prepared.row][np.argsort(prepared.order)]
    assert len(prepared.read) == len(scene.points)
    assert torch.allclose(mine, scene.points.feat[scene.inverse], atol=1e-5)


# ------------------------------------------------------------------------------------------------ tiles


def test_tiles_give_what_the_whole_cloud_gives():
    net = room_net().eval()
    xyz = RNG.random((12_000, 3)) * [16.0, 12.0, 0.3]
    read = replace(ROOM, features=("normal",)).prepare(xyz, normal=np.ones_like(xyz)).read
    read = read.with_feat(torch.randn(len(read), 6))
    sizes = []

    @torch.no_grad()
    def run(points):
        sizes.append(len(points))
        return net(points).feat

    whole = in_tiles(run, read, 0.07)
    tiled = in_tiles(run, read, 0.07, most=2000)
    assert torch.allclose(whole, tiled, atol=1e-5)
    assert len(sizes) > 4 and max(sizes[1:]) < sizes[0]
    with torch.no_grad():
        narrow = in_tiles(run, read, 0.07, most=2000, margin=0)
    assert not torch.allclose(whole, narrow, atol=1e-4)  # what the margin is for


def test_tiles_cut_every_cell_once():
    cell = torch.randint(0, 50, (5000, 3)).unique(dim=0)
    tiles = cut_tiles(cell, 300)
    assert torch.cat(tiles).sort().values.equal(torch.arange(len(cell)))
    assert max(map(len, tiles)) <= 300 and min(map(len, tiles)) > 50
    line = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 1]])
    assert sorted(map(len, cut_tiles(line, 1))) == [1, 2]  # equal cells stay together


def test_memory_of_a_large_cloud_is_bounded():
    "Beyond what comes in and goes out, features take at most 500 bytes a point."
    script = (
        "import numpy as np, resource, torch\n"
        "from tests.test_features import FeatureExtractor, ROOM, room_net\n"
        "extractor = FeatureExtractor(room_net(), ROOM)\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "def cloud(n):\n"
        "    xyz = np.random.default_rng(0).random((n, 3)) * [12.0, 12.0, 0.05]\n"
        "    return xyz, np.zeros((n, 3), np.uint8), np.tile(np.float32([0, 0, 1]), (n, 1))\n"
        "extractor(*cloud(30_000))\n"
        "large = cloud(300_000)\n"
        "before = peak()\n"
        "feat = extractor(*large)\n"
        "print((peak() - before - feat.nbytes) / len(feat))\n"
    )
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(root), str(root / "tests")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=root
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 500


# ------------------------------------------------------------------------------------------------ weights


def test_weights_come_back(tmp_path):
    extractor = FeatureExtractor(small("PointNet2"), Transform(n_points=300, optional=("color",)))
    feat = extractor(XYZ)
    for half, most in ((False, 0.0), (True, 0.01)):
        folder = extractor.save_pretrained(tmp_path / str(half), half=half)
        again = FeatureExtractor.from_pretrained(folder)
        assert again.transform == extractor.transform
        assert np.abs(again(XYZ) - feat).max() <= most
        assert "library_name: unipre3d" in (folder / "README.md").read_text()
    alone = backbones.PointNet2.from_pretrained(tmp_path / "False")  # the backbone without the rest
    assert alone.config == extractor.backbone.config
    start = start_from(small("PointNet2"), tmp_path / "False")
    assert start.coverage == 1 and start_summary(start)["sha256"]
    config = json.loads((tmp_path / "False" / "config.json").read_text())
    config["transform"]["flavour"] = 1
    (tmp_path / "False" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown values flavour"):
        load_weights(tmp_path / "False")


def untrained(name, folder, classes=()):
    return save_run(folder, name, (recipes | finetune_recipes)[name], classes)


def test_a_run_has_features(tmp_path):
    folder = untrained("object-transformer-mini", tmp_path / "run")
    for where in (folder, folder / "checkpoint.safetensors", str(folder)):
        extractor = FeatureExtractor.from_pretrained(where)
        assert extractor(XYZ).shape == (len(XYZ), 96)
    assert extractor.transform == Transform()


def test_where_there_are_no_weights(tmp_path, monkeypatch):
    for where, says in (
        ("nothing-here", "found nothing there"),
        (tmp_path, "config.json: expected the config.json of weights"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=says):
            load_weights(where)
    with pytest.raises(
        FileNotFoundError, match="no-owner/no-name: expected weights .* found neither"
    ):
        fetch_weights("no-owner/no-name", NOBODY)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_weights("owner/name") == Path("owner/name")  # a folder comes first


def test_a_folder_of_clouds_named_like_shipped_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "objects").mkdir()
    assert find_weights("objects") == shipped_weights()["objects"]
    extractor = FeatureExtractor(small("PointNet2"), Transform())
    extractor.save_pretrained(tmp_path / "objects")
    assert find_weights("objects") == Path("objects")


def test_half_a_download_is_not_taken_for_weights(tmp_path, monkeypatch):
    here = tmp_path / "models--owner--name"
    kept = here / "snapshots" / ("a" * 40)
    (here / "refs").mkdir(parents=True)
    (here / "refs" / "main").write_text("a" * 40)
    kept.mkdir(parents=True)
    (kept / "config.json").write_text("{}")
    fetched = partial(huggingface_hub.snapshot_download, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    with pytest.raises(FileNotFoundError, match="owner/name: expected weights .* found neither"):
        fetch_weights("owner/name", NOBODY)
    (kept / "model.safetensors").write_bytes(b"")
    assert fetch_weights("owner/name", NOBODY) == kept


@pytest.mark.parametrize(
    "values",
    [
        {"radius": "0.65"},
        {"n_points": 2.5},
        {"voxel_size": -1},
        {"radius": np.nan},
        {"features": 3},
    ],
)
def test_values_that_no_transform_has(values):
    with pytest.raises(ValueError, match="config.json: expected the values of a transform") as said:
        Transform.from_values(values, "config.json")
    assert "\n" not in str(said.value)


def test_a_hub_that_does_not_answer():
    extractor = FeatureExtractor(small("PointNet2"), Transform())
    with pytest.raises(OSError, match="owner/name: expected to write it on the hub") as problem:
        extractor.push_to_hub("owner/name", endpoint=NOBODY)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("name", sorted(shipped_weights()))
def test_shipped_weights(name):
    folder = shipped_weights()[name]
    assert (folder / "model.safetensors").stat().st_size <= 4 * 2**20
    config = json.loads((folder / "config.json").read_text())
    extractor = FeatureExtractor.from_pretrained(name, next(iter(config.get("kinds", [""]))))
    assert extractor.transform.optional == ("color", "normal")
    assert ("transform" in config) == ("" in extractor.kinds)
    card = (folder / "README.md").read_text()
    for words in ("Trained", "Held-out scores", "Data", "CC BY", "Not good for"):
        assert words in card
    torch.manual_seed(0)
    fresh = type(extractor.backbone)(**extractor.backbone.config)
    assert start_from(fresh, name).coverage == 1
    if extractor.transform.radius:
        feat = extractor(XYZ, CHAIR["color"], CHAIR["normal"])
        order = RNG.permutation(len(XYZ))
        mixed = extractor(XYZ[order], CHAIR["color"][order], CHAIR["normal"][order])
        assert np.array_equal(mixed, feat[order]) and feat.std(0).min() > 0


# ------------------------------------------------------------------------------------------------ kinds of cloud


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    "The run of a recipe that alternates, and its weights as they are shared."
    folder = tmp_path_factory.mktemp("kinds")
    run = untrained("both-sparseunet-mini", folder / "run")
    extractor = FeatureExtractor.from_pretrained(run, "objects")
    record = json.loads((shipped_weights()["rooms"] / "record.json").read_text())
    record["data"] |= {"second_name": "furniture", "second_train": 500}
    extractor.record = record
    return run, extractor.save_pretrained(folder / "weights")


def test_a_kind_of_cloud_has_its_transform_and_its_voxels(paired):
    xyz, rgb = box_room(3000)
    normal = estimate_normals(xyz, inside=True)
    recipe = recipes["both-sparseunet-mini"]
    chair = XYZ, CHAIR["color"], CHAIR["normal"]
    sizes = dict(rooms=0.07, objects=0.04)
    kinds = kinds_of(recipe, build_backbone(recipe))
    assert {name: kind.voxel_size for name, kind in kinds.items()} == sizes
    for where in paired:
        for kind, cloud in (("objects", chair), ("rooms", (xyz, rgb, normal))):
            extractor = FeatureExtractor.from_pretrained(where, kind)
            feat = extractor(*cloud)
            by_hand = transform_of(
                recipe if kind == "rooms" else recipes["object-sparseunet-mini"],
                small("SparseUNet", voxel_size=sizes[kind], in_channels=6),
            )
            by_hand = replace(
                by_hand, features=("normal", "color_signed"), optional=("color", "normal")
            )
            assert extractor.transform == by_hand and bool(by_hand.radius) == (kind == "objects")
            net = small("SparseUNet", voxel_size=sizes[kind], in_channels=6).eval()
            assert start_from(net, where).coverage == 1
            assert extractor.backbone.voxel_size == extractor.backbone.config["voxel_size"]
            assert extractor.backbone.voxel_size == sizes[kind]
            assert np.array_equal(FeatureExtractor(net, by_hand)(*cloud), feat)
            net.voxel_size = 0.1
            assert not np.array_equal(FeatureExtractor(net, by_hand)(*cloud), feat)


def test_weights_of_several_kinds_come_back(paired, tmp_path):
    run, folder = paired
    config = json.loads((folder / "config.json").read_text())
    assert set(config["kinds"]) == {"objects", "rooms"} and "transform" not in config
    kept = FeatureExtractor.from_pretrained(folder, "rooms")
    assert kept.kinds == FeatureExtractor.from_pretrained(run, "objects").kinds
    again = kept.save_pretrained(tmp_path / "again")
    for kind in ("objects", "rooms"):
        first, second = (FeatureExtractor.from_pretrained(f, kind) for f in (folder, again))
        assert np.array_equal(first(XYZ), second(XYZ)) and first.kinds == second.kinds
    assert backbones.SparseUNet.from_pretrained(folder).width == kept.width
    card = (folder / "README.md").read_text()
    for words in (
        "# Features of rooms and objects: SparseUNet",
        'from_pretrained(WHERE, kind="rooms")',
        '**Rooms**, `kind="rooms"` in metres, z up, voxels of 0.07 m',
        '**Objects**, `kind="objects"` of any size, z up; 512 points',
        "and 500 of `furniture` in alternation",
    ):
        assert words in card, words


def test_a_kind_is_never_guessed(paired, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_cloud(tmp_path / "chair.ply", XYZ[:600], CHAIR["color"][:600])
    needed = "--kind: expected rooms or objects, kinds of cloud that"
    for where in paired:
        for kind, says in (("", "found none"), ("streets", "found streets")):
            with pytest.raises(ValueError, match=f"{needed} .*{says}") as problem:
                FeatureExtractor.from_pretrained(where, kind)
            assert "\n" not in str(problem.value)
        for command in ("features", "view"):
            words = (command, "chair.ply", "--from", where, "--out")
            out = "a.npz" if command == "features" else "a.html"
            assert run_cli(*words, out) == 2
            assert needed in capsys.readouterr().err
            assert run_cli(*words, out, "--kind", "objects") == 0
        found = np.load(tmp_path / "a.npz")
        own = FeatureExtractor.from_pretrained(where, "objects")(XYZ[:600], CHAIR["color"][:600])
        assert np.abs(found["feat"] - own).max() < 1e-5
    capsys.readouterr()
    for words in (("features", "chair.ply"), ("view", "chair.ply", "--out", "b.html")):
        for weights in ("objects", untrained("object-transformer-mini", tmp_path / words[0])):
            assert run_cli(*words, "--from", weights, "--kind", "objects") == 2
            said = capsys.readouterr().err
            assert "--kind: expected none for" in said and "leave it out" in said
            assert len(said.splitlines()) == 1
    assert run_cli("view", "chair.ply", "--from", "none", "--kind", "rooms", "--out", "b.html") == 2
    assert "--kind: expected none without weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kinds",
    [
        {},
        [],
        {"objects": 3},
        {"objects": {"transform": {}}},
        {"objects": {"transform": {}, "voxel_size": -1}},
        {"objects": {"transform": {"flavour": 1}, "voxel_size": 0.1}},
    ],
)
def test_kinds_that_there_are_not(paired, tmp_path, kinds):
    FeatureExtractor.from_pretrained(paired[1], "rooms").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"kinds": kinds}))
    with pytest.raises(ValueError, match="config.json: ") as problem:
        load_weights(tmp_path, "objects")
    assert "\n" not in str(problem.value)


def test_tasks_of_both_kinds_start_from_one_set_of_weights(paired, tmp_path):
    for where in paired:
        shapes = change(
            finetune_recipes["cls-shapes-mini"],
            backbone="SparseUNet",
            backbone_options=SMALL_BACKBONES["SparseUNet"] | {"voxel_size": 0.04},
            features=("normal", "color_signed"),
        )
        for recipe, size in ((shapes, 0.04), (finetune_recipes["sem-rooms-mini"], 0.07)):
            net = build_backbone(recipe)
            assert start_from(net, where).coverage == 1 and net.voxel_size == size
    commands = next_commands(recipes["both-sparseunet-mini"], tmp_path)
    assert [line.rsplit(" ", 1)[1] for line in commands if " --kind " in line] == [
        "rooms",
        "objects",
    ]
    assert any("finetune sem-rooms-mini" in line for line in commands)


# ------------------------------------------------------------------------------------------------ probes


def test_probes_start_from_shipped_weights_by_name(tmp_path):
    columns = FeatureExtractor.from_pretrained("objects").transform.features
    recipe = change(
        finetune_recipes["cls-furniture-mini"],
        features=columns,
        n_points=96,
        batch_size=4,
        steps=2,
        warmup=0,
        probe=True,
        validation="none",
        neighbours=3,
    )
    done = run_recipe("probe", recipe, tmp_path / "run", init="objects", say=lambda text: None)
    scores = done.record["metrics"]
    assert done.record["start"]["coverage"] == 1 and done.record["start"]["sha256"]
    assert scores["oa_nearest3"] > 0.25 and set(scores) >= {"oa", "macc", "macc_nearest3"}


def test_neighbours_vote():
    known = torch.cat([torch.randn(20, 6) + 4 * k for k in range(3)])
    label = torch.arange(3).repeat_interleave(20)
    found = nearest_probabilities(known, label, known + 0.01, 3, k=1)
    assert found.argmax(1).equal(label) and torch.allclose(found.sum(1), torch.ones(60))
    stretched = known * torch.tensor([1.0, 10, 100, 1, 1, 1000])  # units of columns do not matter
    again = nearest_probabilities(stretched, label, stretched, 3, k=5)
    assert torch.allclose(again, nearest_probabilities(known, label, known, 3, k=5), atol=1e-4)
    assert nearest_probabilities(known[:2], label[:2], known, 3, k=50).shape == (60, 3)


def test_a_light_decoder_for_rooms():
    recipe = change(finetune_recipes["sem-rooms-mini"], hidden=24)
    assert [type(part).__name__ for part in recipe.build_model(20).head][0] == "Linear"
    assert recipe.build_model(20).head[-1].in_features == 24
    assert isinstance(change(recipe, probe=True).build_model(20).head, nn.Linear)
    with pytest.raises(ValueError, match="hidden: counts only without --probe"):
        check_changes(change(recipe, probe=True), finetune_recipes["sem-rooms-mini"])


def write_scans(folder):
    "Six boxes in the layout of scanned objects."
    from PIL import Image

    for k in range(6):
        corners = np.array(np.meshgrid([0, 1], [0, 1], [0, 1])).reshape(3, -1).T * [1, 1 + k, 2]
        faces = np.array([[0, 1, 3], [0, 3, 2], [4, 5, 7], [4, 7, 6], [0, 1, 5], [0, 5, 4]])
        uv = (65535 * corners[:, :2] / corners[:, :2].max(0)).astype(np.uint16)
        arrays = dict(vertices=corners.astype(np.float32), faces=faces.astype(np.uint16), uv=uv)
        np.savez(folder / f"{k}.npz", **arrays)
        Image.new("RGB", (8, 8), (40 * k, 100, 200 - 30 * k)).save(folder / f"{k}.jpg")


def load_benchmark(name, monkeypatch):
    "A script of benchmarks/ as a module."
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_views_of_scanned_objects(tmp_path, monkeypatch):
    "Scores of six boxes: a mean over the scans of an object, and all of them between those of an image that knows the answer."
    module = load_benchmark("novel_views", monkeypatch)
    write_scans(tmp_path)
    monkeypatch.setattr(module, "VIEWS", 6)
    _, _, record, _ = load_weights("objects")
    recipe = from_values(module.PretrainRecipe, record["values"])
    paths = sorted(tmp_path.glob("*.npz"))
    samples = module.open_samples(module.draw_scans(paths, tmp_path / "scans.zip"), recipe)
    assert len(samples) == 6 and samples[0].target.rgb.shape == (4, 3, 64, 64)
    assert samples[0].points.feat.shape == (1024, 9)
    known = module.mean_image_scores(samples)
    torch.manual_seed(0)
    net = module.build_image_net(recipe.model)
    found = module.scores_of(
        recipe.build_predictor(net.width).eval(), net, samples, recipe.objective.background
    )
    for scores in (known, found):
        assert set(scores) == {"psnr", "psnr_foreground"}
        assert all(len(one) == 6 and np.isfinite(one).all() for one in scores.values())
    target = [samples[k].target.rgb for k in range(6)]
    mean = torch.cat(target).mean(0)
    error = (mean - target[2]).square().mean((1, 2, 3))
    assert np.isclose(known["psnr"][2], float((-10 * error.log10()).mean()), atol=1e-4)
    values = np.array([[1.0, 3.0, 5.0]])
    assert module.of_objects(values, ["a", "b", "a"]).tolist() == [[3.0, 3.0]]
    found = module.summary(np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]))
    assert found["mean"] == 2.5 and found["by_seed"] == [2.0, 3.0]
    assert np.isclose(found["high"] - 2.5, 4.303 / 3**0.5, atol=1e-3)  # Student, two degrees


def test_the_verdict_on_weights_of_both_kinds_is_that_of_its_rows(monkeypatch):
    module = load_benchmark("unified", monkeypatch)
    for name, limits in (("unified", module.LIMITS), ("unified_shipped", module.SHIPPED)):
        record = read_json(data_dir() / "records" / f"benchmark_{name}.json")
        assert module.verdict(record["rows"], limits) == record["verdict"]
    of = {row["arm"]: row for row in record["rows"] if row["sha256"]}
    for kind in ("objects", "rooms"):  # the weights that were scored are those that ship
        assert of[kind]["sha256"] == data_hash(shipped_weights()[kind] / "model.safetensors")
    rows = torch.eye(3).repeat(10, 1)
    label = torch.arange(3).repeat(10)
    assert module.linear_probe((rows, label), (torch.eye(3), torch.arange(3)), 3) == 1


def test_comparisons_of_rooms_are_those_of_their_rows(monkeypatch):
    module = load_benchmark("rooms_labels", monkeypatch)
    record = read_json(data_dir() / "records" / "benchmark_rooms.json")
    assert module.effects(record["rows"]) == record["effects"]


def test_more_of_rooms_chooses_compares_and_goes_on(tmp_path, monkeypatch):
    "Trials choose the weight, a run that diverged stays a row, and a second call makes nothing again."
    module = load_benchmark("rooms_more", monkeypatch)
    assert (
        module.choose_weight([dict(weight=0.2, linear_20=1), dict(weight=0.02, linear_20=1)]) == 0.2
    )
    assert (
        module.choose_weight([dict(weight=0.2, failed="?"), dict(weight=0.02, linear_20=1)]) == 0.02
    )
    with pytest.raises(SystemExit, match="both did"):
        module.choose_weight([dict(weight=0.2, failed="?")])
    made = []

    def probed(arm, seed, work, runs, train, tests):
        made.append((arm, seed))
        if (arm, seed) == ("none", 60) or (arm == "far" and seed < 62):
            raise module.NotFinished(arm, work, "diverged")
        if len(made) == 5:
            raise module.NotFinished(arm, work, "interrupted")
        better = runs["point.depth"].objective.terms["depth"] == 0.02
        return {"linear_20": 1.0 + better + (arm == "point.depth") + seed / 100}

    def tuned(arm, seed, work, runs, rooms):
        made.append((arm, seed))
        return {"miou": 3.0, "miou_half": 2.5 if arm.startswith("tuned_20") else 1.0}

    for name, value in dict(probed_row=probed, tuned_row=tuned).items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "rooms_of", lambda how, splits: [[0] * 40])
    monkeypatch.setattr(module, "embedded_rooms", lambda *how: None)
    monkeypatch.setattr(module, "data_hash", lambda path: "")
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["rooms_more.py", "--json", str(path)])
    with pytest.raises(module.NotFinished, match="is interrupted"):  # that is no result
        module.main()
    assert made == [("point.depth", 90)] * 2 + [("random", 60), ("none", 60), ("point", 60)]
    assert [row["arm"] for row in read_json(path)["rows"]] == ["random", "none"]
    module.main()
    record = read_json(path)
    assert record["depth_weight"] == 0.02 and len(record["trials"]) == 2
    rows = [(row["arm"], row["seed"]) for row in record["rows"]]
    assert rows == [(arm, seed) for seed in range(60, 66) for arm in module.ARMS]
    assert "is diverged" in record["rows"][1]["failed"] and len(made) == 2 + len(rows) + 1
    found = {(row["first"], row["second"]): row for row in record["effects"] if row["primary"]}
    assert set(found) == set(module.PRIMARY)
    assert found["point.depth", "point"]["verdict"] == "first ahead"
    assert found["none.depth", "none"]["pairs"] == 5 and found["none.depth", "none"]["failed"] == 1
    assert found["near", "far"]["verdict"] == "void: 2 pairs failed"
    assert [row["plateau"] for row in record["plateaus"]] == [False] * 3 + [True] * 3
    module.main()
    assert len(made) == 2 + len(rows) + 1 and read_json(path)["rows"] == record["rows"]
    arms = {arm.split(".")[1] for arm in module.ARMS if arm.startswith("tuned")}
    assert arms == set(module.STARTS) and set(module.runs_of(0.2)) < set(module.ARMS)
    order = np.random.default_rng(61).permutation(40)
    assert module.tuning(5, 61, 40).data.places == tuple(order[:5])
    assert set(module.tuning(5, 61, 40).data.places) < set(module.tuning(20, 61, 40).data.places)


def test_three_tasks_on_rooms_try_equally_many_rates(tmp_path, monkeypatch):
    module = load_benchmark("rooms_paradigms", monkeypatch)
    made = []

    def finished(arm, seed, work, runs):
        made.append((arm, seed, runs[arm].optimiser.lr))
        if runs[arm].optimiser.lr == 0.008 or (arm, seed) == ("contrast", 71):
            raise module.NotFinished(arm, work, "diverged")
        return tmp_path

    def probed(backbone, train, tests, seed):
        best = made and made[-1][2] == 0.004
        return {"linear_20": 10.0 + (made[-1][2] if best and seed == 91 else 0) + seed / 100}

    for name, value in dict(trained=finished, probes=probed).items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "rooms_of", lambda how, splits: [[0] * 40])
    monkeypatch.setattr(module, "embedded_rooms", lambda *how: None)
    monkeypatch.setattr(module, "data_hash", lambda path: "")
    monkeypatch.setattr(module, "frozen", lambda folder, seed: None)
    monkeypatch.setattr(module, "read_record", lambda path: {"cpu_seconds": 1.0})
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["rooms_paradigms.py", "--json", str(path)])
    module.main()
    record = read_json(path)
    tried = [(row["arm"], row["lr"], row["seed"]) for row in record["tries"]]
    assert tried == [(arm, rate, 91) for arm in module.BASES for rate in module.RATES]
    assert {arm: found["lr"] for arm, found in record["recipes"].items()} == dict.fromkeys(
        module.BASES, 0.004
    )
    rows = [(row["arm"], row["seed"]) for row in record["rows"]]
    assert rows == [(arm, seed) for seed in range(70, 76) for arm in module.ARMS]
    found = {(row["first"], row["second"]): row for row in record["effects"] if row["primary"]}
    assert {pair: row["pairs"] for pair, row in found.items()} == {
        ("colour", "random"): 6,
        ("masked", "contrast"): 5,
        ("colour", "masked"): 6,
        ("colour", "contrast"): 5,
    }
    before = len(made)
    module.main()
    assert len(made) == before
    equal = [dict(arm=arm, lr=lr, linear_20=1.0) for arm in module.BASES for lr in module.RATES]
    assert set(module.chosen_rates(equal).values()) == {0.002}
    with pytest.raises(SystemExit, match="masked: expected a rate that does not diverge"):
        module.chosen_rates([row for row in equal if row["arm"] != "masked"])


def test_retrieval_of_scanned_objects(tmp_path, monkeypatch, capsys):
    write_scans(tmp_path)
    module = load_benchmark("retrieval", monkeypatch)
    monkeypatch.setattr(module, "POINTS", (300, 300, 200))
    words = ["retrieval.py", "--data", str(tmp_path), "--json", str(tmp_path / "record.json")]
    monkeypatch.setattr(sys, "argv", words)
    module.main()
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["data"]["objects"] == 6 and record["chance"] == round(1 / 6, 4)
    fractions = [
        v
        for row in record["rows"].values()
        for one in row.values()
        for v in one["300 points"].values()
    ]
    assert len(fractions) == 12 and all(0 <= value <= 1 for value in fractions)
    meshes = [module.read_object(path) for path in sorted(tmp_path.glob("*.npz"))]
    clouds = [[module.sample(mesh, 300, 0)] * 3 for mesh in meshes]  # asked with the gallery itself
    found = module.scores(FeatureExtractor.from_pretrained("objects"), clouds, ("normal", "color"))
    assert found == {"300 points": dict(top1=1, top5=1), "200 points": dict(top1=1, top5=1)}


# ------------------------------------------------------------------------------------------------ the command line


def run_cli(*words):
    return main([str(word) for word in words])


def test_features_from_a_shell(tmp_path, monkeypatch, capsys):
    folder = untrained("object-transformer-mini", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    write_cloud(tmp_path / "chair.ply", XYZ, CHAIR["color"])
    assert run_cli("features", "chair.ply", "--from", folder) == 0
    found = np.load(tmp_path / "chair-features.npz")
    assert np.array_equal(found["feat"], FeatureExtractor.from_pretrained(folder)(found["xyz"]))
    shown = read_cloud(tmp_path / "chair-features.ply")
    assert np.allclose(shown.xyz, XYZ) and len(np.unique(shown.color, axis=0)) > 100
    assert run_cli("features", "chair.ply", "--from", folder, "--similar", 9, "--out", "s.npz") == 0
    assert read_cloud(tmp_path / "s.ply").scalars["likeness"].argmax() == 9
    (tmp_path / "many").mkdir()
    for k in range(3):
        write_cloud(tmp_path / "many" / f"{k}.ply", XYZ * [1, 1, 1 + k])
    assert run_cli("features", "many", "--from", folder, "--nearest", 2) == 0
    found = np.load(tmp_path / "many-features.npz")
    assert found["name"].tolist() == ["0", "1", "2"] and found["nearest"].shape == (3, 2)
    capsys.readouterr()
    for words, says in (
        (["nothing.ply"], "found nothing there"),
        (["chair.ply", "--nearest", 1], "--nearest: counts only for a folder"),
        (["many", "--nearest", 3], "--nearest: expected 1..2 of 3 clouds"),
        (["chair.ply", "--similar", 10**6], "--similar: expected a point in"),
        (["chair.ply", "--out", "a.txt"], "expected a name that ends in .npz"),
        (["chair.ply", "--unit", "miles"], "--unit: expected one of m, cm"),
        (["chair.ply", "--from", "nowhere"], "found nothing there"),
        ([], "expected a cloud file or a folder of them"),
    ):
        words = [*words] if "--from" in words or not words else [*words, "--from", folder]
        assert run_cli("features", *words) == 2
        assert says in capsys.readouterr().err


def bad_files(folder, good=3):
    "A folder of clouds, of which two are none."
    (folder / "below").mkdir(parents=True)
    for k in range(good):
        write_cloud(folder / f"{k}.ply", XYZ[:600] * [1, 1, 1 + k])
    (folder / "1bad.ply").write_bytes(b"ply\nnothing else")
    np.savez(folder / "below" / "all-in-one-place.npz", xyz=np.ones((9, 3)))
    return folder


def left_out(text):
    "What standard error says at the end, a line a file."
    return text[text.index("left out") :].splitlines()


def test_a_bad_file_costs_no_other(tmp_path, capsys):
    many = bad_files(tmp_path / "many")
    run = untrained("object-transformer-mini", tmp_path / "run")
    out = tmp_path / "new" / "a.npz"
    words = ("features", many, "--from", run, "--out", out)
    assert run_cli(*words, "--nearest", 4) == 1
    found = np.load(out)
    assert found["name"].tolist() == ["0", "1", "2"] and found["nearest"].shape == (3, 2)
    first, *named = left_out(capsys.readouterr().err)
    assert first == "left out 2 of 5 files:" and len(named) == 2
    assert "1bad.ply: expected" in named[0] and "all-in-one-place.npz: xyz: expected" in named[1]

    cls = untrained("cls-shapes-mini", tmp_path / "cls", [f"c{k}" for k in range(15)])
    said = tmp_path / "said"
    assert run_cli("predict", many, "--from", cls, "--out", said) == 1
    assert len((said / "predictions.csv").read_text().splitlines()) == 10
    assert sorted(path.name for path in said.glob("*.npz")) == ["0.npz", "1.npz", "2.npz"]
    assert left_out(capsys.readouterr().err)[0] == "left out 2 of 5 files:"


def test_options_that_suit_no_cloud_stop_before_the_first(tmp_path, capsys):
    none = bad_files(tmp_path / "none", good=0)
    run = untrained("object-transformer-mini", tmp_path / "run")
    cls = untrained("cls-shapes-mini", tmp_path / "cls", [f"c{k}" for k in range(15)])
    for words, says in (
        (["--up", "q"], 'up: expected "x", "y" or "z"'),
        (["--normals", "guess"], 'normals: expected "given" or "estimate"'),
        (["--unit", "mm"], "--unit: counts only for rooms"),
        ([], "none of 2 files could be used"),
    ):
        for command, weights in (("features", run), ("predict", cls)):
            out = tmp_path / "a.npz"
            assert run_cli(command, none, "--from", weights, "--out", out, *words) == 2
            assert says in capsys.readouterr().err
    assert run_cli("features", none, "--from", run, "--nearest", 2) == 2
    assert "--nearest: expected 1..1 of 2 clouds" in capsys.readouterr().err
    assert run_cli("predict", none, "--from", cls, "--category", "chair") == 2
    assert "--category: counts only for parts" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::unipre3d.values.MissingPoints")
def test_the_number_of_a_point_in_a_file_with_holes(tmp_path, capsys):
    run = untrained("object-transformer-mini", tmp_path / "run")
    holes = XYZ[:300].copy()
    holes[3] = np.nan
    np.save(tmp_path / "holes.npy", holes)
    words = ("features", tmp_path / "holes.npy", "--from", run, "--out", tmp_path / "a.npz")
    assert run_cli(*words) == 0
    assert run_cli(*words, "--similar", 5) == 2
    assert "--similar: expected a file without missing points" in capsys.readouterr().err


def test_names_of_clouds_are_their_own(tmp_path):
    for name in ("x-y-z.ply", "x/y-z.ply", "x-y/z.ply", "a.xyz", "a.ply", "b.obj"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert len(cloud_paths(str(tmp_path))) == 6


def test_a_room_in_millimetres_is_named(tmp_path, capsys):
    folder = untrained("scene-sparseunet-mini", tmp_path / "run")
    xyz, rgb = box_room(3000)
    normal = estimate_normals(xyz, inside=True)
    write_cloud(tmp_path / "mm.ply", 1000 * xyz, rgb, normal=normal)
    words = ("features", tmp_path / "mm.ply", "--from", folder, "--out", tmp_path / "a.npz")
    assert run_cli(*words) == 2
    assert "a room in metres" in capsys.readouterr().err
    assert run_cli(*words, "--unit", "mm") == 0
    assert len(np.load(tmp_path / "a.npz")["feat"]) == 3000


def test_an_object_in_millimetres_is_no_room_of_hundreds_of_metres(tmp_path, capsys):
    "Its size and what the weights expect stand in one line; real rooms of 1 to 100 m are left alone."
    folder = untrained("scene-sparseunet-mini", tmp_path / "run")
    xyz, rgb = box_room(600)
    xyz = (xyz - xyz.min(0)) / np.ptp(xyz, axis=0).max()
    normal = estimate_normals(xyz, inside=True)
    out = tmp_path / "a.npz"
    for length, status in ((300, 2), (1500, 2), (0.3, 2), (1, 0), (99, 0)):
        write_cloud(tmp_path / "one.ply", length * xyz, rgb, normal=normal)
        assert run_cli("features", tmp_path / "one.ply", "--from", folder, "--out", out) == status
        said = capsys.readouterr()
        if status:
            assert "expected a room in metres, 0.5 to 100 long, found one of" in said.err
            assert "--unit mm" in said.err
        else:
            assert "read as a room of" in said.out and "rooms in metres, in voxels" in said.out
    write_cloud(tmp_path / "one.ply", 300 * xyz, rgb, normal=normal)
    words = ("features", tmp_path / "one.ply", "--from", folder, "--out", out, "--unit", "m")
    assert run_cli(*words) == 0
    assert "read as a room of 300.00 x 240.00 x 150.00 m" in capsys.readouterr().out


def test_a_survey_is_no_object(tmp_path, capsys):
    "Weights of objects read a thousand points of it: a warning says so, and its size is said."
    run = untrained("object-transformer-mini", tmp_path / "run")
    words = ("--from", run, "--out", tmp_path / "a.npz")
    write_cloud(tmp_path / "far.ply", 500 * XYZ[:300] + [4.5e5, 5.4e6, 100])
    with pytest.warns(UserWarning, match="coordinates of a survey, .* are read as one object"):
        assert run_cli("features", tmp_path / "far.ply", *words) == 0
    write_cloud(tmp_path / "near.ply", XYZ[:300])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_cli("features", tmp_path / "near.ply", *words) == 0
    assert "read as one object" in capsys.readouterr().out


def test_predictions_from_a_shell(tmp_path, capsys):
    names = [f"c{k}" for k in range(15)]
    folder = untrained("cls-shapes-mini", tmp_path / "cls", names)
    (tmp_path / "many").mkdir()
    for k in range(2):
        write_cloud(tmp_path / "many" / f"{k}.ply", XYZ * [1, 1, 1 + k])
    out = tmp_path / "said"
    assert run_cli("predict", tmp_path / "many", "--from", folder, "--out", out) == 0
    table = (out / "predictions.csv").read_text().splitlines()
    assert table[0] == "cloud,label,probability" and len(table) == 7
    assert np.isclose(np.load(out / "1.npz")["probability"].sum(), 1, atol=1e-5)
    from unipre3d.data.scannet import scannet_labels

    xyz, rgb = box_room(3000)
    write_cloud(tmp_path / "room.ply", xyz, rgb, normal=estimate_normals(xyz, inside=True))
    for name in ("sem-rooms-mini", "inst-rooms-mini"):
        folder = untrained(name, tmp_path / name, scannet_labels(20).names)
        assert run_cli("predict", tmp_path / "room.ply", "--from", folder, "--out", out / name) == 0
        cloud = read_cloud(out / name / "room.ply")
        answer = Predictor.from_run(folder)(
            xyz.astype(np.float32), rgb, estimate_normals(xyz, inside=True)
        )
        assert (cloud.scalars["label"] == answer.label).mean() > 0.99
    capsys.readouterr()
    run = untrained("object-transformer-mini", tmp_path / "pre")
    for words, says in (
        (["room.ply"], "--from: expected the folder of a fine-tuned run"),
        (["room.ply", "--from", run], "--from: expected a fine-tuned run"),
        (
            ["many/0.ply", "--from", tmp_path / "cls", "--category", "chair"],
            "--category: counts only for parts",
        ),
    ):
        assert run_cli("predict", tmp_path / words[0], *words[1:]) == 2
        assert says in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ networks of others


class Mean(nn.Module):
    "A network in PyTorch Geometric's signature: each point beside the mean of its cloud."

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x, pos, batch):
        mean = torch.zeros(int(batch.max()) + 1, 3).index_add(0, batch, x)
        mean = mean / torch.bincount(batch)[:, None]
        return self.linear(torch.cat([x, mean[batch]], 1))


def test_networks_of_others_are_backbones():
    torch.manual_seed(0)
    net = PointAdapter(Mean(), 8)
    clouds = [torch.rand(30, 3), torch.rand(20, 3)]
    both = PointBatch.pack(clouds, clouds)
    alone = PointBatch.pack(clouds[1:], clouds[1:])
    assert torch.allclose(net(both).feat[30:], net(alone).feat, atol=1e-6)
    order = torch.randperm(20)
    mixed = PointBatch.pack([clouds[1][order]], [clouds[1][order]])
    assert torch.allclose(net(mixed).feat, net(alone).feat[order], atol=1e-6)
    assert torch.equal(net(both).feat, net.norm(net.body(net.stem(both)).feat))
    assert any(name.startswith("module.") for name, _ in net.named_parameters())
    feat = FeatureExtractor(net, Transform(n_points=100))(XYZ)
    assert feat.shape == (len(XYZ), 8)
    with pytest.raises(ValueError, match="expected a backbone of this package"):
        net.save_pretrained("anywhere")


def test_answers_that_are_no_features():
    cloud = PointBatch.pack([torch.rand(5, 3)], [torch.rand(5, 3)])
    for answer, says in (
        (torch.zeros(5, 7), r"module.x: expected shape \[n 8\]"),
        ((torch.zeros(4, 8), torch.zeros(5, 3), cloud.batch), "module.pos: expected shape"),
        ((torch.zeros(2, 8), torch.zeros(2, 3), torch.tensor([1, 0])), "sorted"),
    ):
        with pytest.raises(ValueError, match=says):
            PointAdapter(lambda x, pos, batch, answer=answer: answer, 8)(cloud)


@pytest.mark.parametrize("name", ["StandardTransformer", "PointNet2", "SparseUNet"])
def test_ours_in_the_signature_of_others(name):
    net = small(name, in_channels=3).eval()
    clouds = [torch.rand(300, 3), torch.rand(250, 3)]
    both = PointBatch.pack(clouds, clouds)
    x, pos, batch = as_pyg(net)(None, both.xyz, both.batch)
    ours = net(both)
    assert (
        torch.equal(x, ours.feat) and torch.equal(pos, ours.xyz) and torch.equal(batch, ours.batch)
    )
    one = as_pyg(net)(clouds[0], clouds[0])
    assert len(one[0]) == int((batch == 0).sum())
