"""Cloud files in every dialect that people have: the same points out of each, and one line for what is none."""

import struct
import warnings

import numpy as np
import pytest
from plyfile import PlyData, PlyElement

from unipre3d.data.clouds import (
    READERS,
    find_clouds,
    plain_cloud,
    read_cloud,
    unpack_lzf,
    write_cloud,
)
from unipre3d.values import MissingPoints

N = 60
RNG = np.random.default_rng(0)
XYZ = RNG.normal(size=(N, 3)).astype(np.float32).astype(np.float64)
RGB = RNG.integers(0, 256, (N, 3)).astype(np.uint8)
NORMAL = (XYZ / np.linalg.norm(XYZ, axis=1, keepdims=True)).astype(np.float32)
TIME = np.arange(N) / 4


def same(cloud, color=True, normal=False, exact=True):
    places = cloud.xyz + cloud.offset
    assert np.array_equal(places, XYZ) if exact else np.allclose(places, XYZ, atol=1e-6)
    assert cloud.color is None if not color else np.allclose(cloud.color * 255, RGB, atol=0.01)
    assert cloud.normal is None if not normal else np.allclose(cloud.normal, NORMAL, atol=1e-5)
    return cloud


# ------------------------------------------------------------------------------------------------ PLY


def write_ply(path, columns, order="<", text=False, faces=False):
    table = np.rec.fromarrays(
        [values for _, values, _ in columns], dtype=[(n, k) for n, _, k in columns]
    )
    elements = [PlyElement.describe(table, "vertex")]
    if faces:
        face = np.empty(2, dtype=[("vertex_indices", "O")])
        face["vertex_indices"] = [np.array([0, 1, 2], "i4"), np.array([0, 2, 3, 4], "i4")]
        elements.append(PlyElement.describe(face, "face"))
    PlyData(elements, text=text, byte_order=order).write(str(path))


@pytest.mark.parametrize("form", ["<", ">", "text"])
@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize(
    "names, values, color_kind",
    [
        (("red", "green", "blue"), RGB, "u1"),
        (("r", "g", "b"), RGB / np.float32(255), "f4"),
        (("diffuse_red", "diffuse_green", "diffuse_blue"), RGB.astype(np.uint16), "u2"),
    ],
)
def test_ply_dialects(tmp_path, form, kind, names, values, color_kind):
    columns = [(axis, column, kind) for axis, column in zip("xyz", XYZ.T)]
    columns += [(f"n{axis}", column, "f4") for axis, column in zip("xyz", NORMAL.T)]
    columns += [(name, column, color_kind) for name, column in zip(names, values.T)]
    columns += [("alpha", np.full(N, 255), "u1"), ("scalar_Time", TIME, "f4")]
    order = "<" if form == "text" else form
    write_ply(tmp_path / "a.ply", columns, order, form == "text", faces=True)
    cloud = same(read_cloud(tmp_path / "a.ply"), normal=True)
    assert np.array_equal(cloud.scalars["Time"], TIME) and set(cloud.scalars) == {"Time", "alpha"}
    assert cloud.xyz.dtype == np.float64 and cloud.color.dtype == np.float32


def test_a_ply_without_vertices_is_named(tmp_path):
    table = np.zeros(2, dtype=[("a", "f4")])
    PlyData([PlyElement.describe(table, "edge")]).write(str(tmp_path / "a.ply"))
    with pytest.raises(
        ValueError, match="a.ply: expected a PLY file of points, found elements edge"
    ):
        read_cloud(tmp_path / "a.ply")


# ------------------------------------------------------------------------------------------------ PCD


def pack_lzf(data):
    "Greedy LZF: repeats of the last 32 bytes, everything else as it is."
    out, literal, place = bytearray(), bytearray(), 0

    def flush():
        while literal:
            part = literal[:32]
            out.append(len(part) - 1)
            out.extend(part)
            del literal[:32]

    while place < len(data):
        best, away = 0, 0
        for back in range(1, min(place, 300) + 1):
            length = 0
            while place + length < len(data) and length < 260:
                if data[place + length] != data[place + length - back]:
                    break
                length += 1
            if length > best:
                best, away = length, back
        if best < 3:
            literal.append(data[place])
            place += 1
            continue
        flush()
        length, offset = best - 2, away - 1
        out.append((min(length, 7) << 5) | offset >> 8)
        if length >= 7:
            out.append(length - 7)
        out.append(offset & 255)
        place += best
    flush()
    return bytes(out)


