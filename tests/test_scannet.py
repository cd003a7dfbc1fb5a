"""Rooms in ScanNet's layout: parity with the released pipeline, what is skipped, what is refused, raw scans."""
import io
import json
import pickle
import shutil
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData, PlyElement
from safetensors.numpy import load_file

from unipre3d.core import CameraBatch
from unipre3d.data.scannet import (BOX, ScanNetFrames, box_cameras, box_cloud, box_frame, convert_scans, nearest, read_color, read_depth,
                                   read_intrinsics, read_sens_frames, read_sens_header, scale_intrinsics, scannet20, standard_intrinsics,
                                   vertex_normals, write_box_rooms, write_cloud, write_frame, write_intrinsics)
from unipre3d.geometry.cameras import project, unproject

HW = (24, 32)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    return write_box_rooms(tmp_path_factory.mktemp("box") / "rooms", rooms=dict(a="train", b="train", c="val"), n_frames=6, hw=(48, 64), spacing=.25)


@pytest.fixture
def rooms(pristine, tmp_path): return Path(shutil.copytree(pristine, tmp_path / "rooms"))


def frames(root, **options): return ScanNetFrames(root, **dict(split="train", hw=HW) | options)


def quiet(f):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f()


def refuses(f, *words, kind=(ValueError, FileNotFoundError)):
    with pytest.raises(kind) as info: quiet(f)
    text = str(info.value)
    assert "\n" not in text and len(text) < 500, text
    for word in words: assert word in text, text


# ---- parity with the released pipeline

@pytest.fixture(scope="module")
def parity(): return load_file(Path(__file__).parent / "parity" / "cameras_scannet.safetensors")


@pytest.fixture
def released(parity, tmp_path):
    "The recorded inputs as files; one point at the recorded mean, so that the mean of the cloud is that point."
    for n in (0, 1):
        color, depth = parity[f"in/color{n}_HWC"].astype(np.uint8), parity[f"in/depth{n}_mm"].astype(np.uint16)
        write_frame(tmp_path, "scene0000_00", n, color, depth, parity["in/c2w_txt"][n].astype(np.float64))
        path = tmp_path / "2D" / "color" / "scene0000_00" / f"{n}.jpg"
        path.unlink(); Image.fromarray(color).save(path.with_suffix(".png"))                    # exact colours
    write_cloud(tmp_path, "train", "scene0000_00", coord=parity["in/moving_centers"][None])
    return ScanNetFrames(tmp_path, split="train", hw=(120, 160), intrinsics="standard", resample="bicubic")


def test_parity_of_intrinsics(parity):
    stored = parity["out/link_intrinsic"].astype(np.float64)                                    # principal point (79.5, 59.5): pixel centres are whole numbers
    ours = read_intrinsics(" ".join(map(str, stored.ravel())), (120, 160))
    np.testing.assert_allclose(ours, standard_intrinsics((120, 160)), atol=1e-5)
    assert ours[0, 2] == 80 and ours[1, 2] == 60                                                # ours: the first centre is at 0.5


def test_parity_of_depth_colour_and_poses(parity, released):
    views = [released.view(0, n) for n in (0, 1)]
    depth = parity["out/depth160x120"]
    np.testing.assert_allclose(np.stack([v.depth for v in views]), np.where(depth > .05, depth, 0), atol=1e-6)
    np.testing.assert_array_equal(views[0].color.transpose(2, 0, 1), parity["out/image160x120_255_first"])
    poses = released.poses(0).copy()
    poses[:, :3, 3] -= released.array(0, "coord").mean(0, dtype=np.float64)
    np.testing.assert_allclose(poses, parity["out/c2w_centered"], atol=1e-6)
    np.testing.assert_allclose(np.linalg.inv(poses), parity["out/w2c"], atol=1e-5)


