"""Fuzzing of everything that opens a file: mutated and hostile files for every reader, record, config and checkpoint.

The default run checks a few inputs in a process of its own. The long run, for a change of a reader, is one of

    UNIPRE3D_FUZZ=10000 python -m pytest tests/test_fuzz_files.py
    python tests/test_fuzz_files.py 0 10000 1000  # first seed, mutated inputs, hostile inputs
    python tests/test_fuzz_files.py 0 10000 1000 data/records/outcomes/fuzz.json  # and a record of the run

An input is a function of its seed and nothing of it is kept. Allowed are one line of ValueError or OSError that names the file,
or values that are right by the rule of `oracle.py`: those of the whole file, those that another reader finds, those that a
warning counts, or values of their kind where no other reader reads the file. Anything else is printed with its seed: values that are
silently wrong, another exception, a line without the file, more than LIMIT_S seconds, more than a gigabyte of memory above the
file. `check_input(kit, seed, hostile)` repeats it.
"""

import csv
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import oracle

RECORD = Path(__file__).parent.parent / "data" / "records" / "outcomes" / "fuzz.json"
DEFAULT = (60, 40)  # mutated and hostile inputs of the default run
LIMIT_S = 30
GIGABYTE = 2**30


# ---- what is opened: one small data set of each kind, and a call that reads all of it


def read_all(reader, views=True, prefix=""):
    "What training reads of a data set, by name."
    found = {f"{prefix}count": len(reader)}
    for i in range(min(2, len(reader))):
        own = dict(name=reader.name(i), classes=len(reader.classes), label=reader.label(i))
        own |= reader.rows(i)
        if views:
            own |= dict(poses=reader.world_to_cam(i), K=reader.K(i), frames=reader.frames(i))
            for frame in reader.frames(i)[:2]:
                view = reader.view(i, frame)
                own |= {f"view {frame} {k}": getattr(view, k) for k in ("rgb", "depth", "mask")}
        found |= {f"{prefix}{i} {key}": value for key, value in own.items() if value is not None}
    return found


def other_text(path):
    return oracle.text_of(path.read_bytes())


def other_pose(values, key, place, pose):
    "The poses with one that another reader found."
    poses = np.array(values[key])
    poses[place] = pose
    return {key: poses}


def other_shade(path, key):
    "The mean of a picture, colours on black."
    from PIL import Image

    pixels = np.asarray(Image.open(path).convert("RGBA"), dtype=float)
    return {f"{key} shade": (pixels[..., :3] * (pixels[..., 3:] > 0)).mean((0, 1))}


def by_column(names, read):
    "Arrays of a cloud as another reader has them, under the names of ours."
    made = dict(
        xyz=lambda raw: oracle.as_points(raw)[0], coord=lambda raw: oracle.as_points(raw)[0]
    )
    made |= dict(color=oracle.as_color, normal=oracle.as_normal, instance=oracle.as_objects)
    own = dict(coord="xyz", color="colors", segment20="segment")
    return {f"0 {own.get(n, n)}": made.get(n, oracle.as_labels)(read(n)) for n in names}


def objects(folder, kind):
    from unipre3d.data.shapenet import ShapeNetViews, export_objects

    export_objects(ShapeNetViews(classes=["lamp"], split="train"), folder, kind, [0])
    if kind == "released":
        from PIL import Image

        (path,) = folder.glob("*/*/easy/01.png")
        Image.open(path).convert("RGB").save(path.with_suffix(".JPG"))
        path.unlink()
        (folder / "train.txt").write_text("another-one\n")
        (folder / "test.txt").write_text("-".join(path.parts[-4:-2]) + "\n")


def open_objects(folder):
    from unipre3d.data.shapenet import ShapeNetViews

    return read_all(ShapeNetViews(folder, split="train", size=32))


def table_columns(raw):
    "Columns of a cloud of ten numbers a point."
    xyz, real = oracle.as_points(raw[:, :3])
    found = {"0 xyz": xyz, "0 normal": oracle.as_normal(raw[real, 3:6])}
    return found | {
        "0 colors": oracle.as_color(raw[real, 6:9]),
        "0 part": oracle.as_labels(raw[real, 9]),
    }


def other_objects(path, values):
    if path.suffix == ".npy":
        return table_columns(oracle.npy(path.read_bytes()))
    if path.suffix == ".txt" and path.stem.isdigit():
        pose = np.array(other_text(path).split(), dtype=float).reshape(4, 4)
        return other_pose(values, "0 poses", int(path.stem), np.linalg.inv(pose))
    if path.suffix == ".png":
        return other_shade(path, f"0 view {int(path.stem)}")
    if path.name == "objects.csv":
        rows = oracle.table(path.read_bytes())
        return {"count": len({(r["class"], r["id"]) for r in rows if r["split"] == "train"})}
    if path.name == "convention.json":
        fov = json.loads(path.read_bytes())["fov"]
        return {"0 focal": 16 / np.tan(np.radians(fov) / 2)}
    return None


def open_released(folder):
    from unipre3d.data.shapenet import ShapeNetViews

    found = read_all(ShapeNetViews(folder, convention="released", size=32, radius=0.65))
    if MUTATED.get("name") in ("train.txt", "test.txt"):
        found["listed"] = len(ShapeNetViews(folder, convention="released", split="test"))
    return found


def other_released(path, values):
    if path.suffix == ".npy":
        return {"0 radii": oracle.as_radii(oracle.npy(path.read_bytes()))}
    if path.suffix == ".txt" and path.stem.isdigit():
        pose = np.array(other_text(path).split(), dtype=float).reshape(4, 4)
        turned = np.diag([1.0, -1, -1]) @ pose[:3, :3]
        turns = np.array(values["0 poses"])[:, :3, :3]
        turns[int(path.stem)] = turned.T
        return {"0 turns": turns}
    if path.suffix.lower() in (".png", ".jpg"):
        return other_shade(path, f"0 view {int(path.stem)}")
    return None