def test_lzf_is_undone():
    for data in (
        b"",
        b"a",
        b"abc" * 100,
        bytes(1000),
        RNG.bytes(500),
        b"ab" * 20 + RNG.bytes(40) + bytes(300),
    ):
        packed = pack_lzf(data)
        assert unpack_lzf(packed, len(data)) == data
        for size in (len(data) + 1, max(0, len(data) - 1)):
            if size != len(data):
                with pytest.raises(ValueError):
                    unpack_lzf(packed, size)
    for wrong in (b"\xff", b"\x20\x05", b"\xe0\x00"):
        with pytest.raises(ValueError):
            unpack_lzf(wrong, 10)


@pytest.mark.parametrize("form", ["ascii", "binary", "binary_compressed"])
@pytest.mark.parametrize("rgb", ["F", "U"])
def test_pcd(tmp_path, form, rgb):
    packed = RGB.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    packed = packed.astype(np.uint32)
    color = packed.view(np.float32) if rgb == "F" else packed
    kinds = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("rgb", f"<{rgb.lower()}4")]
    kinds += [
        ("_", "<u1"),
        ("pad", "<u1"),
        ("normal_x", "<f4"),
        ("normal_y", "<f4"),
        ("normal_z", "<f4"),
    ]
    nothing = np.zeros(N, np.uint8)
    table = np.empty(N, kinds)
    for name, column in zip(table.dtype.names, [*XYZ.T, color, nothing, nothing, *NORMAL.T]):
        table[name] = column
    fields = " ".join(table.dtype.names)
    sizes = " ".join(str(table.dtype[name].itemsize) for name in table.dtype.names)
    types = " ".join(table.dtype[name].kind.upper() for name in table.dtype.names)
    head = (
        f"# .PCD v0.7\nVERSION 0.7\nFIELDS {fields}\nSIZE {sizes}\nTYPE {types}\nCOUNT{' 1' * 9}\n"
    )
    head += f"WIDTH {N}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {N}\nDATA {form}\n"
    if form == "ascii":
        rows = [" ".join(repr(v.item()) for v in row) for row in table]
        body = "\n".join(rows).encode()
    elif form == "binary":
        body = table.tobytes()
    else:
        raw = b"".join(np.ascontiguousarray(table[name]).tobytes() for name in table.dtype.names)
        small = pack_lzf(raw)
        body = struct.pack("<II", len(small), len(raw)) + small
    if form == "ascii" and rgb == "F":
        assert np.isfinite(color).all()
    path = tmp_path / "a.pcd"
    path.write_bytes(head.encode() + body)
    same(read_cloud(path), normal=True)
    path.write_bytes(head.encode() + body[: len(body) // 2])
    with pytest.raises(ValueError, match=r"a.pcd: expected a PCD file") as problem:
        read_cloud(path)
    assert "\n" not in str(problem.value)


def test_a_pcd_header_whose_lines_do_not_belong_together(tmp_path):
    head = f"FIELDS x y z rgb\nSIZE 4 4 4\nTYPE F F F\nPOINTS {N}\nDATA binary\n"
    (tmp_path / "a.pcd").write_bytes(head.encode() + XYZ.astype("<f4").tobytes())
    with pytest.raises(ValueError, match=r"a.pcd: expected a PCD file, found FIELDS, TYPE, SIZE"):
        read_cloud(tmp_path / "a.pcd")


# ------------------------------------------------------------------------------------------------ numpy and text


def test_numpy(tmp_path):
    np.save(tmp_path / "a.npy", np.concatenate([XYZ, RGB], 1))
    same(read_cloud(tmp_path / "a.npy"))
    np.save(tmp_path / "b.npy", np.concatenate([XYZ, NORMAL, RGB, TIME[:, None]], 1))
    assert list(same(read_cloud(tmp_path / "b.npy"), normal=True).scalars) == ["column_10"]
    np.save(tmp_path / "c.npy", XYZ.astype(">f8"))
    same(read_cloud(tmp_path / "c.npy"), color=False)
    named = np.rec.fromarrays([*XYZ.T, *RGB.T], names="X,Y,Z,R,G,B")
    np.save(tmp_path / "d.npy", np.asarray(named))
    same(read_cloud(tmp_path / "d.npy"))
    np.savez(
        tmp_path / "e.npz",
        coord=XYZ,
        color=RGB,
        normal=NORMAL,
        segment=np.arange(N),
        name=np.array("x"),
    )
    assert list(same(read_cloud(tmp_path / "e.npz"), normal=True).scalars) == ["segment"]
    np.savez(tmp_path / "f.npz", points=np.concatenate([XYZ, RGB], 1))
    same(read_cloud(tmp_path / "f.npz"))
    np.savez(tmp_path / "g.npz", x=XYZ[:, 0], y=XYZ[:, 1], z=XYZ[:, 2])
    same(read_cloud(tmp_path / "g.npz"), color=False)
    np.savez(tmp_path / "h.npz", other=XYZ)
    with pytest.raises(ValueError, match="h.npz: expected an array called xyz, .* found other"):
        read_cloud(tmp_path / "h.npz")


def lines(columns, mark=" ", decimal="."):
    return "\n".join(mark.join(f"{v:.9g}".replace(".", decimal) for v in row) for row in columns)


ROWS = np.concatenate([XYZ, RGB], 1)


@pytest.mark.parametrize(
    "name, text",
    [
        ("plain.xyz", lines(ROWS)),
        ("tabs.txt", lines(ROWS, "\t") + "\n"),
        ("comma.csv", "x,y,z,red,green,blue\n" + lines(ROWS, ",")),
        ("quoted.csv", '"X","Y","Z","R","G","B"\n' + lines(ROWS, ",")),
        ("german.csv", "X;Y;Z;R;G;B\n" + lines(ROWS, ";", ",")),
        ("compare.asc", "//X Y Z R G B\n" + lines(ROWS)),
        ("remarks.txt", "# made by hand\n# x y z r g b\n" + lines(ROWS) + "\n# end\n"),
        ("spaces.txt", lines(ROWS).replace(" ", "   ").replace("\n", "\n  ")),
        ("count.pts", f"{N}\n" + lines(np.concatenate([XYZ, np.full((N, 1), 99), RGB], 1))),
        ("windows.xyz", lines(ROWS).replace("\n", "\r\n")),
    ],
)
def test_text(tmp_path, name, text):
    (tmp_path / name).write_text(text, newline="")
    cloud = same(read_cloud(tmp_path / name), exact=False)
    assert set(cloud.scalars) == ({"column_7"} if name == "count.pts" else set())


def test_names_count_also_beside_a_column_of_nothing(tmp_path):
    rows = np.concatenate([XYZ, RGB, np.full((N, 1), np.nan), TIME[:, None]], 1)
    (tmp_path / "a.txt").write_text("x y z r g b nothing time\n" + lines(rows))
    cloud = same(read_cloud(tmp_path / "a.txt"), exact=False)
    assert set(cloud.scalars) == {"nothing", "time"} and np.allclose(cloud.scalars["time"], TIME)
    (tmp_path / "a.csv").write_text(
        "x;y;z;r;g;b;\n" + lines(ROWS, ";").replace("\n", ";\n") + ";\n"
    )
    assert not same(read_cloud(tmp_path / "a.csv"), exact=False).scalars


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "one two three\n", "1 2\n3 4\n", "1 2 3\n4 x 6\n"]
)
def test_text_that_is_no_cloud(tmp_path, text):
    (tmp_path / "a.xyz").write_text(text)
    with pytest.raises(ValueError, match="a.xyz: expected") as problem:
        read_cloud(tmp_path / "a.xyz")
    assert "\n" not in str(problem.value)


