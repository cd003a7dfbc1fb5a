"""Posed images of other programs: bytes of COLMAP, lenses, time stamps, units, wrong readings, and what an import writes."""

import json
import math
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plyfile import PlyData, PlyElement
from scipy.spatial.transform import Rotation

from unipre3d.cli import data_command
from unipre3d.data import posed
from unipre3d.data.check import check_data, find_readers
from unipre3d.data.imports import (
    ImportOptions,
    cameras_up,
    depth_ratio,
    find_depth_scale,
    import_posed,
    sketch,
    to_z_up,
)
from unipre3d.data.posed import (
    FLIP,
    COLMAP_LENSES,
    Lens,
    colmap_lens,
    distort,
    make_lens,
    nearest_stamps,
    read_captures,
    read_colmap,
    read_depth_map,
    read_transforms,
    read_tum,
    redraw,
    straighten,
)
from unipre3d.data.samples import ViewSamples
from unipre3d.data.scannet import (
    ScanNetFrames,
    box_cameras,
    box_cloud,
    box_frame,
    standard_intrinsics,
    write_cloud,
)

HW = (60, 80)
BIG = (96, 128)  # of lenses
K = standard_intrinsics(HW)
WALK = box_cameras(12)
INTRINSICS = (K[0, 0], K[1, 1], K[0, 2] - 0.5, K[1, 2] - 0.5)  # of TUM RGB-D: whole centres


def refuses(call, *words, kind=ValueError):
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


@pytest.fixture(scope="module")
def frames():
    return [box_frame(pose, K, HW) for pose in WALK]


# ---------------------------------------------------------------- writers by the published formats


def colmap_binary(folder, cameras, images, points):
    "COLMAP's three files: counts of 8 bytes, then rows; models by number."
    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLMAP_LENSES)
    rows = [
        struct.pack("<iiQQ", n, names.index(model), w, h) + struct.pack(f"<{len(values)}d", *values)
        for n, (model, w, h, values) in cameras.items()
    ]
    (folder / "cameras.bin").write_bytes(struct.pack("<Q", len(rows)) + b"".join(rows))
    rows = []
    for n, (name, camera, quaternion, translation, observed) in enumerate(images, 1):
        row = struct.pack("<i7di", n, *quaternion, *translation, camera) + name.encode() + b"\0"
        row += struct.pack("<Q", len(observed))
        rows.append(row + b"".join(struct.pack("<ddq", *one) for one in observed))
    (folder / "images.bin").write_bytes(struct.pack("<Q", len(rows)) + b"".join(rows))
    rows = [
        struct.pack("<Q3d3Bd", n, *xyz, *rgb, 0.5)
        + struct.pack("<Q", 2)
        + struct.pack("<4i", *range(4))
        for n, (xyz, rgb) in enumerate(points)
    ]
    (folder / "points3D.bin").write_bytes(struct.pack("<Q", len(rows)) + b"".join(rows))


def colmap_text(folder, cameras, images, points):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{n} {m} {w} {h} {' '.join(map(repr, map(float, v)))}"
        for n, (m, w, h, v) in cameras.items()
    ]
    (folder / "cameras.txt").write_text("\n".join(["# cameras", *lines]) + "\n")
    lines = []
    for n, (name, camera, q, t, observed) in enumerate(images, 1):
        lines.append(f"{n} {' '.join(map(repr, [*q, *t]))} {camera} {name}")
        lines.append(" ".join(f"{x!r} {y!r} {p}" for x, y, p in observed))
    (folder / "images.txt").write_text("\n".join(["# images", *lines]) + "\n")
    lines = [f"{n} {' '.join(map(repr, [*x, *c]))} 0.5 1 2" for n, (x, c) in enumerate(points)]
    (folder / "points3D.txt").write_text("\n".join(["# points", *lines]) + "\n")


def colmap_world(scale=1.0, tilt=np.eye(3)):
    "Images and points of the box room in a world of its own."
    images = []
    for k, pose in enumerate(WALK):
        R = (tilt @ pose[:3, :3]).T
        t = -R @ (scale * (tilt @ pose[:3, 3]))
        q = Rotation.from_matrix(R).as_quat(scalar_first=True).tolist()
        images.append((f"{k:03d}.png", 7, q, t.tolist(), [(1.5, 2.5, k), (3.0, 4.0, -1)]))
    cloud = {k: v[::5] for k, v in box_cloud(0.1).items()}
    points = list(zip((scale * cloud["coord"] @ tilt.T).tolist(), cloud["color"].tolist()))
    return images, points


def colmap_folder(folder, frames, *, write=colmap_binary, depth=0.0, scale=1.0, tilt=np.eye(3)):
    (folder / "images").mkdir(parents=True)
    images, points = colmap_world(scale, tilt)
    cameras = {7: ("PINHOLE", HW[1], HW[0], [K[0, 0], K[1, 1], K[0, 2], K[1, 2]])}
    write(folder / "sparse" / "0", cameras, images, points)
    for (name, *_), (color, z) in zip(images, frames):
        Image.fromarray(color).save(folder / "images" / name)
        if depth:
            (folder / "depth").mkdir(exist_ok=True)
            Image.fromarray(np.round(z * depth).astype(np.uint16)).save(folder / "depth" / name)
    return folder