def in_zip(columns):
    "Members of an archive as the module zipfile finds them."

    def other(path, values):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            arrays = {Path(n).stem: n for n in archive.namelist() if n.endswith(".npy")}
            return columns({stem: oracle.npy(archive.read(n)) for stem, n in arrays.items()})

    return other


def zip_of(make):
    "The files of a data set as one archive."

    def pack(folder):
        make(folder / "plain")
        with zipfile.ZipFile(folder / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted((folder / "plain").rglob("*")):
                archive.write(path, path.relative_to(folder / "plain"))
        shutil.rmtree(folder / "plain")

    return pack


def rooms(folder):
    from unipre3d.data.scannet import write_box_rooms

    write_box_rooms(folder, rooms=dict(a="train"), n_frames=2, hw=(24, 32), spacing=0.5)


def open_rooms(folder):
    from unipre3d.data.scannet import ScanNetFrames

    return read_all(ScanNetFrames(folder, split="train", labels=20, hw=(12, 16)))


def other_rooms(path, values):
    kind = path.parent.parent.name
    if path.suffix == ".npy":
        return by_column([path.stem], lambda name: oracle.npy(path.read_bytes()))
    if path.name == "intrinsics.txt":
        K = np.array(other_text(path).split(), dtype=float).reshape(4, 4)[:3, :3]
        K[:2, 2] += 0.5
        return {"0 K": np.diag([0.5, 0.5, 1]) @ K}
    if kind == "pose":
        pose = np.array(other_text(path).split(), dtype=float).reshape(4, 4)
        place = values["0 frames"].index(int(path.stem))
        return other_pose(values, "0 poses", place, np.linalg.inv(pose))
    if kind == "color":
        return other_shade(path, f"0 view {path.stem}")
    if kind == "depth":
        from PIL import Image

        stored = np.asarray(Image.open(path))[1::2, 1::2]
        return {f"0 view {path.stem} depth": np.where(stored > 50, stored / 1000, 0)}
    return None


def shards(folder):
    from unipre3d.data.readers import Store
    from unipre3d.data.shards import write_shards

    rooms(folder / "plain")
    write_shards(Store(folder / "plain"), folder / "packed", 1, progress=False)
    shutil.rmtree(folder / "plain")


def open_shards(folder):
    return open_rooms(folder / "packed")


def raw_scan(folder):
    from test_scannet import write_scan

    write_scan(folder, "a", n_frames=2)
    words = "raw_category\tid\tnyu40id\ntable\t7\t7\nchair\t5\t5\n"
    (folder / "labels.tsv").write_text(words)
    (folder / "train.txt").write_text("a\n")


def open_raw(folder):
    from unipre3d.data.scannet import convert_scans, read_labels, read_mesh

    scene, n = folder / "a", len(read_mesh(folder / "a" / "a_vh_clean_2.ply")["coord"])
    found = {f"1 {name}": labels for name, labels in read_labels(scene, "a", n).items()}
    with tempfile.TemporaryDirectory() as out:
        split = {"train": folder / "train.txt"}
        convert_scans(
            folder, out, split=split, labels=folder / "labels.tsv", every=1, progress=False
        )
        return found | open_converted(Path(out))


def open_converted(folder):
    from unipre3d.data.scannet import ScanNetFrames

    return read_all(ScanNetFrames(folder, split="train", labels=20, hw=(12, 16)))


def other_raw(path, values):
    if path.name.endswith(".labels.ply"):
        from unipre3d.data.scannet import NYU40

        classes = {number: k for k, number in enumerate(NYU40.tolist())}
        rows = oracle.ply(path.read_bytes())["vertex"]["label"]
        return {"1 segment20": np.array([classes.get(int(n), -1) for n in rows])}
    if path.suffix == ".ply":
        rows = oracle.ply(path.read_bytes())["vertex"]
        xyz, color = (
            np.stack([rows[k] for k in names], 1) for names in ("xyz", ("red", "green", "blue"))
        )
        return {"0 xyz": xyz, "0 colors": oracle.as_color(color)}
    if path.suffix == ".json":
        home = path.parent
        segments, groups = (
            json.loads(next(home.glob(f"*{end}")).read_bytes())
            for end in ("segs.json", "aggregation.json")
        )
        segment = np.array(segments["segIndices"])
        found = np.full(len(segment), -1)
        for one in groups["segGroups"]:
            found[np.isin(segment, one["segments"])] = one["objectId"]
        return {"1 instance": oracle.as_objects(found)}
    return None


def labelled(folder):
    from unipre3d.data import labelled as writers

    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(8, 6)).astype(np.float32)
    writers.write_scanobjectnn(folder / "son", cloud[None, :, :3], [3], split="train")
    for form in ("normal_resampled", "ply_hdf5"):
        clouds = [("a", cloud), ("b", cloud)]
        writers.write_modelnet40(folder / form, clouds, ["a", "b"], split="train", form=form)
    part = np.concatenate([cloud, np.zeros((8, 1))], 1)
    shapes = {"train": [("02691156", "m", part)]}
    writers.write_shapenetpart(folder / "part", shapes, {"Airplane": "02691156"})
    arrays = dict(coord=cloud[:, :3], color=np.full((8, 3), 9), segment=np.zeros(8))
    writers.write_s3dis(folder / "s3dis", "Area_1/a", **arrays, instance=np.zeros(8))


def open_labelled(folder):
    from unipre3d.data.labelled import S3DIS, ModelNet40, ScanObjectNN, ShapeNetPart

    scans = ScanObjectNN(folder / "son", split="train")
    found = read_all(scans, False, "son-") | {"son-0 mask": scans.mask(0)}
    for form in ("normal_resampled", "ply_hdf5"):
        found |= read_all(ModelNet40(folder / form, split="train"), False, f"{form}-")
    found |= read_all(ShapeNetPart(folder / "part", split="train"), False, "part-")
    return found | read_all(S3DIS(folder / "s3dis", split="test", test_area=1), False)