# ------------------------------------------------------------------------------------------------ surveys


def test_las_and_laz(tmp_path):
    laspy = pytest.importorskip("laspy")
    far = XYZ + [500_000, 5_400_000, 100]
    for suffix in ("las", "laz"):
        header = laspy.LasHeader(point_format=3, version="1.2")
        header.offsets, header.scales = far.min(0), [1e-4] * 3
        las = laspy.LasData(header)
        las.x, las.y, las.z = far.T
        las.red, las.green, las.blue = RGB.T.astype(np.uint16) * 257
        las.intensity = np.arange(N)
        las.write(tmp_path / f"a.{suffix}")
        cloud = read_cloud(tmp_path / f"a.{suffix}")
        assert np.abs(cloud.xyz + cloud.offset - far).max() < 1e-4 and np.abs(cloud.xyz).max() < 100
        assert np.allclose(cloud.color * 255, RGB, atol=0.01)
        assert cloud.scalars["intensity"].tolist() == list(range(N))
    las.red[:] = las.green[:] = las.blue[:] = 0
    las.write(tmp_path / "b.las")
    assert read_cloud(tmp_path / "b.las").color is None


def test_e57(tmp_path):
    pye57 = pytest.importorskip("pye57")
    file = pye57.E57(str(tmp_path / "a.e57"), mode="w")
    table = dict(zip(("cartesianX", "cartesianY", "cartesianZ"), XYZ.T.copy()))
    table |= dict(zip(("colorRed", "colorGreen", "colorBlue"), RGB.T.copy()))
    file.write_scan_raw(table)
    file.write_scan_raw(table, translation=np.array([1.0, 0, 0]))
    file.close()
    cloud = read_cloud(tmp_path / "a.e57")
    assert np.allclose(cloud.xyz[:N], XYZ) and np.allclose(cloud.xyz[N:], XYZ + [1, 0, 0])
    assert np.allclose(cloud.color[:N] * 255, RGB, atol=0.01)


