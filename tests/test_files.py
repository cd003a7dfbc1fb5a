"""Files as users have them: what a download or a spreadsheet makes of them, where pictures of meshes lie, what headers declare."""

import json
import os
import shutil
import struct
import warnings

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import save_file

from unipre3d.backbones import StandardTransformer
from unipre3d.data.readers import Store
from unipre3d.data.shapenet import ShapeNetViews, export_objects
from unipre3d.files import reading
from unipre3d.image import load_autoencoder
from unipre3d.records import read_config, read_record
from unipre3d.released import load_released, read_checkpoint
from unipre3d.runs.checkpoint import load_tensors, readable_rows, save_tensors
from unipre3d.worlds.mesh import read_mesh
from unipre3d.worlds.prepare import find_meshes, prepare_meshes

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 88123456\n"
PAGE = b"<!DOCTYPE html><html><title>Virus scan warning</title></html>"
OBJ = (
    "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv .5 .5 1\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
    "usemtl wood\nf 1/1 2/2 3/3 4/4\nf 1/1 2/2 5/3\nf 2/1 3/2 5/3\n"
)


def refuses(call, *words, kind=(ValueError, OSError)):
    "One line with all of these words."
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and "expected" in text, text
    for word in words:
        assert str(word) in text, text


# ---- tables and tutorials' files


@pytest.fixture
def objects(tmp_path):
    source = ShapeNetViews(classes=["lamp"], split="train")
    return export_objects(source, tmp_path / "mine", "unipre3d", [0, 1])


@pytest.mark.parametrize("change", ["mark", "semicolons", "tabs", "UTF-16", "empty lines"])
def test_a_table_that_a_spreadsheet_saved(objects, change):
    want = ShapeNetViews(objects)
    path = objects / "objects.csv"
    text = path.read_text()
    data = {
        "mark": b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
        "semicolons": text.replace(",", ";").encode(),
        "tabs": text.replace(",", "\t").encode(),
        "UTF-16": text.replace(",", "\t").encode("utf-16"),
        "empty lines": (text + "\n" + "," * text.partition("\n")[0].count(",") + "\n").encode(),
    }
    path.write_bytes(data[change])
    found = ShapeNetViews(objects)
    assert found.items == want.items and found.table == want.table


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("convention.json", b"{}", "no 'points' in it"),
        ("convention.json", b'{"points": ', "does not load"),
        ("convention.json", b"[" * 10**6, "nested too deeply"),
        ("convention.json", PAGE, "a web page"),
        ("objects.csv", b"id,class\na,lamp\n", "columns class, id, split, found id, class"),
        ("objects.csv", b"id,class,split\na,lamp\n", "2 values in line 2 instead of 3"),
        ("objects.csv", b"id,class,split\n\xff,lamp,train\n", "does not load"),
        ("objects.csv", POINTER, "a Git LFS pointer"),
    ],
)
def test_a_damaged_table_is_named(objects, name, data, words):
    (objects / name).write_bytes(data)
    refuses(lambda: ShapeNetViews(objects), objects / name, words, kind=ValueError)


@pytest.mark.parametrize(
    "change", (dict(fov=255), dict(fov=-1), dict(views=0), dict(views=99_999_999_999))
)
def test_a_convention_that_no_camera_has_is_named(objects, change):
    path = objects / "convention.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refuses(lambda: ShapeNetViews(objects), path, "fov in 0..180", *change.values())


def test_a_convention_with_another_suffix_is_named(objects):
    path = objects / "convention.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(suffix="*png")))
    refuses(lambda: ShapeNetViews(objects), path, "a suffix such as .png", "*png")