def other_labelled(path, values):
    import h5py

    form = next(p.name for p in path.parents if p.parent.name == "labelled")
    if path.suffix == ".npy":
        return by_column(
            [path.stem],
            lambda name: (
                oracle.npy(path.read_bytes()).squeeze(-1)
                if name in ("segment", "instance")
                else oracle.npy(path.read_bytes())
            ),
        )
    if path.suffix == ".h5":
        with h5py.File(path, "r") as file:
            found = {
                f"{form}-count": len(file["data"]),
                f"{form}-0 radii": oracle.as_radii(file["data"][0]),
            }
            found[f"{form}-0 label"] = np.ravel(file["label"][0])[0]
            if form == "son":
                found["son-0 mask"] = file["mask"][0] != -1
            return found
    if path.parent.name in ("a", "b", "02691156"):
        mark = "," if form == "normal_resampled" else None
        rows = np.loadtxt(io.StringIO(other_text(path)), delimiter=mark, ndmin=2)
        number = 1 if path.parent.name == "b" else 0
        found = {f"{form}-{number} radii": oracle.as_radii(rows[:, :3])}
        if form == "part":
            _, real = oracle.as_points(rows[:, :3])
            found["part-0 part"] = oracle.as_labels(rows[real, 6])
        return found
    return None


def scans(folder):
    from unipre3d.worlds.scans import write_scans

    one = dict(xyz=np.zeros((8, 3), np.float32), mask=np.ones(8, bool), part=np.ones(8, np.uint8))
    about = dict(classes=["chair"], parts={"chair": ["leg"]})
    write_scans(folder / "scans.npz", [one, one], ["a", "b"], [0, 0], **about)
    np.savez_compressed(
        folder / "room.npz",
        cell=np.zeros((4, 3), np.uint8),
        color=np.zeros((4, 3), np.uint8),
        normal=np.zeros((4, 3), np.int8),
        truth=np.zeros(4, np.int8),
        found=np.zeros(4, np.int8),
        voxel_size=np.float32(0.1),
    )


def open_scans(folder):
    from unipre3d.files import read_arrays
    from unipre3d.worlds.scans import Scans

    found = read_all(Scans(folder / "scans.npz"), False)
    arrays = read_arrays(folder / "room.npz")
    return found | {f"room {name}_array": array for name, array in arrays.items()}


def other_scans(path, values):
    arrays = np.load(path, allow_pickle=False)
    if path.name == "room.npz":
        return {f"room {name}_array": arrays[name] for name in arrays.files}
    return {f"0 {name}": arrays[name][0] for name in ("xyz", "part", "label")}


def gaussians(folder):
    import torch

    from unipre3d.core import GaussianBatch
    from unipre3d.formats import save_gaussians

    one, four = torch.zeros(3, 3), torch.nn.functional.normalize(torch.ones(3, 4))
    batch = torch.zeros(3, dtype=torch.long)
    cloud = GaussianBatch(one, one + 1, four, torch.ones(3) / 2, torch.zeros(3, 4, 3), batch, 1)
    for kind in (".ply", ".spz", ".glb"):
        save_gaussians(cloud, folder / f"gaussians{kind}")


def open_gaussians(folder):
    from unipre3d.formats import load_gaussians

    found = {}
    for kind in (".ply", ".spz", ".glb"):
        cloud, _ = load_gaussians(folder / f"gaussians{kind}")
        for name in ("mean", "scale", "quat", "opacity", "sh"):
            found[f"{kind} {name}"] = getattr(cloud, name).numpy()
    return found


def other_gaussians(path, values):
    if path.suffix != ".ply":
        return None
    rows = oracle.ply(path.read_bytes())["vertex"]
    mean = np.stack([rows[axis] for axis in "xyz"], 1)
    return {".ply mean": mean, ".ply opacity": 1 / (1 + np.exp(-rows["opacity"].astype(float)))}


OBJ = (
    "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv .5 .5 1\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
    "usemtl wood\nf 1/1 2/2 3/3 4/4\nf 1/1 2/2 5/3\nf 2/1 3/2 5/3\n"
)