def transforms_folder(folder, frames, *, unit=1000, **more):
    folder.mkdir(parents=True)
    rows = []
    for k, (pose, (color, z)) in enumerate(zip(WALK, frames)):
        Image.fromarray(color).save(folder / f"{k:02d}.png")
        row = dict(file_path=f"{k:02d}.png", transform_matrix=(pose @ FLIP).tolist())
        if unit:
            Image.fromarray(np.round(z * unit).astype(np.uint16)).save(folder / f"d{k:02d}.png")
            row["depth_file_path"] = f"d{k:02d}.png"
        rows.append(row)
    facts = dict(fl_x=K[0, 0], fl_y=K[1, 1], cx=K[0, 2], cy=K[1, 2], w=HW[1], h=HW[0])
    (folder / "transforms.json").write_text(json.dumps(facts | more | dict(frames=rows)))
    return folder


def tum_folder(folder, frames, late=0.004):
    for kind in ("rgb", "depth"):
        (folder / kind).mkdir(parents=True)
    lists = dict(rgb=[], depth=[], groundtruth=[])
    for k, (pose, (color, z)) in enumerate(zip(WALK, frames)):
        time = 100 + 0.1 * k
        Image.fromarray(color).save(folder / f"rgb/{k}.png")
        Image.fromarray(np.round(z * 5000).astype(np.uint16)).save(folder / f"depth/{k}.png")
        lists["rgb"].append(f"{time:.6f} rgb/{k}.png")
        lists["depth"].append(f"{time + late:.6f} depth/{k}.png")
        words = [*pose[:3, 3], *Rotation.from_matrix(pose[:3, :3]).as_quat()]
        lists["groundtruth"].append(f"{time:.6f} " + " ".join(map(repr, map(float, words))))
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(["# time stamps", *lines, ""]))
    return folder


def scene_folder(root, frames, *, ending=".npy"):
    home = root / "images" / "train" / "box"
    for kind in ("color", "depth", "intrinsic", "pose"):
        (home / kind).mkdir(parents=True)
    full = np.eye(4)
    full[:3, :3] = K
    full[:2, 2] -= 0.5

    def save(path, matrix):
        if ending == ".npy":
            np.save(path.with_suffix(".npy"), matrix)
        else:
            path.with_suffix(".txt").write_text(
                "\n".join(" ".join(map(repr, map(float, row))) for row in matrix)
            )

    save(home / "intrinsic" / "intrinsic", full)
    for k, (pose, (color, z)) in enumerate(zip(WALK, frames)):
        Image.fromarray(color).save(home / "color" / f"{k}.png")
        Image.fromarray(np.round(z * 1000).astype(np.uint16)).save(home / "depth" / f"{k}.png")
        save(home / "pose" / str(k), pose)
    return root


def how(out, **options):
    return ImportOptions(**dict(out=str(out), height=60, spacing=0.1, hold_out=0) | options)


# ---------------------------------------------------------------- COLMAP


@pytest.mark.parametrize("write", [colmap_binary, colmap_text])
def test_a_model_is_read_as_it_was_written(tmp_path, frames, write):
    capture = read_colmap(colmap_folder(tmp_path / "film", frames, write=write))
    assert [one.color.name for one in capture.images] == [f"{k:03d}.png" for k in range(12)]
    poses = np.stack([one.pose for one in capture.images])
    assert np.abs(poses - WALK).max() < 1e-12
    assert np.array_equal(capture.images[0].lens.K, K)
    _, points = colmap_world()
    assert np.array_equal(capture.cloud["coord"], [xyz for xyz, _ in points])
    assert np.array_equal(capture.cloud["color"], [rgb for _, rgb in points])


def test_rigs_and_frames_beside_a_model_change_nothing(tmp_path, frames):
    folder = colmap_folder(tmp_path / "film", frames)
    want = [one.pose for one in read_colmap(folder).images]
    for name in ("rigs.bin", "frames.bin"):
        (folder / "sparse" / "0" / name).write_bytes(struct.pack("<Q", 0))
    assert np.array_equal([one.pose for one in read_colmap(folder).images], want)


@pytest.mark.parametrize(
    ("name", "place", "words"),
    [
        ("images.txt", 5, ["nan"]),
        ("points3D.txt", 4, ["nan"]),
        ("points3D.txt", 4, ["999"]),
        ("points3D.txt", 4, []),
    ],
)
def test_numbers_that_mean_nothing_are_named(tmp_path, frames, name, place, words):
    "A pose or a colour that is none, or a line that was cut."
    folder = colmap_folder(tmp_path / "film", frames, write=colmap_text)
    path = folder / "sparse" / "0" / name
    lines = path.read_text().split("\n")
    row = lines[1].split()
    row[place : place + 1 if words else None] = words
    lines[1] = " ".join(row)
    path.write_text("\n".join(lines))
    wanted = "found numbers that are not finite" if name == "images.txt" else "found a line without"
    refuses(lambda: read_colmap(folder), str(path.parent), wanted)


