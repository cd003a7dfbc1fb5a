"""Composed rooms: files, labels, geometry and provenance, checked with code that shares nothing with the composer."""

import csv
import hashlib
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unipre3d.core import data_dir
from unipre3d.worlds.rooms.build import HEIGHT
from unipre3d.worlds.rooms.disk import (
    RoomsOptions,
    embedded_rooms,
    make_rooms,
    plan_rooms,
    rooms_version,
)
from unipre3d.worlds.mesh import Material, Mesh
from unipre3d.worlds.rooms.film import noisy_depth
from unipre3d.worlds.rooms.furnish import ROOM_KINDS, compose_room
from unipre3d.worlds.rooms.light import choose_appearance
from unipre3d.worlds.rooms.models import read_meshes, unpack_model
from unipre3d.worlds.sensor import depth_sigma
from unipre3d.data.scannet import ScanNetFrames
from unipre3d.records import cache_dir, cached

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import build_room_models as build

FRAMES = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Three rooms, one a split."
    return make_rooms(tmp_path_factory.mktemp("made") / "rooms", rooms=3, frames=FRAMES, workers=1)


@pytest.fixture(scope="module")
def composed():
    "Rooms of every type, splits in turn, not filmed."
    return [
        compose_room(100 + k, split=("train", "val", "test")[k % 3], kind=kind)
        for k, kind in enumerate([*ROOM_KINDS, *ROOM_KINDS][:8])
    ]


