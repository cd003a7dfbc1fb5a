"""Rooms in ScanNet's layout: parity with the released pipeline, what is skipped, what is refused, damaged files, raw scans."""

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
from unipre3d.data import scannet
from unipre3d.data.samples import ViewSamples
from unipre3d.data.readers import as_views, read_views
from unipre3d.data.scannet import (
    BLOCK,
    BOX,
    ScanNetFrames,
    box_cameras,
    box_cloud,
    box_frame,
    convert_scans,
    resize_nearest,
    scannet_labels,
    read_header,
    read_color,
    read_categories,
    read_intrinsics,
    read_labels,
    read_mesh,
    read_sens_frames,
    read_sens_header,
    scale_intrinsics,
    scannet20,
    standard_intrinsics,
    vertex_normals,
    write_box_rooms,
    write_cloud,
    write_frame,
    write_intrinsics,
)
from unipre3d.geometry.cameras import project, unproject

HW = (24, 32)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    return write_box_rooms(
        tmp_path_factory.mktemp("box") / "rooms",
        rooms=dict(a="train", b="train", c="val"),
        n_frames=6,
        hw=(48, 64),
        spacing=0.25,
    )


@pytest.fixture
def rooms(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "rooms"))


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    "Two training rooms and one to validate, 12 frames of 24 x 32; read only."
    return write_box_rooms(tmp_path_factory.mktemp("boxes"), n_frames=12, hw=HW, spacing=0.2)


@pytest.fixture()
def copy(boxes, tmp_path):
    "A room that a test may damage."
    for part in ("train", "2D/color", "2D/depth", "2D/pose"):
        shutil.copytree(boxes / part / "box0000_00", tmp_path / part / "box0000_00")
    shutil.copy(boxes / "2D" / "intrinsics.txt", tmp_path / "2D" / "intrinsics.txt")
    return tmp_path


def frames(root, **options):
    return ScanNetFrames(root, **dict(split="train", hw=HW) | options)


def quiet(f):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f()


def refuses(f, *words, kind=(ValueError, FileNotFoundError)):
    with pytest.raises(kind) as info:
        quiet(f)
    text = str(info.value)
    assert "\n" not in text and len(text) < 500, text
    for word in words:
        assert str(word) in text, text


# ---- parity with the released pipeline


@pytest.fixture(scope="module")
def parity():
    return load_file(Path(__file__).parent / "parity" / "cameras_scannet.safetensors")


@pytest.fixture
def released(parity, tmp_path):
    "The recorded inputs as files; one point at the recorded mean, so that the mean of the cloud is that point."
    for n in (0, 1):
        color, depth = (
            parity[f"in/color{n}_HWC"].astype(np.uint8),
            parity[f"in/depth{n}_mm"].astype(np.uint16),
        )
        write_frame(
            tmp_path, "scene0000_00", n, color, depth, parity["in/c2w_txt"][n].astype(np.float64)
        )
        path = tmp_path / "2D" / "color" / "scene0000_00" / f"{n}.jpg"
        path.unlink()
        Image.fromarray(color).save(path.with_suffix(".png"))  # exact colours
    write_cloud(tmp_path, "train", "scene0000_00", coord=parity["in/moving_centers"][None])
    return ScanNetFrames(
        tmp_path, split="train", hw=(120, 160), intrinsics="standard", resample="bicubic"
    )


def test_parity_of_intrinsics(parity):
    stored = parity["out/link_intrinsic"].astype(
        np.float64
    )  # principal point (79.5, 59.5): pixel centres are whole numbers
    ours = read_intrinsics(" ".join(map(str, stored.ravel())), (120, 160))
    np.testing.assert_allclose(ours, standard_intrinsics((120, 160)), atol=1e-5)
    assert ours[0, 2] == 80 and ours[1, 2] == 60  # ours: the first centre is at 0.5


def test_parity_of_depth_colour_and_poses(parity, released):
    views = [released.view(0, n) for n in (0, 1)]
    depth = parity["out/depth160x120"]
    np.testing.assert_allclose(
        np.stack([v.depth for v in views]), np.where(depth > 0.05, depth, 0), atol=1e-6
    )
    np.testing.assert_array_equal(
        views[0].rgb.transpose(2, 0, 1), parity["out/image160x120_255_first"]
    )
    poses = np.linalg.inv(released.world_to_cam(0))
    poses[:, :3, 3] -= released.array(0, "coord").mean(0, dtype=np.float64)
    np.testing.assert_allclose(poses, parity["out/c2w_centered"], atol=1e-6)
    np.testing.assert_allclose(np.linalg.inv(poses), parity["out/w2c"], atol=1e-5)
    view = as_views(
        np.zeros((2, 4, 4, 3), np.uint8),
        np.linalg.inv(poses),
        np.tile(np.eye(3), (2, 1, 1)),
        np.zeros(2, dtype=int),
        depth=np.ones((2, 4, 4)),
    )
    np.testing.assert_allclose(view.camera.world_to_cam, parity["out/w2c"], atol=1e-5)
    np.testing.assert_allclose(view.camera.center, parity["out/camera_center"], atol=1e-5)


def test_parity_of_world_points(parity, released):
    "The same pixels go to the same points: x = (u - 79.5) z / f there is ((u + 0.5) - 80) z / f here."
    views = read_views(released, 0)
    pose = views.camera.cam_to_world
    pose[:, :3, 3] -= torch.from_numpy(parity["in/moving_centers"])
    camera = CameraBatch(
        torch.linalg.inv(pose), views.camera.K, views.camera.hw, views.camera.batch
    )
    xyz, valid = unproject(views.depth, camera)
    want = parity["out/unprojected_120x160x4"]
    held = np.array_equal(want.shape, (2, 120, 160, 4))
    assert held and np.array_equal(valid.numpy(), want[..., 3] > 0.5)
    assert np.abs(xyz.numpy() - want[..., :3])[valid.numpy()].max() < 2e-5  # metres


# ---- geometry


def test_unproject_then_project_is_the_identity(rooms):
    views = read_views(frames(rooms), 0)
    xyz, valid = unproject(views.depth, views.camera)
    assert valid.all()
    for v in range(len(views)):
        uv, depth, inside = project(
            xyz[v].reshape(-1, 3),
            torch.zeros(HW[0] * HW[1], dtype=torch.long),
            views.camera.select(torch.tensor([v])),
        )
        rows, columns = torch.meshgrid(
            torch.arange(HW[0]) + 0.5, torch.arange(HW[1]) + 0.5, indexing="ij"
        )
        assert (
            inside.all()
            and (uv[0] - torch.stack([columns, rows], -1).reshape(-1, 2)).abs().max() < 1e-3
        )
        torch.testing.assert_close(depth[0].reshape(HW), views.depth[v], atol=1e-4, rtol=0)


