"""What may come out of a file that was damaged and still opens.

A reader gives values by name, such as `0 xyz` or `0 view 20 depth`. They are right in one of four ways, in this order:

    same       they are those of the file before it was damaged
    agrees     they are those that another reader finds in the damaged bytes: numpy, h5py, zipfile, csv, json, PyTorch, Pillow,
               or a few lines below for PLY, OBJ, OFF, STL, glTF and PCD
    counted    a warning says what was left out
    in range   no other reader reads this kind, and all values are of their kind: see `wrong_kind`

Anything else is silent: values that are not of their kind, values that another reader does not find, or a file that another
reader refuses.
"""

import csv
import io
import json
import re
import struct
import zipfile

import numpy as np

RADIUS = 0.65  # of objects


# ---- the kinds


def wrong_kind(values):
    "The first value that is not of its kind, in words; None where all are."
    for key, value in values.items():
        name = key.split()[-1]
        check = CHECKS.get(name)
        if check and value is not None:
            cloud = {k.split()[-1]: v for k, v in values.items() if k.split()[0] == key.split()[0]}
            if not check(np.asarray(value), cloud):
                return f"{key}: {np.asarray(value).dtype} {np.asarray(value).shape}"
    return None


def _points(v, cloud):
    sane = bool((np.abs(v) < 1e10).all())  # False for NaN
    return v.ndim == 2 and v.shape[1] == 3 and len(v) > 0 and v.dtype.kind == "f" and sane


def _beside(v, cloud, wide=()):
    return "xyz" not in cloud or v.shape == (len(cloud["xyz"]), *wide)


def _normals(v, cloud):
    length = np.linalg.norm(v.astype(float), axis=-1)
    unit = (np.abs(length - 1) < 0.02) | (length == 0)
    return bool(unit.all()) and _beside(v, cloud, (3,))


def _colors(v, cloud):
    fits = v.dtype == np.uint8 or bool(((v >= 0) & (v <= 1)).all())
    return fits and _beside(v, cloud, (3,))


def _labels(v, cloud):
    return v.dtype.kind in "iu" and bool((v >= -1).all()) and _beside(v, cloud)


def _classes(v, cloud):
    return _labels(v, cloud) and bool((v < max(1, int(cloud.get("classes", 2**31)))).all())


def _class(v, cloud):
    return v.dtype.kind in "iu" and 0 <= int(v) < int(cloud.get("classes", 2**31))


def _poses(v, cloud):
    rotation = v[..., :3, :3]
    off = np.abs(np.swapaxes(rotation, -1, -2) @ rotation - np.eye(3)).max(initial=0)
    return v.shape[-2:] == (4, 4) and bool(np.isfinite(v).all()) and off < 1e-2


def _intrinsics(v, cloud):
    focal = v[..., [0, 1], [0, 1]]
    return v.shape[-2:] == (3, 3) and bool(np.isfinite(v).all() and (focal > 0).all())


def _depth(v, cloud):
    return v.dtype == np.float32 and bool(np.isfinite(v).all() and (v >= 0).all())


def _finite(v, cloud):
    return v.dtype.kind in "iub" or bool(np.isfinite(v).all())


def _unit(v, cloud):
    return bool(((v >= 0) & (v <= 1)).all())


CHECKS = dict(
    xyz=_points,
    mean=lambda v, c: bool((np.abs(v) < 1e10).all()),
    corners=lambda v, c: v.ndim == 3 and bool((np.abs(v) < 1e10).all()),
    normal=_normals,
    facing=lambda v, c: bool((np.linalg.norm(v, axis=-1) < 1.02).all()),  # short in a sliver
    color=_colors,
    segment=_classes,
    instance=_labels,
    part=_labels,
    mask=lambda v, c: v.dtype.kind in "biu" and bool((v <= 1).all()),
    label=_class,
    poses=_poses,
    K=_intrinsics,
    rgb=lambda v, c: v.dtype == np.uint8 and v.shape[-1] == 3,
    depth=_depth,
    opacity=_unit,
    tint=_unit,
    scale=lambda v, c: bool(np.isfinite(v).all() and (v >= 0).all()),
    quat=lambda v, c: bool((np.abs(np.linalg.norm(v, axis=-1) - 1) < 1e-3).all()),
    sh=_finite,
    uv=_finite,
    tensor=_finite,
    scalar=lambda v, c: len(v) == len(c["xyz"]),
)


# ---- comparing


def equal(a, b, tolerance=1e-5):
    "Whether two values are one."
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind not in "biufc" or b.dtype.kind not in "biufc":
        return a.shape == b.shape and bool((a == b).all())
    return a.shape == b.shape and np.allclose(a, b, tolerance, tolerance, equal_nan=True)


def same(values, first):
    "Whether nothing changed."
    return values.keys() == first.keys() and all(equal(values[k], first[k]) for k in first)