def test_of_several_models_the_largest_counts(tmp_path, frames):
    folder = colmap_folder(tmp_path / "film", frames)
    cameras = {1: ("SIMPLE_PINHOLE", 4, 4, [2.0, 2.0, 2.0])}
    colmap_binary(folder / "sparse" / "1", cameras, colmap_world()[0][:0], [])
    capture = read_colmap(folder)
    assert len(capture.images) == 12 and "2 models" in capture.remarks[-1]


@pytest.mark.parametrize("size", [3, 30, 100, 180])
@pytest.mark.parametrize("name", ["cameras.bin", "images.bin", "points3D.bin"])
def test_a_model_that_was_cut_off_is_named(tmp_path, frames, name, size):
    folder = colmap_folder(tmp_path / "film", frames)
    path = folder / "sparse" / "0" / name
    whole = path.read_bytes()
    if size < len(whole):
        path.write_bytes(whole[:size])
        refuses(lambda: read_colmap(folder), name)


def test_a_count_that_is_not_there_takes_no_memory(tmp_path, frames):
    folder = colmap_folder(tmp_path / "film", frames)
    (folder / "sparse" / "0" / "points3D.bin").write_bytes(struct.pack("<Q", 2**60))
    refuses(lambda: read_colmap(folder), "points3D.bin", "its end after 8 bytes")


def test_other_lenses_are_refused_by_name():
    for model in ("FOV", "THIN_PRISM_FISHEYE", "DIVISION"):
        values = [1.0] * len(COLMAP_LENSES.get(model, "f cx cy k").split())
        refuses(lambda: colmap_lens(model, (4, 4), values, "cameras: camera 3"), "camera 3", model)


def test_images_that_are_missing_are_counted(tmp_path, frames):
    folder = colmap_folder(tmp_path / "film", frames)
    (folder / "images" / "003.png").unlink()
    capture = read_colmap(folder)
    assert len(capture.images) == 11 and "left out 1 of 12" in capture.remarks[0]
    for path in (folder / "images").iterdir():
        path.unlink()
    refuses(lambda: read_colmap(folder), "000.png", kind=FileNotFoundError)


def test_depth_of_the_dense_step(tmp_path, frames):
    folder = colmap_folder(tmp_path / "film", frames)
    (folder / "sparse" / "stereo" / "depth_maps").mkdir(parents=True)
    z = frames[0][1].astype("<f4")
    head = f"{HW[1]}&{HW[0]}&1&".encode()
    path = folder / "sparse" / "stereo" / "depth_maps" / "000.png.geometric.bin"
    path.write_bytes(head + z.tobytes())
    image = read_colmap(folder).images[0]
    assert image.depth == path and np.array_equal(read_depth_map(path), z)


# ---------------------------------------------------------------- lenses


LENSES = {
    "SIMPLE_RADIAL": [100.0, 64.0, 48.0, -0.1],
    "RADIAL": [100.0, 63.0, 48.5, 0.1, -0.02],
    "OPENCV": [100.0, 101.0, 64.0, 48.0, -0.2, 0.05, 0.002, -0.001],
    "FULL_OPENCV": [100.0, 100.0, 64.0, 48.0, 0.3, 0.1, 0.001, 0.001, 0.02, 0.35, 0.02, 0.01],
    "OPENCV_FISHEYE": [90.0, 90.0, 64.0, 48.0, 0.03, -0.01, 0.002, 0.0],
    "SIMPLE_RADIAL_FISHEYE": [90.0, 64.0, 48.0, 0.02],
    "RADIAL_FISHEYE": [90.0, 64.0, 48.0, 0.02, 0.001],
}


@pytest.mark.parametrize("model", LENSES)
def test_a_drawn_pixel_is_what_its_ray_hits(model):
    lens = colmap_lens(model, BIG, LENSES[model], model)
    v, u = np.meshgrid(np.arange(BIG[0]) + 0.5, np.arange(BIG[1]) + 0.5, indexing="ij")
    pinhole = straighten([lens], model)
    for plane in (u, v):  # an image whose value is its own pixel, bent by the lens
        drawn = redraw(plane, lens, pinhole)
        rays = posed.pixel_rays(pinhole)
        bent = distort(rays, lens) * np.diag(lens.K)[:2] + lens.K[:2, 2]
        truth = bent[..., 0] if plane is u else bent[..., 1]
        assert np.abs(drawn - truth).max() < 0.6
        assert np.abs(drawn - truth)[2:-2, 2:-2].max() < 1e-6
    inside = (bent > -1).all() and (bent < np.array(BIG[::-1]) + 1).all()
    assert inside and pinhole.K[0, 0] >= min(lens.K[0, 0], lens.K[1, 1]) - 1e-9


def test_several_cameras_become_one():
    first = make_lens(dict(f=100.0, cx=64.0, cy=48.0), BIG, "a")
    second = make_lens(dict(f=120.0, cx=60.0, cy=50.0, k1=-0.1), BIG, "b")
    pinhole = straighten([first, second], "film")
    assert pinhole.family == "pinhole" and pinhole.hw == BIG
    assert pinhole.K[0, 0] > 110
    assert straighten([first, first], "film") is first