def test_pixels_lie_on_the_surfaces(boxes):
    source = frames(
        boxes, hw=(12, 16)
    )  # nearest pixels of 24 x 32: up to half a stored pixel beside the centre
    views = read_views(frames(boxes), 0)
    xyz, valid = unproject(views.depth, views.camera)
    p = xyz[valid].numpy()
    wall = np.minimum(abs(p), abs(p - BOX)).min(1)
    block = np.where(
        ((p > BLOCK[0] - 0.01) & (p < BLOCK[1] + 0.01)).all(1),
        np.minimum(abs(p - BLOCK[0]), abs(p - BLOCK[1])).min(1),
        9,
    )
    assert valid.all() and np.minimum(wall, block).max() < 5e-3
    np.testing.assert_allclose(source.K(0), np.diag([0.5, 0.5, 1]) @ frames(boxes).K(0), atol=1e-9)


@pytest.mark.parametrize("hw", [(48, 64), (24, 32), (96, 128), (30, 64)])
def test_a_point_keeps_its_relative_place_at_any_size(rooms, hw):
    source, cloud = frames(rooms, hw=hw), torch.from_numpy(frames(rooms).array(0, "coord"))
    one = torch.zeros(len(cloud), dtype=torch.long)
    uv = project(cloud, one, read_views(source, 0, [0]).camera)[0][0] / torch.tensor([hw[1], hw[0]])
    at_native = project(cloud, one, read_views(frames(rooms, hw=(48, 64)), 0, [0]).camera)[0][
        0
    ] / torch.tensor([64, 48])
    seen = (at_native > 0).all(1) & (at_native < 1).all(1)
    assert seen.sum() > 50 and (uv - at_native)[seen].abs().max() < 1e-5


def test_box_cloud_lies_on_what_is_seen():
    "A pixel's point has the colour of the surface there; the trace agrees with the cloud's own planes."
    cloud = box_cloud(0.1)
    assert set(cloud["segment20"]) == {0, 1, 6} and np.allclose(
        np.linalg.norm(cloud["normal"], axis=1), 1
    )
    color, depth = box_frame(box_cameras(3)[1], standard_intrinsics(HW), HW)
    assert color.shape == (*HW, 3) and (depth > 0).all()


# ---- reading


def test_rows(rooms):
    source = frames(rooms)
    assert [source.name(i) for i in range(len(source))] == ["a", "b"]
    assert set(source.rows(0)) == {"xyz", "color", "normal"}  # no labels are read
    rows = frames(rooms, labels=20).rows(0)
    assert {k: v.dtype for k, v in rows.items()} == dict(
        xyz=np.float32, color=np.uint8, normal=np.float32, segment=np.int32, instance=np.int32
    )
    assert all(len(v) == len(rows["xyz"]) for v in rows.values()) and not source.has(
        0, "segment200"
    )
    assert frames(rooms, scenes=["b"]).scenes == ["b"] and len(frames(rooms, split="val")) == 1


def test_what_was_written_is_read(boxes):
    source, made = frames(boxes), box_cloud(0.2)
    rows = source.rows(0)
    np.testing.assert_allclose(rows["xyz"], made["coord"], atol=1e-6)
    for name in ("color", "segment20", "instance"):
        np.testing.assert_array_equal(source.array(0, name), made[name])
    np.testing.assert_array_equal(frames(boxes, labels=20).rows(0)["segment"], made["segment20"])
    assert (
        len(source) == 2
        and source.name(1) == "box0001_00"
        and source.frames(0) == list(range(0, 240, 20))
    )
    frame, pose = source.view(0, 40), box_cameras(12)[2]
    color, depth = box_frame(pose, standard_intrinsics(HW), HW)
    assert (
        frame.rgb.dtype == np.uint8
        and frame.depth.dtype == np.float32
        and source.world_to_cam(0).dtype == source.K(0).dtype == np.float64
    )
    np.testing.assert_allclose(frame.depth, depth, atol=6e-4)
    np.testing.assert_allclose(source.world_to_cam(0)[2], np.linalg.inv(pose), atol=1e-12)
    assert np.abs(frame.rgb.astype(int) - color).mean() < 6
    np.testing.assert_allclose(source.K(0), standard_intrinsics(HW), atol=1e-9)


def test_frames_are_in_order_of_number(rooms):
    for kind, suffix in dict(color="jpg", depth="png", pose="txt").items():
        (rooms / "2D" / kind / "a" / f"100.{suffix}").rename(
            rooms / "2D" / kind / "a" / f"9.{suffix}"
        )
    assert frames(rooms).frames(0) == [0, 9, 20, 40, 60, 80]


def test_zip_reads_as_the_folder(rooms, tmp_path):
    with zipfile.ZipFile(tmp_path / "rooms.zip", "w") as z:
        for p in sorted(rooms.rglob("*.*")):
            z.write(p, str(p.relative_to(rooms)))
    a, b = frames(rooms), pickle.loads(pickle.dumps(frames(tmp_path / "rooms.zip")))
    assert a.scenes == b.scenes and a.frames(1) == b.frames(1)
    assert np.array_equal(a.view(1, 20).rgb, b.view(1, 20).rgb) and np.array_equal(
        a.array(0, "coord"), b.array(0, "coord")
    )


def test_cache_changes_nothing_and_pickles_empty(rooms):
    with_cache, without = frames(rooms), frames(rooms, cache_bytes=0)
    for n in with_cache.frames(0):
        a, b, c = with_cache.view(0, n), without.view(0, n), with_cache.view(0, n)
        for k in ("rgb", "depth"):
            x, y, z = (getattr(v, k) for v in (a, b, c))
            assert np.array_equal(x, y) and np.array_equal(x, z)
    assert not without.cache.items and with_cache.cache.items
    copy = pickle.loads(pickle.dumps(with_cache))
    assert not copy.cache.items and np.array_equal(
        copy.view(0, 40).depth, with_cache.view(0, 40).depth
    )


