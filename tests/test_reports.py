"""Files that users of other programs reported: read as they are meant, or named in one line."""

import base64
import json
import shutil
import struct
import warnings
from io import BytesIO

import numpy as np
import pytest
import trimesh
from PIL import Image
from plyfile import PlyData, PlyElement
from test_posed import HW, WALK, K, colmap_folder, colmap_text, scene_folder, transforms_folder

from unipre3d.cli import main
from unipre3d.core import data_dir
from unipre3d.data.clouds import read_cloud
from unipre3d.data.imports import ImportOptions, import_posed
from unipre3d.data.labelled import (
    ModelNet40,
    ShapeNetPart,
    write_modelnet40,
    write_shapenetpart,
)
from unipre3d.data.posed import read_captures, read_colmap, read_transforms
from unipre3d.data.scannet import (
    ScanNetFrames,
    box_frame,
    convert_scans,
    read_categories,
    read_color,
    read_labels,
    write_box_rooms,
    write_cloud,
)
from unipre3d.data.scannet import read_mesh as read_scan
from unipre3d.data.shapenet import ShapeNetViews, export_objects
from unipre3d.image import load_autoencoder
from unipre3d.values import check_labels, unit_colors
from unipre3d.worlds.mesh import read_mesh, surface, to_linear, to_srgb
from unipre3d.worlds.prepare import prepare_meshes

CORNERS = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1]], np.float32)
UV = np.array([[0.1, 0.2], [0.9, 0.2], [0.9, 0.6], [0.1, 0.6]])
OBJ = "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 1\nvt 0 0\n"
OBJ += "usemtl wood\nf 1/1 2/1 3/1\nf 1/1 3/1 4/1\n"
HEAD = "ply\nformat binary_little_endian 1.0\nelement vertex 4\n"
PLY = HEAD + "{xyz}{rgb}element face 2\n{list}end_header\n"


def one_line(call, *words):
    with pytest.raises((ValueError, OSError)) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and len(text) < 800, text
    for word in words:
        assert str(word) in text, text


def png(color, mode="RGB"):
    with BytesIO() as file:
        Image.new(mode, (8, 8), color).save(file, "PNG")
        return file.getvalue()


def deep(value):
    "A grey PNG of 16 bits."
    with BytesIO() as file:
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(file, "PNG")
        return file.getvalue()