# ---------------------------------------------------------------- transforms.json, TUM


@pytest.mark.parametrize("wide", [False, True])
def test_intrinsics_of_each_frame_count_before_those_of_the_file(tmp_path, frames, wide):
    folder = transforms_folder(tmp_path / "film", frames, k1=0.01)
    data = json.loads((folder / "transforms.json").read_text())
    data["frames"][3]["fl_x"] = 99.0
    if wide:
        del data["fl_x"], data["fl_y"]
        data["camera_angle_x"] = 2 * math.atan(HW[1] / 2 / 80.0)
    (folder / "transforms.json").write_text(json.dumps(data))
    images = read_transforms(folder / "transforms.json", "film").images
    assert images[3].lens.K[0, 0] == 99.0
    assert abs(images[0].lens.K[0, 0] - (80.0 if wide else K[0, 0])) < 1e-9
    assert images[0].lens.distortion[0] == 0.01


def test_intrinsics_are_for_the_size_that_the_file_names(tmp_path, frames):
    folder = transforms_folder(tmp_path / "film", frames)
    data = json.loads((folder / "transforms.json").read_text())
    twice = {name: 2 * data[name] for name in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
    (folder / "transforms.json").write_text(json.dumps(data | twice))
    lens = read_transforms(folder / "transforms.json", "film").images[0].lens
    assert lens.hw == HW and np.allclose(lens.K, K)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(camera_model="EQUIRECTANGULAR"), "EQUIRECTANGULAR"),
        (dict(k4=0.1), "k4"),
        (dict(fl_x=0, fl_y=0), "camera_angle_x"),
        (dict(frames="none"), "frames"),
        (dict(frames=[{}]), "file_path"),
        (dict(applied_transform=[[1]]), "transforms.json"),
    ],
)
def test_a_wrong_transforms_json_is_named(tmp_path, frames, change, word):
    folder = transforms_folder(tmp_path / "film", frames)
    data = json.loads((folder / "transforms.json").read_text())
    (folder / "transforms.json").write_text(json.dumps(data | change))
    refuses(lambda: read_transforms(folder / "transforms.json", "film"), "transforms.json", word)


def test_files_of_splits_are_scenes_of_splits(tmp_path, frames):
    folder = transforms_folder(tmp_path / "film", frames)
    text = (folder / "transforms.json").read_text()
    (folder / "transforms.json").unlink()
    for split in ("train", "val"):
        (folder / f"transforms_{split}.json").write_text(text)
    lines = import_posed(folder, how(tmp_path / "out"), progress=False)
    assert ScanNetFrames(tmp_path / "out", split="val").scenes == ["film-val"]
    assert ScanNetFrames(tmp_path / "out", split="train").scenes == ["film-train"], lines


def test_time_stamps_take_the_nearest():
    rng = np.random.default_rng(0)
    times, others = np.sort(rng.uniform(0, 10, 40)), np.sort(rng.uniform(0, 10, 60))
    found = nearest_stamps(times, others, 0.05)
    gap = np.abs(times[:, None] - others)
    for k, place in enumerate(found):
        assert (place is None) == (gap[k].min() > 0.05)
        assert place is None or gap[k, place] == gap[k].min()


def test_depth_that_a_list_names_and_nobody_has_costs_its_image(tmp_path, frames):
    folder = tum_folder(tmp_path / "freiburg3_box", frames)
    lens = (K[0, 0], K[1, 1], K[0, 2], K[1, 2])
    whole = read_tum(folder, lens)
    next(iter(sorted((folder / "depth").iterdir()))).unlink()
    found = read_tum(folder, lens)
    assert len(found.images) == len(whole.images) - 1
    assert f"left out 1 of {len(whole.images)} images" in found.remarks[0]


def test_a_film_without_poses_in_time_is_refused(tmp_path, frames):
    folder = tum_folder(tmp_path / "freiburg3_box", frames, late=0.05)
    refuses(lambda: read_captures(folder), "groundtruth.txt", "within 0.02 s")


# ---------------------------------------------------------------- an import


