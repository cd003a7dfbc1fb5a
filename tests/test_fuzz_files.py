"""Fuzzing of everything that opens a file: mutated and hostile files for every reader, record, config and checkpoint.

The default run checks a few inputs in a process of its own. The long run, for a change of a reader, is one of

    UNIPRE3D_FUZZ=10000 python -m pytest tests/test_fuzz_files.py
    python tests/test_fuzz_files.py 0 10000 1000  # first seed, mutated inputs, hostile inputs

An input is a function of its seed and nothing of it is kept. Allowed are a value, or one line of ValueError or OSError that
names the file. Anything else is printed with its seed: another exception, a line without the file, more than LIMIT_S seconds,
more than a gigabyte of memory above the file. `check_input(kit, seed, hostile)` repeats it.
"""

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
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

DEFAULT = (60, 40)  # mutated and hostile inputs of the default run
LIMIT_S = 30
GIGABYTE = 2**30


# ---- what is opened: one small data set of each kind, and a call that reads all of it


def read_all(reader, views=True):
    "What training reads of a data set."
    for i in range(min(2, len(reader))):
        reader.name(i), reader.label(i), reader.rows(i)
        if views:
            reader.world_to_cam(i), reader.K(i)
            for frame in reader.frames(i)[:2]:
                reader.view(i, frame)


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

    read_all(ShapeNetViews(folder, split="train", size=32))


def open_released(folder):
    from unipre3d.data.shapenet import ShapeNetViews

    read_all(ShapeNetViews(folder, convention="released", size=32, radius=0.65))
    if MUTATED.get("name") in ("train.txt", "test.txt"):
        ShapeNetViews(folder, convention="released", split="test")


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

    read_all(ScanNetFrames(folder, split="train", labels=20, hw=(12, 16)))


def raw_scan(folder):
    from test_scannet import write_scan

    write_scan(folder, "a", n_frames=2)
    words = "raw_category\tid\tnyu40id\ntable\t7\t7\nchair\t5\t5\n"
    (folder / "labels.tsv").write_text(words)
    (folder / "train.txt").write_text("a\n")


def open_raw(folder):
    from unipre3d.data.scannet import convert_scans, read_labels, read_mesh

    scene, n = folder / "a", len(read_mesh(folder / "a" / "a_vh_clean_2.ply")["coord"])
    read_labels(scene, "a", n)
    with tempfile.TemporaryDirectory() as out:
        split = {"train": folder / "train.txt"}
        convert_scans(
            folder, out, split=split, labels=folder / "labels.tsv", every=1, progress=False
        )


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
    read_all(scans, False)
    scans.mask(0)
    for form in ("normal_resampled", "ply_hdf5"):
        read_all(ModelNet40(folder / form, split="train"), False)
    read_all(ShapeNetPart(folder / "part", split="train"), False)
    read_all(S3DIS(folder / "s3dis", split="test", test_area=1), False)


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

    read_all(Scans(folder / "scans.npz"), False)
    read_arrays(folder / "room.npz")


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

    for kind in (".ply", ".spz", ".glb"):
        load_gaussians(folder / f"gaussians{kind}")


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
    for path in near or [folder / changed]:
        read_mesh(path)


def prepared(folder):
    meshes(folder / "all")


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


def open_runs(folder):
    from unipre3d.backbones import StandardTransformer
    from unipre3d.image import load_autoencoder
    from unipre3d.records import read_config, read_record
    from unipre3d.released import read_checkpoint
    from unipre3d.runs.checkpoint import MetricsFile, load_tensors

    changed = MUTATED.get("name", "")
    calls = {
        "record.json": lambda: read_record(folder / "record.json"),
        "config.json": lambda: read_config(folder),
        "metrics.csv": lambda: MetricsFile(folder / "metrics.csv", ["step", "loss"], 1).close(),
        "checkpoint.safetensors": lambda: load_tensors(folder / "checkpoint.safetensors"),
        "vae": lambda: load_autoencoder(folder / "vae"),
        "backbone": lambda: StandardTransformer.from_pretrained(folder / "backbone"),
    }
    released = lambda: read_checkpoint(folder / changed)
    calls.get(changed, calls.get(changed.partition("/")[0], released))()


KITS = {
    "objects": (lambda folder: objects(folder, "unipre3d"), open_objects),
    "released": (lambda folder: objects(folder, "released"), open_released),
    "objects in a zip": (
        zip_of(lambda folder: objects(folder, "unipre3d")),
        lambda folder: open_objects(folder / "set.zip"),
    ),
    "rooms": (rooms, open_rooms),
    "rooms in a zip": (zip_of(rooms), lambda folder: open_rooms(folder / "set.zip")),
    "raw scans": (raw_scan, open_raw),
    "labelled": (labelled, open_labelled),
    "scans": (scans, open_scans),
    "gaussians": (gaussians, open_gaussians),
    "meshes": (meshes, open_meshes),
    "runs": (runs, open_runs),
}
ONE_BY_ONE = ("meshes", "runs")  # kits whose files are opened one by one
MUTATED = {}  # "name": of the file that was changed, for kits whose files are opened one by one


class Kit:
    "The files of one kind in a folder, and their bytes."

    def __init__(self, name, home):
        self.name = name
        make, self.open = KITS[name]
        self.folder = home / name.replace(" ", "_")
        self.folder.mkdir()
        make(self.folder)
        found = sorted(p for p in self.folder.rglob("*") if p.is_file())
        unread = re.compile(r"easy/(0[2-9]|[12]\d)\.")  # views that `read_all` leaves out
        found = [p for p in found if not unread.search(str(p))]
        self.files = {str(p.relative_to(self.folder)): p.read_bytes() for p in found}
        whole = list(self.files)[: None if name in ONE_BY_ONE else 1]
        for MUTATED["name"] in whole:  # as they are they open, or nothing would be tested
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.open(self.folder)

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
    "What opening the files gives: `value`, `refused`, or what is wrong."
    MUTATED["name"] = name
    before = peak_memory() and peak_memory()
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kit.open(kit.folder)
        found = "value"
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
    if before and peak_memory() > before + size + GIGABYTE:
        found = "more than 1 GB above the file"
    return found


def check_input(kit, seed, hostile=None):
    "One input of a kit: the outcome and a line that says what was done."
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
    found = outcome(kit, name, size)
    kit.restore(name)
    return found, f"seed {seed}, {kit.name}: {name}, {done}"


def check_inputs(first, mutated, hostile):
    "A table of outcomes, and a line for each that is not allowed."
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        kits = [Kit(name, home) for name in KITS]
        contents = hostile_files(home)
        counts, wrong = Counter(), []
        for seed in range(first, first + mutated + hostile):
            kit = kits[seed % len(kits)]
            evil = contents if seed >= first + mutated else None
            print(seed, kit.name, file=sys.stderr, flush=True)
            found, line = check_input(kit, seed, evil)
            allowed = found in ("value", "refused")
            counts[kit.name, found if allowed else found.partition(":")[0]] += 1
            if not allowed:
                wrong.append(f"{line}: {found}")
    return counts, wrong


def test_mutated_and_hostile_files():
    mutated, hostile = DEFAULT
    if long_run := int(os.environ.get("UNIPRE3D_FUZZ", 0)):
        mutated, hostile = long_run, long_run // 10
    command = [sys.executable, __file__, "0", str(mutated), str(hostile)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-500:]


if __name__ == "__main__":
    counts, wrong = check_inputs(*map(int, sys.argv[1:4]))
    for (kit, found), count in sorted(counts.items()):
        print(f"{kit:20} {found:40} {count:6}")
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))