def meshes(folder):
    import trimesh
    from PIL import Image

    Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / "wood.png")
    (folder / "a.obj").write_text(OBJ)
    (folder / "a.mtl").write_text("newmtl wood\nKd 1 1 1\nmap_Kd -s 1 1 1 wood.png\n")
    box = trimesh.creation.box()
    box.visual.face_colors = [200, 40, 30, 255]
    for name in ("b.ply", "c.stl", "d.off", "e.glb"):
        box.export(folder / name)
    box.export(folder / "f.ply", encoding="ascii")
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=Image.open(folder / "wood.png"), alphaMode="BLEND"
    )
    box.visual = trimesh.visual.TextureVisuals(uv=box.vertices[:, :2], material=material)
    box.export(folder / "g.glb")
    (folder / "gltf").mkdir()
    for name, data in trimesh.exchange.gltf.export_gltf(trimesh.Scene([box])).items():
        (folder / "gltf" / name).write_bytes(data)
    moved = dict(KHR_texture_transform=dict(offset=[0.1, 0.2], rotation=1.0, scale=[2, 3]))
    tree = json.loads((folder / "gltf" / "model.gltf").read_text())
    tree["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]["extensions"] = moved
    (folder / "gltf" / "model.gltf").write_text(json.dumps(tree))
    corners = ("0 0 0", "1 0 0", "1 1 0", "0 1 1")
    lines = [f"v {corner} 200 30 30" for corner in corners] + ["f 1 2 3", "f 1 3 4"]
    (folder / "h.obj").write_text("\n".join(lines))
    lines = ["COFF", "4 2 0", *corners, "3 0 1 2 255 0 0", "3 0 2 3 255 0 0"]
    (folder / "i.off").write_text("\n".join(lines))
    kinds = [f"property float {k}" for k in "x y z red green blue".split()]
    lines = ["ply", "format ascii 1.0", "element vertex 4", *kinds, "element face 2"]
    lines += ["property list uchar int vertex_indices", "end_header"]
    lines += [f"{corner} 200 30 0.5" for corner in corners] + ["3 0 1 2", "3 0 2 3"]
    (folder / "j.ply").write_text("\n".join(lines))


def open_meshes(folder):
    "The mesh that was mutated: `only`, or all."
    from unipre3d.worlds.mesh import read_mesh

    changed = MUTATED.get("name", "")
    near = [folder / "a.obj"] if changed in ("a.mtl", "wood.png") else []
    near = [folder / "gltf" / "model.gltf"] if changed.startswith("gltf/") else near
    (path,) = near or [folder / changed]
    mesh = read_mesh(path)
    found = dict(corners=mesh.corners, facing=mesh.normal, uv=mesh.uv, tint=mesh.tint)
    found["material"] = mesh.material
    for k, material in enumerate(mesh.materials):
        found[f"{k}_tint"] = np.array(material.color)
        found[f"{k}_texture"] = material.texture
        found[f"{k}_opacity"] = material.opacity
    return {f"0 {name.replace('_', ' ')}": v for name, v in found.items() if v is not None}


def other_meshes(path, values):
    data = path.read_bytes()
    if path.suffix == ".ply":
        found = oracle.ply(data)
        lists = [v for k, v in found["face"].items() if k in ("vertex_indices", "vertex_index")]
        corners = np.stack([found["vertex"][axis] for axis in "xyz"], 1)
        return {"0 soup": oracle.soup(oracle.fans(corners, lists[0]))}
    if path.suffix == ".gltf":
        beside = lambda buffer: (path.parent / buffer["uri"]).read_bytes()
        return {"0 soup": oracle.soup(oracle.gltf(data, beside))}
    readers = {".obj": oracle.obj, ".off": oracle.off, ".stl": oracle.stl, ".glb": oracle.glb}
    if path.suffix in readers:
        return {"0 soup": oracle.soup(readers[path.suffix](data))}
    return None


def clouds(folder):
    from test_clouds import pack_lzf

    rng = np.random.default_rng(0)
    xyz = rng.normal(size=(12, 3)).astype(np.float32)
    rgb = rng.integers(2, 256, (12, 3)).astype(np.uint8)
    part = np.arange(12) % 4
    from unipre3d.data.clouds import write_cloud

    write_cloud(folder / "a.ply", xyz, rgb, {"part": part}, oracle.as_normal(xyz))
    kinds = [f"property float {k}" for k in "xyz"] + [
        f"property uchar {k}" for k in ("red", "green", "blue")
    ]
    head = [
        "ply",
        "format ascii 1.0",
        "element vertex 12",
        *kinds,
        "property int part",
        "end_header",
    ]
    lines = [
        " ".join(map(str, (*p, *c, k)))
        for p, c, k in zip(xyz.tolist(), rgb.tolist(), part.tolist())
    ]
    (folder / "b.ply").write_text("\n".join(head + lines) + "\n")
    head = "FIELDS x y z part\nSIZE 4 4 4 4\nTYPE F F F I\nCOUNT 1 1 1 1\nWIDTH 12\nHEIGHT 1\nPOINTS 12\nDATA "
    rows = np.rec.fromarrays([*xyz.T, part.astype("<i4")], dtype="<f4,<f4,<f4,<i4")
    plain = [" ".join(map(str, (*p, k))) for p, k in zip(xyz.tolist(), part.tolist())]
    (folder / "c.pcd").write_text(head + "ascii\n" + "\n".join(plain) + "\n")
    (folder / "d.pcd").write_bytes(head.encode() + b"binary\n" + rows.tobytes())
    turned = b"".join(np.ascontiguousarray(rows[name]).tobytes() for name in rows.dtype.names)
    packed = pack_lzf(turned)
    sizes = struct.pack("<II", len(packed), len(turned))
    (folder / "e.pcd").write_bytes(head.encode() + b"binary_compressed\n" + sizes + packed)
    np.save(folder / "f.npy", np.concatenate([xyz, rgb], 1))
    np.savez_compressed(folder / "g.npz", xyz=xyz, color=rgb, part=part)
    lines = [",".join(map(str, (*p, *c))) for p, c in zip(xyz.tolist(), rgb.tolist())]
    (folder / "h.csv").write_text("\n".join(["x,y,z,red,green,blue", *lines]) + "\n")
    np.savetxt(folder / "i.xyz", xyz)
    np.savetxt(folder / "j.txt", np.concatenate([xyz, rgb], 1), fmt="%.6f")


def open_clouds(folder):
    from unipre3d.data.clouds import read_cloud

    cloud = read_cloud(folder / MUTATED["name"])
    found = dict(xyz=cloud.xyz + cloud.offset, color=cloud.color, normal=cloud.normal)
    found |= {f"{name} scalar": values for name, values in cloud.scalars.items()}
    return {f"0 {name}": values for name, values in found.items() if values is not None}


def other_clouds(path, values):
    data = path.read_bytes()
    rgb = ("red", "green", "blue")
    if path.suffix in (".ply", ".pcd"):
        rows = oracle.ply(data)["vertex"] if path.suffix == ".ply" else oracle.pcd(data)
        if rows is None:
            return None
        names = rows.dtype.names if hasattr(rows, "dtype") else rows
        small = {name.lower(): rows[name] for name in names}
        raw = {"xyz": np.stack([small[k] for k in "xyz"], 1)}
        if set(rgb) <= set(small):
            raw["color"] = np.stack([small[k] for k in rgb], 1)
    elif path.suffix == ".npz":
        raw = {name: array for name, array in np.load(path).items() if name in ("xyz", "color")}
    elif path.suffix == ".csv":
        rows = oracle.table(data)
        wide = [[float(row[k]) for k in (*"xyz", *rgb)] for row in rows]
        raw = dict(xyz=np.array(wide)[:, :3], color=np.array(wide)[:, 3:])
    else:
        rows = (
            oracle.npy(data)
            if path.suffix == ".npy"
            else np.loadtxt(io.StringIO(other_text(path)), ndmin=2)
        )
        raw = dict(xyz=rows[:, :3])
    xyz, real = oracle.as_points(raw["xyz"])
    found = {"0 xyz": xyz}
    if "color" in raw:
        found["0 colors"] = oracle.as_color(raw["color"])[real]
    return found


def captures(folder):
    from test_posed import HW, K, WALK, box_frame, colmap_binary, colmap_folder, colmap_text
    from test_posed import scene_folder, transforms_folder, tum_folder

    frames = [box_frame(pose, K, HW) for pose in WALK[:3]]
    colmap_folder(folder / "bytes", frames, write=colmap_binary, depth=1000)
    colmap_folder(folder / "text", frames, write=colmap_text)
    transforms_folder(folder / "transforms", frames, integer_depth_scale=0.001)
    tum_folder(folder / "sequence", frames)
    scene_folder(folder / "scene", frames)


def open_captures(folder):
    from unipre3d.data.imports import draw_color, draw_depth
    from unipre3d.data.posed import read_captures

    place = folder / Path(MUTATED["name"]).parts[0]
    values = (70, 70, 39.5, 29.5) if place.name == "sequence" else ()
    (capture,) = read_captures(place, intrinsics=values)
    for remark in capture.remarks:  # printed by the command
        warnings.warn(f"{place}: {remark}")
    images = capture.images
    found = dict(count=len(images), names=[one.color.name for one in images])
    found |= dict(
        poses=np.stack([one.pose for one in images]), K=np.stack([one.lens.K for one in images])
    )
    found |= {f"{key}_tensor": value for key, value in (capture.cloud or {}).items()}
    if "coord_tensor" in found:
        found["xyz"] = found["coord_tensor"]
    for k, one in enumerate(images[:2]):
        found[f"{k}_rgb"] = draw_color(one, one.lens)
        found[f"{k}_depth"] = draw_depth(one, one.lens) if one.depth else None
    return {f"0 {name.replace('_', ' ')}": v for name, v in found.items() if v is not None}


def other_captures(path, values):
    names = list(values["0 names"])
    poses = np.array(values["0 poses"])
    if path.name == "transforms.json":
        frames = json.loads(other_text(path))["frames"]
        assert len(frames) == len(names)
        for frame in frames:
            matrix = np.eye(4)
            rows = np.array(frame["transform_matrix"], dtype=float)
            matrix[: len(rows)] = rows
            poses[names.index(Path(frame["file_path"]).name)] = matrix @ np.diag([1, -1, -1, 1])
        return {"0 poses": poses}
    if path.parent.name == "pose":
        poses[names.index(f"{path.stem}.png")] = oracle.npy(path.read_bytes()).reshape(4, 4)
        return {"0 poses": poses}
    if path.name == "points3D.txt":
        lines = [line.split() for line in other_text(path).splitlines()]
        rows = np.array(
            [[float(x) for x in line[1:7]] for line in lines if line and line[0][0] != "#"]
        )
        return {"0 coord tensor": rows[:, :3], "0 color tensor": rows[:, 3:]}
    return None


def runs(folder):
    import torch
    from safetensors.torch import save_file

    from unipre3d.backbones import StandardTransformer
    from unipre3d.core import data_dir
    from unipre3d.runs.checkpoint import save_tensors

    record = sorted((data_dir() / "records").glob("*.json"))[0]
    record = next(
        p
        for p in sorted((data_dir() / "records").glob("*.json"))
        if "kind" in json.loads(p.read_text())
    )
    shutil.copy(record, folder / "record.json")
    (folder / "config.json").write_text(json.dumps(dict(name="mini", values={"lr": 0.1})))
    (folder / "metrics.csv").write_text("step,loss\n1,0.5\n2,0.4\n")
    weights = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}
    save_tensors(folder / "checkpoint.safetensors", weights, {"step": 3})
    torch.save({"model": weights, "epoch": 3}, folder / "released.pth")
    torch.save(weights, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(weights, folder / "released.safetensors")
    small = StandardTransformer(
        encoder_widths=(8, 8, 8), encoder_dims=12, width=12, depth=1, num_heads=2
    )
    small.save_pretrained(folder / "backbone")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / "vae").mkdir(exist_ok=True)
        shutil.copy(data_dir() / "autoencoder-mini" / name, folder / "vae" / name)