# ------------------------------------------------------------------------------------------------ all of them


def test_far_out_and_missing_points(tmp_path):
    far = XYZ + [4_500_000, 5_400_000, 100]
    write_cloud(tmp_path / "far.ply", far)
    cloud = read_cloud(tmp_path / "far.ply")
    assert np.array_equal(cloud.xyz + cloud.offset, far) and np.abs(cloud.xyz).max() < 10
    assert np.array_equal(cloud.offset, np.round(cloud.offset))
    holes = XYZ.copy()
    holes[[3, 7]] = np.nan
    np.savez(tmp_path / "holes.npz", xyz=holes, color=RGB, time=TIME)
    with pytest.warns(MissingPoints, match="left out 2 of 60 points"):
        cloud = read_cloud(tmp_path / "holes.npz")
    kept = np.delete(np.arange(N), [3, 7])
    assert cloud.missing == 2 and np.array_equal(cloud.xyz, XYZ[kept])
    assert np.allclose(cloud.color * 255, RGB[kept]) and np.array_equal(
        cloud.scalars["time"], TIME[kept]
    )


def test_what_is_written_is_read(tmp_path):
    path = write_cloud(tmp_path / "a.ply", XYZ, RGB / 255, {"part": np.arange(N)}, NORMAL)
    cloud = same(read_cloud(path), normal=True)
    assert cloud.scalars["part"].tolist() == list(range(N))
    with pytest.raises(ValueError, match="a.obj: expected a name that ends in .ply"):
        write_cloud(tmp_path / "a.obj", XYZ)
    with pytest.raises(ValueError, match=r"color: expected an array \[60 3\]"):
        write_cloud(tmp_path / "b.ply", XYZ, RGB[:5])
    assert not (tmp_path / "b.ply").exists()


@pytest.mark.parametrize("suffix", sorted(READERS))
def test_files_that_are_none(tmp_path, suffix):
    pytest.importorskip({".las": "laspy", ".laz": "laspy", ".e57": "pye57"}.get(suffix, "numpy"))
    for name, data in (
        ("empty", b""),
        ("noise", bytes(range(1, 200))),
        ("page", b"<!doctype html><p>no</p>"),
    ):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(data)
        with pytest.raises((ValueError, OSError), match=f"{path.name}: expected") as problem:
            read_cloud(path)
        assert "\n" not in str(problem.value)
    with pytest.raises(FileNotFoundError, match="found nothing there"):
        read_cloud(tmp_path / f"none{suffix}")


def test_other_names_and_folders(tmp_path):
    with pytest.raises(
        ValueError, match="a.docx: expected a cloud file .* found a name that ends in .docx"
    ):
        read_cloud(tmp_path / "a.docx")
    with pytest.raises(ValueError, match="expected cloud files"):
        find_clouds(tmp_path)
    (tmp_path / "below" / ".hidden").mkdir(parents=True)
    for name in ("b.PLY", "below/a.xyz", "below/.hidden/c.ply", "d.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_clouds(tmp_path)] == ["b.PLY", "a.xyz"]


def test_columns_without_names():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare = plain_cloud(XYZ, "rows")
        assert bare.color is None and bare.normal is None and not bare.scalars
        labels = plain_cloud(np.concatenate([XYZ, RGB, np.arange(N)[:, None]], 1), "rows")
        assert list(labels.scalars) == ["column_7"] and labels.color is not None
        bits = plain_cloud(np.concatenate([XYZ, np.arange(3 * N).reshape(N, 3) % 2], 1), "rows")
        assert bits.color is None and len(bits.scalars) == 3  # zeros and ones could mean anything


@pytest.mark.parametrize(
    "text, said",
    (
        ("1 2 3 4 5 6\n1 2 3 4\n", "4 numbers instead of 6 in row 2"),
        ("# x y z i\n1 2 3 4\n\n1 2 3\n1 2 3 4\n", "3 numbers instead of 4 in row 2"),
        ("1," * 20_000 + "\n", "a row of 20,000 numbers, more than 10,000"),
    ),
)
def test_rows_of_a_text_are_of_one_length(tmp_path, text, said):
    "Else a column moves to another, or a colour is lost."
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=f"a.txt: expected .* found {said}"):
        read_cloud(tmp_path / "a.txt")