def test_depth_takes_pillows_nearest_and_colour_the_area():
    rng = np.random.default_rng(0)
    depth = rng.integers(0, 60000, (45, 61)).astype(np.uint16)
    assert np.array_equal(
        resize_nearest(depth, (13, 100)),
        np.asarray(Image.fromarray(depth).resize((100, 13), Image.NEAREST)),
    )
    assert np.array_equal(resize_nearest(depth, (45, 61)), depth)
    png, color = io.BytesIO(), rng.integers(0, 256, (48, 64, 3)).astype(np.uint8)
    Image.fromarray(color).save(png, "PNG")
    mean = color.reshape(24, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(read_color(png.getvalue(), (24, 32)) - mean).max() <= 1
    assert np.array_equal(read_color(png.getvalue(), (48, 64)), color)


def test_a_jpeg_is_averaged_over_areas():
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    image = np.kron(rng.integers(40, 200, (6, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    Image.fromarray(image).save(buffer, "JPEG", quality=98, subsampling=0)
    small = read_color(buffer.getvalue(), (6, 8))
    assert (
        read_header(buffer).hw == (96, 128)
        and np.abs(small.astype(int) - image[8::16, 8::16]).max() <= 4
    )


def test_depth_up_to_the_bound_is_missing(rooms):
    path = rooms / "2D" / "depth" / "a" / "0.png"
    depth = np.array(Image.open(path))
    depth[:, :32] = 50
    depth[:, 32:34] = 51
    Image.fromarray(depth).save(path)
    got = frames(rooms, hw=(48, 64)).view(0, 0).depth
    assert (got[:, :32] == 0).all() and np.allclose(got[:, 32:34], 0.051)


# ---- intrinsics


def test_intrinsics_of_a_scene_come_first(rooms):
    K = standard_intrinsics((48, 64))
    K[0, 0] = 99
    write_intrinsics(rooms / "2D" / "intrinsic" / "b.txt", K)
    source = frames(rooms, hw=(48, 64))
    assert source.K(1)[0, 0] == pytest.approx(99) and source.K(0)[0, 0] == pytest.approx(
        standard_intrinsics((48, 64))[0, 0]
    )
    np.testing.assert_allclose(
        frames(rooms, hw=(48, 64), intrinsics="standard").K(1),
        standard_intrinsics((48, 64)),
        atol=1e-9,
    )
    write_intrinsics(rooms / "train" / "a" / "intrinsic_depth.txt", K)
    assert frames(rooms).K(0)[0, 0] == pytest.approx(99 / 2)


def test_no_intrinsics_is_an_error_unless_asked_for(rooms):
    (rooms / "2D" / "intrinsics.txt").unlink()
    refuses(lambda: read_views(frames(rooms), 0), "2D/intrinsics.txt", "--intrinsics standard")
    with pytest.raises(FileNotFoundError) as info:
        quiet(lambda: read_views(frames(rooms), 0))
    (rooms / "2D" / "intrinsics.txt").write_text(
        str(info.value).rsplit(": ", 1)[1]
    )  # what it says to write can be read
    np.testing.assert_allclose(frames(rooms).K(0), standard_intrinsics(HW), rtol=1e-5)
    (rooms / "2D" / "intrinsics.txt").unlink()
    np.testing.assert_allclose(frames(rooms, intrinsics="standard").K(0), standard_intrinsics(HW))
    refuses(
        lambda: frames(rooms, intrinsics="guess"),
        "intrinsics: expected one of files, standard, got 'guess'",
    )


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "9 or 16"),
        ("1 2 3", "9 or 16"),
        ("-577 0 319.5 0 577 239.5 0 0 1", "expected"),
        ("a b", "other text"),
        ("nan " * 9, "finite"),
        ("577 0 319.5 0 577 239.5 0 0 1", "another size"),
    ],
)
def test_error_intrinsics(rooms, text, word):
    (rooms / "2D" / "intrinsics.txt").write_text(text)
    refuses(lambda: read_views(frames(rooms), 0), "intrinsics.txt", word)


def test_scaling_twice_is_scaling_once():
    K = np.array([[500.0, 0, 311], [0, 510, 233], [0, 0, 1]])
    np.testing.assert_allclose(
        scale_intrinsics(scale_intrinsics(K, (480, 640), (90, 70)), (90, 70), (33, 44)),
        scale_intrinsics(K, (480, 640), (33, 44)),
    )


# ---- frames that are skipped


def test_skipped_frames_are_counted_and_said_once(copy):
    at = lambda kind, name: copy / "2D" / kind / "box0000_00" / name
    at("pose", "0.txt").write_text(" ".join(["-inf"] * 16))
    at("pose", "20.txt").write_text(" ".join(["nan"] * 16))
    at("pose", "40.txt").write_text("2 0 0 0 0 2 0 0 0 0 2 0 0 0 0 1")
    at("pose", "60.txt").write_text("1 0 0")
    at("color", "80.jpg").unlink()
    at("depth", "100.png").unlink()
    at("depth", "120.png").write_bytes(at("depth", "120.png").read_bytes()[:60])
    at("color", "140.jpg").write_bytes(b"no image")
    Image.fromarray(np.zeros(HW, np.uint16)).save(at("depth", "160.png"))
    Image.fromarray(np.full(HW, 50, np.uint16)).save(
        at("depth", "180.png")
    )  # up to 5 cm counts as missing
    (at("color", "thumbs.db")).write_text("")
    with pytest.warns(UserWarning) as said:
        source = frames(copy)
        assert source.frames(0) == [200, 220] == source.frames(0)
    assert source.skipped == {
        "pose is not finite": 2,
        "pose is not a rigid 4 x 4 matrix": 2,
        "no color file": 1,
        "no depth file": 1,
        "depth does not decode": 1,
        "color does not decode": 1,
        "depth is empty": 2,
    }
    assert len(said) == 7 and all(
        "\n" not in str(w.message) and str(copy) in str(w.message) for w in said
    )
    refuses(lambda: source.view(0, 40), "expected one of the 2 usable frames of box0000_00")
    assert len(source.world_to_cam(0)) == 2 and len(read_views(source, 0)) == 2


def test_a_scene_is_looked_at_without_decoding(rooms, monkeypatch):
    "Poses and headers say which frames can be used; pixels are decoded when they are shown."
    decoded = []
    for name in ("read_color", "read_depth"):
        monkeypatch.setattr(
            scannet,
            name,
            lambda *args, read=getattr(scannet, name): decoded.append(args[-1]) or read(*args),
        )
    source = frames(rooms)
    assert (
        len(source.frames(0)) == len(source.world_to_cam(0)) == 6
        and source.K(0) is not None
        and not decoded
    )
    source.view(0, 20)
    assert sorted(Path(p).name for p in decoded) == ["20.jpg", "20.png"]
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(
        rooms / "2D" / "depth" / "b" / "20.png"
    )  # so small that it must be decoded to know
    assert len(quiet(lambda: source.frames(1))) == 5 and len(decoded) == 3


@pytest.mark.parametrize("kind, name", [("depth", "40.png"), ("color", "40.png")])
def test_error_an_image_that_breaks_in_the_middle(rooms, kind, name):
    "Headers do not show it; the error names the file."
    path = rooms / "2D" / kind / "a" / name
    if kind == "color":
        (path.parent / "40.jpg").unlink()
        Image.fromarray(
            np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8)
        ).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(60) + data[len(data) // 2 + 60 :])
    source = frames(rooms)
    assert 40 in source.frames(0) and not source.skipped
    refuses(
        lambda: source.view(0, 40), path, "expected a", "without this file its frame is skipped"
    )
    path.unlink()
    refuses(lambda: source.view(0, 40), path, kind=FileNotFoundError)
    assert 40 not in quiet(lambda: frames(rooms).frames(0))


def test_reasons_do_not_depend_on_the_folders_name(copy, tmp_path_factory):
    root = tmp_path_factory.mktemp("x") / "color"
    shutil.copytree(copy, root)
    path = root / "2D" / "depth" / "box0000_00" / "40.png"
    path.write_bytes(path.read_bytes()[:60])
    source = frames(root)
    quiet(lambda: source.frames(0))
    assert source.skipped == {"depth does not decode": 1}


def test_png_beside_jpg_is_left_alone(copy):
    folder = copy / "2D" / "color" / "box0000_00"
    for n in range(0, 240, 20):
        Image.fromarray(np.zeros((*HW, 3), np.uint8)).save(folder / f"{n}.png")
    source = frames(copy, cache_bytes=0)
    assert all(source.view(0, n).rgb.mean() > 20 for n in source.frames(0))


def test_a_scene_without_usable_frames(copy):
    for p in (copy / "2D" / "pose" / "box0000_00").iterdir():
        p.write_text(" ".join(["inf"] * 16))
    source = frames(copy)
    assert quiet(lambda: source.frames(0)) == [] and source.skipped["pose is not finite"] == 12
    refuses(lambda: read_views(source, 0), "box0000_00", "found 0 usable")
    refuses(
        lambda: ViewSamples(source, n_ref=8, n_target=8, max_gap=5),
        "at least 2 usable views",
        "found none among 1: box0000_00",
    )


# ---- errors


def test_error_missing_folders(rooms, tmp_path):
    refuses(
        lambda: frames(tmp_path / "nowhere"),
        "nowhere",
        "<scene>/coord.npy",
        "scan-net.org",
        kind=FileNotFoundError,
    )
    refuses(
        lambda: frames(rooms, split="tset"), "tset", "holds 2D, train, val", kind=FileNotFoundError
    )
    refuses(lambda: frames(rooms, scenes=["zzz"]), "zzz")
    shutil.rmtree(rooms / "2D" / "depth" / "a")
    refuses(lambda: frames(rooms).frames(0), "2D/depth/a", kind=FileNotFoundError)
    assert len(frames(rooms).array(0, "coord"))  # the cloud needs no frames


def test_what_is_not_there(copy):
    refuses(
        lambda: frames(copy, split="val"),
        copy / "val",
        "expected one folder a scene",
        kind=FileNotFoundError,
    )
    refuses(lambda: frames(copy, scenes=["x"]), "scenes: expected some of the 1", "'x'")
    refuses(lambda: frames(copy, resample="guess"), "resample: expected")
    refuses(lambda: frames(copy, hw=(0, 4)), "hw: expected")
    refuses(lambda: frames(copy, depth_scale=0), "depth_scale: expected")
    refuses(lambda: frames(copy).view(0, 7), "frame: expected one of the 12")
    (copy / "train" / ".DS_Store").write_text("")
    assert frames(copy).scenes == ["box0000_00"]
    shutil.rmtree(copy / "2D" / "pose")
    refuses(
        lambda: frames(copy).frames(0), copy / "2D" / "pose" / "box0000_00", kind=FileNotFoundError
    )
    (copy / "train" / "box0000_00" / "coord.npy").unlink()
    refuses(
        lambda: frames(copy).rows(0),
        copy / "train" / "box0000_00" / "coord.npy",
        kind=FileNotFoundError,
    )


@pytest.mark.parametrize(
    "name, array, word",
    [
        ("coord", np.zeros((0, 3)), "empty cloud"),
        ("coord", np.zeros((4, 2)), "[n 3]"),
        ("coord", np.full((4, 3), np.nan), "12 that are not"),
        ("color", np.zeros((4, 3)), "as in coord.npy"),
        ("color", None, "0..255"),
        ("normal", np.zeros(7), "as in coord.npy"),
        ("segment20", np.zeros(3), "as in coord.npy"),
        ("coord", np.zeros(5), "[n 3], found [5]"),
        ("coord", np.array([[0, 0, np.inf]]), "1 that are not"),
        ("instance", np.zeros((5, 2)), "found [5, 2]"),
        ("coord", np.array([["a", "b", "c"]]), "finite numbers"),
        ("coord", b"no array", "does not load"),
        ("coord", b"", "coord"),
        ("coord", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortr", "coord"),
    ],
)
def test_error_cloud(rooms, name, array, word):
    path = rooms / "train" / "a" / f"{name}.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    else:
        np.save(path, np.load(path) * 3.0 if array is None else array)
    refuses(lambda: frames(rooms, labels=20).rows(0), f"{name}.npy", word)


@pytest.mark.parametrize(
    "low, high, text",
    [(-1, 1, "0..255, found -1"), (0, 300, "found 0"), (0, 1.2, "fractions up to 1.2")],
)
def test_colours_out_of_range(copy, low, high, text):
    folder = copy / "train" / "box0000_00"
    np.save(
        folder / "color.npy",
        np.linspace(low, high, 3 * len(np.load(folder / "coord.npy"))).reshape(-1, 3),
    )
    refuses(lambda: frames(copy).array(0, "color"), folder / "color.npy", text)
    refuses(
        lambda: write_cloud(copy, "train", "b", color=np.array([[0, 0, 256]])),
        "write_cloud: color: expected colours in 0..255",
    )


def test_colours_as_fractions_are_read_as_bytes(copy):
    folder = copy / "train" / "box0000_00"
    fractions = np.linspace(0, 0.9, 3 * len(np.load(folder / "coord.npy"))).reshape(-1, 3)
    np.save(folder / "color.npy", fractions)
    assert np.array_equal(frames(copy).array(0, "color"), np.round(255 * fractions))


def test_labels_may_be_a_column_and_optional_files_absent(rooms):
    path = rooms / "train" / "a" / "segment20.npy"
    labels = np.load(path)
    np.save(path, labels[:, None])
    assert np.array_equal(frames(rooms).array(0, "segment20"), labels)
    (rooms / "train" / "a" / "normal.npy").unlink()
    assert "normal" not in frames(rooms).rows(0)
    refuses(
        lambda: frames(rooms).array(0, "normal"),
        "normal.npy",
        "found none",
        "leave out the features",
        kind=FileNotFoundError,
    )
    refuses(
        lambda: ViewSamples(frames(rooms), max_gap=5, features=("normal",))[0],
        "a: features: expected a cloud with normal",
    )
    assert (
        ViewSamples(frames(rooms), n_ref=1, n_target=1, max_gap=5, features=("color",))[
            0
        ].points.feat.shape[1]
        == 3
    )


@pytest.mark.parametrize("hw, word", [((48, 48), "proportions"), ((24, 32), "other frames")])
def test_error_size_of_depth(rooms, hw, word):
    Image.fromarray(np.full(hw, 900, np.uint16)).save(rooms / "2D" / "depth" / "a" / "20.png")
    refuses(lambda: frames(rooms).frames(0), "2D/depth/a/20.png", word)


def test_depth_of_another_size_than_colour_is_fine(rooms):
    for p in (rooms / "2D" / "depth" / "a").iterdir():
        Image.fromarray(np.array(Image.open(p))[::2, ::2]).save(p)
    write_intrinsics(rooms / "2D" / "intrinsic" / "a.txt", standard_intrinsics((24, 32)))
    source = frames(rooms)
    assert len(source.frames(0)) == 6
    np.testing.assert_allclose(source.K(0), standard_intrinsics(HW))


def test_error_depth_of_eight_bits(rooms):
    Image.fromarray(np.full((48, 64), 9, np.uint8)).save(rooms / "2D" / "depth" / "a" / "20.png")
    refuses(lambda: frames(rooms).frames(0), "2D/depth/a/20.png", "16 bits", "mode L")


# ---- raw scans


def write_film(path, n=7, hw=HW, color_hw=HW, version=4, inf=()):
    "The box room in ScanNet's binary layout."
    K, where = (
        lambda hw: (
            np.pad(standard_intrinsics(hw) - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]], (0, 1))
            + np.diag([0, 0, 0, 1.0])
        ),
        [],
    )
    with open(path, "wb") as f:
        f.write(
            struct.pack("<IQ9s", version, 9, b"StructSen")
            + np.stack([K(color_hw), np.eye(4), K(hw), np.eye(4)]).astype("<f4").tobytes()
        )
        f.write(struct.pack("<2i4IfQ", 2, 1, color_hw[1], color_hw[0], hw[1], hw[0], 1000.0, n))
        for k, p in enumerate(box_cameras(n)):
            jpeg, packed = (
                io.BytesIO(),
                zlib.compress(
                    np.round(box_frame(p, standard_intrinsics(hw), hw)[1] * 1000)
                    .astype("<u2")
                    .tobytes()
                ),
            )
            Image.fromarray(box_frame(p, standard_intrinsics(color_hw), color_hw)[0]).save(
                jpeg, "JPEG", quality=95
            )
            if k in inf:
                p = np.full((4, 4), -np.inf)
            where.append(
                (
                    f.tell(),
                    f.tell() + 96,
                    f.tell() + 96 + len(jpeg.getvalue()),
                    f.tell() + 96 + len(jpeg.getvalue()) + len(packed),
                )
            )
            f.write(
                p.astype("<f4").tobytes()
                + struct.pack("<4Q", 0, 0, len(jpeg.getvalue()), len(packed))
                + jpeg.getvalue()
                + packed
            )
    return where  # of each frame: its start, its colour, its depth, its end


