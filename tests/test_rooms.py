"""Composed rooms: what is on disk, whether it agrees with itself, and whether it can be made again."""
import hashlib
import shutil
from dataclasses import asdict, fields, replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("embreex")

from unipre3d.data import rooms as R  # noqa: E402
from unipre3d.data.furniture import read_csv  # noqa: E402
from unipre3d.data.scannet import ScanNetFrames  # noqa: E402

ROOMS, FRAMES = 3, 5                                                           # one of each split


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return R.make_rooms(tmp_path_factory.mktemp("rooms") / "set", rooms=ROOMS, frames=FRAMES, workers=1)


def digest(root):
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(root).rglob("*")) if p.is_file()}


def test_layout_and_types(made):
    table = read_csv(made / "rooms.csv")
    assert [r["split"] for r in table] == ["train", "val", "test"]
    for r in table:
        cloud = {p.stem: np.load(p) for p in (made / r["split"] / r["room"]).glob("*.npy")}
        assert set(cloud) == {"coord", "color", "normal", "segment20", "segment200", "instance"}
        n = int(r["points"])
        assert n > 3000 and all(len(v) == n for v in cloud.values())
        assert (cloud["coord"].dtype, cloud["normal"].dtype, cloud["color"].dtype) == (np.float32, np.float32, np.uint8)
        np.testing.assert_allclose(np.linalg.norm(cloud["normal"], axis=1), 1, atol=1e-4)
        assert -1 <= cloud["segment20"].min() and cloud["segment20"].max() <= 19 and {0, 1} <= set(cloud["segment20"].tolist())
        assert -1 <= cloud["segment200"].min() and cloud["segment200"].max() <= 199
        assert set(np.unique(cloud["instance"])) - {-1} == set(range(cloud["instance"].max() + 1))
        for i in range(cloud["instance"].max() + 1): assert len(set(cloud["segment20"][cloud["instance"] == i])) == 1   # a thing has one class
        assert len(np.unique(np.floor(cloud["coord"] / R.VOXEL), axis=0)) > .95 * n
        for k in range(FRAMES):
            color, depth = (Image.open(made / "2D" / kind / r["room"] / f"{k}.{suffix}") for kind, suffix in (("color", "jpg"), ("depth", "png")))
            assert color.size == depth.size == (320, 240) and color.format == "JPEG" and np.asarray(depth).dtype in (np.uint16, np.int32)
            z, rgb = np.asarray(depth), np.asarray(color)
            assert .3 < (z > 0).mean() < .999 and z[z > 0].min() >= 340 and z.max() < 9000 and 30 < rgb.mean() < 235
            R3 = np.loadtxt(made / "2D" / "pose" / r["room"] / f"{k}.txt")
            np.testing.assert_allclose(R3[:3, :3] @ R3[:3, :3].T, np.eye(3), atol=1e-6)
            assert R3[2, 1] < 0                                                # image down is world down
    np.testing.assert_allclose(np.loadtxt(made / "2D" / "intrinsics.txt")[:2, 2], [159.5, 119.5])


def test_the_reader_reads_them_and_the_cloud_lies_in_the_frames(made):
    for split in ("train", "val", "test"):
        source = ScanNetFrames(made, split=split, hw=(240, 320))
        assert source.frames(0) == list(range(FRAMES)) and not source.skipped
        np.testing.assert_allclose(source.intrinsics(0), R.K, atol=1e-6)
        xyz, color, off, gap = source.array(0, "coord"), source.array(0, "color"), [], []
        for k in source.frames(0):
            frame = source.view(0, k)
            local = (xyz - frame.pose[:3, 3]) @ frame.pose[:3, :3]
            at = local[:, :2] / np.maximum(local[:, 2:], .1) * R.FOCAL + R.K[:2, 2]
            seen = np.flatnonzero((local[:, 2] > .3) & (at >= 0).all(1) & (at < (320, 240)).all(1))
            column, row = at[seen].astype(int).T
            z = frame.depth[row, column]
            near = (z > 0) & (np.abs(local[seen, 2] - z) < 6 * R.depth_sigma(z))
            off.append(((local[seen, 2] - z) / R.depth_sigma(z))[near]); gap.append(np.abs(color[seen].astype(float) - frame.color[row, column])[near].mean(1))
        off, gap = np.concatenate(off), np.concatenate(gap)
        assert len(off) > 3000 and abs(np.median(off)) < .6 and off.std() < 2.5
        assert np.median(gap) < 25                                             # of 255; exposure drifts by about 7 %


def test_depth_is_right_up_to_its_noise():
    room = R.compose_room(3, kind="living")
    for frame in R.film(room, R.choose_look(room), 2):
        there = frame["depth"] > 0
        error = (frame["depth"] / 1000 - frame["z"])[there] / R.depth_sigma(frame["z"][there])
        assert abs(np.median(error)) < .1 and .8 < np.percentile(np.abs(error), 68) < 1.2