def verdict(values, first, other, warned):
    "One of the words above, or `silent: ...`; `other` reads the damaged bytes, and gives None for a kind that it does not know."
    if wrong := wrong_kind(values):
        return f"silent: {wrong}"
    if same(values, first):
        return "same"
    try:
        found = other(values)
    except Exception as problem:  # of any library: it refuses the file
        text = " ".join(str(problem).split())[:120]
        return (
            "counted" if warned else f"silent: refused elsewhere, {type(problem).__name__}: {text}"
        )
    if found is None:
        return "counted" if warned else "in range"
    if key := differing(values, found):
        return "counted" if warned else f"silent: {key} is another"
    return "agrees"


def differing(values, found):
    "The first value that another reader finds otherwise; None where there is none."
    for key, value in found.items():
        ours = derived(values, key)
        if ours is None or not equal(ours, value, TOLERANCES.get(key.split()[-1], 1e-5)):
            return key
    return None


TOLERANCES = dict(radii=1e-4, shade=8, soup=1e-4)  # a picture that was scaled keeps its mean, about
TOLERANCES |= dict(turns=1e-3)  # a rotation is made one, where it is so near


def derived(values, key):
    "A value, or what is made of one: `radii`, `colors`, `shade`, `turns`, `focal`, `soup`."
    stem, _, name = key.rpartition(" ")
    made = dict(
        radii=("xyz", as_radii),
        colors=("color", fraction),
        shade=("rgb", lambda rgb: rgb.mean((0, 1))),
        turns=("poses", lambda poses: poses[:, :3, :3]),
        focal=("K", lambda K: K[0, 0]),
        soup=("corners", lambda corners: soup(corners, False)),
    )
    if name not in made:
        return values.get(key)
    own, change = made[name]
    value = values.get(f"{stem} {own}")
    return None if value is None else change(value)


def soup(corners, y_up=True):
    "Triangles in an order of their own, z up."
    corners = np.asarray(corners, dtype=np.float64)
    if y_up:
        corners = np.stack([corners[..., 0], -corners[..., 2], corners[..., 1]], -1)
    rows = np.round(corners, 4) + 0.0
    rows = np.array([sorted(map(tuple, triangle)) for triangle in rows.tolist()]).reshape(-1, 9)
    return rows[np.lexsort(rows.T[::-1])]


# ---- other readers of single files


def npy(data):
    return np.load(io.BytesIO(data), allow_pickle=False)


def text_of(data):
    for mark, name in (
        (b"\xff\xfe\0\0", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(name)
    if data[:1] == b"\0":
        return data.decode("utf-16-be")
    return data.decode("utf-8-sig")


def table(data):
    text = text_of(data)
    first = text.splitlines()[0]
    mark = max(",;\t", key=first.count)
    return list(csv.DictReader(io.StringIO(text), delimiter=mark))


PLY_KINDS = dict(char="i1", uchar="u1", short="i2", ushort="u2", int="i4", uint="u4", float="f4")
PLY_KINDS |= dict(double="f8", int8="i1", uint8="u1", int16="i2", uint16="u2", int32="i4")
PLY_KINDS |= dict(uint32="u4", float32="f4", float64="f8")


def ply(data):
    "Elements by name: columns [n], and lists of arrays."
    head, _, body = data.partition(b"end_header")
    first, _, body = body.partition(b"\n")
    assert not first.strip()
    lines = [line.split() for line in head.decode("latin-1").splitlines()]
    form = next(words[1] for words in lines if words[:1] == ["format"])
    elements = []
    for word, *rest in filter(None, lines):
        if word == "element":
            elements.append((rest[0], int(rest[1]), []))
        if word == "property":
            elements[-1][2].append(rest)
    words = iter(body.split()) if form == "ascii" else None
    order = ">" if "big" in form else "<"
    place = 0

    def take(kind, count=1):
        nonlocal place
        dtype = np.dtype(PLY_KINDS[kind])
        if words is not None:
            row = [next(words) for _ in range(count)]
            whole = dtype.kind in "iu"
            return np.array([int(w) if whole else float(w) for w in row]).astype(dtype)
        found = np.frombuffer(body, dtype.newbyteorder(order), count, place)
        place += dtype.itemsize * count
        return found

    found = {}
    for name, count, properties in elements:
        rows = {rest[-1]: [] for rest in properties}
        for _ in range(count):
            for kind, *rest in properties:
                if kind == "list":
                    size, item, own = rest
                    rows[own].append(take(item, int(take(size)[0])))
                else:
                    rows[rest[-1]].append(take(kind)[0])
        found[name] = {k: v if any(np.ndim(x) for x in v) else np.array(v) for k, v in rows.items()}
    return found


def fans(corners, faces):
    "Triangles of polygons."
    return np.array(
        [
            [corners[f[0]], corners[f[k]], corners[f[k + 1]]]
            for f in faces
            for k in range(1, len(f) - 1)
        ]
    )


def obj(data):
    corners, faces = [], []
    for line in text_of(data).splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["v"]:
            corners.append([float(x) for x in words[1:4]])
        if words[:1] == ["f"]:
            numbers = [int(word.split("/")[0]) for word in words[1:]]
            faces.append([n - 1 if n > 0 else len(corners) + n for n in numbers])
    return fans(np.array(corners), faces)


def off(data):
    lines = [line.split("#")[0].split() for line in text_of(data).splitlines()]
    lines = [words for words in lines if words]
    assert lines[0][0] in ("OFF", "COFF")
    counts = lines[1] if len(lines[0]) == 1 else lines[0][1:]
    rows = lines[2 if len(lines[0]) == 1 else 1 :]
    n, m = int(counts[0]), int(counts[1])
    corners = np.array([[float(x) for x in words[:3]] for words in rows[:n]])
    faces = [[int(x) for x in words[1 : 1 + int(words[0])]] for words in rows[n : n + m]]
    assert len(corners) == n and len(faces) == m
    return fans(corners, faces)


def stl(data):
    (count,) = struct.unpack_from("<I", data, 80)
    kind = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("more", "<u2")])
    return np.frombuffer(data, kind, count, 84)["corners"]