def test_a_line_of_metrics_without_an_end_is_no_row(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n" + "2," * 10**5 + "\n2,0.4\n")
    rows = readable_rows(tmp_path / "metrics.csv", ["step", "loss"], 2)
    assert [row["loss"] for row in rows] == ["0.5", "0.4"]


def test_a_row_of_metrics_holds_numbers(tmp_path):
    "Only scores of a validation may be empty."
    columns = ["step", "loss", "val_oa"]
    lines = ["step,loss,val_oa", "1,0.5,", "2,,0.5", "3,x4,0.5", "4,nan,0.25"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    rows = readable_rows(tmp_path / "metrics.csv", columns, 9)
    assert [row["step"] for row in rows] == ["1", "4"]


def test_members_of_an_archive_are_named(objects, tmp_path):
    archive = shutil.make_archive(tmp_path / "set", "zip", objects)
    item = "/".join(ShapeNetViews(objects).items[0])
    (objects / item / "easy" / "00.txt").write_text("1 2 3")
    damaged = shutil.make_archive(tmp_path / "damaged", "zip", objects)
    assert ShapeNetViews(archive).cam_to_world(0).shape == (24, 4, 4)
    refuses(lambda: ShapeNetViews(damaged).cam_to_world(0), "damaged.zip", "00.txt", "16 numbers")
    refuses(lambda: Store(archive).read("none.txt"), f"{archive}: none.txt", "nothing there")


# ---- weights and records


@pytest.mark.parametrize(
    "data, words",
    [
        (POINTER, "a Git LFS pointer, not the file itself; run: git lfs pull"),
        (PAGE, "a web page; download the file in a browser"),
        (b"", "an empty file"),
        (b"junk" * 30, "a file of 120 bytes that does not load"),
    ],
)
def test_a_download_that_is_no_checkpoint(tmp_path, data, words):
    for name in ("model.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(data)
        if data != b"junk" * 30:
            refuses(lambda: load_released(StandardTransformer(), tmp_path / name), name, words)
        refuses(lambda: read_checkpoint(tmp_path / name), name, "expected")
    refuses(lambda: load_tensors(tmp_path / "model.safetensors"), "model.safetensors", words)
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(data)
    refuses(lambda: load_autoencoder(folder), "diffusion_pytorch_model.safetensors", words)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    weights = {"a": torch.zeros(3), "b.weight": torch.tensor([1.0, value])}
    save_tensors(tmp_path / "checkpoint.safetensors", weights, {})
    save_file(weights, tmp_path / "released.safetensors")
    torch.save(weights, tmp_path / "released.pth")
    words = "found 1 of 2 numbers of b.weight that are not"
    refuses(lambda: load_tensors(tmp_path / "checkpoint.safetensors"), "checkpoint", words)
    for name in ("released.safetensors", "released.pth"):
        refuses(lambda: read_checkpoint(tmp_path / name), name, words)


def test_a_tensor_that_repeats_what_is_stored_has_a_bound(tmp_path):
    torch.save({"w": torch.zeros(1).expand(2**40)}, tmp_path / "w.pth")
    refuses(lambda: read_checkpoint(tmp_path / "w.pth"), "w.pth: w", "MB when unpacked")


@pytest.mark.parametrize("data", [b"", b'{"name": "mini"', b"[]", b"\xff\xfe\x00", PAGE])
def test_half_a_record_is_named(tmp_path, data):
    for name, read in (
        ("record.json", lambda: read_record(tmp_path / "record.json")),
        ("config.json", lambda: read_config(tmp_path)),
    ):
        (tmp_path / name).write_bytes(data)
        refuses(read, tmp_path / name, kind=ValueError)


def test_a_record_of_other_types_is_named(tmp_path):
    for record in ({"kind": ["x"]}, {"kind": "pretrain", "metrics": 3}, {"kind": None}):
        (tmp_path / "record.json").write_text(json.dumps(record))
        refuses(lambda: read_record(tmp_path / "record.json"), "record.json", kind=ValueError)


# ---- sizes


def test_nothing_but_files_is_opened(tmp_path):
    "A pipe would wait for ever, a device would never end."
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "device.npy").symlink_to("/dev/zero")
    (tmp_path / "dead.npy").symlink_to("nowhere")
    (tmp_path / "loop.npy").symlink_to("loop.npy")
    store = Store(tmp_path)
    for name in ("pipe", "device"):
        refuses(lambda: store.array(f"{name}.npy"), f"{name}.npy", "a pipe, a socket or a device")
        refuses(lambda: Store(tmp_path / f"{name}.npy"), f"{name}.npy", "a pipe")
        refuses(lambda: read_mesh(tmp_path / f"{name}.npy"), f"{name}.npy", "a pipe")
    for name in ("dead", "loop"):
        refuses(lambda: store.array(f"{name}.npy"), f"{name}.npy", "a link to nothing")


@pytest.mark.parametrize("shape", ["(1000000000000, 3)", "(4611686018427387904, 4)", "(-1, 3)"])
def test_an_array_that_is_not_there_takes_no_memory(tmp_path, shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    (tmp_path / "coord.npy").write_bytes(data)
    refuses(lambda: Store(tmp_path).array("coord.npy"), tmp_path / "coord.npy")


def test_an_error_inside_that_names_the_file_passes_as_it_is():
    with pytest.raises(ValueError, match="^a.csv: expected 3 rows, found 2$"):
        with reading("a.csv", "a table"):
            raise ValueError("a.csv: expected 3 rows, found 2")
    with pytest.raises(ImportError):
        with reading("a.csv", "a table"):
            raise ImportError("a package is missing")


# ---- meshes


@pytest.mark.parametrize(
    "line, picture, folder",
    [
        ("wood.png", "wood.png", "."),
        ("../images/wood.png", "../images/wood.png", "models"),
        ("textures\\wood.png", "textures/wood.png", "."),
        ("C:\\work\\wood.png", "wood.png", "."),
        ("/nowhere/else/wood.png", "textures/wood.png", "."),
        ("Wood.PNG", "wood.png", "."),
        ("-s 1 1 1 -bm 0.3 wood.png", "wood.png", "."),
        ("-clamp on my wood.png", "my wood.png", "."),
        ("wood.png", "../Textures/Wood.png", "models"),
    ],
)
def test_a_picture_is_found_as_viewers_find_it(tmp_path, line, picture, folder):
    home = tmp_path / folder
    home.mkdir(exist_ok=True)
    (home / "a.obj").write_text(OBJ)
    (home / "a.mtl").write_text(f"newmtl wood\nKd 1 1 1\nmap_Kd {line}\n")
    (home / picture).parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), (200, 30, 30)).save(home / picture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mesh = read_mesh(home / "a.obj")
    assert mesh.materials[0].texture.reshape(-1, 4).mean(0).tolist() == [200, 30, 30, 255]
    assert len(mesh.corners) == 4  # a quad and two triangles
    (home / picture).unlink()
    with pytest.warns(UserWarning, match="a.obj: left out what it names and cannot be read"):
        assert read_mesh(home / "a.obj").materials[0].texture is None
    (home / picture).write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="a.obj: left out"):
        read_mesh(home / "a.obj")


def test_a_quad_keeps_its_picture_coordinates(tmp_path):
    (tmp_path / "a.obj").write_text(OBJ)
    (tmp_path / "a.mtl").write_text("newmtl wood\nKd 1 1 1\nmap_Kd wood.png\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "wood.png")
    mesh = read_mesh(tmp_path / "a.obj", up="z")
    corners = {(0, 0, 0): (0, 0), (1, 0, 0): (1, 0), (1, 1, 0): (1, 1), (0, 1, 0): (0, 1)}
    flat = (mesh.corners[..., 2] == 0).all(1)
    assert flat.sum() == 2
    for corner, uv in zip(mesh.corners[flat].reshape(-1, 3), mesh.uv[flat].reshape(-1, 2)):
        assert tuple(uv.tolist()) == corners[tuple(corner.tolist())]


def glb(path, mode, alpha, vertex=None, picture=None):
    square = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0]], [[0, 1, 2]])
    material = trimesh.visual.material.PBRMaterial(
        baseColorFactor=[128, 128, 128, alpha], alphaMode=mode, baseColorTexture=picture
    )
    square.visual = trimesh.visual.TextureVisuals(uv=np.zeros((3, 2)), material=material)
    if vertex is not None:
        square.visual.vertex_attributes["color"] = np.tile(np.uint8(vertex), (3, 1))
    square.export(path)
    return read_mesh(path)