def other_runs(path, values):
    import torch
    from safetensors.torch import load

    if path.suffix == ".json" and path.parent.name == "runs":
        found = json.loads(other_text(path))
        found.pop("sha256" if path.name == "config.json" else "", None)
        return {"text": json.dumps(found, sort_keys=True)}
    if path.suffix in (".pth", ".safetensors"):
        data = path.read_bytes()
        tensors = (
            load(data)
            if path.suffix == ".safetensors"
            else torch.load(io.BytesIO(data), weights_only=True)
        )
        parts = {k: v for k, v in tensors.items() if isinstance(v, dict)}
        inner = [{f"{part}.{k}": v for k, v in own.items()} for part, own in parts.items()]
        tensors = inner[0] if inner else tensors
        return {
            f"0 {k} tensor": v.float().numpy()
            for k, v in tensors.items()
            if f"0 {k} tensor" in values or path.parent.name == "runs"
        }
    return None


def open_runs(folder):
    from unipre3d.backbones import StandardTransformer
    from unipre3d.image import load_autoencoder
    from unipre3d.records import read_config, read_record
    from unipre3d.released import read_checkpoint
    from unipre3d.runs.checkpoint import MetricsFile, load_tensors

    changed = MUTATED.get("name", "")

    def text(value):
        return {"text": json.dumps(value, sort_keys=True)}

    def tensors(found):
        return {f"0 {name} tensor": tensor.float().numpy() for name, tensor in found.items()}

    def metrics():
        MetricsFile(folder / "metrics.csv", ["step", "loss"], 1).close()
        rows = list(csv.DictReader(io.StringIO((folder / "metrics.csv").read_text())))
        return {f"{row['step']} loss": np.array(float(row["loss"])) for row in rows}

    calls = {
        "record.json": lambda: text(read_record(folder / "record.json")),
        "config.json": lambda: text(read_config(folder)),
        "metrics.csv": metrics,
        "checkpoint.safetensors": lambda: tensors(
            load_tensors(folder / "checkpoint.safetensors")[0]
        ),
        "vae": lambda: tensors(load_autoencoder(folder / "vae").state_dict()),
        "backbone": lambda: tensors(
            StandardTransformer.from_pretrained(folder / "backbone").state_dict()
        ),
    }
    released = lambda: tensors(read_checkpoint(folder / changed))
    return calls.get(changed, calls.get(changed.partition("/")[0], released))()


