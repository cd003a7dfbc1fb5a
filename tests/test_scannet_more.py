"""Rooms: damaged files and odd arguments, in the preprocessed layout and in raw scans."""
import io, json, pickle, shutil, struct, warnings, zipfile, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData, PlyElement
from safetensors.numpy import load_file

from unipre3d.data import scannet
from unipre3d.data.loaders import Room, SceneSamples
from unipre3d.data.scannet import (BLOCK, BOX, ScanNetFrames, as_posed_views, box_cameras, box_frame, convert_scans, nearest, read_labels, read_mesh,
                                   read_sens_frames, read_sens_header, scale_intrinsics, standard_intrinsics, write_box_rooms, write_cloud, write_frame,
                                   write_intrinsics)
from unipre3d.geometry.cameras import project, unproject

PARITY, HW = Path(__file__).parent / "parity", (24, 32)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    "Two training rooms and one to validate, 12 frames of 24 x 32; read only."
    return write_box_rooms(tmp_path_factory.mktemp("rooms"), n_frames=12, hw=HW, spacing=.2)


@pytest.fixture()
def copy(rooms, tmp_path):
    "A room that a test may damage."
    for part in ("train", "2D/color", "2D/depth", "2D/pose"): shutil.copytree(rooms / part / "box0000_00", tmp_path / part / "box0000_00") if part != "train" else shutil.copytree(rooms / part / "box0000_00", tmp_path / "train" / "box0000_00")
    shutil.copy(rooms / "2D" / "intrinsics.txt", tmp_path / "2D" / "intrinsics.txt")
    return tmp_path


def frames(root, **options): return ScanNetFrames(root, **dict(dict(split="train", hw=HW), **options))


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def refuses(action, *texts, kind=(ValueError, FileNotFoundError)):
    with pytest.raises(kind) as caught: action()
    message = str(caught.value)
    assert "\n" not in message and all(str(t) in message for t in texts), message


def same(a, b):
    pairs = [(a.points.xyz, b.points.xyz), (a.points.feat, b.points.feat), (a.points.batch, b.points.batch)]
    for v, w in ((a.ref, b.ref), (a.target, b.target)):
        pairs += [(v.rgb, w.rgb), (v.depth, w.depth), (v.camera.world_to_cam, w.camera.world_to_cam), (v.camera.K, w.camera.K), (v.camera.batch, w.camera.batch)]
    return all(torch.equal(x, y) for x, y in pairs)


# ---- against the released reader

@pytest.fixture(scope="module")
def released(tmp_path_factory):
    "The recorded frames in the layout, and what the released reader made of them."
    root, x = tmp_path_factory.mktemp("released"), load_file(PARITY / "cameras_scannet.safetensors")
    write_cloud(root, "train", "a", coord=x["in/moving_centers"][None])
    for k in range(2): write_frame(root, "a", k, x[f"in/color{k}_HWC"].astype(np.uint8), x[f"in/depth{k}_mm"], x["in/c2w_txt"][k])
    for k in range(2): Image.fromarray(x[f"in/color{k}_HWC"].astype(np.uint8)).save(root / "2D" / "color" / "a" / f"{k}.png"); (root / "2D" / "color" / "a" / f"{k}.jpg").unlink()
    return ScanNetFrames(root, split="train", hw=(120, 160), intrinsics="standard", resample="bicubic"), x


def test_released_intrinsics_half_a_pixel_apart(released):
    source, x = released
    ours = source.intrinsics(0).copy()
    ours[:2, 2] -= .5
    np.testing.assert_allclose(ours, x["out/link_intrinsic"][:3, :3], rtol=1e-6)


def test_released_depth_and_colour(released):
    source, x = released
    for k in range(2):
        depth = source.view(0, k).depth
        want = x["out/depth160x120"][k]
        np.testing.assert_allclose(depth, np.where(want > .05, want, 0), atol=1e-6)
    np.testing.assert_array_equal(source.view(0, 0).color.transpose(2, 0, 1), x["out/image160x120_255_first"])