def write_scan(root, scene="scene0000_00", n_frames=41, hw=(24, 32), color_hw=(48, 64), inf=()):
    "A raw scene in ScanNet's binary layout."
    folder = root / scene
    folder.mkdir(parents=True)
    write_film(folder / f"{scene}.sens", n_frames, hw, color_hw, inf=inf)
    cloud = box_cloud(0.5)
    vertex = np.array(
        [(*p, *c, 255) for p, c in zip(cloud["coord"], cloud["color"])],
        dtype=[(k, "f4") for k in "xyz"] + [(k, "u1") for k in ("red", "green", "blue", "alpha")],
    )
    face = np.array([([0, 1, 2],)], dtype=[("vertex_indices", "i4", (3,))])
    PlyData([PlyElement.describe(vertex, "vertex"), PlyElement.describe(face, "face")]).write(
        str(folder / f"{scene}_vh_clean_2.ply")
    )
    nyu = np.array([1, 2, 0, 0, 0, 0, 7])[cloud["segment20"]]
    PlyData(
        [PlyElement.describe(np.array([(k,) for k in nyu], dtype=[("label", "u2")]), "vertex")]
    ).write(str(folder / f"{scene}_vh_clean_2.labels.ply"))
    (folder / f"{scene}.aggregation.json").write_text(
        json.dumps(dict(segGroups=[dict(objectId=0, segments=[5])]))
    )
    (folder / f"{scene}_vh_clean_2.0.010000.segs.json").write_text(
        json.dumps(dict(segIndices=np.where(cloud["segment20"] == 6, 5, 4).tolist()))
    )
    (folder / f"{scene}.txt").write_text(
        "numDepthFrames = 41\naxisAlignment = 0 -1 0 2 1 0 0 3 0 0 1 0 0 0 0 1 \n"
    )
    return cloud