def test_same_seed_same_bytes_and_a_stopped_call_goes_on(made, tmp_path):
    before = digest(made)
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    shutil.rmtree(copy / "val"); (copy / "rooms.csv").unlink(); (copy / ".part-left").mkdir()
    kept = (copy / "train" / "room0000_00" / "coord.npy").stat().st_mtime_ns
    R.make_rooms(copy, rooms=ROOMS, frames=FRAMES, workers=1)
    assert digest(copy) == before and (copy / "train" / "room0000_00" / "coord.npy").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="choose another folder"): R.make_rooms(copy, rooms=ROOMS, frames=FRAMES, seed=1, workers=1)


def test_other_seeds_make_other_rooms():
    a, b = R.plan_rooms(60), R.plan_rooms(60, seed=1)
    assert not {r["seed"] for r in a} & {r["seed"] for r in b} and len({r["seed"] for r in a}) == 60
    assert [sum(r["split"] == s for r in a) for s in ("train", "val", "test")] == [40, 8, 12]
    assert R.plan_rooms(3) == a[:3] and {r["type"] for r in a if r["split"] == "test"} == set(R.KINDS)


def rests(thing, host):
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 5)] * 2), -1).reshape(-1, 2)
    return abs(R.heights(host, thing.center + (grid * thing.half) @ R.turn(thing.angle).T).max() - thing.z[0]) < .005


def collisions(room):
    solid = [p for p in room.pieces if p.solid]
    small = [replace(p, half=p.half - .001, z=(p.z[0] + .001, p.z[1] - .001)) for p in solid]
    pairs = [(a, solid[j]) for k, a in enumerate(solid) for j in k + 1 + np.flatnonzero(R.boxes_overlap(small[k], small[k + 1:]))]
    return [(a.name, b.name) for a, b in pairs if not (rests(a, b) or rests(b, a) or "window" in (a.role, b.role) and "curtain" in (a.label20, b.label20))]


@pytest.mark.parametrize("kind", R.KINDS)
def test_furniture_does_not_collide_and_stays_inside(kind):
    split_of = {r["id"]: r["split"] for r in read_csv(R.data_dir() / "furniture.csv")}
    for seed in range(4):
        split = ("train", "val", "test", "train")[seed]
        room = R.compose_room(seed, kind=kind, split=split)
        assert collisions(room) == [] and {split_of[m] for m in room.used} <= {split}
        assert 5 <= room.placed <= 20
        for p in room.pieces:
            assert (p.vertices[:, :2] > -.03).all() and (p.vertices[:, :2] < room.size + .03).all() and -.02 < p.vertices[:, 2].min() and p.vertices[:, 2].max() < R.HEIGHT + .01, p.name
        eyes = R.film_path(room, 28)[:, :3, 3]
        tall = [p for p in room.pieces if p.solid and p.z[0] < 1.5 < p.z[1]]
        for p in tall: assert not ((np.abs((eyes[:, :2] - p.center) @ R.turn(p.angle)) < p.half).all(1)).any(), p.name   # the camera is in no cupboard


def test_models_of_the_splits_are_disjoint_over_the_default_plan():
    family = {r["id"]: r["family"] for r in read_csv(R.data_dir() / "furniture.csv")}
    used = {"train": set(), "val": set(), "test": set()}
    for p in R.plan_rooms(30): used[p["split"]] |= {family[m] for m in R.compose_room(p["seed"], split=p["split"], kind=p["type"]).used}
    assert all(used.values()) and not used["train"] & used["val"] and not used["train"] & used["test"] and not used["val"] & used["test"]


def test_an_empty_room_has_walls_and_no_furniture(tmp_path):
    root = R.make_rooms(tmp_path, rooms=1, frames=3, pieces=0, workers=1)
    (row,) = read_csv(root / "rooms.csv")
    assert (row["pieces"], row["models"]) == ("0", "") and int(row["points"]) > 1000
    seen = set(np.load(root / "train" / "room0000_00" / "segment20.npy").tolist())
    assert {0, 1} <= seen <= {-1, 0, 1, 7, 8, 13}                              # walls, floor, door, window, curtain


def test_the_cache_is_used_and_named_by_the_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNIPRE3D_CACHE", str(tmp_path))
    monkeypatch.setattr(R, "make_rooms", lambda out, **how: (out.mkdir(), (out / "rooms.csv").write_text(str(how)), out)[2])
    first = R.embedded_rooms(rooms=2)
    assert first.parent == tmp_path and R.rooms_version() in first.name and str(first) in capsys.readouterr().out
    monkeypatch.setattr(R, "make_rooms", None)                                 # a second call makes nothing
    assert R.embedded_rooms(rooms=2) == first


def test_options_are_the_keywords_of_the_function():
    assert {f.name for f in fields(R.RoomsOptions)} == set(signature(R.make_rooms).parameters) - {"pieces"}
    assert all(signature(R.make_rooms).parameters[k].default == v for k, v in asdict(R.RoomsOptions()).items())


def test_errors_name_the_argument(tmp_path):
    with pytest.raises(ValueError, match="kind: expected one of"): R.compose_room(0, kind="cave")
    with pytest.raises(ValueError, match="rooms: expected at least 1"): R.make_rooms(tmp_path, rooms=0)