KITS = {
    "objects": (lambda folder: objects(folder, "unipre3d"), open_objects, other_objects),
    "released": (lambda folder: objects(folder, "released"), open_released, other_released),
    "objects in a zip": (
        zip_of(lambda folder: objects(folder, "unipre3d")),
        lambda folder: open_objects(folder / "set.zip"),
        in_zip(lambda arrays: table_columns(*arrays.values())),
    ),
    "rooms": (rooms, open_rooms, other_rooms),
    "rooms in a zip": (
        zip_of(rooms),
        lambda folder: open_rooms(folder / "set.zip"),
        in_zip(lambda arrays: by_column(arrays, arrays.get)),
    ),
    "shards": (shards, open_shards, lambda path, values: None),
    "raw scans": (raw_scan, open_raw, other_raw),
    "labelled": (labelled, open_labelled, other_labelled),
    "scans": (scans, open_scans, other_scans),
    "gaussians": (gaussians, open_gaussians, other_gaussians),
    "meshes": (meshes, open_meshes, other_meshes),
    "clouds": (clouds, open_clouds, other_clouds),
    "captures": (captures, open_captures, other_captures),
    "runs": (runs, open_runs, other_runs),
}
ONE_BY_ONE = ("meshes", "clouds", "captures", "runs")  # kits whose files are opened one by one
MUTATED = {}  # "name": of the file that was changed, for kits whose files are opened one by one


class Kit:
    "The files of one kind in a folder, and their bytes."

    def __init__(self, name, home):
        self.name = name
        make, self.open, self.other = KITS[name]
        self.folder = home / name.replace(" ", "_")
        self.folder.mkdir()
        make(self.folder)
        found = sorted(p for p in self.folder.rglob("*") if p.is_file())
        unread = re.compile(r"easy/(0[2-9]|[12]\d)\.")  # views that `read_all` leaves out
        found = [p for p in found if not unread.search(str(p))]
        self.files = {str(p.relative_to(self.folder)): p.read_bytes() for p in found}
        self.first = {}  # values of the whole files; of kits that are opened one by one by file
        whole = list(self.files)[: None if name in ONE_BY_ONE else 1]
        for MUTATED["name"] in whole:  # as they are they open, or nothing would be tested
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.first[MUTATED["name"]] = self.open(self.folder)
            self.restore(MUTATED["name"])
        for file in self.files:  # what another reader finds is compared, or it would tell nothing
            values = self.whole(file)
            found = self.other(self.folder / file, values)
            wrong = oracle.wrong_kind(values) or oracle.differing(values, found or {})
            assert not wrong, f"{name}: {file}: {wrong}"

    def whole(self, name):
        "Values of the whole files."
        return self.first.get(name) or next(iter(self.first.values()))

    def restore(self, name):
        path = self.folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists() or path.is_symlink():
            path.unlink()
        path.write_bytes(self.files[name])


# ---- what is done to a file


def cut(data, rng):
    a, b = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    return a, b


def flip_bits(data, rng):
    out = bytearray(data)
    for at in rng.integers(0, len(out), int(rng.integers(1, 12))):
        out[at] ^= 1 << int(rng.integers(8))
    return bytes(out)


def flip_head(data, rng):
    return flip_bits(data[:200], rng) + data[200:]


def truncate(data, rng):
    return data[: int(rng.integers(0, len(data)))]


def drop_chunk(data, rng):
    a, b = cut(data, rng)
    return data[:a] + data[b:]


def repeat_chunk(data, rng):
    a, b = cut(data, rng)
    return data[:b] + data[a:b] + data[b:]


def swap_chunks(data, rng):
    a, b = cut(data, rng)
    return data[b:] + data[a:b] + data[:a]


def fill_chunk(data, rng):
    a, b = cut(data, rng)
    b = min(b, a + 64)
    return data[:a] + bytes([int(rng.choice([0, 255, 32, 48]))]) * (b - a) + data[b:]


NUMBERS = (
    b"0 -1 1 7 255 65536 2147483648 99999999999 1e400 nan inf 3.7 abc null [] true 0x10".split()
)


def change_number(data, rng):
    found = [m.span() for m in re.finditer(rb"-?\d+\.?\d*", data[:3000])]
    if not found:
        return flip_head(data, rng)
    a, b = found[int(rng.integers(len(found)))]
    return data[:a] + NUMBERS[int(rng.integers(len(NUMBERS)))] + data[b:]


def change_word(data, rng):
    "A binary number of the header."
    at = int(rng.integers(0, max(1, min(len(data), 400) - 8)))
    value = int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63 - 1]))
    form = "<Q" if rng.random() < 0.5 else "<I"
    word = struct.pack(form, value % (2 ** (8 * struct.calcsize(form))))
    return data[:at] + word + data[at + len(word) :]


def other_encoding(data, rng):
    name = ["utf-16", "utf-8-sig", "utf-16-be", "utf-32"][int(rng.integers(4))]
    return data.decode("latin1").encode(name)