def convert(tmp_path, **options):
    out = convert_scans(
        tmp_path / "scans", tmp_path / "out", **dict(split="train", hw=HW, progress=False) | options
    )
    return ScanNetFrames(out, split="train", hw=HW)


def mesh(folder, faces=((0, 1, 2), (0, 2, 3)), labels=(1, 5, 5, 40), name="a"):
    xyz = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=np.float32)
    vertex = np.array(
        [(*p, 10, 20, 30) for p in xyz],
        dtype=[(k, "f4") for k in "xyz"] + [(k, "u1") for k in ("red", "green", "blue")],
    )
    parts = [PlyElement.describe(vertex, "vertex")]
    if faces:
        parts.append(
            PlyElement.describe(
                np.array([(list(f),) for f in faces], dtype=[("vertex_indices", "i4", (3,))]),
                "face",
            )
        )
    PlyData(parts).write(str(folder / f"{name}_vh_clean_2.ply"))
    if labels:
        PlyData(
            [
                PlyElement.describe(
                    np.array([(l,) for l in labels], dtype=[("label", "u2")]), "vertex"
                )
            ]
        ).write(str(folder / f"{name}_vh_clean_2.labels.ply"))


def instances(folder, segments, name="a"):
    (folder / f"{name}.aggregation.json").write_text(
        json.dumps(
            dict(segGroups=[dict(objectId=0, segments=[7]), dict(objectId=4, segments=[9, 3])])
        )
    )
    (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(
        json.dumps(dict(segIndices=segments))
    )


@pytest.fixture()
def scan(tmp_path):
    folder = tmp_path / "scans" / "a"
    folder.mkdir(parents=True)
    return folder, write_film(folder / "a.sens")


def film(path, **options):
    with open(path, "rb") as f:
        header = read_sens_header(f, "a.sens")
        return header, list(read_sens_frames(f, header, **options))


def test_header_and_frames_of_a_film(scan):
    folder, _ = scan
    header, all_frames = film(folder / "a.sens", every=1)
    assert header[1:] == (HW, HW, 1000.0, 7)
    np.testing.assert_allclose(header.intrinsics, standard_intrinsics(HW), rtol=1e-6)
    assert [n for n, *_ in all_frames] == list(range(7))
    for every, want in ((3, [0, 3, 6]), (20, [0])):
        some = film(folder / "a.sens", every=every)[1]
        assert [n for n, *_ in some] == want
        for n, jpeg, depth, pose in some:
            assert jpeg == all_frames[n][1]
            np.testing.assert_array_equal(depth, all_frames[n][2])
            np.testing.assert_allclose(pose, box_cameras(7)[n], atol=1e-6)
            np.testing.assert_allclose(
                depth / 1000,
                box_frame(box_cameras(7)[n], standard_intrinsics(HW), HW)[1],
                atol=6e-4,
            )
    write_film(folder / "b.sens", n=2, color_hw=(48, 64))
    with open(folder / "b.sens", "rb") as f:
        assert read_sens_header(f)[1:3] == ((48, 64), HW) and not f.seek(0)
        assert (
            len(list(read_sens_frames(f, read_sens_header(f), every=1))) == 2 and not f.read()
        )  # to the last byte
    refuses(lambda: film(folder / "a.sens", every=0), "every: expected at least 1")


@pytest.mark.parametrize("cut", ["empty", "version", "header", "pose", "color", "depth"])
def test_a_film_that_is_cut_off(scan, cut):
    folder, where = scan
    start, color, depth, end = where[2]
    size = dict(empty=0, version=3, header=200, pose=start + 50, color=color + 9, depth=end - 1)[
        cut
    ]
    with open(folder / "a.sens", "r+b") as f:
        f.truncate(size)
    refuses(
        lambda: film(folder / "a.sens", every=1, name="a.sens"),
        "a.sens",
        *(() if size <= 200 else ("frame 2",)),
        "cut off",
    )


def test_a_film_that_is_damaged(scan):
    folder, where = scan
    content = (folder / "a.sens").read_bytes()
    start, color, depth, end = where[0]

    def damaged(at, new):
        (folder / "a.sens").write_bytes(content[:at] + new + content[at + len(new) :])
        return lambda: film(folder / "a.sens", every=1, name="a.sens")

    refuses(damaged(0, struct.pack("<I", 3)), "a.sens: expected version 4", "found 3")
    refuses(damaged(depth, bytes(9)), "a.sens, frame 0: expected depth of 32 x 24")
    refuses(damaged(color - 8, struct.pack("<Q", 2**62)), "a.sens, frame 0", "damaged")
    refuses(damaged(4, struct.pack("<Q", 2**40)), "a.sens", "damaged")
    refuses(
        damaged(21 + 256, struct.pack("<2i", 0, 1)), "a.sens: expected JPEG colour and zlib depth"
    )
    refuses(damaged(21 + 256 + 24, struct.pack("<f", 0)), "a.sens: expected", "0 a metre")
    refuses(damaged(21 + 256 + 28, struct.pack("<Q", 0)), "a.sens: expected at least one frame")
    good = zlib.compress(bytes(10))
    refuses(damaged(depth, good), "a.sens, frame 0: expected depth of 32 x 24")


def test_converted_scan_reads_as_the_preprocessed_layout(tmp_path):
    cloud = write_scan(tmp_path / "scans", inf=(20,))
    source = convert(tmp_path, every=10)
    assert (
        quiet(lambda: source.frames(0)) == [0, 10, 30, 40]
        and source.skipped["pose is not finite"] == 1
    )
    np.testing.assert_allclose(source.array(0, "coord"), cloud["coord"], atol=1e-6)
    for name in ("color", "segment20", "instance"):
        assert np.array_equal(source.array(0, name), cloud[name]), name
    np.testing.assert_allclose(source.K(0), standard_intrinsics(HW), atol=1e-4)
    views = read_views(source, 0)
    p = unproject(views.depth, views.camera)[0].reshape(-1, 3).numpy()
    assert np.maximum(p - BOX, -p).max() < 3e-3  # on the walls: depth, poses and K agree


def test_scans_into_the_layout(scan):
    folder, _ = scan
    write_film(folder / "a.sens", inf=(4,))
    mesh(folder)
    instances(folder, [7, 9, 3, 8])
    out = convert_scans(folder.parent, folder.parent.parent / "out", split="train", every=2, hw=HW)
    source = frames(out)
    assert quiet(lambda: source.frames(0)) == [0, 2, 6] and source.skipped == {
        "pose is not finite": 1
    }
    rows = source.rows(0)
    for name in ("segment20", "instance"):
        np.testing.assert_array_equal(source.array(0, name), [0, 4, 4, -1])
    np.testing.assert_array_equal(rows["normal"], [[0, 0, 1]] * 4)
    np.testing.assert_array_equal(rows["color"], [[10, 20, 30]] * 4)
    np.testing.assert_allclose(source.K(0), standard_intrinsics(HW), rtol=1e-6)
    np.testing.assert_allclose(
        source.view(0, 6).depth,
        box_frame(box_cameras(7)[6], standard_intrinsics(HW), HW)[1],
        atol=6e-4,
    )
    at = source.frames(0).index(6)
    np.testing.assert_allclose(
        np.linalg.inv(source.world_to_cam(0)[at]), box_cameras(7)[6], atol=1e-6
    )
    half = frames(
        convert_scans(
            folder.parent,
            folder.parent.parent / "half",
            split=dict(val=["a"]),
            every=2,
            hw=(12, 16),
        ),
        split="val",
        hw=(12, 16),
    )
    np.testing.assert_allclose(
        quiet(lambda: half.K(0)),
        scale_intrinsics(standard_intrinsics(HW), HW, (12, 16)),
        rtol=1e-6,
    )
    refuses(
        lambda: convert_scans(folder.parent, out, split=dict(val=["b"])),
        folder.parent / "b",
        kind=FileNotFoundError,
    )
    refuses(lambda: convert_scans(out, out, split="val"), out, "found none", kind=FileNotFoundError)


def test_aligned_scan_is_the_same_room(tmp_path):
    write_scan(tmp_path / "scans")
    plain = convert(tmp_path)
    turned = ScanNetFrames(
        convert_scans(
            tmp_path / "scans",
            tmp_path / "turned",
            split="train",
            hw=HW,
            align=True,
            progress=False,
        ),
        split="train",
        hw=HW,
    )
    xyz = [torch.from_numpy(s.array(0, "coord")) for s in (plain, turned)]
    uv, uv_turned = (
        project(x, torch.zeros(len(x), dtype=torch.long), read_views(s, 0, [20]).camera)
        for x, s in zip(xyz, (plain, turned))
    )
    seen = uv[2][0]
    assert (
        seen.sum() > 20
        and (uv[0] - uv_turned[0])[0, seen].abs().max() < 1e-3
        and (xyz[0] - xyz[1]).abs().max() > 1
    )
    (tmp_path / "scans" / "scene0000_00" / "scene0000_00.txt").write_text("sceneType = Box\n")
    refuses(
        lambda: convert_scans(
            tmp_path / "scans", tmp_path / "again", split="train", hw=HW, align=True, progress=False
        ),
        "scene0000_00.txt",
        "axisAlignment",
    )


def test_conversion_goes_on_where_it_stopped(tmp_path):
    write_scan(tmp_path / "scans")
    write_scan(tmp_path / "scans", "scene0001_00", n_frames=3)
    source = convert(tmp_path, split=dict(train=["scene0000_00"], val=["scene0001_00"]))
    assert (
        source.scenes == ["scene0000_00"] and len(ScanNetFrames(tmp_path / "out", split="val")) == 1
    )
    done = (tmp_path / "out" / "val" / "scene0001_00" / "coord.npy").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "out" / "train")
    convert(tmp_path, split=dict(train=["scene0000_00"], val=["scene0001_00"]))
    assert (tmp_path / "out" / "val" / "scene0001_00" / "coord.npy").stat().st_mtime_ns == done
    refuses(
        lambda: convert(tmp_path, split=dict(train=["scene0009_00"])),
        "scene0009_00",
        kind=FileNotFoundError,
    )