LAYOUTS = {
    "colmap": lambda folder, frames: colmap_folder(folder, frames, depth=1000),
    "transforms": transforms_folder,
    "tum": tum_folder,
    "images": scene_folder,
    "text": lambda folder, frames: scene_folder(folder, frames, ending=".txt"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_cameras(tmp_path, frames, layout):
    folder = LAYOUTS[layout](tmp_path / "film", frames)
    options = how(tmp_path / "out", up="z")
    if layout == "tum":
        values = (K[0, 0], K[1, 1], K[0, 2] - 0.5, K[1, 2] - 0.5)
        options = replace(options, intrinsics=tuple(map(float, values)))
    lines = import_posed(folder, options, progress=False)
    rooms = ScanNetFrames(tmp_path / "out", split="train", hw=HW)
    poses = np.linalg.inv(rooms.world_to_cam(0))
    assert len(poses) == 12, lines
    scale = np.linalg.norm(poses[6, :3, 3] - poses[0, :3, 3])
    scale /= np.linalg.norm(WALK[6, :3, 3] - WALK[0, :3, 3])
    assert abs(scale - 1) < (0.02 if layout == "colmap" else 1e-9)  # COLMAP's unit is found
    assert np.abs(poses[:, :3, :3] - WALK[:, :3, :3]).max() < 1e-6
    assert np.abs(poses[:, :3, 3] / scale - WALK[:, :3, 3]).max() < 1e-6
    assert np.abs(rooms.K(0) - K).max() < 1e-6
    z = rooms.view(0, 3).depth
    assert np.median(np.abs(z - frames[3][1])) < 0.002 * (20 if layout == "colmap" else 1)
    rows = rooms.rows(0)
    assert len(rows["xyz"]) > 500 and {"color", "normal"} <= set(rows)
    sample = ViewSamples(rooms, n_points=256, n_ref=2, n_target=2, max_gap=5)[0]
    assert sample.ref.depth is not None
    (sheet,) = (tmp_path / "out").glob("*.png")
    assert Image.open(sheet).size[0] >= 320
    assert not check_data(find_readers(tmp_path / "out"), progress=False).refused


def test_a_world_of_its_own_gets_metres_and_z(tmp_path, frames):
    tilt = Rotation.from_euler("xyz", [70, -30, 10], degrees=True).as_matrix()
    folder = colmap_folder(tmp_path / "film", frames, depth=1000, scale=0.4, tilt=tilt)
    lines = import_posed(folder, how(tmp_path / "out"), progress=False)
    assert any("unit: 2.5" in line for line in lines) or any("unit: 2.4" in line for line in lines)
    poses = np.linalg.inv(ScanNetFrames(tmp_path / "out", split="train").world_to_cam(0))
    A = poses[:, :3, :3] @ WALK[:, :3, :3].transpose(0, 2, 1)
    assert np.abs(A - A[0]).max() < 1e-6 and A[0, 2, 2] > 0.9999  # about z alone
    far = np.linalg.norm(poses[6, :3, 3] - poses[0, :3, 3])
    assert abs(far / np.linalg.norm(WALK[6, :3, 3] - WALK[0, :3, 3]) - 1) < 0.02


def test_without_depth_the_unit_is_asked_for_and_features_alone_are_joined(tmp_path, frames):
    folder = colmap_folder(tmp_path / "film", frames)
    refuses(lambda: import_posed(folder, how(tmp_path / "out"), progress=False), "--scale METRES")
    lines = import_posed(folder, how(tmp_path / "out", scale=1.0, up="z"), progress=False)
    assert any("no depth" in line for line in lines)
    rooms = ScanNetFrames(tmp_path / "out", split="train", hw=HW)
    assert rooms.view(0, 0).depth is None and not rooms.skipped
    sample = ViewSamples(rooms, n_points=256, n_ref=2, n_target=2, max_gap=5)[0]
    assert sample.ref.depth is None
    assert not check_data(find_readers(tmp_path / "out"), progress=False).refused


def test_films_with_and_without_depth_do_not_mix(tmp_path, frames):
    import_posed(
        colmap_folder(tmp_path / "blind", frames),
        how(tmp_path / "out", scale=1.0, up="z"),
        progress=False,
    )
    import_posed(
        transforms_folder(tmp_path / "deep", frames), how(tmp_path / "out"), progress=False
    )
    rooms = ScanNetFrames(tmp_path / "out", split="train", hw=HW)
    samples = ViewSamples(rooms, n_points=64, n_ref=1, n_target=1, max_gap=5)
    refuses(lambda: samples.batch([(0, 0), (1, 0)]), "depth in all clouds")


WRONG = {
    "--poses inverted": lambda pose: np.linalg.inv(pose),
    "--axes flipped": lambda pose: pose @ FLIP,
}


@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_reading_is_named_and_its_option_mends_it(tmp_path, frames, option):
    folder = transforms_folder(tmp_path / "film", frames)
    data = json.loads((folder / "transforms.json").read_text())
    for row, pose in zip(data["frames"], WALK):
        row["transform_matrix"] = (WRONG[option](pose) @ FLIP).tolist()
    (folder / "transforms.json").write_text(json.dumps(data))
    cloud = tmp_path / "cloud.npy"
    np.save(cloud, box_cloud()["coord"])
    for given in (str(cloud), ""):
        options = how(tmp_path / "out", cloud=given)
        refuses(lambda: import_posed(folder, options, progress=False), option, "would fit")
    name, value = option.removeprefix("--").split()
    import_posed(folder, replace(options, **{name: value}), progress=False)
    poses = np.linalg.inv(ScanNetFrames(tmp_path / "out", split="train").world_to_cam(0))
    assert np.abs(poses - WALK).max() < 1e-6


AS_WRITTEN = {
    "--poses world-to-camera": lambda pose: np.linalg.inv(pose @ FLIP),
    "--poses world-to-camera --axes flipped": lambda pose: np.linalg.inv(pose),
}


@pytest.mark.parametrize("option", AS_WRITTEN)
def test_matrices_from_world_to_camera_are_named_and_mended(tmp_path, frames, option):
    folder = transforms_folder(tmp_path / "film", frames)
    data = json.loads((folder / "transforms.json").read_text())
    for row, pose in zip(data["frames"], WALK):
        row["transform_matrix"] = AS_WRITTEN[option](pose).tolist()
    (folder / "transforms.json").write_text(json.dumps(data))
    cloud = tmp_path / "cloud.npy"
    np.save(cloud, box_cloud()["coord"])
    options = how(tmp_path / "out", cloud=str(cloud))
    refuses(lambda: import_posed(folder, options, progress=False), f"{option} would fit")
    words = option.replace("--", "").split()
    mended = replace(options, **dict(zip(words[::2], words[1::2])))
    import_posed(folder, mended, progress=False)
    poses = np.linalg.inv(ScanNetFrames(tmp_path / "out", split="train").world_to_cam(0))
    assert np.abs(poses - WALK).max() < 1e-6


def test_matrices_that_were_right_are_named_again(tmp_path, frames):
    folder = transforms_folder(tmp_path / "film", frames)
    options = how(tmp_path / "out", poses="world-to-camera")
    refuses(
        lambda: import_posed(folder, options, progress=False),
        "--poses layout would fit",
    )


def test_of_units_of_depth_the_right_one_is_named(tmp_path, frames):
    folder = transforms_folder(tmp_path / "film", frames)
    options = how(tmp_path / "out", depth_scale=5000.0)
    refuses(
        lambda: import_posed(folder, options, progress=False),
        "--depth-scale 1000 would fit",
    )


@pytest.mark.parametrize(
    ("change", "option"),
    [
        (lambda xyz: xyz * 1000, "--cloud-scale 0.001"),
        (lambda xyz: xyz @ to_z_up(np.array([0, 1.0, 0])), "--cloud-up y"),
    ],
)
def test_a_cloud_of_other_units_or_axes_is_named(tmp_path, frames, change, option):
    folder = transforms_folder(tmp_path / "film", frames)
    xyz = change(box_cloud()["coord"]).astype(np.float32)
    vertex = np.array([tuple(p) for p in xyz], dtype=[(k, "f4") for k in "xyz"])
    PlyData([PlyElement.describe(vertex, "vertex")]).write(str(tmp_path / "cloud.ply"))
    options = how(tmp_path / "out", cloud=str(tmp_path / "cloud.ply"))
    refuses(lambda: import_posed(folder, options, progress=False), f"{option} would fit")
    name, value = option.removeprefix("--").replace("-", "_").split()
    value = float(value) if "scale" in name else value
    import_posed(folder, replace(options, **{name: value}), progress=False)
    rows = ScanNetFrames(tmp_path / "out", split="train").rows(0)
    assert np.abs(rows["xyz"] - box_cloud()["coord"]).max() < 1e-3


def test_a_transform_that_was_applied_can_be_undone(tmp_path, frames):
    moved = np.eye(4)
    moved[:3, 3] = [20, 0, 0]
    folder = transforms_folder(tmp_path / "film", frames, applied_transform=moved[:3].tolist())
    data = json.loads((folder / "transforms.json").read_text())
    for row, pose in zip(data["frames"], WALK):
        row["transform_matrix"] = (moved @ pose @ FLIP).tolist()
    (folder / "transforms.json").write_text(json.dumps(data))
    np.save(tmp_path / "cloud.npy", box_cloud()["coord"])
    options = how(tmp_path / "out", cloud=str(tmp_path / "cloud.npy"))
    refuses(lambda: import_posed(folder, options, progress=False), "--world original", "would fit")
    import_posed(folder, replace(options, world="original"), progress=False)
    poses = np.linalg.inv(ScanNetFrames(tmp_path / "out", split="train").world_to_cam(0))
    assert np.abs(poses - WALK).max() < 1e-6


@pytest.mark.parametrize("unit", [1000, 5000, 10_000, 100])
@pytest.mark.parametrize("with_points", [True, False])
def test_the_unit_of_depth_is_found(tmp_path, frames, unit, with_points):
    folder = transforms_folder(tmp_path / "film", frames, unit=unit)
    (capture,) = read_captures(folder)
    views = sketch(capture.images, straighten([one.lens for one in capture.images], "film"))
    xyz = box_cloud(0.1)["coord"] if with_points else None
    assert find_depth_scale(xyz, views)[0] == unit


def test_hidden_points_do_not_decide_the_unit(frames, tmp_path):
    folder = transforms_folder(tmp_path / "film", frames, unit=731)
    (capture,) = read_captures(folder)
    views = sketch(capture.images, straighten([one.lens for one in capture.images], "film"))
    xyz = box_cloud(0.1)["coord"][::9]  # so few that the block hides nothing
    ratio, share = depth_ratio(xyz, views)
    assert abs(ratio / 731 - 1) < 0.02 and share < 0.98


def test_level_cameras_tell_what_is_up():
    rng = np.random.default_rng(0)
    for _ in range(20):
        tilt = Rotation.random(random_state=rng.integers(2**31)).as_matrix()
        poses = WALK.copy()
        poses[:, :3] = tilt @ WALK[:, :3]
        A = to_z_up(cameras_up(poses))
        assert np.allclose(A @ A.T, np.eye(3)) and np.linalg.det(A) > 0
        assert (A @ tilt @ [0, 0, 1])[2] > 0.999


def test_what_is_there_is_not_written_again(tmp_path, frames):
    folder = transforms_folder(tmp_path / "film", frames)
    import_posed(folder, how(tmp_path / "out"), progress=False)
    refuses(
        lambda: import_posed(folder, how(tmp_path / "out"), progress=False), "no scene of this name"
    )


@pytest.mark.parametrize(
    "left", ["2D/color/film/3.jpg", "2D/intrinsic/film.txt", "val/film/color.npy"]
)
def test_half_of_an_import_is_refused_before_anything_is_read_or_written(tmp_path, frames, left):
    "What a killed import leaves of this scene, in whichever split; files of another scene do not count."
    folder = transforms_folder(tmp_path / "film", frames)
    for k in range(12):
        (folder / f"{k:02d}.png").write_bytes((folder / f"{k:02d}.png").read_bytes()[:200])
    place = tmp_path / "out" / left
    place.parent.mkdir(parents=True)
    place.write_bytes(b"")
    refuses(
        lambda: import_posed(folder, how(tmp_path / "out"), progress=False),
        "no scene of this name, film",
        "an import that was stopped",
    )
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [place]


def test_another_scene_may_be_there(tmp_path, frames):
    folder = transforms_folder(tmp_path / "film", frames)
    (tmp_path / "out" / "2D" / "color" / "films").mkdir(parents=True)
    assert import_posed(folder, how(tmp_path / "out"), progress=False)


def test_one_bad_capture_costs_itself_alone(tmp_path, frames):
    "Of three one has depth that fits nothing: the others are written, it is named, and nothing of it is there."
    films = [transforms_folder(tmp_path / "films" / name, frames) for name in "abc"]
    data = json.loads((films[1] / "transforms.json").read_text())
    away = 40 * np.random.default_rng(0).normal(size=len(data["frames"]))
    for row, metres in zip(data["frames"], away):
        row["transform_matrix"][0][3] += metres
    (films[1] / "transforms.json").write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="left out 1 of 3 captures\n  b"):
        import_posed(tmp_path / "films", how(tmp_path / "out", split="train"), progress=False)
    assert ScanNetFrames(tmp_path / "out", split="train").scenes == ["a", "c"]
    assert not list((tmp_path / "out").rglob("b*"))


def test_last_frames_are_of_those_that_have_depth(tmp_path, frames):
    "Half of the film has none: the scene of the last frames was empty."
    folder = transforms_folder(tmp_path / "film", frames)
    data = json.loads((folder / "transforms.json").read_text())
    for row in data["frames"][6:]:
        del row["depth_file_path"]
    (folder / "transforms.json").write_text(json.dumps(data))
    import_posed(folder, how(tmp_path / "out", hold_out=0.34), progress=False)
    counts = [len(ScanNetFrames(tmp_path / "out", split=s).frames(0)) for s in ("train", "val")]
    assert counts == [4, 2]


def test_columns_of_a_scan_are_compared_before_anything_is_written(tmp_path, frames):
    folder = scene_folder(tmp_path / "film", frames)
    write_cloud(folder, "train", "box", **box_cloud(0.1))
    home = folder / "train" / "box"
    color, coord = np.load(home / "color.npy"), np.load(home / "coord.npy")
    np.save(home / "color.npy", color[:-1])
    refuses(lambda: import_posed(folder, how(tmp_path / "out"), progress=False), "points: color")
    assert not (tmp_path / "out").exists()
    np.save(home / "color.npy", color)
    coord[5] = np.nan
    np.save(home / "coord.npy", coord)
    with pytest.warns(UserWarning, match="left out 1 of"):
        import_posed(folder, how(tmp_path / "out"), progress=False)
    rows = ScanNetFrames(tmp_path / "out", split="train").rows(0)
    assert len(rows["xyz"]) == len(coord) - 1
    assert np.array_equal(rows["color"], np.delete(color, 5, 0))


def test_points_of_every_kind_of_file(tmp_path, frames):
    folder = transforms_folder(tmp_path / "film", frames)
    cloud = box_cloud()
    np.savetxt(tmp_path / "cloud.xyz", np.concatenate([cloud["coord"], cloud["color"]], 1))
    options = how(tmp_path / "out", cloud=str(tmp_path / "cloud.xyz"))
    import_posed(folder, options, progress=False)
    rows = ScanNetFrames(tmp_path / "out", split="train").rows(0)
    assert np.abs(rows["xyz"] - cloud["coord"]).max() < 1e-6
    assert np.array_equal(rows["color"], cloud["color"])


def test_folders_that_hold_nothing_are_named(tmp_path, frames):
    refuses(lambda: read_captures(tmp_path), "an empty folder", "transforms.json")
    refuses(lambda: read_captures(tmp_path / "none"), "nothing there")
    folder = transforms_folder(tmp_path / "film", frames, unit=0)
    refuses(lambda: import_posed(folder, how(tmp_path / "out"), progress=False), "--cloud FILE")
    (tmp_path / "more").mkdir()
    assert [one.name for one in read_captures(tmp_path)] == ["film"]


def test_several_captures_are_split_whole(tmp_path, frames):
    for k in range(3):
        transforms_folder(tmp_path / "films" / f"room{k}", frames)
    options = how(tmp_path / "out", hold_out=0.3, every=3)
    import_posed(tmp_path / "films", options, progress=False)
    scenes = {s: ScanNetFrames(tmp_path / "out", split=s).scenes for s in ("train", "val")}
    assert len(scenes["train"]) == 2 and len(scenes["val"]) == 1


def test_the_command_says_what_it_found(tmp_path, frames, capsys):
    folder = transforms_folder(tmp_path / "film", frames)
    out = tmp_path / "scenes"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data_command(["import", str(folder), "--out", str(out), "--spacing=0.1"]) == 0
    said = capsys.readouterr().out
    for words in (
        "transforms.json: 12 images of 80 x 60",
        "cameras and points fit",
        "next: unipre3d pretrain scene-sparseunet-mini --data",
        " --init rooms\n",
    ):
        assert words in said
    refuses(lambda: data_command(["import", str(folder), "--scle", "2"]), "did you mean --scale")
    refuses(lambda: data_command(["import"]), "expected a folder of posed images")
    with pytest.raises(SystemExit):
        data_command(["import", "--help"])
    assert "--depth-scale FLOAT" in capsys.readouterr().out
    assert Path(out / "train").is_dir()


def test_lenses_have_no_size_of_their_own():
    lens = Lens(HW, K)
    assert np.allclose(lens.scaled((48, 64)).scaled(HW).K, K)


# ---------------------------------------------------------------- one bad file of many


def spoil(path, keep=0.5):
    "The beginning of a file."
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


def test_one_bad_picture_costs_itself_alone(tmp_path, frames):
    "Cut in its pixels, cut in its header, or its depth: of three captures all are imported, and the files are named."
    films = {}
    for name, writer in (("a", transforms_folder), ("b", colmap_folder), ("c", transforms_folder)):
        more = dict(depth=1000) if writer is colmap_folder else {}
        films[name] = writer(tmp_path / "films" / name, frames, **more)
    spoil(films["a"] / "03.png")
    (films["a"] / "07.png").write_bytes(b"no picture")
    spoil(films["b"] / "images" / "005.png")
    spoil(films["c"] / "d02.png")
    lines = import_posed(tmp_path / "films", how(tmp_path / "out", split="train"), progress=False)
    said = "\n".join(lines)
    assert "a: left out 1 of 12 images that cannot be read: 07.png" in said  # its header
    assert "a: left out 1 of 11 images that cannot be read: 03.png" in said
    assert "b: left out 1 of 12 images that cannot be read: 005.png" in said
    assert "c: left out 1 of 12 images that cannot be read: 02.png" in said
    rooms = ScanNetFrames(tmp_path / "out", split="train")
    assert [len(rooms.frames(k)) for k in range(3)] == [10, 11, 11]
    kept = [k for k in range(12) if k not in (3, 7)]
    assert np.abs(np.linalg.inv(rooms.world_to_cam(0)) - WALK[kept]).max() < 1e-5


def test_where_nothing_is_left_the_file_is_named(tmp_path, frames):
    folder = transforms_folder(tmp_path / "film", frames)
    for k in range(11):
        spoil(folder / f"{k:02d}.png")
    refuses(lambda: import_posed(folder, how(tmp_path / "out"), progress=False), "00.png")
    for k in range(12):
        (folder / f"{k:02d}.png").write_bytes(b"no picture")
    refuses(lambda: read_captures(folder), "00.png")


@pytest.mark.parametrize(
    "words", ["nan nan nan nan nan nan nan", "0 0 inf 0 0 0 1", "1 2 3 0 0 0 0"]
)
def test_one_pose_that_is_none_costs_its_image_alone(tmp_path, frames, words):
    folder = tum_folder(tmp_path / "freiburg3", frames)
    path = folder / "groundtruth.txt"
    lines = path.read_text().split("\n")
    lines[5] = f"{lines[5].split()[0]} {words}"
    path.write_text("\n".join(lines))
    (capture,) = read_captures(folder, intrinsics=INTRINSICS)
    assert [one.color.name for one in capture.images] == [f"{k}.png" for k in range(12) if k != 4]
    assert capture.remarks == ("left out 1 of 12 images whose pose is none: rgb/4.png",)
    kept = [k for k in range(12) if k != 4]
    assert np.abs([one.pose for one in capture.images] - WALK[kept]).max() < 1e-9


def test_a_film_without_a_pose_is_refused(tmp_path, frames):
    folder = tum_folder(tmp_path / "freiburg3", frames)
    path = folder / "groundtruth.txt"
    times = [line.split()[0] for line in path.read_text().split("\n")[1:-1]]
    path.write_text("".join(f"{time} nan nan nan nan nan nan nan\n" for time in times))
    refuses(
        lambda: read_captures(folder, intrinsics=INTRINSICS), str(path), "no pose of finite numbers"
    )