def table(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def digests(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def cloud(root, row, name):
    return np.load(root / row["split"] / row["room"] / f"{name}.npy")


# ---------------------------------------------------------------- files


def test_layout_and_types(root):
    rows = table(root / "rooms.csv")
    assert [r["split"] for r in rows] == ["train", "val", "test"]
    assert not list(root.glob(".part*"))
    want = dict(
        coord=(np.float32, 3),
        color=(np.uint8, 3),
        normal=(np.float32, 3),
        segment20=(np.int16, None),
        segment200=(np.int16, None),
        instance=(np.int16, None),
    )
    for r in rows:
        n = int(r["points"])
        assert n > 10_000
        for name, (dtype, width) in want.items():
            x = cloud(root, r, name)
            assert x.dtype == dtype and x.shape == ((n,) if width is None else (n, width)), (
                r["room"],
                name,
            )
        assert np.isfinite(cloud(root, r, "coord")).all()
        np.testing.assert_allclose(np.linalg.norm(cloud(root, r, "normal"), axis=1), 1, atol=1e-4)
        for k in range(FRAMES):
            frame = [
                root / "2D" / kind / r["room"] / f"{k}.{end}"
                for kind, end in (("color", "jpg"), ("depth", "png"), ("pose", "txt"))
            ]
            color, depth, pose = (
                np.asarray(Image.open(frame[0])),
                np.asarray(Image.open(frame[1])),
                np.loadtxt(frame[2]),
            )
            assert (
                color.shape == (240, 320, 3)
                and depth.shape == (240, 320)
                and depth.dtype == np.uint16
            )
            np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-6)
            assert np.linalg.det(pose[:3, :3]) > 0 and (pose[3] == [0, 0, 0, 1]).all()
            assert color.mean() > 20, f"{r['room']} frame {k} is black"
            assert (depth > 0).mean() > 0.3, f"{r['room']} frame {k} has hardly any depth"


def test_intrinsics_have_pixel_centres_on_whole_numbers(root):
    K = np.loadtxt(root / "2D" / "intrinsics.txt")
    assert K.shape == (4, 4)
    np.testing.assert_allclose(K[:2, 2], [159.5, 119.5])


def test_the_reader_skips_nothing(root):
    for split in ("train", "val", "test"):
        source = ScanNetFrames(root, split=split, labels=200)
        assert len(source) == 1 and len(source.frames(0)) == FRAMES and not source.skipped
        assert set(source.rows(0)) == {"xyz", "color", "normal", "segment", "instance"}
        assert source.has(0, "segment20")
        np.testing.assert_allclose(source.K(0)[:2, 2], [80, 60])


# ---------------------------------------------------------------- geometry of the scan


def test_points_meet_the_depth_of_the_frames(root):
    for r in table(root / "rooms.csv"):
        xyz, K = cloud(root, r, "coord").astype(float), np.loadtxt(root / "2D" / "intrinsics.txt")
        met = np.zeros(len(xyz), bool)
        for k in range(FRAMES):
            pose, depth = (
                np.loadtxt(root / "2D" / "pose" / r["room"] / f"{k}.txt"),
                np.asarray(Image.open(root / "2D" / "depth" / r["room"] / f"{k}.png")) / 1000,
            )
            p = (xyz - pose[:3, 3]) @ pose[:3, :3]
            u, v = (
                np.round(K[i, i] * p[:, i] / np.maximum(p[:, 2], 0.01) + K[i, 2]).astype(int)
                for i in (0, 1)
            )
            at = np.flatnonzero((p[:, 2] > 0.2) & (u >= 0) & (u < 320) & (v >= 0) & (v < 240))
            z = depth[v[at], u[at]]
            met[at] |= (z > 0) & (np.abs(z - p[at, 2]) < 5 * depth_sigma(z) + 0.04)
        assert met.mean() > 0.92, (r["room"], met.mean())


def test_one_point_a_voxel_and_no_fringe(root):
    for r in table(root / "rooms.csv"):
        xyz = cloud(root, r, "coord")
        assert len(np.unique(np.floor(xyz / 0.02).astype(int), axis=0)) > 0.98 * len(xyz)
        floor = xyz[cloud(root, r, "segment20") == 1, 2]
        assert np.abs(np.median(floor)) < 0.01 and np.mean(np.abs(floor) < 0.06) > 0.95


def test_normals_face_the_inside(root):
    for r in table(root / "rooms.csv"):
        normal, label = cloud(root, r, "normal"), cloud(root, r, "segment20")
        assert (normal[label == 1, 2] > 0.8).mean() > 0.8
        assert (np.abs(normal[label == 0, 2]) < 0.3).mean() > 0.7


# ---------------------------------------------------------------- labels


def test_labels_name_known_classes(root):
    names = {
        (r["set"], int(r["number"])): r["name"] for r in table(data_dir() / "scannet_classes.csv")
    }
    for r in table(root / "rooms.csv"):
        found = {names["20", n] for n in np.unique(cloud(root, r, "segment20")) if n >= 0}
        fine = {names["200", n] for n in np.unique(cloud(root, r, "segment200")) if n >= 0}
        assert {"wall", "floor", "door"} <= found and {"wall", "floor"} <= fine
        assert len(found) > 5 and len(fine) > 6
        instance, label = cloud(root, r, "instance"), cloud(root, r, "segment20")
        assert sorted(np.unique(instance)) == list(range(-1, instance.max() + 1))
        assert (instance[np.isin(label, (0, 1))] == -1).mean() > 0.99
        assert all(len(np.unique(label[instance == k])) == 1 for k in range(instance.max() + 1))


def test_every_model_has_names_that_exist():
    from unipre3d.worlds.rooms.models import label_ids, room_models

    ids = label_ids()
    for m in room_models().values():
        assert ("200", m.label200) in ids, f"{m.id}: {m.label200!r} is no ScanNet200 class"
        assert not m.label20 or ("20", m.label20) in ids, (
            f"{m.id}: {m.label20!r} is no ScanNet20 class"
        )


# ---------------------------------------------------------------- composition


def inside(box, xy, shrink):
    "Which points lie in a turned rectangle that is a little smaller."
    c, s = np.cos(box.angle), np.sin(box.angle)
    d = xy - box.center
    return (np.abs(d @ [c, s]) < box.half[0] - shrink) & (
        np.abs(d @ [-s, c]) < box.half[1] - shrink
    )


def spots(box, n=24):
    "Points all over a turned rectangle."
    t = np.linspace(-1, 1, n)
    a, b = (np.stack(np.meshgrid(t, t), -1).reshape(-1, 2) * box.half).T
    c, s = np.cos(box.angle), np.sin(box.angle)
    return box.center + np.stack([a * c - b * s, a * s + b * c], 1)


def test_furniture_on_the_floor_does_not_collide(composed):
    for room in composed:
        standing = [p for p in room.pieces if p.model and p.solid and p.z[0] < 0.2]
        for i, a in enumerate(standing):
            for b in standing[i + 1 :]:
                if min(a.z[1], b.z[1]) < max(a.z[0], b.z[0]):
                    continue
                assert (
                    not inside(a, spots(b), 0.003).any() and not inside(b, spots(a), 0.003).any()
                ), (room.kind, a.name, b.name)


def test_furniture_stays_in_the_room(composed):
    for room in composed:
        for p in room.pieces:
            if not p.model:
                continue
            assert (
                p.vertices[:, :2].min() > -0.01 and (p.vertices[:, :2] < room.size + 0.01).all()
            ), (room.kind, p.name)
            assert p.vertices[:, 2].min() > -0.001 and p.vertices[:, 2].max() < HEIGHT + 0.001, (
                room.kind,
                p.name,
            )


def test_rooms_hold_what_their_type_says(composed):
    want = dict(bedroom="bed", living="sofa", kitchen="lower", bath="toilet")
    for kind, role in want.items():
        mine = [r for r in composed if r.kind == kind]
        assert sum(any(p.role == role for p in r.pieces) for r in mine) >= len(mine) - 1, kind
    assert all(8 <= r.placed <= 20 for r in composed)


def test_the_embedded_rooms_are_full_and_share_their_classes():
    "All sixty, not filmed: at least eight pieces each, rugs off the walls, no class in validation or test that training lacks."
    found = {s: set() for s in ("train", "val", "test")}
    for plan in plan_rooms(60):
        room = compose_room(plan["seed"], split=plan["split"], kind=plan["type"])
        assert 8 <= room.placed <= 20, (plan["room"], room.placed)
        found[plan["split"]] |= {p.label20 for p in room.pieces}
        for p in room.pieces:
            if p.name == "rug":
                assert (p.vertices[:, :2] > 0).all() and (p.vertices[:, :2] < room.size).all(), (
                    plan["room"]
                )
    assert found["val"] | found["test"] <= found["train"] and len(found["train"] - {""}) == 20
    assert found["train"] - found["val"] == found["train"] - found["test"] == {"bathtub"}


def test_slanted_planes_keep_their_depth():
    "With the same random numbers, a slanted plane has the very holes of a flat one; a step of half a metre is holed at its edge and nowhere else."
    appearance, (h, w) = choose_appearance(compose_room(0, pieces=0)), (240, 320)
    column = np.tile(np.arange(w), (h, 1))

    def holes(depth):
        view = dict(
            depth=depth.astype(np.float32), slant=np.full((h, w), 0.4), glass=np.zeros((h, w), bool)
        )
        return noisy_depth(view, appearance, np.random.default_rng(0)) == 0

    flat, step = holes(np.full((h, w), 1.5)), holes(np.where(column < w // 2, 1.0, 1.5))
    np.testing.assert_array_equal(
        holes(1 / (0.35 + 0.9 * column / w)), flat
    )  # from 2.9 to .8 m: 1 / z is linear over a plane
    edge = np.abs(column - w / 2 + 0.5) < 1
    np.testing.assert_array_equal(step[~edge], flat[~edge])
    assert step[edge].mean() > 0.5 > 0.1 > flat.mean()


def test_models_stay_in_their_split(composed, root):
    split = {r["id"]: r["split"] for r in table(data_dir() / "furniture.csv")}
    family = {r["id"]: r["family"] for r in table(data_dir() / "furniture.csv")}
    used = {s: set() for s in ("train", "val", "test")}
    for room in composed:
        used[room.split] |= set(room.used)
    for r in table(root / "rooms.csv"):
        used[r["split"]] |= set(r["models"].split())
    for s, models in used.items():
        assert models and {split[m] for m in models} == {s}
    families = {s: {family[m] for m in models} for s, models in used.items()}
    assert (
        not families["train"] & (families["val"] | families["test"])
        and not families["val"] & families["test"]
    )


def test_the_plan_grows_without_changing(composed):
    plan = plan_rooms(60)
    assert [sum(p["split"] == s for p in plan) for s in ("train", "val", "test")] == [40, 8, 12]
    assert plan_rooms(7) == plan[:7] and plan_rooms(7, seed=1) != plan[:7]
    assert all(
        {p["type"] for p in plan if p["split"] == s} == set(ROOM_KINDS)
        for s in ("train", "val", "test")
    )
    assert len({p["seed"] for p in plan}) == 60


# ---------------------------------------------------------------- again, on, and empty


def test_an_interrupted_set_goes_on_with_the_same_bytes(root, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(root, again)
    first = digests(root)
    shutil.rmtree(
        again / "val" / "room0001_00"
    )  # it was stopped before this cloud was put in place
    (again / ".part-left").mkdir()
    kept = (again / "train" / "room0000_00" / "coord.npy").stat().st_mtime_ns
    assert make_rooms(again, rooms=3, frames=FRAMES, workers=1) == again
    assert digests(again) == first
    assert (again / "train" / "room0000_00" / "coord.npy").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="choose another folder"):
        make_rooms(again, rooms=3, frames=FRAMES, seed=1, workers=1)
    with pytest.raises(ValueError, match="choose another folder"):
        make_rooms(again, rooms=3, frames=FRAMES, pieces=3, workers=1)


def test_a_room_without_furniture(tmp_path):
    make_rooms(tmp_path, rooms=1, frames=4, workers=1, pieces=0)
    (row,) = table(tmp_path / "rooms.csv")
    assert row["pieces"] == "0" and row["models"] == ""
    label = np.load(tmp_path / "train" / row["room"] / "segment20.npy")
    assert set(np.unique(label)) <= {-1, 0, 1, 7, 8, 10, 13} and {0, 1} <= set(np.unique(label))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="kind: expected one of bedroom"):
        compose_room(0, kind="attic")
    with pytest.raises(ValueError, match="rooms: expected at least 1, got 0"):
        plan_rooms(0)


def test_the_cache_has_a_name_for_each_version(root, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIPRE3D_CACHE", str(tmp_path))
    made = cached("rooms-3-0", rooms_version(), lambda place: shutil.copytree(root, place))
    assert cache_dir() == made.parent == tmp_path and embedded_rooms(rooms=3) == made
    assert set(asdict(RoomsOptions())) == {"rooms", "seed", "out", "frames", "workers"}


# ---------------------------------------------------------------- the archive of models


@pytest.fixture(scope="module")
def striped():
    "A ball of radius 1 with stripes."
    ball = pytest.importorskip("trimesh").creation.icosphere(4)
    corners = ball.vertices[ball.faces]
    stripes = np.zeros((8, 8, 4), np.uint8)
    stripes[..., 3] = 255
    stripes[::2, :, 0], stripes[1::2, :, 2] = 230, 200
    around = np.arctan2(corners[..., 1], corners[..., 0]) / 6.2832 % 1
    uv = np.stack([around, corners[..., 2] / 2 + 0.5], -1).astype(np.float32)
    none = np.zeros(len(corners), dtype=np.int64)
    material = Material(texture=stripes)
    return Mesh(corners, uv, corners.astype(np.float32), none, none, [material], ["ball"])


def test_a_model_gets_fewer_triangles_in_the_colours_of_the_mesh(striped):
    pytest.importorskip("fast_simplification")
    xyz, normal, color = build.sample_mesh(striped, 1000, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(xyz, axis=1), 1, atol=0.01)
    np.testing.assert_allclose(normal, xyz, atol=0.15)  # points of the ball, normals outwards
    assert (build.one_side(normal) == build.one_side(-normal)).all()
    assert build.distinct_corners(np.array([[0, 1, 2], [0, 1, 0]])).tolist() == [True, False]
    vertices, faces = build.decimate(striped.corners, 300)
    assert len(faces) <= 345

    def area(vertices, faces):
        return np.linalg.norm(build.face_vectors(vertices[faces]), axis=1).sum() / 2

    cut = build.split_faces(vertices, faces, np.arange(len(faces)) < 10)
    assert len(cut[1]) == len(faces) + 10
    np.testing.assert_allclose(area(*cut[:2]), area(vertices, faces))  # cutting changes no surface
    painted = build.paint_faces(vertices, faces, striped, 700, np.random.default_rng(0))
    assert len(faces) < len(painted[1]) <= 700


def test_models_are_packed_and_read_again(striped, tmp_path):
    pytest.importorskip("fast_simplification")
    packed = build.simplify_model(striped)
    vertices, faces, color = unpack_model(packed)
    np.testing.assert_allclose(vertices.min(0), [-1, -1, 0], atol=0.02)
    assert faces.max() < len(vertices)
    again = build.pack_model(vertices, faces, color / 255)  # exact up to its rounding
    np.testing.assert_array_equal(again["vertices"], packed["vertices"])
    np.testing.assert_array_equal(again["faces"], packed["faces"])
    path = build.write_meshes({"ball": packed, "again": again}, tmp_path / "two.npz")
    for key, values in read_meshes(path)["ball"].items():
        np.testing.assert_array_equal(values, packed[key])
    with pytest.raises(ValueError, match="expected sha256"):
        build.build_meshes(path, tmp_path / "out.npz", tmp_path / "work")  # another package


def test_the_embedded_archive_is_what_the_tool_writes(tmp_path):
    embedded = data_dir() / "furniture_meshes.npz"
    written = build.write_meshes(read_meshes(embedded), tmp_path / "all.npz")
    assert written.read_bytes() == embedded.read_bytes()


def test_near_duplicates():
    def sample(seed, taller=1.0, paint=0.0):
        xyz = np.random.default_rng(seed).normal(size=(1024, 3))
        xyz *= 0.3 / np.linalg.norm(xyz, axis=1, keepdims=True)
        return xyz * [1, 1, taller], np.full((1024, 3), 0.3 + paint)

    clouds = dict(a=sample(0), again=sample(1), taller=sample(2, 1.4), painted=sample(3, paint=0.4))
    assert build.near_duplicates(clouds) == {"again": "a"}