def test_a_damaged_glb_is_no_text(tmp_path):
    "Its header is JSON, but nobody saves it as text; a .gltf is one."
    from unipre3d.formats import load_gaussians

    glb(tmp_path / "a.glb", "OPAQUE", 255)
    data = bytearray((tmp_path / "a.glb").read_bytes())
    data[40] = 0xFF
    (tmp_path / "a.glb").write_bytes(data)
    (tmp_path / "a.gltf").write_bytes(data[20:200])
    for call in (read_mesh, load_gaussians):
        refuses(lambda: call(tmp_path / "a.glb"), "a.glb: expected a", "copy or download it again")
    refuses(lambda: read_mesh(tmp_path / "a.gltf"), "a.gltf: expected a glTF", "text in UTF-8")


def test_gltf_multiplies_light_and_keeps_its_alpha_modes(tmp_path):
    from unipre3d.worlds.mesh import surface

    def color(*args, **kwargs):
        mesh = glb(tmp_path / "a.glb", *args, **kwargs)
        rgb, opacity, _ = surface(mesh, np.array([0]), np.array([[0.3, 0.3]]))
        return rgb[0, 0], opacity[0]

    half = 0.7366  # sRGB of 128 / 255 in light
    picture = Image.new("RGBA", (4, 4), (188, 188, 188, 64))
    assert color("OPAQUE", 64) == pytest.approx((half, 1), abs=1e-3)
    assert color("OPAQUE", 64, picture=picture) == pytest.approx((0.5405, 1), abs=3e-3)
    assert color("MASK", 255, picture=picture)[1] == 0
    assert color("BLEND", 128, picture=picture)[1] == pytest.approx(64 * 128 / 255**2, abs=3e-3)
    assert [color("MASK", 255, vertex=[9, 9, 9, alpha])[1] for alpha in (100, 200)] == [0, 1]
    tinted = color("OPAQUE", 255, vertex=[128, 128, 128, 255], picture=picture)
    assert tinted == pytest.approx((0.3911, 1), abs=3e-3)