def test_parity_of_world_points(parity, released):
    "The same pixels go to the same points: x = (u - 79.5) z / f there is ((u + 0.5) - 80) z / f here."
    views = released.views(0)
    pose = views.camera.cam_to_world
    pose[:, :3, 3] -= torch.from_numpy(parity["in/moving_centers"])
    camera = CameraBatch(torch.linalg.inv(pose), views.camera.K, views.camera.hw, views.camera.batch)
    xyz, valid = unproject(views.depth, camera)
    want = parity["out/unprojected_120x160x4"]
    held = np.array_equal(want.shape, (2, 120, 160, 4))
    assert held and np.array_equal(valid.numpy(), want[..., 3] > .5)
    assert np.abs(xyz.numpy() - want[..., :3])[valid.numpy()].max() < 2e-5                     # metres


# ---- geometry

def test_unproject_then_project_is_the_identity(rooms):
    views = frames(rooms).views(0)
    xyz, valid = unproject(views.depth, views.camera)
    assert valid.all()
    for v in range(len(views)):
        uv, depth, inside = project(xyz[v].reshape(-1, 3), torch.zeros(HW[0] * HW[1], dtype=torch.long), views.camera.select(torch.tensor([v])))
        rows, columns = torch.meshgrid(torch.arange(HW[0]) + .5, torch.arange(HW[1]) + .5, indexing="ij")
        assert inside.all() and (uv[0] - torch.stack([columns, rows], -1).reshape(-1, 2)).abs().max() < 1e-3
        torch.testing.assert_close(depth[0].reshape(HW), views.depth[v], atol=1e-4, rtol=0)


def test_pixels_land_on_the_walls(rooms):
    views = frames(rooms, hw=(48, 64)).views(0)                                                 # the stored size: exact but for millimetres
    p = unproject(views.depth, views.camera)[0].reshape(-1, 3).numpy()
    outside = np.maximum(p - BOX, -p).max(1)
    assert outside.max() < 2e-3


@pytest.mark.parametrize("hw", [(48, 64), (24, 32), (96, 128), (30, 64)])
def test_a_point_keeps_its_relative_place_at_any_size(rooms, hw):
    source, cloud = frames(rooms, hw=hw), torch.from_numpy(frames(rooms).array(0, "coord"))
    one = torch.zeros(len(cloud), dtype=torch.long)
    uv = project(cloud, one, source.views(0, [0]).camera)[0][0] / torch.tensor([hw[1], hw[0]])
    at_native = project(cloud, one, frames(rooms, hw=(48, 64)).views(0, [0]).camera)[0][0] / torch.tensor([64, 48])
    seen = (at_native > 0).all(1) & (at_native < 1).all(1)
    assert seen.sum() > 50 and (uv - at_native)[seen].abs().max() < 1e-5


def test_box_cloud_lies_on_what_is_seen():
    "A pixel's point has the colour of the surface there; the trace agrees with the cloud's own planes."
    cloud = box_cloud(.1)
    assert set(cloud["segment20"]) == {0, 1, 6} and np.allclose(np.linalg.norm(cloud["normal"], axis=1), 1)
    color, depth = box_frame(box_cameras(3)[1], standard_intrinsics(HW), HW)
    assert color.shape == (*HW, 3) and (depth > 0).all()


# ---- reading

def test_rows(rooms):
    source = frames(rooms)
    assert [source.scene(i) for i in range(len(source))] == ["a", "b"]
    rows = source.rows(0)
    assert {k: v.dtype for k, v in rows.items()} == dict(xyz=np.float32, color=np.uint8, normal=np.float32, segment20=np.int32, instance=np.int32)
    assert all(len(v) == len(rows["xyz"]) for v in rows.values()) and not source.has(0, "segment200")
    assert frames(rooms, scenes=["b"]).scenes == ["b"] and len(frames(rooms, split="val")) == 1