def test_released_centred_poses(released):
    source, x = released
    pose = source.poses(0).copy()
    pose[:, :3, 3] -= x["in/moving_centers"]
    np.testing.assert_allclose(pose, x["out/c2w_centered"], atol=1e-5)
    view = as_posed_views(np.zeros((2, 4, 4, 3), np.uint8), np.ones((2, 4, 4)), pose, np.tile(np.eye(3), (2, 1, 1)), np.zeros(2, dtype=int))
    np.testing.assert_allclose(view.camera.world_to_cam, x["out/w2c"], atol=1e-5)
    np.testing.assert_allclose(view.camera.center, x["out/camera_center"], atol=1e-5)


def test_released_back_projection(released):
    source, x = released
    pose = source.poses(0).copy()
    pose[:, :3, 3] -= x["in/moving_centers"]
    views = as_posed_views(np.stack([source.view(0, k).color for k in range(2)]), np.stack([source.view(0, k).depth for k in range(2)]), pose,
                           np.tile(source.intrinsics(0), (2, 1, 1)), np.zeros(2, dtype=int))
    xyz, valid = unproject(views.depth, views.camera)
    want = x["out/unprojected_120x160x4"]
    np.testing.assert_array_equal(valid, want[..., 3] > 0)
    np.testing.assert_allclose(xyz[valid], want[..., :3][want[..., 3] > 0], atol=1e-5)


# ---- small arrays

@pytest.mark.parametrize("old, new", [((48, 64), (12, 16)), ((5, 5), (5, 5))])
def test_nearest_is_pillows(old, new):
    image = np.arange(old[0] * old[1], dtype=np.int32).reshape(old)
    np.testing.assert_array_equal(nearest(image, new), np.asarray(Image.fromarray(image).resize(new[::-1], Image.NEAREST)))


@pytest.mark.parametrize("text", ["", "1 2 3", "a b c d e f g h i", "nan 0 16 0 20 12 0 0 1", "-20 0 16 0 20 12 0 0 1", "20 0 160 0 20 12 0 0 1"])
def test_bad_intrinsics(text):
    refuses(lambda: scannet.read_intrinsics(text, HW, "here.txt"), "here.txt: expected")