def test_an_empty_cell_of_a_table_stays_a_gap(tmp_path):
    (tmp_path / "a.csv").write_text("x,y,z,i\n1,2,3,4\n1,2,4,\n1,3,3,5\n")
    found = read_cloud(tmp_path / "a.csv").scalars["i"]
    np.testing.assert_array_equal(found, [4, np.nan, 5])


@pytest.mark.parametrize(
    "text, said",
    (
        ("x,y,z,red, 9,109,125\n1,2,3,4\n", "before the first row"),
        ("x,y,z,r9,125\n1,2,3,4\n", "before the first row"),
        ("x y z\n1 2 three\n1 2 3\n", "before the first row"),
        ("0.125\n1 2 3\n", "before the first row"),
    ),
)
def test_a_torn_row_is_no_header(tmp_path, text, said):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=f"a.csv: expected .* {said}"):
        read_cloud(tmp_path / "a.csv")


def test_a_cell_without_a_number_is_said(tmp_path):
    "It makes a column of colours a plain one."
    (tmp_path / "a.txt").write_text("1 2 3 9 9 9\n1 2 4 null 8 200\n1 3 3 9 9 9\n")
    with pytest.warns(UserWarning, match="a.txt: 1 cells hold no number"):
        assert read_cloud(tmp_path / "a.txt").color is None


def pcd_text(count, rows):
    head = f"FIELDS x y z part\nSIZE 4 4 4 4\nTYPE F F F I\nCOUNT 1 1 1 {count}\n"
    return head + f"WIDTH {len(rows)}\nHEIGHT 1\nPOINTS {len(rows)}\nDATA ascii\n" + "\n".join(rows)


def test_a_column_of_several_numbers_in_a_pcd_text(tmp_path):
    (tmp_path / "a.pcd").write_text(pcd_text(2, ["1 2 3 4 5", "1 2 4 6 7"]))
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.pcd").xyz, [[1, 2, 3], [1, 2, 4]])
    (tmp_path / "a.pcd").write_text(pcd_text(99999999999, ["1 2 3 4 5", "1 2 4 6 7"]))
    with pytest.raises(
        ValueError, match="a.pcd: expected a PCD file, found a row of 100,000,000,002"
    ):
        read_cloud(tmp_path / "a.pcd")


def test_two_of_three_colours_are_said(tmp_path):
    (tmp_path / "a.csv").write_text("x,y,z,red,green,blua\n1,2,3,4,5,6\n1,2,4,4,5,6\n")
    with pytest.warns(UserWarning, match="a.csv: no column blue, so that the cloud has no colours"):
        assert read_cloud(tmp_path / "a.csv").color is None


def test_a_header_of_another_number_of_columns_is_said(tmp_path):
    (tmp_path / "a.csv").write_text("x,y,z,red\n1,2,3,4,5,6\n1,2,4,4,5,6\n")
    with pytest.warns(UserWarning, match="a.csv: left out its header, which names 4 of 6 columns"):
        assert len(read_cloud(tmp_path / "a.csv").color) == 2


@pytest.mark.parametrize("head", ["# 3D point list with one line of data per point:\n", ""])
@pytest.mark.parametrize("track", ["", " 0.5 3 17 4 2"])
def test_points_of_colmap_are_no_numbers_of_points(tmp_path, head, track):
    path = tmp_path / "points3D.txt"
    path.write_text(
        head + f"7 1.5 2 3 255 0 51{track}\n9 -1 4 0.5 0 255 0{track and track + ' 8 1'}\n"
    )
    cloud = read_cloud(path)
    assert cloud.xyz.tolist() == [[1.5, 2, 3], [-1, 4, 0.5]]
    assert cloud.color[0] == pytest.approx([1, 0, 0.2])