def test_conversion_goes_on_after_a_cut_film(scan):
    folder, where = scan
    mesh(folder)
    shutil.copytree(folder, folder.parent / "0first")
    for p in list((folder.parent / "0first").iterdir()):
        p.rename(p.with_name(p.name.replace("a", "0first", 1)))
    content, out = (folder / "a.sens").read_bytes(), folder.parent.parent / "out"
    (folder / "a.sens").write_bytes(content[: where[4][1] + 5])
    go = lambda: convert_scans(folder.parent, out, split="train", every=2, hw=HW)
    refuses(go, folder / "a.sens", "frame 4", "cut off")
    assert not (out / "train" / "a" / "coord.npy").exists()
    done = out / "2D" / "pose" / "0first" / "0.txt"
    done.write_text("this scene was complete")
    (folder / "a.sens").write_bytes(content)
    go()
    assert (
        frames(out, scenes=["a"]).frames(0) == [0, 2, 4, 6]
        and done.read_text() == "this scene was complete"
    )


def test_a_film_with_a_broken_image(scan):
    folder, where = scan
    mesh(folder)
    content = bytearray((folder / "a.sens").read_bytes())
    content[where[0][1] : where[0][1] + 20] = bytes(20)
    (folder / "a.sens").write_bytes(content)
    refuses(
        lambda: convert_scans(folder.parent, folder.parent / "out", split="train", hw=HW),
        folder / "a.sens",
        "frame 0",
    )