def gltf(header, binary):
    "Triangles of all primitives; nodes that move or repeat them are refused."
    header = json.loads(header)
    assert not any({"matrix", "scale", "rotation", "translation"} & set(n) for n in header["nodes"])
    kinds = {5126: "<f4", 5125: "<u4", 5123: "<u2", 5121: "u1"}

    def accessor(number):
        one = header["accessors"][number]
        view = header["bufferViews"][one["bufferView"]]
        wide = dict(SCALAR=1, VEC2=2, VEC3=3, VEC4=4)[one["type"]]
        first = view.get("byteOffset", 0) + one.get("byteOffset", 0)
        blob = binary(header["buffers"][view.get("buffer", 0)])
        return np.frombuffer(blob, kinds[one["componentType"]], one["count"] * wide, first).reshape(
            -1, wide
        )

    found = []
    for node in header["nodes"]:
        for part in header["meshes"][node["mesh"]]["primitives"] if "mesh" in node else ():
            corners = accessor(part["attributes"]["POSITION"])
            found.append(corners[accessor(part["indices"]).reshape(-1, 3)])
    return np.concatenate(found)


def glb(data):
    size = int.from_bytes(data[12:16], "little")
    return gltf(data[20 : 20 + size], lambda _: data[28 + size :])


def pcd(data):
    "Columns by name, of ascii and of plain bytes."
    head, _, _ = data.partition(b"DATA ")
    facts = {
        line.split()[0].upper(): line.split()[1:]
        for line in head.decode("latin-1").splitlines()
        if line.split()
    }
    form, _, body = data[len(head) + 5 :].partition(b"\n")
    names, count = facts["FIELDS"], int(facts["POINTS"][0])
    kinds = [(n, f"<{t.lower()}{s}") for n, t, s in zip(names, facts["TYPE"], facts["SIZE"])]
    if form.strip() == b"ascii":
        rows = np.array(body.split(), dtype=float).reshape(count, len(names))
        return dict(zip(names, rows.T))
    if form.strip() != b"binary":
        return None
    return np.frombuffer(body, kinds, count)


# ---- from raw columns to what a reader of ours should say


def as_points(raw):
    "Coordinates, and which rows are points."
    raw = np.asarray(raw)
    real = (np.abs(raw.astype(np.float64)) < 1e10).all(1)
    return raw[real], real


def as_radii(raw):
    "Distances from the mean, of the largest: what no rotation and no scale changes."
    xyz, _ = as_points(raw)
    xyz = xyz.astype(np.float64) - xyz.mean(0, dtype=np.float64)
    length = np.linalg.norm(xyz, axis=1)
    return length / length.max()


def as_color(raw):
    "Fractions, of bytes, numbers up to 255 or fractions."
    raw = np.asarray(raw)
    if raw.dtype == np.uint16 and raw.max() > 255:
        return raw / 65535
    whole = raw.dtype.kind in "iu" or not (raw % 1).any()
    return raw / 255 if whole or raw.max() > 1 else raw


def as_normal(raw):
    length = np.linalg.norm(raw.astype(float), axis=1, keepdims=True)
    return np.where(np.abs(length**2 - 1) > 0.02, raw / np.where(length, length, 1), raw)


def as_labels(raw):
    raw = np.asarray(raw, dtype=np.float64)
    return np.where(np.isin(raw, [-1, -100, 255]), -1, raw)


def as_objects(raw):
    "Numbers of objects, of which 255 is one."
    raw = np.asarray(raw, dtype=np.float64)
    return np.where(np.isin(raw, [-1, -100]), -1, raw)


def fraction(color):
    "Colours of ours in 0..1."
    return np.asarray(color) / 255 if np.asarray(color).dtype == np.uint8 else color