def change_letters(data, rng):
    pairs = [
        (b",", b";"),
        (b"\n", b"\r\n"),
        (b" ", b"\t"),
        (b"{", b"["),
        (b'"', b"'"),
        (b"e", b"\xe9"),
    ]
    old, new = pairs[int(rng.integers(len(pairs)))]
    return data.replace(old, new)


MUTATIONS = [
    flip_bits,
    flip_head,
    truncate,
    drop_chunk,
    repeat_chunk,
    swap_chunks,
    fill_chunk,
    change_number,
    change_word,
    other_encoding,
    change_letters,
]


# ---- hostile files: made here, and nothing like them is kept


def npy_header(shape, kind="<f4"):
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + b"\0" * 64


def png_header(w, h):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">2I5B", w, h, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def zip_of_zeros(names, size):
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                with archive.open(name, "w", force_zip64=True) as member:
                    for _ in range(size >> 20):
                        member.write(bytes(2**20))
        return file.getvalue()


def h5_of_nothing(path):
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("data", (2**20, 2**14, 3), "f4", chunks=(1, 64, 3))
        file.create_dataset("label", (2**20,), "i4", chunks=(64,))
    return path.read_bytes()


def glb(header):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    return b"glTF" + struct.pack("<3I", 2, len(text) + 20, len(text)) + b"JSON" + text


def ply_header(form, rows, faces=0):
    names = "".join(f"property float {x}\n" for x in "xyz")
    lists = f"element face {faces}\nproperty list uchar int vertex_indices\n" if faces else ""
    return f"ply\nformat {form} 1.0\nelement vertex {rows}\n{names}{lists}end_header\n".encode()


def hostile_files(home):
    "Contents by name; most are wrong for most files, which is part of it."
    nodes = [{"mesh": 0}] * 10**5
    accessor = {"count": 2**40, "componentType": 5126, "type": "VEC3"}
    return {
        "empty": b"",
        "one byte": b"\n",
        "zeros": bytes(4096),
        "text": b"not what was expected\n" * 20,
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 88\n",
        "page": b"<!DOCTYPE html><html><title>Log in</title></html>",
        "deep JSON": b"[" * 10**6,
        "deep objects": b'{"a":' * 10**5,
        "many values": b"[" + b"{}," * (5 * 10**6) + b"{}]",
        "JSON null": b"null",
        "JSON list": b"[1, 2, 3]",
        "JSON numbers": b'{"name": NaN, "values": 1e999, "kind": ["x"], "metrics": 3, "points": 1}',
        "long integer": b"9" * 10**5,
        "long line": b"1," * 10**6,
        "many lines": b"1\n" * 10**6,
        "UTF-16": "class;id;split\nlamp;a;train\n".encode("utf-16"),
        "huge array": npy_header("(1000000000000, 3)"),
        "overflowing array": npy_header("(4611686018427387904, 4)"),
        "negative array": npy_header("(-1, 3)"),
        "array of objects": npy_header("(3,)", "|O"),
        "array of no bytes": npy_header("(1000000000000,)", "|V0"),
        "deep array": npy_header("(" * 60 + ")" * 40),
        "huge picture": png_header(2**20, 2**20),
        "large picture": png_header(30000, 30000),
        "zip of zeros": zip_of_zeros(["convention.json", "train/a/coord.npy"], 300 * 2**20),
        "npz of zeros": zip_of_zeros(["xyz.npy"], 300 * 2**20),
        "zip of deep names": zip_of_zeros(["a/" * 30000], 0),
        "huge h5": h5_of_nothing(home / "nothing.h5"),
        "huge PLY": ply_header("binary_little_endian", 10**12),
        "huge text PLY": ply_header("ascii", 10**12),
        "huge faces": ply_header("binary_little_endian", 0, 10**9) + bytes(10**6),
        "negative PLY": ply_header("ascii", -5),
        "huge STL": bytes(80) + struct.pack("<I", 2**32 - 1) + bytes(500),
        "huge glTF": glb({"accessors": [accessor], "asset": {"version": "2.0"}}),
        "many nodes": glb({"nodes": nodes, "scene": 0, "scenes": [{"nodes": [0]}], "meshes": []}),
        "huge weights": struct.pack("<Q", 2**62) + b"{}",
        "large header": struct.pack("<Q", 10**8 - 1) + b"{" * 64,
        "huge OFF": b"OFF\n1000000000000 1000000000000 0\n0 0 0\n",
    }


def as_pipe(path):
    os.mkfifo(path)


def as_device(path):
    path.symlink_to("/dev/zero")


def as_folder(path):
    path.mkdir()


def as_dead_link(path):
    path.symlink_to("nowhere")


def as_loop(path):
    path.symlink_to(path.name)


PLACES = [as_pipe, as_device, as_folder, as_dead_link, as_loop]


# ---- the check


class TooLong(BaseException):
    "An input took more than LIMIT_S seconds."


def ring(*_):
    raise TooLong


def peak_memory():
    "The most memory of this process since the last call; None where the system does not say."
    try:
        text = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return int(re.search(r"VmHWM:\s+(\d+)", text)[1]) * 1024


def outcome(kit, name, size):
    """What opening the files gives, and its memory in bytes above what was there.

    `refused`, one of the words of `oracle.verdict`, or what is wrong."""
    MUTATED["name"] = name
    before = peak_memory() and peak_memory()
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_S)
    values = None
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            values = kit.open(kit.folder)
    except (ValueError, OSError) as problem:
        text, found = str(problem), "refused"
        named = Path(name).name in text or str(kit.folder) in text
        if "\n" in text:
            found = f"more than one line: {text[:300]!r}"
        elif not named or "expected" not in text and type(problem) is ValueError:
            found = f"without the file: {type(problem).__name__}: {text[:300]}"
    except TooLong:
        found = f"more than {LIMIT_S} s"
    except Exception as problem:
        found = f"traceback: {type(problem).__name__}: {str(problem)[:200]!r}"
    finally:
        signal.alarm(0)
    above = peak_memory() - before if before else 0
    if values is not None:
        warned = any(
            w.category is not RuntimeWarning and str(kit.folder) in str(w.message) for w in said
        )
        path = kit.folder / name
        other = kit.other if path.is_file() else lambda path, values: None  # a device has no end
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = oracle.verdict(values, kit.whole(name), lambda v: other(path, v), warned)
    if above > size + GIGABYTE:
        found = "more than 1 GB above the file"
    return found, above - size