def boxes(folder, n, rng):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        trimesh.creation.box(rng.uniform(0.4, 1, 3)).export(folder / f"{folder.name}{i}.ply")


HOW = dict(views=3, size=16, points=64, split=(0.5, 0.25, 0.25))


def test_links_are_followed_and_hidden_files_are_not_meshes(tmp_path):
    rng = np.random.default_rng(0)
    boxes(tmp_path / "mine" / "chair", 4, rng)
    boxes(tmp_path / "store" / "lamp", 4, rng)
    (tmp_path / "mine" / "lamp").symlink_to(tmp_path / "store" / "lamp")
    (tmp_path / "mine" / "back").symlink_to(tmp_path)  # a loop
    (tmp_path / "mine" / "chair" / "._chair0.ply").write_bytes(b"another system's")
    (tmp_path / "mine" / "__MACOSX").mkdir()
    (tmp_path / "mine" / "__MACOSX" / "a.ply").write_bytes(b"another system's")
    (tmp_path / "mine" / "chair" / "gone.ply").symlink_to("nowhere")
    (tmp_path / "mine" / "back").unlink()
    found = find_meshes(tmp_path / "mine")
    assert [p.name for p in found] == [f"{k}{i}.ply" for k in ("chair", "lamp") for i in range(4)]
    archive = prepare_meshes(found, tmp_path / "mine.zip", **HOW)
    assert ShapeNetViews(archive).classes == ["chair", "lamp"]
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(found):  # as caches of a hub keep files
        os.replace(path, blobs / str(number))
        path.symlink_to(blobs / str(number))
    again = prepare_meshes(find_meshes(tmp_path / "mine"), tmp_path / "again.zip", **HOW)
    assert again.read_bytes() == archive.read_bytes()


def test_a_loop_of_links_ends(tmp_path):
    boxes(tmp_path / "chair", 1, np.random.default_rng(0))
    (tmp_path / "chair" / "up").symlink_to(tmp_path)
    assert [p.name for p in find_meshes(tmp_path)] == ["chair0.ply"]


def test_a_web_page_in_the_place_of_a_mesh(tmp_path):
    "A text that OBJ takes for nothing: what it is stands in the line."
    (tmp_path / "a.obj").write_bytes(b"<!DOCTYPE html><html><title>Log in</title></html>")
    refuses(lambda: read_mesh(tmp_path / "a.obj"), "a.obj", "found a web page", "download")
    (tmp_path / "b.obj").write_text("v 0 0 0\nv 1 0 0\n")
    refuses(lambda: read_mesh(tmp_path / "b.obj"), "triangles, found none; a point cloud needs")


def test_bad_files_are_left_out_and_named(tmp_path):
    boxes(tmp_path / "chair", 4, np.random.default_rng(0))
    want = prepare_meshes(find_meshes(tmp_path), tmp_path / "want.zip", **HOW)
    for name in ("bad0.ply", "bad1.obj", "bad2.glb"):
        (tmp_path / "chair" / name).write_bytes(b"no mesh")
    with pytest.warns(UserWarning, match="left out 3 of 7 files") as said:
        some = prepare_meshes(find_meshes(tmp_path), tmp_path / "some.zip", **HOW)
    text = str(said[0].message)
    assert all(text.count(f"bad{k}.") == 1 for k in range(3))
    assert {r["id"] for r in ShapeNetViews(some).table.values()} == {
        r["id"] for r in ShapeNetViews(want).table.values()
    }
    bad = [p for p in find_meshes(tmp_path) if p.name.startswith("bad")]
    refuses(lambda: prepare_meshes(bad, tmp_path / "none.zip", **HOW), "bad0.ply", "none of 3")
    assert not (tmp_path / "none.zip").exists()