def test_a_cloud_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    "Stopped while coord.npy is written: the next conversion writes the scene again."
    write_scan(tmp_path / "scans", n_frames=3)
    save = np.save

    def stop(file, array):
        if "coord" not in str(getattr(file, "name", file)):
            return save(file, array)
        with open(file, "wb") if isinstance(file, (str, Path)) else file as f:
            f.write(b"\x93NUMPY")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", stop)
        convert(tmp_path)
    assert not (tmp_path / "out" / "train" / "scene0000_00" / "coord.npy").exists()
    assert len(convert(tmp_path).array(0, "coord")) == len(box_cloud(0.5)["coord"])
    assert not list((tmp_path / "out").rglob("*.part"))


def test_nothing_of_a_truncated_film_looks_complete(tmp_path):
    write_scan(tmp_path / "scans", n_frames=3)
    path = tmp_path / "scans" / "scene0000_00" / "scene0000_00.sens"
    path.write_bytes(path.read_bytes()[:1500])
    refuses(lambda: convert(tmp_path, every=1), "scene0000_00.sens", "cut off")
    assert not (tmp_path / "out" / "train").exists()


def test_error_files_of_a_raw_scene(tmp_path):
    refuses(lambda: convert(tmp_path), "scans", "found none", kind=FileNotFoundError)
    write_scan(tmp_path / "scans", n_frames=1)
    folder = tmp_path / "scans" / "scene0000_00"
    labels = folder / "scene0000_00_vh_clean_2.labels.ply"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:120])
    refuses(lambda: convert(tmp_path), "labels.ply")
    labels.unlink()
    (folder / "scene0000_00.aggregation.json").write_text("{")
    refuses(lambda: convert(tmp_path), "aggregation.json")
    (folder / "scene0000_00.aggregation.json").unlink()
    source = convert(tmp_path)
    assert set(source.rows(0)) == {"xyz", "color", "normal"}
    assert not any(
        source.has(0, k) for k in ("segment20", "segment200", "instance")
    )  # a test scene
    mesh = folder / "scene0000_00_vh_clean_2.ply"
    mesh.write_bytes(mesh.read_bytes()[:300])
    shutil.rmtree(tmp_path / "out")
    refuses(lambda: convert(tmp_path), "vh_clean_2.ply")
    mesh.unlink()
    refuses(lambda: convert(tmp_path), "vh_clean_2.ply", kind=FileNotFoundError)