def test_frames_are_in_order_of_number(rooms):
    for kind, suffix in dict(color="jpg", depth="png", pose="txt").items():
        (rooms / "2D" / kind / "a" / f"100.{suffix}").rename(rooms / "2D" / kind / "a" / f"9.{suffix}")
    assert frames(rooms).frames(0) == [0, 9, 20, 40, 60, 80]


def test_zip_reads_as_the_folder(rooms, tmp_path):
    with zipfile.ZipFile(tmp_path / "rooms.zip", "w") as z:
        for p in sorted(rooms.rglob("*.*")): z.write(p, str(p.relative_to(rooms)))
    a, b = frames(rooms), frames(tmp_path / "rooms.zip")
    assert a.scenes == b.scenes and a.frames(1) == b.frames(1)
    assert np.array_equal(a.view(1, 20).color, b.view(1, 20).color) and np.array_equal(a.array(0, "coord"), b.array(0, "coord"))


def test_cache_changes_nothing_and_pickles_empty(rooms):
    with_cache, without = frames(rooms), frames(rooms, cache_bytes=0)
    for n in with_cache.frames(0):
        a, b, c = with_cache.view(0, n), without.view(0, n), with_cache.view(0, n)
        for x, y, z in zip(a, b, c): assert np.array_equal(x, y) and np.array_equal(x, z)
    assert not without.cache.items and with_cache.cache.items
    copy = pickle.loads(pickle.dumps(with_cache))
    assert not copy.cache.items and np.array_equal(copy.view(0, 40).depth, with_cache.view(0, 40).depth)