def glb(path, uv=UV, corners=CORNERS, second=None, texture=None, picture=None, **header):
    "Two triangles with a picture; arrays of whole numbers stand for fractions."
    kinds = {"f": 5126, "B": 5121, "H": 5123}
    arrays = [corners, uv.astype(np.float32) if uv.dtype == float else uv]
    arrays += [] if second is None else [second.astype(np.float32)]
    names = ["POSITION", "TEXCOORD_0", "TEXCOORD_1"][: len(arrays)]
    blob, views, accessors = b"", [], []
    for array in arrays:
        wide = -(-array.shape[1] * array.itemsize // 4) * 4  # bytes of a row, a multiple of four
        rows = np.zeros((4, wide // array.itemsize), array.dtype)
        rows[:, : array.shape[1]] = array
        views.append(dict(buffer=0, byteOffset=len(blob), byteLength=rows.nbytes, byteStride=wide))
        kind = dict(componentType=kinds[array.dtype.char], type=f"VEC{array.shape[1]}")
        normalized = dict(normalized=True) if array.dtype.kind == "u" else {}
        accessors.append(dict(bufferView=len(views) - 1, count=4) | kind | normalized)
        blob += rows.tobytes()
    for data in (np.array([0, 1, 2, 0, 2, 3], np.uint32).tobytes(), picture or png((200, 30, 30))):
        views.append(dict(buffer=0, byteOffset=len(blob), byteLength=len(data)))
        blob += data + b"\0" * (-len(data) % 4)
    accessors.append(dict(bufferView=len(views) - 2, componentType=5125, count=6, type="SCALAR"))
    part = dict(attributes={n: k for k, n in enumerate(names)}, indices=len(names), material=0)
    base = dict(pbrMetallicRoughness=dict(baseColorTexture=dict(index=0) | (texture or {})))
    tree = dict(
        asset=dict(version="2.0"),
        scene=0,
        scenes=[dict(nodes=[0])],
        nodes=[dict(mesh=0)],
        meshes=[dict(primitives=[part])],
        materials=[base],
        textures=[dict(source=0)],
        images=[dict(bufferView=len(views) - 1, mimeType="image/png")],
        accessors=accessors,
        bufferViews=views,
        buffers=[dict(byteLength=len(blob))],
    )
    text = json.dumps(tree | header).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I", len(text)) + b"JSON" + text
    chunks += struct.pack("<I", len(blob)) + b"BIN\0" + blob
    path.write_bytes(b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks)
    return path


def picture_places(mesh):
    "Picture coordinates of the four corners, v down."
    uv = mesh.uv.reshape(-1, 2)[[0, 1, 2, 5]]
    return np.stack([uv[:, 0], 1 - uv[:, 1]], 1)


def obj(folder, mtl, text=OBJ, **files):
    (folder / "a.obj").write_text(text)
    (folder / "a.mtl").write_bytes(mtl if isinstance(mtl, bytes) else mtl.encode())
    for name, data in files.items():
        (folder / f"{name}.png").write_bytes(data)
    return folder / "a.obj"


def scan(path, remark=b"", lines="\n", order="<", kind="float"):
    "A coloured PLY of two triangles in bytes."
    xyz = "".join(f"property {kind} {axis}\n" for axis in "xyz")
    rgb = "".join(f"property uchar {name}\n" for name in ("red", "green", "blue", "alpha"))
    head = PLY.format(xyz=xyz, rgb=rgb, list="property list uchar int vertex_indices\n").encode()
    head = head.replace(b" 1.0\n", b" 1.0\n" + remark, 1).replace(b"\n", lines.encode())
    head = head.replace(b"little", b"big") if order == ">" else head
    row = order + ("3d" if kind == "double" else "3f") + "4B"
    body = b"".join(struct.pack(row, *corner, 200, 30, 30, 255) for corner in CORNERS)
    body += b"".join(struct.pack(order + "B3i", 3, *face) for face in ((0, 1, 2), (0, 2, 3)))
    path.write_bytes(head + body)
    return path


# ---------------------------------------------------------------- meshes


@pytest.mark.parametrize("kind", (np.uint8, np.uint16))
def test_fractions_that_are_stored_as_whole_numbers(tmp_path, kind):
    "glTF: normalised integers, as optimisers of files write them."
    whole = np.iinfo(kind).max
    packed = glb(tmp_path / "a.glb", np.round(UV * whole).astype(kind))
    np.testing.assert_allclose(picture_places(read_mesh(packed)), UV, atol=1 / whole)
    packed = glb(tmp_path / "b.glb", corners=(CORNERS * whole).astype(kind))
    np.testing.assert_allclose(np.ptp(read_mesh(packed).corners, (0, 1)), 1, atol=1e-6)


def test_a_material_that_moves_its_picture(tmp_path):
    "glTF: scale, rotation and offset of a texture, and the second set of its coordinates."
    moved = dict(offset=[0, 1], rotation=np.pi / 2, scale=[0.5, 0.25])
    moved = dict(extensions=dict(KHR_texture_transform=moved))
    mesh = read_mesh(glb(tmp_path / "a.glb", texture=moved))
    want = np.stack([0.25 * UV[:, 1], 1 - 0.5 * UV[:, 0]], 1)
    np.testing.assert_allclose(picture_places(mesh), want, atol=1e-6)
    wrong = dict(extensions=dict(KHR_texture_transform=dict(scale=[1, 2, 3])))
    one_line(lambda: read_mesh(glb(tmp_path / "c.glb", texture=wrong)), "c.glb: expected a glTF")
    mesh = read_mesh(glb(tmp_path / "b.glb", second=UV / 3, texture=dict(texCoord=1)))
    np.testing.assert_allclose(picture_places(mesh), UV / 3, atol=1e-6)


def test_what_a_gltf_file_needs_and_is_not_read(tmp_path):
    "glTF: required compression is refused, a picture in another format is counted."
    packed = glb(tmp_path / "a.glb", extensionsRequired=["EXT_meshopt_compression"])
    one_line(lambda: read_mesh(packed), packed, "found one that needs EXT_meshopt_compression")
    textures = [dict(extensions=dict(KHR_texture_basisu=dict(source=0)))]
    with pytest.warns(UserWarning, match="b.glb: left out .* a picture in KHR_texture_basisu"):
        read_mesh(glb(tmp_path / "b.glb", textures=textures))
    files = []
    for name in ("a.glb", "c.glb", "d.glb", "e.glb"):
        (tmp_path / "boxes").mkdir(exist_ok=True)
        files.append(tmp_path / "boxes" / name)
        trimesh.creation.box().export(files[-1])
    files[0].write_bytes(packed.read_bytes())
    how = dict(views=2, size=16, points=64)
    with pytest.warns(UserWarning, match="left out 1 of 4 files") as said:
        prepare_meshes(files, tmp_path / "boxes.zip", **how)
    assert "EXT_meshopt_compression" in str(said[-1].message)


def test_grey_pictures_of_16_bits(tmp_path):
    "Textures and frames that are cut at 255 become white."
    mesh = read_mesh(obj(tmp_path, "newmtl wood\nmap_Kd wood.png\n", wood=deep(100 * 257)))
    assert (mesh.materials[0].texture == [100, 100, 100, 255]).all()
    mesh = read_mesh(glb(tmp_path / "a.glb", picture=deep(100 * 257)))
    assert (mesh.materials[0].texture == [100, 100, 100, 255]).all()
    assert (read_color(deep(100 * 257), (4, 4)) == 100).all()


def test_glass_in_an_mtl_file(tmp_path):
    "The line `d`; `Tr`, which programs write for opaque and for clear, changes nothing."
    mesh = read_mesh(obj(tmp_path, "newmtl wood\nKd .2 .2 .2\nd 0.75\n"))
    assert mesh.materials[0].opacity == 0.75
    mesh = read_mesh(obj(tmp_path, "newmtl wood\nKd .2 .2 .2\nTr 1.0\n"))
    assert mesh.materials[0].opacity == 1
    mtl = "newmtl wood\nd 0.75\nmap_Kd wood.png\n"
    mesh = read_mesh(obj(tmp_path, mtl, wood=png((200, 30, 30))))
    assert (mesh.materials[0].texture == [200, 30, 30, 191]).all()


def test_an_mtl_file_in_an_older_encoding(tmp_path):
    "Letters of a remark decide nothing: colours stay."
    mtl = "# Möbel\nnewmtl wood\nKd 0.2 0.4 0.6\n".encode("latin-1")
    mesh = read_mesh(obj(tmp_path, mtl))
    np.testing.assert_allclose(mesh.materials[0].color, (0.2, 0.4, 0.6), atol=0.01)


@pytest.mark.parametrize("remark", ("Möbel".encode("latin-1"), "点云".encode()))
def test_a_ply_file_with_letters_in_its_remarks(tmp_path, remark):
    "Programs write the path of the source into the header."
    path = scan(tmp_path / "a.ply", b"comment " + remark + b"\n")
    assert (read_scan(path)["color"] == [200, 30, 30]).all()
    np.testing.assert_allclose(read_mesh(path).materials[0].color, [0.8, 0.1, 0.1], atol=0.02)


@pytest.mark.parametrize("how", (dict(lines="\r\n"), dict(order=">"), dict(kind="double")))
def test_a_ply_file_of_another_program(tmp_path, how):
    "Windows line ends before bytes, the other byte order, doubles."
    path = scan(tmp_path / "a.ply", **how)
    rows = read_scan(path)
    np.testing.assert_array_equal(rows["coord"], CORNERS)
    assert (rows["color"] == [200, 30, 30]).all()
    np.testing.assert_array_equal(read_mesh(path, "z").corners[0], CORNERS[:3])


def test_colours_of_an_obj_file_in_bytes(tmp_path):
    "`v x y z r g b` with 0..255 was white."
    lines = "".join(f"v {x} {y} {z} {{}}\n" for x, y, z in CORNERS) + "f 1 2 3\nf 1 3 4\n"
    for color in ("200 30 30", "0.784 0.118 0.118"):
        (tmp_path / "a.obj").write_text(lines.replace("{}", color))
        color = read_mesh(tmp_path / "a.obj").materials[0].color
        np.testing.assert_allclose(color, [0.8, 0.1, 0.1], atol=0.02)


def test_vertices_of_two_numbers_are_named(tmp_path):
    "An OBJ that was cut, or a drawing in a plane."
    (tmp_path / "a.obj").write_text("v 0 0\nv 1 0\nv 1 1\nf 1 2 3\n")
    one_line(lambda: read_mesh(tmp_path / "a.obj"), "a.obj: expected", "vertices of 2 numbers")
    (tmp_path / "a.obj").write_text("v 0 0 0\nv \nv 1 0 0\nv 1 1 0\nf 1 2 3\n")
    one_line(lambda: read_mesh(tmp_path / "a.obj"), "a.obj: expected", "vertices of 0 numbers")


@pytest.mark.parametrize("first", ("OFF\n4 2 0", "OFF4 2 0", "OFF\n# mine\n\n4 2 0"))
def test_variants_of_off_files(tmp_path, first):
    "Counts on the first line, remarks, empty lines; colours are said to be left out."
    rows = "\n0 0 0\n1 0 0\n1 1 0\n0 1 1\n3 0 1 2\n3 0 2 3"
    (tmp_path / "a.off").write_text(first + rows + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_mesh(tmp_path / "a.off", "z").corners[0], CORNERS[:3])
    (tmp_path / "b.off").write_text(first + rows + " 255 0 0\n")
    with pytest.warns(UserWarning, match="b.off: left out its colours"):
        read_mesh(tmp_path / "b.off")


def test_a_missing_picture_of_a_ply_file_is_one_warning(tmp_path, capfd):
    "No traceback of another package between the lines."
    path = scan(tmp_path / "a.ply", b"comment TextureFile gone.png\n")
    with pytest.warns(UserWarning, match="a.ply: left out .* gone.png"):
        read_mesh(path)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ("uchar", "ushort", "float", "double", "fractions"))
@pytest.mark.parametrize("where", ("vertex", "face"))
def test_colours_of_a_ply_file_in_every_type(tmp_path, kind, where):
    "Floats up to 255 were white, and numbers of 16 bits wrapped."
    scale = dict(ushort=257, fractions=1 / 255).get(kind, 1)
    rgb = " ".join(f"{scale * value:.6g}" for value in (200, 30, 90))
    names = ("red", "green", "blue")
    kind = "float" if kind == "fractions" else kind
    rows = "".join(f"property {kind} {name}\n" for name in names)
    xyz = "".join(f"property float {axis}\n" for axis in "xyz")
    own = {"vertex": (rows, "", f" {rgb}", ""), "face": ("", rows, "", f" {rgb}")}[where]
    text = "ply\nformat ascii 1.0\nelement vertex 3\n" + xyz + own[0] + "element face 1\n"
    text += "property list uchar int vertex_indices\n" + own[1] + "end_header\n"
    text += "".join(f"{corner}{own[2]}\n" for corner in ("0 0 0", "1 0 0", "0 1 0"))
    (tmp_path / "a.ply").write_text(text + f"3 0 1 2{own[3]}\n")
    mesh = read_mesh(tmp_path / "a.ply")
    np.testing.assert_allclose(mesh.materials[0].color, np.array([200, 30, 90]) / 255, atol=1 / 31)


@pytest.mark.parametrize("kind", ("B", "H", "f"))
@pytest.mark.parametrize("material", (False, True))
def test_vertex_colours_of_a_gltf_file_in_every_type(tmp_path, kind, material):
    "A half in 16 bits was black where there is no material."
    half = {"B": 128, "H": 32_768, "f": 0.5}[kind]
    corners = np.float32([[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    colors = np.full((3, 4), half, kind)
    arrays = (corners, colors, np.arange(3, dtype=np.uint32))
    codes = {"f": 5126, "B": 5121, "H": 5123, "I": 5125}
    accessors, views, blob = [], [], b""
    for array, form in zip(arrays, ("VEC3", "VEC4", "SCALAR")):
        views.append(dict(buffer=0, byteOffset=len(blob), byteLength=array.nbytes))
        one = dict(bufferView=len(views) - 1, count=3, type=form)
        normalized = dict(normalized=True) if array.dtype.char in "BH" else {}
        accessors.append(one | dict(componentType=codes[array.dtype.char]) | normalized)
        blob += array.tobytes()
    part = dict(attributes=dict(POSITION=0, COLOR_0=1), indices=2)
    uri = "data:application/octet-stream;base64," + base64.b64encode(blob).decode()
    tree = dict(
        asset=dict(version="2.0"),
        scene=0,
        scenes=[dict(nodes=[0])],
        nodes=[dict(mesh=0)],
        meshes=[dict(primitives=[part | (dict(material=0) if material else {})])],
        accessors=accessors,
        bufferViews=views,
        buffers=[dict(byteLength=len(blob), uri=uri)],
    )
    if material:
        tree["materials"] = [dict(pbrMetallicRoughness=dict(baseColorFactor=[1, 1, 1, 1]))]
    (tmp_path / "a.gltf").write_text(json.dumps(tree))
    mesh = read_mesh(tmp_path / "a.gltf")
    rgb, _, _ = surface(mesh, np.array([0]), np.array([[0.3, 0.3]]))
    np.testing.assert_allclose(rgb[0], 0.7354, atol=1 / 31)  # half of the light on a screen


def test_a_gltf_material_of_the_older_kind(tmp_path):
    "It was white, whatever colour and picture it had."
    older = dict(diffuseFactor=[0.5, 0.5, 0.5, 1], diffuseTexture=dict(index=0))
    material = dict(extensions=dict(KHR_materials_pbrSpecularGlossiness=older))
    mesh = read_mesh(glb(tmp_path / "a.glb", materials=[material]))
    want = 255 * to_srgb(to_linear(np.array([200, 30, 30]) / 255) / 2)
    np.testing.assert_allclose(mesh.materials[0].texture[0, 0, :3], want, atol=1)


def test_what_a_gltf_file_holds_and_cannot_be_drawn_is_said(tmp_path):
    plain = dict(pbrMetallicRoughness=dict(baseColorTexture=dict(index=0)))
    wrong = {
        "picture 0": dict(picture=b"no picture"),
        "texture 7": dict(texture=dict(index=7)),
        "light of its own": dict(materials=[plain | dict(emissiveFactor=[1, 0, 0])]),
    }
    for words, how in wrong.items():
        with pytest.warns(UserWarning, match=f"a.glb: left out .*{words}"):
            read_mesh(glb(tmp_path / "a.glb", **how))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_mesh(glb(tmp_path / "a.glb"))


def test_holes_in_a_picture_of_their_own(tmp_path):
    "Leaves are cut out by map_d, which is not read: one warning, unless it is the picture itself."
    leaf = "newmtl wood\nKd 1 1 1\nmap_Kd leaf.png\nmap_d {}\n"
    path = obj(tmp_path, leaf.format("leaf.png"), leaf=png((9, 200, 9, 0), "RGBA"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_mesh(path)
    obj(tmp_path, leaf.format("-o 0 0 holes.png"), holes=png((0, 0, 0)))
    with pytest.warns(UserWarning, match=r"a.obj: left out .* holes.png \(map_d"):
        read_mesh(path)


# ---------------------------------------------------------------- data sets


def test_an_object_or_a_scene_in_two_splits(tmp_path):
    "Training on what is tested."
    source = ShapeNetViews(classes=["lamp"], split="train")
    root = export_objects(source, tmp_path / "mine", "unipre3d", [0, 1])
    table = (root / "objects.csv").read_text()
    line = table.splitlines()[1]
    (root / "objects.csv").write_text(table + line.replace("train", "test") + "\n")
    one_line(lambda: ShapeNetViews(root), "objects.csv: expected one row for each object", "lamp/")
    for scene in ("scene0000_00", "scene0001_00"):
        (tmp_path / "scans" / scene).mkdir(parents=True)
        (tmp_path / "scans" / scene / f"{scene}.sens").touch()
    split = dict(train=["scene0000_00", "scene0001_00"], val=["scene0001_00"])
    one_line(
        lambda: convert_scans(tmp_path / "scans", tmp_path / "out", split=split),
        "split: expected each scene in one of train, val",
        "scene0001_00",
    )


def two_lists(root, layout):
    "A data set whose test split has an object or a scene of its training split."
    rows = np.random.default_rng(0).normal(size=(3, 64, 7))
    if layout == "released":
        source = ShapeNetViews(classes=["lamp"], split="train")
        export_objects(source, root, "released", [0, 1])
        names = [source.name(i).replace("/", "-") for i in (0, 1)]
        (root / "train.txt").write_text("\n".join(names))
        (root / "test.txt").write_text(f"{names[1]}.npy\r\n")
        return lambda: ShapeNetViews(root, split="train", convention="released"), names[1]
    if layout in ("normal_resampled", "ply_hdf5"):
        for split in ("train", "test"):
            clouds = [("bed", one[:, :6]) for one in rows]
            write_modelnet40(root, clouds, ["bed"], split=split, form=layout)
        assert len(ModelNet40(root, split="test")) == 3
        (root / "test_files.txt").write_text("data\\ply_data_train0.h5\n")
        (root / "modelnet40_test.txt").write_text("bed_0004\r\nbed_0001\r\n")
        first = "ply_data_train0.h5" if layout == "ply_hdf5" else "bed_0001"
        return lambda: ModelNet40(root, split="train"), first
    if layout == "shapenetpart":
        rows[..., 6] = 12
        own = [("03001627", name, one) for name, one in zip("abc", rows)]
        shapes = dict(train=own[:2], val=own[1:2], test=own[2:])
        write_shapenetpart(root, shapes, dict(Chair="03001627"))
        return lambda: ShapeNetPart(root, split="test"), "03001627-b"
    for split in ("train", "val"):
        write_cloud(root, split, "scene0000_00", coord=rows[0, :, :3])
    return lambda: ScanNetFrames(root, split="train"), "scene0000_00"


@pytest.mark.parametrize(
    "layout", ("released", "normal_resampled", "ply_hdf5", "shapenetpart", "scannet")
)
def test_one_thing_in_two_splits_is_refused_in_every_layout(tmp_path, layout):
    call, name = two_lists(tmp_path, layout)
    what = "scene" if layout == "scannet" else "object"
    one_line(call, f": expected each {what} in one split, found {name}, which ", " has too")


@pytest.mark.parametrize("end", (".PNG", ".JPG", ".jpeg", ".webp"))
@pytest.mark.parametrize("convention", ("released", "unipre3d"))
def test_views_of_objects_under_the_names_that_people_have(tmp_path, end, convention):
    source = ShapeNetViews(classes=["lamp"])
    root = export_objects(source, tmp_path / "set", convention, [0])
    how = dict(convention="released") if convention == "released" else {}
    want = ShapeNetViews(root, **how).view(0, 3)
    for path in root.rglob("easy/*.png"):
        image = Image.open(path)
        path.unlink()
        other = path.with_suffix(end)
        if end == ".PNG":
            image.save(other, "PNG")
        else:
            kept = dict(lossless=True) if end == ".webp" else dict(quality=95)
            image.convert("RGB").save(other, **kept)
    for path in root.rglob("easy/*.txt"):
        path.rename(path.with_suffix(".TXT"))
    (root / ".git" / "objects").mkdir(parents=True)  # what systems add is no class and no object
    (root / "__MACOSX" / "lamp").mkdir(parents=True)
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", root)
    for place in (root, packed):
        reader = ShapeNetViews(place, **how)
        assert (len(reader), reader.classes) == (1, ["lamp"])
        found = reader.view(0, 3)
        apart = np.abs(found.rgb.astype(int) - want.rgb)[want.mask].mean()
        assert apart < (3 if end.startswith(".j") or end == ".JPG" else 1)
        assert (found.mask & want.mask).sum() > 0.95 * (found.mask | want.mask).sum()
        assert len(reader.world_to_cam(0)) == 24


def test_lists_that_were_written_on_windows(tmp_path):
    "Backslashes between folders, and line ends of two characters."
    rows = np.random.default_rng(0).normal(size=(8, 64, 6))
    clouds = [("chair", one) for one in rows]
    write_modelnet40(tmp_path, clouds, ["bed", "chair"], split="train", form="ply_hdf5")
    listed = tmp_path / "train_files.txt"
    listed.write_bytes(listed.read_bytes().replace(b"/", b"\\").replace(b"\n", b"\r\n"))
    data = ModelNet40(tmp_path, split="train")
    assert [data.label(i) for i in range(len(data))] == [1] * 8


def test_a_control_character_in_a_text_of_points(tmp_path):
    "A published data set has such lines: the file is named."
    rows = np.random.default_rng(0).normal(size=(64, 6))
    write_modelnet40(tmp_path, [("bed", rows)], ["bed"], split="train")
    path = tmp_path / "bed" / "bed_0001.txt"
    path.write_bytes(path.read_bytes().replace(b".", b".\x10", 1))
    one_line(lambda: ModelNet40(tmp_path, split="train").rows(0), path)


def test_labels_of_scannet_outside_its_table(tmp_path):
    "Published label files hold 50 and 149; rows of the table end early or say None."
    labels = np.array([1, 50, 149, 39], np.uint16)
    head = HEAD + "property ushort label\nend_header\n"
    (tmp_path / "s_vh_clean_2.labels.ply").write_bytes(head.encode() + labels.tobytes())
    assert read_labels(tmp_path, "s", 4)["segment20"].tolist() == [0, -1, -1, 19]
    table = (
        "id\traw_category\tnyu40id\tModelNet40\n2\tchair\t5\n1\twall\t1\tNone\n9\tthing\tNone\t\n"
    )
    (tmp_path / "labels.tsv").write_text(table)
    found = read_categories(tmp_path / "labels.tsv")
    assert found["chair"][0] == 4 and found["wall"][0] == 0 and found["thing"][0] == -1


def test_a_camera_note_about_rotation_moves_no_pixel(tmp_path):
    "Depth and cameras belong to the stored pixels, whatever EXIF says of showing them."
    root = write_box_rooms(tmp_path, n_frames=2, hw=(24, 32), spacing=0.4)
    source = ScanNetFrames(root, split="val", hw=(24, 32))
    want = source.view(0, source.frames(0)[0])
    (path,) = (root / "2D" / "color" / source.name(0)).glob("0.jpg")
    note = Image.Exif()
    note[0x0112] = 3  # to be shown upside down
    data, segment = path.read_bytes(), note.tobytes()
    path.write_bytes(
        data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment + data[2:]
    )
    assert Image.open(path).getexif()[0x0112] == 3
    found = ScanNetFrames(root, split="val", hw=(24, 32)).view(0, source.frames(0)[0])
    assert (found.rgb == want.rgb).all() and (found.depth == want.depth).all()


# ---------------------------------------------------------------- posed images and clouds of other programs


@pytest.fixture(scope="module")
def frames():
    return [box_frame(pose, K, HW) for pose in WALK[:4]]


def film(folder, frames):
    return transforms_folder(folder, frames) / "transforms.json"


def test_paths_that_windows_wrote(tmp_path, frames):
    "nerfstudio 874: backslashes in transforms.json; the images were there and none was found."
    path = film(tmp_path / "film", frames)
    (path.parent / "images").mkdir()
    for picture in path.parent.glob("*.png"):
        picture.rename(path.parent / "images" / picture.name)
    tree = json.loads(path.read_text())
    for frame in tree["frames"]:
        frame["file_path"] = "images\\" + frame["file_path"]
        frame["depth_file_path"] = ".\\images\\" + frame["depth_file_path"]
    path.write_text(json.dumps(tree))
    capture = read_transforms(path, "film")
    assert len(capture.images) == 4 and all(one.depth.is_file() for one in capture.images)


def test_cameras_of_images_that_were_rotated(tmp_path, frames):
    "nerfstudio 3585: width and height are swapped; pictures were squeezed into the other shape."
    path = film(tmp_path / "film", frames)
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | dict(w=HW[0], h=HW[1], cx=HW[0] / 2, cy=HW[1] / 2)))
    words = ("00.png: expected the proportions of its camera, 60 x 80, found 80 x 60",)
    one_line(lambda: read_transforms(path, "film"), *words)
    folder = colmap_folder(tmp_path / "colmap", frames)
    for picture in (folder / "images").iterdir():
        Image.open(picture).transpose(Image.Transpose.ROTATE_90).save(picture)
    how = ImportOptions(out=str(tmp_path / "out"), scale=1, hold_out=0)
    words = ("000.png: expected the proportions of its camera, 80 x 60, found 60 x 80",)
    one_line(lambda: import_posed(folder, how, progress=False), *words)


def test_names_of_images_with_spaces(tmp_path, frames):
    "LichtFeld-Studio 810, instant-ngp 1096: COLMAP's list was cut at the space."
    folder = colmap_folder(tmp_path / "film", frames, write=colmap_text)
    listed = folder / "sparse" / "0" / "images.txt"
    listed.write_text(listed.read_text().replace("000.png", "plan (402) a.png"))
    (folder / "images" / "000.png").rename(folder / "images" / "plan (402) a.png")
    names = [one.color.name for one in read_colmap(folder).images]
    assert names == ["001.png", "002.png", "003.png", "plan (402) a.png"]


def test_pictures_and_matrices_in_capitals(tmp_path, frames):
    "Endings as cameras and Windows write them, and what macOS leaves beside them."
    root = scene_folder(tmp_path, frames)
    home = root / "images" / "train" / "box"
    for kind in ("color", "depth", "pose"):
        for path in list((home / kind).iterdir()):
            path.rename(path.with_suffix(path.suffix.upper()))
    (home / "color" / "._0.PNG").write_bytes(b"\0\5\x16\7")
    (home / "pose" / "._0.NPY").write_bytes(b"\0\5\x16\7")
    (capture,) = read_captures(root)
    assert len(capture.images) == 4 and not capture.remarks
    assert all(one.depth is not None for one in capture.images)


@pytest.mark.parametrize("kind", ("pcd", "ply"))
def test_a_depth_camera_that_measured_little(tmp_path, kind):
    "labelCloud 54, Open3D 5985: most rows of an image of points are nan or -inf; they are dropped and counted."
    rows = np.full((24, 3), np.nan if kind == "pcd" else -np.inf)
    rows[::6] = CORNERS
    path = tmp_path / f"a.{kind}"
    text = "\n".join(" ".join(map(str, row)) for row in rows.tolist()) + "\n"
    head = "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 6\nHEIGHT 4\nPOINTS 24\nDATA ascii\n"
    if kind == "ply":
        names = "".join(f"property float {axis}\n" for axis in "xyz")
        head = f"ply\nformat ascii 1.0\nelement vertex 24\n{names}end_header\n"
    path.write_text(head + text)
    with pytest.warns(UserWarning, match="left out 20 of 24 points"):
        cloud = read_cloud(path)
    np.testing.assert_array_equal(cloud.xyz, CORNERS)
    path.write_text(head + text.replace("1.0", "nan").replace("0.0", "nan"))
    one_line(lambda: read_cloud(path), path, "expected finite numbers")


def test_faces_that_count_their_corners_backwards(tmp_path):
    "trimesh 2364: -1 is the last corner before the face, not the last of the file."
    lines = []
    for shift in (0, 5):
        lines += [f"v {x + shift:g} {y:g} {z:g}" for x, y, z in CORNERS[:3]] + ["vt 0 0"]
        lines += ["f -3/-1 -2/-1 \\", "-1/-1"]
    (tmp_path / "a.obj").write_text("\n".join(lines) + "\n")
    corners = read_mesh(tmp_path / "a.obj", "z").corners
    np.testing.assert_array_equal(corners, [CORNERS[:3], CORNERS[:3] + [5, 0, 0]])
    (tmp_path / "a.obj").write_text("\n".join([*lines, "f -9 -2 -1"]) + "\n")
    one_line(lambda: read_mesh(tmp_path / "a.obj"), "a.obj: expected", "corner -9 after 6")


@pytest.mark.parametrize("end", ("\n", "\r\n"))
def test_empty_lines_in_a_ply_file(tmp_path, end):
    "plyfile 84, happly 45: programs write them into the header and before the rows."
    names = [f"property float {axis}" for axis in "xyz"]
    lines = ["ply", "format ascii 1.0", "", "element vertex 4", *names, "", "element face 2"]
    lines += ["property list uchar int vertex_indices", "end_header", ""]
    lines += [" ".join(map(str, corner)) for corner in CORNERS.tolist()]
    lines += ["", "3 0 1 2", "3 0 2 3", ""]
    (tmp_path / "a.ply").write_bytes(end.join(lines).encode())
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.ply").xyz, CORNERS)
    np.testing.assert_array_equal(read_mesh(tmp_path / "a.ply", "z").corners[0], CORNERS[:3])


def test_an_stl_file_of_bytes_that_begins_like_text(tmp_path):
    "meshio 530: the first word of SolidWorks' files is solid."
    trimesh.creation.box().export(tmp_path / "a.stl")
    data = (tmp_path / "a.stl").read_bytes()
    (tmp_path / "b.stl").write_bytes(b"solid Box".ljust(80) + data[80:])
    want, found = (read_mesh(tmp_path / f"{name}.stl").corners for name in "ab")
    np.testing.assert_array_equal(found, want)


def test_labels_that_hold_two_numbers(tmp_path):
    "semantic-kitti-api 15: class and instance in one number of 32 bits; never cut."
    labels = np.uint32([1, 131_076, 16_449_537, 3])
    one_line(lambda: check_labels(labels, "a.label", 20), "expected labels in -1..19, found 131076")


def test_an_array_that_an_older_python_wrote(tmp_path):
    "npy-matlab 2: whole numbers of its header end in L; numpy 28334: or are named by their type."
    np.save(tmp_path / "a.npy", CORNERS)
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(b"(4, 3), }  ", b"(4L, 3L), }"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(read_cloud(tmp_path / "a.npy").xyz, CORNERS)
    (tmp_path / "a.npy").write_bytes(
        data.replace(b"(4, 3), }" + b" " * 12, b"(np.int64(4), 3), }  ")
    )
    one_line(lambda: read_cloud(tmp_path / "a.npy"), "a.npy: expected a numpy array")


def test_a_page_that_was_saved_as_an_archive(tmp_path, capsys):
    "pytorch_geometric 10396: a data set's address moved, and the answer was unpacked."
    (tmp_path / "set.zip").write_text("<!DOCTYPE html><title>404 Not Found</title>")
    assert main(["data", "check", str(tmp_path / "set.zip")]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "set.zip: expected" in said and "a web page" in said


def test_bytes_of_colours_in_sixteen_bits():
    "laspy 221, pyntcloud 331: a LAS file may hold either; bytes were divided by 256 and black."
    small = np.uint16([[200, 30, 90]])
    np.testing.assert_allclose(unit_colors(small, "a.las"), small / 255)
    np.testing.assert_allclose(unit_colors(small * 257, "a.las"), small / 255, atol=1e-6)


def test_classes_with_a_hyphen_in_lists_of_objects(tmp_path):
    "A line <class>-<name> was cut at its first hyphen, and the object left out."
    export_objects(ShapeNetViews(classes=["lamp"], split="train"), tmp_path, "released", [0])
    name = next((tmp_path / "lamp").iterdir()).name
    (tmp_path / "lamp").rename(tmp_path / "floor-lamp")
    points = tmp_path / "floor-lamp" / name / "pts"
    next(points.iterdir()).rename(points / f"floor-lamp-{name}.npy")
    (tmp_path / "train.txt").write_text(f"floor-lamp-{name}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ShapeNetViews(tmp_path, convention="released", split="train")) == 1


def test_a_pointer_in_the_place_of_colours(tmp_path):
    "An MTL file that Git LFS keeps: the mesh was grey without a word."
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 88\n"
    path = obj(tmp_path, pointer)
    with pytest.warns(UserWarning, match="a.obj: left out what it names and cannot be read: a.mtl"):
        read_mesh(path)


@pytest.mark.parametrize("remark", ("plain", "Möbel"))
def test_a_binary_ply_file_of_triangles_and_quads(tmp_path, remark):
    "The quads are cut; colours of faces and the remarks go with their triangles."
    vertex = np.array([*np.ndindex(2, 2, 2)], [(k, "f4") for k in "xyz"])
    face = np.empty(3, [("vertex_indices", object), *((k, "u1") for k in ("red", "green", "blue"))])
    corners = ([0, 1, 3], [4, 5, 7, 6], [0, 1])
    face["vertex_indices"] = [np.array(one, "i4") for one in corners]
    face["red"], face["green"], face["blue"] = (255, 0, 9), (0, 255, 9), (0, 0, 9)
    elements = [PlyElement.describe(vertex, "vertex"), PlyElement.describe(face, "face")]
    path = tmp_path / "a.ply"
    PlyData(elements, byte_order=">", comments=["remark"]).write(str(path))
    data = path.read_bytes().replace(b"comment remark", f"comment {remark}".encode())
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="a.ply: left out 1 faces of fewer than three corners"):
        mesh = read_mesh(path, up="z")
    xyz = np.array([*np.ndindex(2, 2, 2)], float)
    np.testing.assert_array_equal(mesh.corners, xyz[[[0, 1, 3], [4, 5, 7], [4, 7, 6]]])
    colors = {tuple(material.color) for material in mesh.materials}
    assert len(mesh.materials) == 2 and colors == {(1, 0, 0), (0, 1, 0)}
    path.write_bytes(data + b"more bytes")
    one_line(lambda: read_mesh(path), "a.ply: expected", "10 bytes behind the last row")


def test_what_is_lost_in_an_obj_file_is_said(tmp_path):
    path = tmp_path / "a.obj"
    triangle = b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
    path.write_bytes(triangle + b"\xff\xff\nmore of it\n")
    with pytest.warns(UserWarning, match="a.obj: left out 2 lines that begin with no word"):
        assert len(read_mesh(path).corners) == 1
    for damaged in (triangle.replace(b"1 0 0", b"1 \xff 0"), triangle + b"f 1 \xff\xff 3\n"):
        path.write_bytes(damaged)
        one_line(lambda: read_mesh(path), "a.obj: expected", "which is not of numbers")


@pytest.mark.parametrize("row", ("3 0 1 2\n", "1 0 0\n"))
def test_an_off_file_has_the_rows_that_it_counts(tmp_path, row):
    text = "OFF\n3 2 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n3 2 1 0\n"
    path = tmp_path / "a.off"
    path.write_text(text.replace(row, ""))
    one_line(lambda: read_mesh(path), "a.off: expected", "4 rows instead of 5")
    path.write_text(text.replace("3 2 1 0", "3 2 1"))
    one_line(lambda: read_mesh(path), "a.off: expected", "no face")


@pytest.mark.parametrize("line", (b"property f\0\0\0", b"prop\xff float x", b"property float"))
def test_a_damaged_line_of_a_ply_header_is_named(tmp_path, line):
    "Else a colour is lost without a word."
    path = scan(tmp_path / "a.ply")
    path.write_bytes(path.read_bytes().replace(b"end_header", line + b"\nend_header"))
    for read in (read_mesh, read_scan, read_cloud):
        one_line(lambda: read(path), "a.ply: expected", "in its header")


def test_a_far_point_of_colmap_is_counted(tmp_path, frames):
    folder = colmap_folder(tmp_path / "a", frames, write=colmap_text)
    path = next(folder.rglob("points3D.txt"))
    first, rest = path.read_text().split("\n", 1)
    count = len(read_colmap(folder).cloud["coord"])
    for word in ("inf", "99999999999"):
        words = rest.split("\n", 1)[0].split()
        words[1] = word
        path.write_text("\n".join([first, " ".join(words), *rest.split("\n", 1)[1:]]))
        with pytest.warns(UserWarning, match=f"points3D: left out 1 of {count} points"):
            cloud = read_colmap(folder).cloud
        assert len(cloud["coord"]) == len(cloud["color"]) == count - 1


def test_an_array_of_no_known_name_is_said(tmp_path):
    "A normal.npy that was misspelt leaves a room without normals."
    write_box_rooms(tmp_path, rooms=dict(a="train"), n_frames=1, hw=(24, 32), spacing=0.5)
    (tmp_path / "train" / "a" / "normal.npy").rename(tmp_path / "train" / "a" / "normals.npy")
    with pytest.warns(
        UserWarning, match="left out 1 arrays of no known name, such as a/normals.npy"
    ):
        ScanNetFrames(tmp_path, split="train")


def test_an_autoencoder_of_too_many_layers_is_refused(tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(data_dir() / "autoencoder-mini", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(layers_per_block=2**31)))
    one_line(lambda: load_autoencoder(folder), "expected weights that fit", "layers a block beside")


def test_a_row_of_a_text_ply_has_its_numbers(tmp_path):
    "Else the rows after it are read as others."
    head = "ply\nformat ascii 1.0\nelement vertex 3\n"
    head += "".join(f"property float {k}\n" for k in "xyz")
    head += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    for row in ("1 0", "1 0 0 0"):
        (tmp_path / "a.ply").write_text(head + f"0 0 0\n{row}\n0 1 0\n3 0 1 2\n")
        for read in (read_mesh, read_cloud):
            one_line(lambda: read(tmp_path / "a.ply"), "a.ply: expected", "where 3 numbers should")


def test_texture_coordinates_that_are_not_finite_are_counted(tmp_path):
    lines = [f"v {x} {y} 0" for x, y in ((0, 0), (1, 0), (0, 1))]
    lines += ["vt nan 0", "vt 1 0", "vt 0 1", "f 1/1 2/2 3/3"]
    (tmp_path / "a.obj").write_text("\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match="left out 1 texture coordinates that are not finite"):
        mesh = read_mesh(tmp_path / "a.obj")
    np.testing.assert_array_equal(mesh.uv, [[[0, 0], [1, 0], [0, 1]]])


def test_a_face_of_an_obj_file_begins_at_one(tmp_path):
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\nf 2 1 0\n")
    one_line(lambda: read_mesh(tmp_path / "a.obj"), "a.obj: expected", "corner 0")
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1/ 2/ 3/")
    one_line(lambda: read_mesh(tmp_path / "a.obj"), "a.obj: expected", "its end within a face")


@pytest.mark.parametrize("row", ("3 0 1", "4 0 1 2", "3 0 1 2 9"))
def test_a_face_of_a_text_ply_has_its_numbers(tmp_path, row):
    head = "ply\nformat ascii 1.0\nelement vertex 3\n"
    head += "".join(f"property float {k}\n" for k in "xyz")
    head += "element face 2\nproperty list uchar int vertex_indices\nend_header\n"
    (tmp_path / "a.ply").write_text(head + f"0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n{row}\n")
    one_line(lambda: read_mesh(tmp_path / "a.ply"), "a.ply: expected", "numbers should be")


def test_corners_of_a_binary_ply_stand_behind_picture_coordinates(tmp_path):
    vertex = np.array([*np.ndindex(2, 2, 2)], [(k, "f4") for k in "xyz"])
    face = np.empty(2, [("texcoord", object), ("vertex_indices", object)])
    face["vertex_indices"] = [np.array(one, "i4") for one in ([0, 1, 3], [4, 5, 7, 6])]
    uv = [(0, 0), (1, 0), (1, 1), (0, 1)]
    face["texcoord"] = [np.array(uv[:n], "f4").ravel() for n in (3, 4)]
    elements = [PlyElement.describe(vertex, "vertex"), PlyElement.describe(face, "face")]
    PlyData(elements, byte_order="<").write(str(tmp_path / "a.ply"))
    mesh = read_mesh(tmp_path / "a.ply", up="z")
    xyz = np.array([*np.ndindex(2, 2, 2)], float)
    np.testing.assert_array_equal(mesh.corners, xyz[[[0, 1, 3], [4, 5, 7], [4, 7, 6]]])