def check_input(kit, seed, hostile=None):
    "One input of a kit: the outcome, its memory, and a line that says what was done."
    rng = np.random.default_rng(seed)
    name = list(kit.files)[int(rng.integers(len(kit.files)))]
    path = kit.folder / name
    if hostile is None:
        how = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
        data = how(kit.files[name], rng) if kit.files[name] else b""
        path.write_bytes(data)
        size, done = len(data), how.__name__
    else:
        options = [*hostile, *PLACES]
        how = options[int(rng.integers(len(options)))]
        path.unlink()
        size = len(hostile[how]) if how in hostile else 0
        if how in hostile:
            path.write_bytes(hostile[how])
        else:
            how(path)
        done = how if how in hostile else how.__name__
    found, above = outcome(kit, name, size)
    kit.restore(name)
    return found, above, f"seed {seed}, {kit.name}: {name}, {done}"


ALLOWED = ("refused", "same", "agrees", "counted", "in range")


def check_inputs(first, mutated, hostile):
    "Counts by kit and outcome, the most memory above a file in bytes, and a line for each outcome that is not allowed."
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        kits = [Kit(name, home) for name in KITS]
        contents = hostile_files(home)
        counts, wrong, most = Counter(), [], 0
        for seed in range(first, first + mutated + hostile):
            kit = kits[seed % len(kits)]
            evil = contents if seed >= first + mutated else None
            print(seed, kit.name, file=sys.stderr, flush=True)
            found, above, line = check_input(kit, seed, evil)
            most = max(most, above)
            counts[kit.name, found if found in ALLOWED else found.partition(":")[0]] += 1
            if found not in ALLOWED:
                wrong.append(f"{line}: {found}")
                print(wrong[-1], file=sys.stderr, flush=True)
    return counts, most, wrong


def write_record(path, first, mutated, hostile, counts, most, wrong, seconds):
    "What a run of this file found."
    from unipre3d.records import code_version, hardware

    table = {}
    for (kit, found), count in sorted(counts.items()):
        table.setdefault(kit, {})[found] = count
    record = dict(date=time.strftime("%Y-%m-%d", time.gmtime()), code=code_version())
    record |= dict(first_seed=first, mutated=mutated, hostile=hostile, seconds=round(seconds))
    record |= dict(most_megabytes_above_file=round(most / 2**20), limit_seconds=LIMIT_S)
    record |= dict(outcomes=table, wrong=wrong, hardware=hardware())
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def test_mutated_and_hostile_files():
    mutated, hostile = DEFAULT
    if long_run := int(os.environ.get("UNIPRE3D_FUZZ", 0)):
        mutated, hostile = long_run, long_run // 10
    command = [sys.executable, __file__, "0", str(mutated), str(hostile)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-500:]


def test_the_oracle_finds_what_is_silent():
    "Each way of being wrong is one; each right way has its word."
    whole = {"0 xyz": np.eye(3), "0 classes": 4, "0 segment": np.arange(3), "0 color": np.eye(3)}
    first = whole | {}

    def says(other=lambda values: None, warned=False, **changed):
        values = whole | {f"0 {name}": value for name, value in changed.items()}
        return oracle.verdict(values, first, other, warned)

    def refuses(values):
        raise OSError("cut off")

    moved = np.eye(3) + 1
    assert says() == "same" and says(xyz=moved) == "in range"
    assert says(lambda values: {"0 xyz": moved}, xyz=moved) == "agrees"
    assert says(lambda values: {"0 xyz": np.eye(3)}, xyz=moved).startswith("silent")
    assert says(refuses, xyz=moved).startswith("silent: refused elsewhere, OSError")
    assert says(refuses, True, xyz=moved) == says(warned=True, xyz=moved) == "counted"
    wrong = dict(
        xyz=moved * np.nan, segment=np.full(3, 4), color=moved, label=4, mask=np.full(3, 2)
    )
    wrong |= dict(instance=np.zeros(2, int), depth=-np.ones((2, 2), np.float32), K=np.zeros((3, 3)))
    wrong |= dict(poses=np.full((1, 4, 4), 2.0), normal=moved, tensor=np.array(np.inf))
    for name, value in wrong.items():
        assert says(warned=True, **{name: value}).startswith(f"silent: 0 {name}")


def test_the_record_of_the_long_run_holds_nothing_wrong():
    record = json.loads(RECORD.read_text())
    assert record["mutated"] >= 10_000 and record["hostile"] >= 1_000 and not record["wrong"]
    rows = record["outcomes"].values()
    assert set(record["outcomes"]) == set(KITS) and {k for row in rows for k in row} <= set(ALLOWED)
    assert sum(sum(row.values()) for row in rows) == record["mutated"] + record["hostile"]
    assert record["most_megabytes_above_file"] < 1024


if __name__ == "__main__":
    numbers = list(map(int, sys.argv[1:4]))
    began = time.monotonic()
    counts, most, wrong = check_inputs(*numbers)
    for (kit, found), count in sorted(counts.items()):
        print(f"{kit:20} {found:40} {count:6}")
    print(f"at most {most / 2**20:.0f} MB above a file")
    print(*wrong, sep="\n")
    if len(sys.argv) > 4:
        write_record(sys.argv[4], *numbers, counts, most, wrong, time.monotonic() - began)
    sys.exit(bool(wrong))