def test_meshes(tmp_path):
    refuses(
        lambda: read_mesh(tmp_path / "a_vh_clean_2.ply"),
        tmp_path / "a_vh_clean_2.ply",
        kind=FileNotFoundError,
    )
    mesh(tmp_path, faces=None, labels=None)
    try:
        flat = read_mesh(tmp_path / "a_vh_clean_2.ply")
    except ValueError as problem:
        assert "a_vh_clean_2.ply: expected triangles" in str(problem)
    else:
        assert not flat["normal"].any()
    mesh(tmp_path, faces=((0, 1, 9),))
    refuses(
        lambda: read_mesh(tmp_path / "a_vh_clean_2.ply"),
        "a_vh_clean_2.ply: expected triangles of vertices 0..3",
    )
    mesh(tmp_path)
    path = tmp_path / "a_vh_clean_2.ply"
    path.write_bytes(path.read_bytes()[:-9])
    refuses(lambda: read_mesh(path), path)
    path.write_text("no mesh")
    refuses(lambda: read_mesh(path), path)


def test_labels_of_a_scan(tmp_path):
    assert read_labels(tmp_path, "a", 4) == {}
    mesh(tmp_path)
    instances(tmp_path, [7, 9, 3, 8])
    assert {k: v.tolist() for k, v in read_labels(tmp_path, "a", 4).items()} == dict(
        segment20=[0, 4, 4, -1], instance=[0, 4, 4, -1]
    )
    instances(tmp_path, [7, 9, 3])
    refuses(
        lambda: read_labels(tmp_path, "a", 4), tmp_path, "expected 4 labels", "found 3 for instance"
    )
    (tmp_path / "a.aggregation.json").write_text("{")
    refuses(lambda: read_labels(tmp_path, "a", 4), "a.aggregation.json", "expected")
    (tmp_path / "a.aggregation.json").unlink()
    refuses(
        lambda: read_labels(tmp_path, "a", 5),
        tmp_path,
        "expected 5 labels",
        "found 4 for segment20",
    )
    (tmp_path / "a_vh_clean_2.labels.ply").write_text("ply")
    refuses(lambda: read_labels(tmp_path, "a", 4), "a_vh_clean_2.labels.ply")


def table(folder, rows):
    (folder / "labels.tsv").write_text("\n".join("\t".join(map(str, row)) for row in rows) + "\n")
    return folder / "labels.tsv"


def test_classes_by_the_names_of_instances(tmp_path):
    mesh(tmp_path)
    instances(tmp_path, [7, 9, 3, 8])
    groups = [
        dict(objectId=0, label="table", segments=[7, 9]),
        dict(objectId=1, label="office chair", segments=[9, 3]),
        dict(objectId=2, label="unheard of", segments=[8]),
    ]
    (tmp_path / "a.aggregation.json").write_text(json.dumps(dict(segGroups=groups)))
    known = scannet_labels(200).ids
    path = table(
        tmp_path,
        [
            ("id", "raw_category", "nyu40id"),
            (known[4], "table", 7),
            (known[1], "office chair", 5),
            (known[9], "office chair", 1),
            (9999, "lint", 40),
            ("", "blank", ""),
        ],
    )
    categories = read_categories(path)
    assert categories == {
        "table": (6, 4),
        "office chair": (4, 1),
        "lint": (-1, -1),
        "blank": (-1, -1),
    }
    found = read_labels(
        tmp_path, "a", 4, categories
    )  # the later of two instances has the vertex that both claim
    assert {k: v.tolist() for k, v in found.items()} == dict(
        segment20=[6, 4, 4, -1], instance=[0, 1, 1, 2], segment200=[4, 1, 1, -1]
    )
    refuses(
        lambda: read_categories(tmp_path / "none.tsv"), "none.tsv", "scannetv2-labels.combined.tsv"
    )
    refuses(lambda: read_categories(table(tmp_path, [("id", "name")])), "labels.tsv")
    refuses(lambda: read_categories(table(tmp_path, [("id", "name"), (1, "wall")])), "raw_category")


def test_clouds_alone_by_the_lists_of_the_benchmark(tmp_path):
    for scene in ("a", "b", "c"):
        (tmp_path / "scans" / scene).mkdir(parents=True)
        mesh(tmp_path / "scans" / scene)
        for path in list((tmp_path / "scans" / scene).iterdir()):
            path.rename(path.with_name(path.name.replace("a_vh", f"{scene}_vh")))
    (tmp_path / "scannetv2_train.txt").write_text("a\nb\n")
    (tmp_path / "scannetv2_val.txt").write_text("c\n")
    lists = dict(train=tmp_path / "scannetv2_train.txt", val=str(tmp_path / "scannetv2_val.txt"))
    out = convert_scans(
        tmp_path / "scans", tmp_path / "out", split=lists, frames=False, progress=False
    )
    assert sorted(p.relative_to(out).as_posix() for p in out.glob("*/*")) == [
        "train/a",
        "train/b",
        "val/c",
    ]
    refuses(
        lambda: convert_scans(tmp_path / "scans", out, split=lists, progress=False),
        "<scene>.sens",
        "found none",
    )
    refuses(
        lambda: convert_scans(
            tmp_path / "scans",
            out,
            split=dict(test=tmp_path / "scannetv2_test.txt"),
            frames=False,
            progress=False,
        ),
        "scannetv2_test.txt",
        "a list of scenes",
    )
    for scene in ("a", "b", "c"):
        (tmp_path / "scans" / scene / f"{scene}.sens").touch()
    refuses(
        lambda: convert_scans(
            tmp_path / "scans", tmp_path / "none", split=lists, every=0, progress=False
        ),
        "a.sens",
    )  # 0 is not "no frames"


def test_the_twenty_classes():
    assert scannet20(np.arange(41)).tolist() == [
        -1,
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
        -1,
        12,
        -1,
        13,
    ] + [-1] * 7 + [14, -1, -1, -1, 15] + [-1] * 4 + [16, 17, -1, 18, -1, -1, 19, -1]


def test_normals_of_a_closed_mesh_point_outwards():
    corners = np.array(
        [[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=np.float32
    )
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    normal = vertex_normals(
        corners, np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))])
    )
    assert ((corners - 0.5) * normal).sum(1).min() > 0.5 and np.allclose(
        np.linalg.norm(normal, axis=1), 1, atol=1e-6
    )