def test_depth_takes_pillows_nearest_and_colour_the_area():
    rng = np.random.default_rng(0)
    depth = rng.integers(0, 60000, (45, 61)).astype(np.uint16)
    assert np.array_equal(nearest(depth, (13, 100)), np.asarray(Image.fromarray(depth).resize((100, 13), Image.NEAREST)))
    png, color = io.BytesIO(), rng.integers(0, 256, (48, 64, 3)).astype(np.uint8)
    Image.fromarray(color).save(png, "PNG")
    mean = color.reshape(24, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(read_color(png.getvalue(), (24, 32))[0] - mean).max() <= 1
    assert np.array_equal(read_color(png.getvalue(), (48, 64))[0], color)


def test_depth_up_to_the_bound_is_missing(rooms):
    path = rooms / "2D" / "depth" / "a" / "0.png"
    depth = np.array(Image.open(path)); depth[:, :32] = 50; depth[:, 32:34] = 51
    Image.fromarray(depth).save(path)
    got = frames(rooms, hw=(48, 64)).view(0, 0).depth
    assert (got[:, :32] == 0).all() and np.allclose(got[:, 32:34], .051)


# ---- intrinsics

def test_intrinsics_of_a_scene_come_first(rooms):
    K = standard_intrinsics((48, 64)); K[0, 0] = 99
    write_intrinsics(rooms / "2D" / "intrinsic" / "b.txt", K)
    source = frames(rooms, hw=(48, 64))
    assert source.intrinsics(1)[0, 0] == pytest.approx(99) and source.intrinsics(0)[0, 0] == pytest.approx(standard_intrinsics((48, 64))[0, 0])
    write_intrinsics(rooms / "train" / "a" / "intrinsic_depth.txt", K)
    assert frames(rooms).intrinsics(0)[0, 0] == pytest.approx(99 / 2)


def test_no_intrinsics_is_an_error_unless_asked_for(rooms):
    (rooms / "2D" / "intrinsics.txt").unlink()
    refuses(lambda: frames(rooms).views(0), "2D/intrinsics.txt", "intrinsics='standard'")
    np.testing.assert_allclose(frames(rooms, intrinsics="standard").intrinsics(0), standard_intrinsics(HW))
    refuses(lambda: frames(rooms, intrinsics="guess"), "intrinsics: expected 'files' or 'standard'")


@pytest.mark.parametrize("text, word", [("1 2 3", "9 or 16"), ("a b", "other text"), ("nan " * 9, "finite"), ("577 0 319.5 0 577 239.5 0 0 1", "another size")])
def test_error_intrinsics(rooms, text, word):
    (rooms / "2D" / "intrinsics.txt").write_text(text)
    refuses(lambda: frames(rooms).views(0), "intrinsics.txt", word)


def test_scaling_twice_is_scaling_once():
    K = np.array([[500., 0, 311], [0, 510, 233], [0, 0, 1]])
    np.testing.assert_allclose(scale_intrinsics(scale_intrinsics(K, (480, 640), (90, 70)), (90, 70), (33, 44)), scale_intrinsics(K, (480, 640), (33, 44)))


# ---- frames that are skipped

def spoil(rooms, how):
    at = lambda kind, name: rooms / "2D" / kind / "a" / name
    pose = at("pose", "40.txt")
    if how == "pose is not finite": pose.write_text(pose.read_text().replace("1.0", "-inf"))
    if how == "pose is not a rigid 4 x 4 matrix": pose.write_text("1 2 3")
    for kind, suffix in dict(color="jpg", depth="png", pose="txt").items():
        if how == f"no {kind} file": at(kind, f"40.{suffix}").unlink()
    for kind, suffix in dict(color="jpg", depth="png").items():
        if how == f"{kind} does not decode": at(kind, f"40.{suffix}").write_bytes(at(kind, f"40.{suffix}").read_bytes()[:200])
    if how == "depth is empty": Image.fromarray(np.zeros((48, 64), np.uint16)).save(at("depth", "40.png"))


@pytest.mark.parametrize("how", ["pose is not finite", "pose is not a rigid 4 x 4 matrix", "no color file", "no depth file", "no pose file",
                                 "color does not decode", "depth does not decode", "depth is empty"])
def test_bad_frame_is_skipped_counted_and_said_once(rooms, how):
    spoil(rooms, how)
    source = frames(rooms)
    with pytest.warns(UserWarning, match=f"a: skipped 1 frames: {how}"): assert source.frames(0) == [0, 20, 60, 80, 100]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert source.frames(0) == [0, 20, 60, 80, 100] and dict(source.skipped) == {how: 1}
    refuses(lambda: source.view(0, 40), "expected one of the 5 usable frames of a")


def test_a_scene_without_a_usable_frame_has_none(rooms):
    for p in (rooms / "2D" / "pose" / "a").iterdir(): p.write_text("inf " * 16)
    source = frames(rooms)
    assert quiet(lambda: source.frames(0)) == [] and source.skipped["pose is not finite"] == 6


# ---- errors

def test_error_missing_folders(rooms, tmp_path):
    refuses(lambda: frames(tmp_path / "nowhere"), "nowhere", "<scene>/coord.npy", "scan-net.org", kind=FileNotFoundError)
    refuses(lambda: frames(rooms, split="tset"), "tset", "holds 2D, train, val", kind=FileNotFoundError)
    refuses(lambda: frames(rooms, scenes=["zzz"]), "zzz")
    shutil.rmtree(rooms / "2D" / "depth" / "a")
    refuses(lambda: frames(rooms).frames(0), "2D/depth/a", kind=FileNotFoundError)
    assert len(frames(rooms).array(0, "coord"))                                                 # the cloud needs no frames


@pytest.mark.parametrize("name, array, word", [
    ("coord", np.zeros((0, 3)), "empty cloud"), ("coord", np.zeros((4, 2)), "[n 3]"), ("coord", np.full((4, 3), np.nan), "12 that are not"),
    ("color", np.zeros((4, 3)), "as in coord.npy"), ("color", None, "0..255"), ("normal", np.zeros(7), "as in coord.npy"), ("segment20", np.zeros(3), "as in coord.npy"),
    ("coord", np.array([["a", "b", "c"]]), "finite numbers"), ("coord", b"no array", "does not load")])
def test_error_cloud(rooms, name, array, word):
    path = rooms / "train" / "a" / f"{name}.npy"
    if isinstance(array, bytes): path.write_bytes(array)
    else: np.save(path, np.load(path) * 3. if array is None else array)
    refuses(lambda: frames(rooms).rows(0), f"{name}.npy", word)


def test_labels_may_be_a_column_and_optional_files_absent(rooms):
    path = rooms / "train" / "a" / "segment20.npy"
    labels = np.load(path); np.save(path, labels[:, None])
    assert np.array_equal(frames(rooms).array(0, "segment20"), labels)
    (rooms / "train" / "a" / "normal.npy").unlink()
    assert "normal" not in frames(rooms).rows(0)
    refuses(lambda: frames(rooms).array(0, "normal"), "normal.npy", "found none", kind=FileNotFoundError)


@pytest.mark.parametrize("hw, word", [((48, 48), "proportions"), ((24, 32), "other frames")])
def test_error_size_of_depth(rooms, hw, word):
    Image.fromarray(np.full(hw, 900, np.uint16)).save(rooms / "2D" / "depth" / "a" / "20.png")
    refuses(lambda: frames(rooms).frames(0), "2D/depth/a/20.png", word)


def test_depth_of_another_size_than_colour_is_fine(rooms):
    for p in (rooms / "2D" / "depth" / "a").iterdir(): Image.fromarray(np.array(Image.open(p))[::2, ::2]).save(p)
    write_intrinsics(rooms / "2D" / "intrinsic" / "a.txt", standard_intrinsics((24, 32)))
    source = frames(rooms)
    assert len(source.frames(0)) == 6
    np.testing.assert_allclose(source.intrinsics(0), standard_intrinsics(HW))


def test_error_depth_of_eight_bits(rooms):
    Image.fromarray(np.full((48, 64), 9, np.uint8)).save(rooms / "2D" / "depth" / "a" / "20.png")
    refuses(lambda: frames(rooms).frames(0), "2D/depth/a/20.png", "16 bits", "mode L")


# ---- raw scans

def write_scan(root, scene="scene0000_00", n_frames=41, hw=(24, 32), color_hw=(48, 64), inf=()):
    "A raw scene in ScanNet's binary layout."
    folder = root / scene
    folder.mkdir(parents=True)
    K = lambda hw: np.pad(standard_intrinsics(hw) - [[0, 0, .5], [0, 0, .5], [0, 0, 0]], (0, 1)) + np.diag([0, 0, 0, 1.])
    with open(folder / f"{scene}.sens", "wb") as f:
        f.write(struct.pack("<IQ9s", 4, 9, b"StructSen") + np.stack([K(color_hw), np.eye(4), K(hw), np.eye(4)]).astype("<f4").tobytes())
        f.write(struct.pack("<2i4IfQ", 2, 1, color_hw[1], color_hw[0], hw[1], hw[0], 1000., n_frames))
        for n, pose in enumerate(box_cameras(n_frames)):
            jpeg = io.BytesIO()
            Image.fromarray(box_frame(pose, standard_intrinsics(color_hw), color_hw)[0]).save(jpeg, "JPEG", quality=95)
            packed = zlib.compress(np.round(box_frame(pose, standard_intrinsics(hw), hw)[1] * 1000).astype("<u2").tobytes())
            pose = np.full((4, 4), -np.inf) if n in inf else pose
            f.write(pose.astype("<f4").tobytes() + struct.pack("<4Q", n, n, len(jpeg.getvalue()), len(packed)) + jpeg.getvalue() + packed)
    cloud = box_cloud(.5)
    vertex = np.array([(*p, *c, 255) for p, c in zip(cloud["coord"], cloud["color"])], dtype=[(k, "f4") for k in "xyz"] + [(k, "u1") for k in ("red", "green", "blue", "alpha")])
    face = np.array([([0, 1, 2],)], dtype=[("vertex_indices", "i4", (3,))])
    PlyData([PlyElement.describe(vertex, "vertex"), PlyElement.describe(face, "face")]).write(str(folder / f"{scene}_vh_clean_2.ply"))
    nyu = np.array([1, 2, 0, 0, 0, 0, 7])[cloud["segment20"]]
    PlyData([PlyElement.describe(np.array([(k,) for k in nyu], dtype=[("label", "u2")]), "vertex")]).write(str(folder / f"{scene}_vh_clean_2.labels.ply"))
    (folder / f"{scene}.aggregation.json").write_text(json.dumps(dict(segGroups=[dict(objectId=0, segments=[5])])))
    (folder / f"{scene}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(dict(segIndices=np.where(cloud["segment20"] == 6, 5, 4).tolist())))
    (folder / f"{scene}.txt").write_text("numDepthFrames = 41\naxisAlignment = 0 -1 0 2 1 0 0 3 0 0 1 0 0 0 0 1 \n")
    return cloud


def convert(tmp_path, **options):
    out = convert_scans(tmp_path / "scans", tmp_path / "out", **dict(split="train", hw=HW, progress=False) | options)
    return ScanNetFrames(out, split="train", hw=HW)


def test_film_is_read_as_it_was_written(tmp_path):
    write_scan(tmp_path / "scans")
    with open(tmp_path / "scans" / "scene0000_00" / "scene0000_00.sens", "rb") as f:
        header = read_sens_header(f)
        film = list(read_sens_frames(f, header, every=10))
        assert not f.read()                                                                     # to the last byte
    np.testing.assert_allclose(header.intrinsics, standard_intrinsics((24, 32)), atol=1e-4)
    assert header.color_hw == (48, 64) and header.depth_hw == (24, 32) and [n for n, *_ in film] == [0, 10, 20, 30, 40]
    for n, _, depth, pose in film:
        np.testing.assert_allclose(pose, box_cameras(41)[n], atol=1e-6)
        np.testing.assert_allclose(depth / 1000, box_frame(box_cameras(41)[n], header.intrinsics, (24, 32))[1], atol=2e-3)


def test_converted_scan_reads_as_the_preprocessed_layout(tmp_path):
    cloud = write_scan(tmp_path / "scans", inf=(20,))
    source = convert(tmp_path, every=10)
    assert quiet(lambda: source.frames(0)) == [0, 10, 30, 40] and source.skipped["pose is not finite"] == 1
    np.testing.assert_allclose(source.array(0, "coord"), cloud["coord"], atol=1e-6)
    for name in ("color", "segment20", "instance"): assert np.array_equal(source.array(0, name), cloud[name]), name
    np.testing.assert_allclose(source.intrinsics(0), standard_intrinsics(HW), atol=1e-4)
    views = source.views(0)
    p = unproject(views.depth, views.camera)[0].reshape(-1, 3).numpy()
    assert np.maximum(p - BOX, -p).max() < 3e-3                                                 # on the walls: depth, poses and K agree


def test_aligned_scan_is_the_same_room(tmp_path):
    write_scan(tmp_path / "scans")
    plain = convert(tmp_path)
    turned = ScanNetFrames(convert_scans(tmp_path / "scans", tmp_path / "turned", split="train", hw=HW, align=True, progress=False), split="train", hw=HW)
    xyz = [torch.from_numpy(s.array(0, "coord")) for s in (plain, turned)]
    uv, uv_turned = (project(x, torch.zeros(len(x), dtype=torch.long), s.views(0, [20]).camera) for x, s in zip(xyz, (plain, turned)))
    seen = uv[2][0]
    assert seen.sum() > 20 and (uv[0] - uv_turned[0])[0, seen].abs().max() < 1e-3 and (xyz[0] - xyz[1]).abs().max() > 1
    (tmp_path / "scans" / "scene0000_00" / "scene0000_00.txt").write_text("sceneType = Box\n")
    refuses(lambda: convert_scans(tmp_path / "scans", tmp_path / "again", split="train", hw=HW, align=True, progress=False), "scene0000_00.txt", "axisAlignment")


def test_conversion_goes_on_where_it_stopped(tmp_path):
    write_scan(tmp_path / "scans"); write_scan(tmp_path / "scans", "scene0001_00", n_frames=3)
    source = convert(tmp_path, split=dict(train=["scene0000_00"], val=["scene0001_00"]))
    assert source.scenes == ["scene0000_00"] and len(ScanNetFrames(tmp_path / "out", split="val")) == 1
    done = (tmp_path / "out" / "val" / "scene0001_00" / "coord.npy").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "out" / "train")
    convert(tmp_path, split=dict(train=["scene0000_00"], val=["scene0001_00"]))
    assert (tmp_path / "out" / "val" / "scene0001_00" / "coord.npy").stat().st_mtime_ns == done
    refuses(lambda: convert(tmp_path, split=dict(train=["scene0009_00"])), "scene0009_00", kind=FileNotFoundError)


@pytest.mark.parametrize("size, word", [(2, "cut off"), (100, "cut off"), (400, "cut off"), (1500, "cut off"), (-20, "cut off")])
def test_error_truncated_film(tmp_path, size, word):
    write_scan(tmp_path / "scans", n_frames=3)
    path = tmp_path / "scans" / "scene0000_00" / "scene0000_00.sens"
    path.write_bytes(path.read_bytes()[:size])
    refuses(lambda: convert(tmp_path, every=1), "scene0000_00.sens", word)
    assert not (tmp_path / "out" / "train").exists()                                            # nothing that looks complete


@pytest.mark.parametrize("at, data, word", [(0, struct.pack("<I", 3), "version 4"), (4, struct.pack("<Q", 2**40), "length"), (21 + 256, struct.pack("<i", 0), "kinds")])
def test_error_film_of_another_kind(tmp_path, at, data, word):
    write_scan(tmp_path / "scans", n_frames=1)
    path = tmp_path / "scans" / "scene0000_00" / "scene0000_00.sens"
    raw = bytearray(path.read_bytes()); raw[at:at + len(data)] = data; path.write_bytes(raw)
    refuses(lambda: convert(tmp_path), "scene0000_00.sens", word)


def test_error_files_of_a_raw_scene(tmp_path):
    refuses(lambda: convert(tmp_path), "scans", "found none", kind=FileNotFoundError)
    write_scan(tmp_path / "scans", n_frames=1)
    folder = tmp_path / "scans" / "scene0000_00"
    labels = folder / "scene0000_00_vh_clean_2.labels.ply"
    whole = labels.read_bytes(); labels.write_bytes(whole[:120])
    refuses(lambda: convert(tmp_path), "labels.ply")
    labels.unlink(); (folder / "scene0000_00.aggregation.json").write_text("{")
    refuses(lambda: convert(tmp_path), "aggregation.json")
    (folder / "scene0000_00.aggregation.json").unlink()
    assert set(convert(tmp_path).rows(0)) == {"xyz", "color", "normal"}                          # a test scene has no labels
    mesh = folder / "scene0000_00_vh_clean_2.ply"
    mesh.write_bytes(mesh.read_bytes()[:300]); shutil.rmtree(tmp_path / "out")
    refuses(lambda: convert(tmp_path), "vh_clean_2.ply")
    mesh.unlink()
    refuses(lambda: convert(tmp_path), "vh_clean_2.ply", kind=FileNotFoundError)


def test_the_twenty_classes():
    assert scannet20(np.arange(41)).tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, -1, 12, -1, 13] + [-1] * 7 + [14, -1, -1, -1, 15] + [-1] * 4 + [16, 17, -1, 18, -1, -1, 19, -1]


def test_normals_of_a_closed_mesh_point_outwards():
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=np.float32)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    normal = vertex_normals(corners, np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))]))
    assert ((corners - .5) * normal).sum(1).min() > .5 and np.allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-6)