def test_a_jpeg_is_averaged_over_areas():
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    image = np.kron(rng.integers(40, 200, (6, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    Image.fromarray(image).save(buffer, "JPEG", quality=98, subsampling=0)
    small, size = scannet.read_color(buffer.getvalue(), (6, 8))
    assert size == (96, 128) and np.abs(small.astype(int) - image[8::16, 8::16]).max() <= 4


# ---- the layout

def test_round_trip_and_types(rooms):
    source, made = frames(rooms), scannet.box_cloud(.2)
    rows = source.rows(0)
    assert {k: v.dtype for k, v in rows.items()} == dict(xyz=np.float32, color=np.uint8, normal=np.float32, segment20=np.int32, instance=np.int32)
    np.testing.assert_allclose(rows["xyz"], made["coord"], atol=1e-6)
    for name in ("color", "segment20", "instance"): np.testing.assert_array_equal(rows[name], made[name])
    assert len(source) == 2 and source.scene(1) == "box0001_00" and source.frames(0) == list(range(0, 240, 20))
    frame, pose = source.view(0, 40), box_cameras(12)[2]
    color, depth = box_frame(pose, standard_intrinsics(HW), HW)
    assert frame.color.dtype == np.uint8 and frame.depth.dtype == np.float32 and frame.pose.dtype == np.float64
    np.testing.assert_allclose(frame.depth, depth, atol=6e-4)
    np.testing.assert_allclose(frame.pose, pose, atol=1e-12)
    assert np.abs(frame.color.astype(int) - color).mean() < 6
    np.testing.assert_allclose(source.intrinsics(0), standard_intrinsics(HW), atol=1e-9)


def test_pixels_lie_on_the_surfaces(rooms):
    source = frames(rooms, hw=(12, 16))          # nearest pixels of 24 x 32: up to half a stored pixel beside the centre
    views = frames(rooms).views(0)
    xyz, valid = unproject(views.depth, views.camera)
    p = xyz[valid].numpy()
    wall = np.minimum(abs(p), abs(p - BOX)).min(1)
    block = np.where(((p > BLOCK[0] - .01) & (p < BLOCK[1] + .01)).all(1), np.minimum(abs(p - BLOCK[0]), abs(p - BLOCK[1])).min(1), 9)
    assert valid.all() and np.minimum(wall, block).max() < 5e-3
    np.testing.assert_allclose(source.intrinsics(0), np.diag([.5, .5, 1]) @ frames(rooms).intrinsics(0), atol=1e-9)


def test_zip_and_pickle_and_cache_change_nothing(copy, tmp_path_factory):
    archive = tmp_path_factory.mktemp("zip") / "rooms.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for p in copy.rglob("*.*"):
            if p.is_file(): z.write(p, p.relative_to(copy))
    plain = frames(copy)
    for other in (frames(archive), frames(copy, cache_bytes=0), pickle.loads(pickle.dumps(plain)), pickle.loads(pickle.dumps(frames(archive)))):
        assert other.frames(0) == plain.frames(0) and other.scenes == plain.scenes
        for a, b in zip(other.view(0, 60), plain.view(0, 60)): np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(other.array(0, "coord"), plain.array(0, "coord"))


def test_labels_are_optional(copy):
    folder = copy / "train" / "box0000_00"
    for name in ("segment20", "instance", "normal"): (folder / f"{name}.npy").unlink()
    source = frames(copy)
    assert set(source.rows(0)) == {"xyz", "color"} and not source.has(0, "normal")
    refuses(lambda: source.array(0, "normal"), folder / "normal.npy", "leave out the features", kind=FileNotFoundError)
    refuses(lambda: SceneSamples(source, features=("normal",))[0], "normal.npy", kind=FileNotFoundError)
    assert SceneSamples(source, n_ref=1, n_target=1, features=("color",))[0].points.feat.shape[1] == 3


def test_intrinsics_of_a_scene_come_first(copy):
    K = standard_intrinsics(HW)
    K[0, 0] *= 1.1
    write_intrinsics(copy / "2D" / "intrinsic" / "box0000_00.txt", K)
    np.testing.assert_allclose(frames(copy).intrinsics(0), K, atol=1e-9)
    np.testing.assert_allclose(frames(copy, intrinsics="standard").intrinsics(0), standard_intrinsics(HW), atol=1e-9)
    shutil.rmtree(copy / "2D" / "intrinsic")
    (copy / "2D" / "intrinsics.txt").rename(copy / "train" / "box0000_00" / "intrinsic_depth.txt")
    np.testing.assert_allclose(frames(copy).intrinsics(0), standard_intrinsics(HW), atol=1e-9)


def test_no_intrinsics(copy):
    (copy / "2D" / "intrinsics.txt").unlink()
    refuses(lambda: frames(copy).views(0), copy / "2D" / "intrinsics.txt", "intrinsics='standard'", kind=FileNotFoundError)
    assert len(frames(copy, intrinsics="standard").views(0)) == 12
    (copy / "2D" / "intrinsics.txt").write_text("1170 0 648 0 0 1170 484 0 0 0 1 0 0 0 0 1")
    refuses(lambda: frames(copy).views(0), copy / "2D" / "intrinsics.txt", "another size")


@pytest.mark.parametrize("name, array, text", [
    ("coord", np.zeros((5, 2)), "expected an array [n 3], found [5, 2]"),
    ("coord", np.zeros(5), "expected an array [n 3], found [5]"),
    ("coord", np.zeros((0, 3)), "empty cloud"),
    ("coord", np.full((5, 3), np.nan), "15 that are not"),
    ("coord", np.array([[0, 0, np.inf]]), "1 that are not"),
    ("coord", np.array([["a", "b", "c"]]), "expected finite numbers"),
    ("color", np.zeros((5, 3)), "as in coord.npy, found [5, 3]"),
    ("segment20", np.zeros(5), "as in coord.npy, found [5]"),
    ("instance", np.zeros((5, 2)), "found [5, 2]")])
def test_damaged_arrays(copy, name, array, text):
    path = copy / "train" / "box0000_00" / f"{name}.npy"
    np.save(path, array)
    refuses(lambda: frames(copy).rows(0), path, text)


@pytest.mark.parametrize("low, high, text", [(-1, 1, "0..255, found -1"), (0, 300, "found 0"), (0, .9, "fractions up to 0.9")])
def test_colours_out_of_range(copy, low, high, text):
    folder = copy / "train" / "box0000_00"
    np.save(folder / "color.npy", np.linspace(low, high, 3 * len(np.load(folder / "coord.npy"))).reshape(-1, 3))
    refuses(lambda: frames(copy).array(0, "color"), folder / "color.npy", text)
    refuses(lambda: write_cloud(copy, "train", "b", color=np.array([[0, 0, 256]])), "write_cloud: color: expected 0..255")


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortr"])
def test_files_that_do_not_load(copy, content):
    path = copy / "train" / "box0000_00" / "coord.npy"
    path.write_bytes(content)
    refuses(lambda: frames(copy).array(0, "coord"), path)


def test_what_is_not_there(copy):
    refuses(lambda: frames(copy / "nowhere"), copy / "nowhere", kind=FileNotFoundError)
    refuses(lambda: frames(copy, split="val"), copy / "val", "expected one folder a scene", kind=FileNotFoundError)
    refuses(lambda: frames(copy, scenes=["x"]), "scenes: expected some of the 1", "'x'")
    refuses(lambda: frames(copy, intrinsics="guess"), "intrinsics: expected")
    refuses(lambda: frames(copy, resample="guess"), "resample: expected")
    refuses(lambda: frames(copy, hw=(0, 4)), "hw: expected")
    refuses(lambda: frames(copy, depth_scale=0), "depth_scale: expected")
    refuses(lambda: frames(copy).view(0, 7), "frame: expected one of the 12")
    (copy / "train" / ".DS_Store").write_text("")
    assert frames(copy).scenes == ["box0000_00"]
    shutil.rmtree(copy / "2D" / "pose")
    refuses(lambda: frames(copy).frames(0), copy / "2D" / "pose" / "box0000_00", kind=FileNotFoundError)
    (copy / "train" / "box0000_00" / "coord.npy").unlink()
    refuses(lambda: frames(copy).rows(0), copy / "train" / "box0000_00" / "coord.npy", kind=FileNotFoundError)


# ---- frames that cannot be used

def test_layouts_that_are_not_what_they_seem(copy):
    path = copy / "2D" / "depth" / "box0000_00" / "40.png"
    Image.fromarray(np.full((24, 24), 900, np.uint16)).save(path)
    refuses(lambda: frames(copy).frames(0), path, "proportions")
    Image.fromarray(np.full((48, 64), 900, np.uint16)).save(path)
    refuses(lambda: frames(copy).frames(0), path, "expected depth of 32 x 24")
    Image.fromarray(np.ones((24, 32), np.uint8)).save(path)
    refuses(lambda: frames(copy).frames(0), path, "16 bits")


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
    Image.fromarray(np.full(HW, 50, np.uint16)).save(at("depth", "180.png"))     # up to 5 cm counts as missing
    (at("color", "thumbs.db")).write_text("")
    with pytest.warns(UserWarning) as said:
        source = frames(copy)
        assert source.frames(0) == [200, 220] == source.frames(0)
    assert source.skipped == {"pose is not finite": 2, "pose is not a rigid 4 x 4 matrix": 2, "no color file": 1, "no depth file": 1,
                              "depth does not decode": 1, "color does not decode": 1, "depth is empty": 2}
    assert len(said) == 7 and all("\n" not in str(w.message) and str(copy) in str(w.message) for w in said)
    assert len(source.poses(0)) == 2 and len(source.views(0)) == 2


def test_reasons_do_not_depend_on_the_folders_name(copy, tmp_path_factory):
    root = tmp_path_factory.mktemp("x") / "color"
    shutil.copytree(copy, root)
    path = root / "2D" / "depth" / "box0000_00" / "40.png"
    path.write_bytes(path.read_bytes()[:60])
    source = frames(root)
    quietly(lambda: source.frames(0))
    assert source.skipped == {"depth does not decode": 1}


def test_png_beside_jpg_is_left_alone(copy):
    folder = copy / "2D" / "color" / "box0000_00"
    for n in range(0, 240, 20): Image.fromarray(np.zeros((*HW, 3), np.uint8)).save(folder / f"{n}.png")
    source = frames(copy, cache_bytes=0)
    assert all(source.view(0, n).color.mean() > 20 for n in source.frames(0))


def test_a_scene_without_usable_frames(copy):
    for p in (copy / "2D" / "pose" / "box0000_00").iterdir(): p.write_text(" ".join(["inf"] * 16))
    source = frames(copy)
    assert quietly(lambda: source.frames(0)) == [] and source.skipped["pose is not finite"] == 12
    refuses(lambda: source.views(0), "box0000_00", "found 0 usable")
    refuses(lambda: SceneSamples(source)[0], "box0000_00: expected at least 2 usable frames", "found 0")
    refuses(lambda: SceneSamples(source).tour(0, 3, 12), "at least one pose")


# ---- raw scans

def sens(path, n=7, hw=HW, version=4, pose=None):
    "The box room as a film."
    K, stored, where = standard_intrinsics(hw), np.eye(4), []
    stored[:3, :3] = K
    stored[:2, 2] -= .5
    with open(path, "wb") as f:
        f.write(struct.pack("<IQ9s", version, 9, b"StructSen") + np.tile(stored, (4, 1, 1)).astype("<f4").tobytes())
        f.write(struct.pack("<2i4IfQ", 2, 1, hw[1], hw[0], hw[1], hw[0], 1000., n))
        for k, p in enumerate(box_cameras(n)):
            if pose is not None and k == pose: p = np.full((4, 4), -np.inf)
            color, depth = box_frame(box_cameras(n)[k], K, hw)
            jpeg, packed = io.BytesIO(), zlib.compress(np.round(depth * 1000).astype("<u2").tobytes())
            Image.fromarray(color).save(jpeg, "JPEG", quality=95)
            where.append((f.tell(), f.tell() + 96, f.tell() + 96 + len(jpeg.getvalue()), f.tell() + 96 + len(jpeg.getvalue()) + len(packed)))
            f.write(p.astype("<f4").tobytes() + struct.pack("<4Q", 0, 0, len(jpeg.getvalue()), len(packed)) + jpeg.getvalue() + packed)
    return where                                    # of each frame: its start, its colour, its depth, its end


def mesh(folder, faces=((0, 1, 2), (0, 2, 3)), labels=(1, 5, 5, 40), name="a"):
    xyz = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=np.float32)
    vertex = np.array([(*p, 10, 20, 30) for p in xyz], dtype=[(k, "f4") for k in "xyz"] + [(k, "u1") for k in ("red", "green", "blue")])
    parts = [PlyElement.describe(vertex, "vertex")]
    if faces: parts.append(PlyElement.describe(np.array([(list(f),) for f in faces], dtype=[("vertex_indices", "i4", (3,))]), "face"))
    PlyData(parts).write(str(folder / f"{name}_vh_clean_2.ply"))
    if labels:
        PlyData([PlyElement.describe(np.array([(l,) for l in labels], dtype=[("label", "u2")]), "vertex")]).write(str(folder / f"{name}_vh_clean_2.labels.ply"))


def instances(folder, segments, name="a"):
    (folder / f"{name}.aggregation.json").write_text(json.dumps(dict(segGroups=[dict(objectId=0, segments=[7]), dict(objectId=4, segments=[9, 3])])))
    (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(dict(segIndices=segments)))


@pytest.fixture()
def scan(tmp_path):
    folder = tmp_path / "scans" / "a"
    folder.mkdir(parents=True)
    return folder, sens(folder / "a.sens")


def film(path, **options):
    with open(path, "rb") as f:
        header = read_sens_header(f, "a.sens")
        return header, list(read_sens_frames(f, header, **options))


def test_header_and_frames_of_a_film(scan):
    folder, _ = scan
    header, all_frames = film(folder / "a.sens", every=1)
    assert header[1:] == (HW, HW, 1000., 7)
    np.testing.assert_allclose(header.intrinsics, standard_intrinsics(HW), rtol=1e-6)
    assert [n for n, *_ in all_frames] == list(range(7))
    for every, want in ((3, [0, 3, 6]), (20, [0])):
        some = film(folder / "a.sens", every=every)[1]
        assert [n for n, *_ in some] == want
        for n, jpeg, depth, pose in some:
            assert jpeg == all_frames[n][1]
            np.testing.assert_array_equal(depth, all_frames[n][2])
            np.testing.assert_allclose(pose, box_cameras(7)[n], atol=1e-6)
            np.testing.assert_allclose(depth / 1000, box_frame(box_cameras(7)[n], standard_intrinsics(HW), HW)[1], atol=6e-4)
    refuses(lambda: film(folder / "a.sens", every=0), "every: expected at least 1")


def test_another_version(tmp_path):
    sens(tmp_path / "a.sens", n=1, version=3)
    refuses(lambda: film(tmp_path / "a.sens"), "a.sens: expected version 4", "found 3")


@pytest.mark.parametrize("cut", ["empty", "version", "header", "pose", "color", "depth"])
def test_a_film_that_is_cut_off(scan, cut):
    folder, where = scan
    start, color, depth, end = where[2]
    size = dict(empty=0, version=3, header=200, pose=start + 50, color=color + 9, depth=end - 1)[cut]
    with open(folder / "a.sens", "r+b") as f: f.truncate(size)
    refuses(lambda: film(folder / "a.sens", every=1, name="a.sens"), "a.sens", *(() if size <= 200 else ("frame 2",)), "cut off")


def test_a_film_that_is_damaged(scan):
    folder, where = scan
    content = (folder / "a.sens").read_bytes()
    start, color, depth, end = where[0]
    def damaged(at, new):
        (folder / "a.sens").write_bytes(content[:at] + new + content[at + len(new):])
        return lambda: film(folder / "a.sens", every=1, name="a.sens")
    refuses(damaged(depth, bytes(9)), "a.sens, frame 0: expected depth of 32 x 24")
    refuses(damaged(color - 8, struct.pack("<Q", 2**62)), "a.sens, frame 0", "damaged")
    refuses(damaged(4, struct.pack("<Q", 2**40)), "a.sens", "damaged")
    refuses(damaged(21 + 256, struct.pack("<2i", 0, 1)), "a.sens: expected JPEG colour and zlib depth")
    refuses(damaged(21 + 256 + 24, struct.pack("<f", 0)), "a.sens: expected", "0 a metre")
    good = zlib.compress(bytes(10))
    refuses(damaged(depth, good), "a.sens, frame 0: expected depth of 32 x 24")


def test_scans_into_the_layout(scan):
    folder, _ = scan
    sens(folder / "a.sens", pose=4)
    mesh(folder)
    instances(folder, [7, 9, 3, 8])
    out = convert_scans(folder.parent, folder.parent.parent / "out", split="train", every=2, hw=HW)
    source = frames(out)
    assert quietly(lambda: source.frames(0)) == [0, 2, 6] and source.skipped == {"pose is not finite": 1}
    rows = source.rows(0)
    np.testing.assert_array_equal(rows["segment20"], [0, 4, 4, -1])
    np.testing.assert_array_equal(rows["instance"], [0, 4, 4, -1])
    np.testing.assert_array_equal(rows["normal"], [[0, 0, 1]] * 4)
    np.testing.assert_array_equal(rows["color"], [[10, 20, 30]] * 4)
    np.testing.assert_allclose(source.intrinsics(0), standard_intrinsics(HW), rtol=1e-6)
    np.testing.assert_allclose(source.view(0, 6).depth, box_frame(box_cameras(7)[6], standard_intrinsics(HW), HW)[1], atol=6e-4)
    np.testing.assert_allclose(source.view(0, 6).pose, box_cameras(7)[6], atol=1e-6)
    half = frames(convert_scans(folder.parent, folder.parent.parent / "half", split=dict(val=["a"]), every=2, hw=(12, 16)), split="val", hw=(12, 16))
    np.testing.assert_allclose(quietly(lambda: half.intrinsics(0)), scale_intrinsics(standard_intrinsics(HW), HW, (12, 16)), rtol=1e-6)
    refuses(lambda: convert_scans(folder.parent, out, split=dict(val=["b"])), folder.parent / "b", kind=FileNotFoundError)
    refuses(lambda: convert_scans(out, out, split="val"), out, "found none", kind=FileNotFoundError)


def test_conversion_goes_on_after_a_cut_film(scan):
    folder, where = scan
    mesh(folder)
    shutil.copytree(folder, folder.parent / "0first")
    for p in list((folder.parent / "0first").iterdir()): p.rename(p.with_name(p.name.replace("a", "0first", 1)))
    content, out = (folder / "a.sens").read_bytes(), folder.parent.parent / "out"
    (folder / "a.sens").write_bytes(content[:where[4][1] + 5])
    go = lambda: convert_scans(folder.parent, out, split="train", every=2, hw=HW)
    refuses(go, folder / "a.sens", "frame 4", "cut off")
    assert not (out / "train" / "a" / "coord.npy").exists()
    done = out / "2D" / "pose" / "0first" / "0.txt"
    done.write_text("this scene was complete")
    (folder / "a.sens").write_bytes(content)
    go()
    assert frames(out, scenes=["a"]).frames(0) == [0, 2, 4, 6] and done.read_text() == "this scene was complete"


def test_a_film_with_a_broken_image(scan):
    folder, where = scan
    mesh(folder)
    content = bytearray((folder / "a.sens").read_bytes())
    content[where[0][1]:where[0][1] + 20] = bytes(20)
    (folder / "a.sens").write_bytes(content)
    refuses(lambda: convert_scans(folder.parent, folder.parent / "out", split="train", hw=HW), folder / "a.sens", "frame 0")


def test_meshes(tmp_path):
    refuses(lambda: read_mesh(tmp_path / "a_vh_clean_2.ply"), tmp_path / "a_vh_clean_2.ply", kind=FileNotFoundError)
    mesh(tmp_path, faces=None, labels=None)
    try: flat = read_mesh(tmp_path / "a_vh_clean_2.ply")
    except ValueError as problem: assert "a_vh_clean_2.ply: expected triangles" in str(problem)
    else: assert not flat["normal"].any()
    mesh(tmp_path, faces=((0, 1, 9),))
    refuses(lambda: read_mesh(tmp_path / "a_vh_clean_2.ply"), "a_vh_clean_2.ply: expected triangles of vertices 0..3")
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
    assert {k: v.tolist() for k, v in read_labels(tmp_path, "a", 4).items()} == dict(segment20=[0, 4, 4, -1], instance=[0, 4, 4, -1])
    instances(tmp_path, [7, 9, 3])
    refuses(lambda: read_labels(tmp_path, "a", 4), tmp_path, "expected 4 labels", "found 3 for instance")
    (tmp_path / "a.aggregation.json").write_text("{")
    refuses(lambda: read_labels(tmp_path, "a", 4), "a.aggregation.json", "expected")
    (tmp_path / "a.aggregation.json").unlink()
    refuses(lambda: read_labels(tmp_path, "a", 5), tmp_path, "expected 5 labels", "found 4 for segment20")
    (tmp_path / "a_vh_clean_2.labels.ply").write_text("ply")
    refuses(lambda: read_labels(tmp_path, "a", 4), "a_vh_clean_2.labels.ply")
