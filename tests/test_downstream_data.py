"""Readers of ScanObjectNN, ModelNet40, ShapeNetPart and S3DIS on tiny files in the real layouts, whole and broken."""

import json
import pickle

import h5py
import numpy as np
import pytest
from PIL import Image

from unipre3d.data import labelled as downstream
from unipre3d.data.readers import class_labels, fit_radius
from unipre3d.data.labelled import (
    S3DIS,
    ModelNet40,
    ScanObjectNN,
    ShapeNetPart,
    shapenet_parts,
    write_modelnet40,
    write_s3dis,
    write_scanobjectnn,
    write_shapenetpart,
    y_up_to_z_up,
    z_up_to_y_up,
)
from unipre3d.data.scannet import SCANNET, scannet_labels
from unipre3d.data.shapenet import ShapeNetViews

RNG = np.random.default_rng(0)
unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)


def refuses(call, *texts, kind=(ValueError, FileNotFoundError)):
    "The call fails with one line that has all the texts."
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for text in texts:
        assert str(text) in message, message


def refuses_data(call, *texts):
    "The same, for a file: the line also says what the folder should look like and where to get the data."
    refuses(call, *texts, "expected", "found", "looks like", "get it from")


# ---- axes and scale


def test_up_is_z_and_nothing_is_mirrored():
    xyz = RNG.normal(size=(20, 3))
    assert np.allclose(y_up_to_z_up(xyz)[:, 2], xyz[:, 1]) and np.array_equal(
        z_up_to_y_up(y_up_to_z_up(xyz)), xyz
    )
    assert np.isclose(np.linalg.det(y_up_to_z_up(np.eye(3))), 1)


@pytest.mark.parametrize("radius", (0.65, 1.0))
def test_fit_radius_is_the_unit_sphere_of_the_field(radius):
    xyz = RNG.normal(3, 2, size=(40, 3))
    centred = xyz - xyz.mean(0)
    want = centred / np.max(np.sqrt(np.sum(centred**2, axis=1))) * radius
    assert (
        np.allclose(fit_radius(xyz, radius), want, atol=1e-6)
        and fit_radius(xyz, radius).dtype == np.float32
    )
    assert np.allclose(fit_radius(xyz, None), centred, atol=1e-6)  # the size stays


def test_objects_have_one_scale_in_all_readers(tmp_path):
    "The same radius gives the same cloud whatever file it comes from; None keeps the file's size about the mean."
    xyz = RNG.normal(2, 3, size=(60, 3))
    table = np.concatenate([xyz, unit(RNG.normal(size=(60, 3)))], 1)
    write_scanobjectnn(tmp_path / "scan", xyz[None], [4], split="train")
    write_modelnet40(
        tmp_path / "model", [("chair", table)], ["chair"], split="train", form="ply_hdf5"
    )
    part = ("03001627", "one", np.concatenate([table, np.full((60, 1), 12)], 1))
    write_shapenetpart(tmp_path / "part", dict(train=[part]), dict(Chair="03001627"))
    folder = tmp_path / "views" / "03001627" / "one"
    (folder / "pts").mkdir(parents=True)
    (folder / "easy").mkdir()
    # the released axes: its reader takes columns (2, 0, 1), negates the first and the last, and half a turn puts z up
    x, y, z = xyz.T
    np.save(folder / "pts" / "03001627-one.npy", np.stack([-y, z, -x], 1).astype(np.float32))
    Image.new("RGB", (8, 8)).save(folder / "easy" / "00.png")
    (folder / "easy" / "00.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 -2 0 0 0 1")
    for radius in (0.65, 1.0, None):
        readers = (
            ScanObjectNN(tmp_path / "scan", split="train", radius=radius),
            ModelNet40(tmp_path / "model", split="train", radius=radius),
            ShapeNetPart(tmp_path / "part", split="train", radius=radius),
            ShapeNetViews(tmp_path / "views", convention="released", views=1, radius=radius),
        )
        for reader in readers:
            assert np.allclose(reader.rows(0)["xyz"], fit_radius(xyz, radius), atol=1e-5), reader


# ---- ScanObjectNN


@pytest.fixture()
def scans(tmp_path):
    "Two splits of two variants, written with h5py alone, as the authors' files are."
    data = RNG.normal(size=(3, 2048, 3)).astype(np.float32)
    mask = np.where(RNG.random((3, 2048)) < 0.3, -1, 7).astype(np.int32)
    for folder, name in (
        ("main_split", "objectdataset"),
        ("main_split", "objectdataset_augmentedrot_scale75"),
        ("main_split_nobg", "objectdataset"),
    ):
        (tmp_path / "h5_files" / folder).mkdir(parents=True, exist_ok=True)
        for split in ("training", "test"):
            with h5py.File(tmp_path / "h5_files" / folder / f"{split}_{name}.h5", "w") as f:
                f["data"], f["label"], f["mask"] = data, np.int32([14, 0, 4]), mask
    return tmp_path, data, mask


@pytest.mark.parametrize("variant", ("OBJ_BG", "OBJ_ONLY", "PB_T50_RS"))
@pytest.mark.parametrize("split", ("train", "test"))
def test_scanobjectnn(scans, variant, split):
    root, data, mask = scans
    for at in (root, root / "h5_files"):
        read = ScanObjectNN(at, split=split, variant=variant)
        assert (
            len(read) == 3
            and [read.classes[k] for k in class_labels(read)] == ["toilet", "bag", "chair"]
            and len(read.classes) == 15
        )
    for i in range(3):
        rows = read.rows(i)
        assert (
            np.allclose(rows["xyz"], fit_radius(y_up_to_z_up(data[i])), atol=1e-6)
            and rows["xyz"].dtype == np.float32
        )
        assert set(rows) == {"xyz"} and np.array_equal(read.mask(i), mask[i] != -1)
    assert np.allclose(
        ScanObjectNN(root, split=split, variant=variant, radius=None).rows(0)["xyz"],
        y_up_to_z_up(data[0] - data[0].mean(0)),
        atol=1e-5,
    )
    assert len({read.name(i) for i in range(3)}) == 3 and ("nobg" in str(read.h5.path)) == (
        variant == "OBJ_ONLY"
    )


def test_scanobjectnn_crosses_processes_and_caches(scans):
    root, *_ = scans
    read = ScanObjectNN(root, split="train", cache_bytes=2**20)
    first = read.rows(0)["xyz"]
    assert read.rows(0)["xyz"].base is first.base
    assert np.array_equal(pickle.loads(pickle.dumps(read)).rows(0)["xyz"], first)
    assert read.fingerprint() == ScanObjectNN(root, split="test").fingerprint()


def test_h5_arrays_are_read_once_and_stay_behind(scans, tmp_path):
    root, data, mask = scans
    path = root / "h5_files/main_split/training_objectdataset_augmentedrot_scale75.h5"
    path.unlink()
    with h5py.File(path, "w") as f:  # compressed in chunks across objects, as h5py guesses them
        for key, value in dict(data=data, label=np.int32([1, 2, 3]), mask=mask).items():
            f.create_dataset(key, data=value, compression="gzip")
    read = ScanObjectNN(root, split="train", radius=None)
    light = pickle.dumps(read)
    assert not read.h5._held
    for i in (2, 0, 1):
        assert np.array_equal(read.rows(i)["xyz"], fit_radius(y_up_to_z_up(data[i]), None))
    assert set(read.h5._held) == {"data"} and np.array_equal(
        read.h5._held["data"], data
    )  # the mask waits until it is asked for
    held = read.h5._held["data"]
    assert (
        np.array_equal(read.mask(1), mask[1] != -1)
        and read.rows(0)
        and read.h5._held["data"] is held
    )
    again = pickle.loads(pickle.dumps(read))
    assert (
        len(pickle.dumps(read)) < len(light) + 100
        and not again.h5._held
        and np.array_equal(again.rows(1)["xyz"], read.rows(1)["xyz"])
    )
    assert np.array_equal(
        write_then_read(tmp_path, data),
        np.stack([fit_radius(y_up_to_z_up(cloud)) for cloud in data]),
    )


def write_then_read(root, data):
    "Clouds through ModelNet40's h5 form, every file's arrays held once."
    (root / "m40").mkdir()
    (root / "m40/shape_names.txt").write_text("airplane\n")
    with h5py.File(root / "m40/ply_data_train0.h5", "w") as f:
        for key, value in dict(data=data, normal=data, label=np.uint8([[0]] * len(data))).items():
            f.create_dataset(key, data=value, compression="gzip")
    read = ModelNet40(root / "m40", split="train")
    clouds = np.stack([read.rows(i)["xyz"] for i in range(len(read))])
    h5 = read.items[0][2][0]
    assert (
        all(item[2][0] is h5 for item in read.items)
        and set(h5._held) == {"data", "normal"}
        and not read.cache.items
        and not pickle.loads(pickle.dumps(read)).items[0][2][0]._held
    )
    return clouds


def test_scanobjectnn_round_trip(tmp_path):
    xyz = np.stack([fit_radius(RNG.normal(size=(50, 3))) for _ in range(4)])
    write_scanobjectnn(
        tmp_path, xyz, [1, 2, 3, 4], RNG.random((4, 50)) < 0.5, split="test", variant="OBJ_BG"
    )
    read = ScanObjectNN(tmp_path, split="test", variant="OBJ_BG")
    assert class_labels(read).tolist() == [1, 2, 3, 4] and all(
        np.allclose(read.rows(i)["xyz"], xyz[i], atol=1e-6) for i in range(4)
    )


def test_scanobjectnn_refuses(scans, tmp_path):
    root, data, mask = scans
    path = root / "h5_files/main_split/training_objectdataset_augmentedrot_scale75.h5"
    read = lambda: ScanObjectNN(root, split="train")

    def rewrite(**arrays):
        path.unlink()  # the reader before may still hold the file open
        with h5py.File(path, "w") as f:
            for key, value in (
                dict(data=data, label=np.int32([1, 2, 3]), mask=mask) | arrays
            ).items():
                if value is not None:
                    f[key] = value

    refuses_data(
        lambda: ScanObjectNN(tmp_path / "nowhere", split="train"),
        tmp_path / "nowhere",
        "nothing there",
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "h5_files.zip").write_bytes(b"PK")
    refuses_data(lambda: ScanObjectNN(tmp_path / "empty", split="train"), "an empty folder")
    refuses_data(lambda: ScanObjectNN(tmp_path / "h5_files.zip", split="train"), "unpack it")
    refuses_data(
        lambda: ScanObjectNN(root, split="train", variant="PB_T25"),
        "training_objectdataset_augmented25_norot.h5",
        "nothing there",
        "is a folder with",
    )
    refuses(
        lambda: ScanObjectNN(root, split="val"), "split: expected one of train, test, got 'val'"
    )
    refuses(
        lambda: ScanObjectNN(root, split="train", variant="hard"),
        "variant: expected one of",
        "PB_T50_RS",
    )
    rewrite(data=None)
    refuses_data(read, path, "an array 'data'", "label, mask")
    rewrite(data=data[..., :2])
    refuses_data(read, path, "data of shape [n n 3]", "[3, 2048, 2]")
    rewrite(data=data[:0], label=np.int32([]), mask=mask[:0])
    refuses_data(read, path, "at least one object")
    rewrite(mask=None)
    refuses_data(lambda: read().mask(0), path, "an array 'mask'", "data, label")
    rewrite(label=np.int32([1, 2]))
    refuses_data(read, path, "label of shape [3]", "[2]")
    rewrite(label=np.int32([1, 2, 15]))
    refuses_data(read, path, "labels in 0..14", "found 15")
    rewrite(mask=mask[:, :9])
    refuses_data(lambda: read().mask(0), path, "mask of shape [3 2048]")
    broken = data.copy()
    broken[1, 5] = np.inf
    rewrite(data=broken)
    with pytest.warns(UserWarning, match="object 1: left out 1 of 2048 points"):
        scans = read()
        assert len(scans.rows(1)["xyz"]) == len(scans.mask(1)) == 2047
    assert len(read().rows(0)["xyz"]) == 2048
    broken[1, :1500] = 1e20
    rewrite(data=broken)
    refuses_data(lambda: read().rows(1), path, "object 1", "finite numbers", "4500 that are not")
    rewrite(data=np.zeros_like(data))
    refuses_data(lambda: read().rows(0), "more than one place")
    half = path.read_bytes()[:3000]
    path.unlink()
    path.write_bytes(half)
    refuses_data(read, path, "an h5 file", "3,000 bytes that does not load")


# ---- ModelNet40


def modelnet_text(root):
    rows = [
        np.concatenate([RNG.normal(size=(30, 3)), unit(RNG.normal(size=(30, 3)))], 1)
        for _ in range(3)
    ]
    names = ["airplane_0001", "night_stand_0001", "airplane_0627"]
    for name, r in zip(names, rows):
        (root / name.rpartition("_")[0]).mkdir(parents=True, exist_ok=True)
        (root / name.rpartition("_")[0] / f"{name}.txt").write_text(
            "\n".join(",".join(f"{x:.6f}" for x in row) for row in r) + "\n"
        )
    (root / "modelnet40_shape_names.txt").write_text("airplane\nbathtub\nnight_stand\n")
    (root / "modelnet40_train.txt").write_text("\n".join(names[:2]) + "\n")
    (root / "modelnet40_test.txt").write_text(names[2])
    return root, rows


def test_modelnet40_text(tmp_path):
    root, rows = modelnet_text(tmp_path / "modelnet40_normal_resampled")
    for at in (root, tmp_path):
        read = ModelNet40(at, split="train")
        assert read.form == "normal_resampled" and [read.name(i) for i in range(2)] == [
            "airplane_0001",
            "night_stand_0001",
        ]
        assert [read.classes[k] for k in class_labels(read)] == ["airplane", "night_stand"]
    assert np.allclose(
        read.rows(1)["xyz"], fit_radius(y_up_to_z_up(rows[1][:, :3])), atol=1e-5
    ) and np.allclose(read.rows(1)["normal"], y_up_to_z_up(rows[1][:, 3:]), atol=1e-5)
    assert (
        np.allclose(np.linalg.norm(read.rows(1)["normal"], axis=1), 1, atol=1e-5)
        and len(ModelNet40(root, split="test")) == 1
    )


def test_modelnet40_h5(tmp_path):
    root = tmp_path / "modelnet40_ply_hdf5_2048"
    root.mkdir()
    (root / "shape_names.txt").write_text("airplane\nbathtub\n")
    data = RNG.normal(size=(5, 40, 3)).astype(np.float32)
    for name, keep in (("train0", slice(0, 2)), ("train1", slice(2, 4)), ("test0", slice(4, 5))):
        with h5py.File(root / f"ply_data_{name}.h5", "w") as f:
            f["data"], f["label"], f["normal"] = (
                data[keep],
                np.uint8([[1]] * len(data[keep])),
                unit(data.reshape(-1, 3)).reshape(data.shape)[keep],
            )
    for lists in (False, True):
        if lists:
            (root / "train_files.txt").write_text(
                "data/modelnet40_ply_hdf5_2048/ply_data_train0.h5\ndata/modelnet40_ply_hdf5_2048/ply_data_train1.h5\n"
            )
        read = pickle.loads(pickle.dumps(ModelNet40(tmp_path, split="train", radius=1.0)))
        assert (
            len(read) == 4
            and class_labels(read).tolist() == [1] * 4
            and len({read.name(i) for i in range(4)}) == 4
        )
        assert np.allclose(
            read.rows(3)["xyz"], fit_radius(y_up_to_z_up(data[3]), 1.0), atol=1e-6
        ) and read.rows(0)["normal"].shape == (40, 3)
    (root / "train_files.txt").write_text("ply_data_train7.h5")
    refuses_data(
        lambda: ModelNet40(root, split="train"), root / "ply_data_train7.h5", "nothing there"
    )
    (root / "test_files.txt").write_text("\n")
    refuses_data(lambda: ModelNet40(root, split="test"), "this file")


@pytest.mark.parametrize("form", ModelNet40.forms)
def test_modelnet40_round_trip(tmp_path, form):
    clouds = [
        (
            kind,
            np.concatenate(
                [fit_radius(RNG.normal(size=(25, 3))), unit(RNG.normal(size=(25, 3)))], 1
            ),
        )
        for kind in ("desk", "bed", "desk")
    ]
    for split in ("train", "test"):
        write_modelnet40(tmp_path, clouds, ["bed", "desk"], split=split, form=form)
    read = ModelNet40(tmp_path, split="test")
    assert class_labels(read).tolist() == [1, 0, 1]
    for i, (_, rows) in enumerate(clouds):
        assert np.allclose(np.concatenate(list(read.rows(i).values()), 1), rows, atol=1e-5)


def test_modelnet40_refuses(tmp_path):
    root, _ = modelnet_text(tmp_path / "modelnet40_normal_resampled")
    plane = root / "airplane/airplane_0001.txt"
    read = lambda: ModelNet40(root, split="train").rows(0)
    refuses_data(
        lambda: ModelNet40(tmp_path / "x", split="train"),
        "modelnet40_shape_names.txt or shape_names.txt",
        "nothing there",
    )
    plane.write_text("1,2,3,0,0,1\n1,2,x,0,0,1\n")
    refuses_data(read, plane, "6 numbers a line")
    plane.write_text("1,2,3\n1,2,4\n")
    refuses_data(read, plane, "[n 6]", "[2, 3]")
    plane.write_text("\n")
    refuses_data(read, plane, "an empty file")
    plane.write_text("1,2,3,0,0,nan\n1,2,4,0,0,1\n")
    refuses_data(read, plane, "finite numbers")
    plane.unlink()
    refuses_data(read, plane, "nothing there")
    (root / "modelnet40_train.txt").write_text("aeroplane_0001")
    refuses_data(
        lambda: ModelNet40(root, split="train"), "modelnet40_train.txt", "'aeroplane_0001'"
    )
    (root / "modelnet40_train.txt").write_text("")
    refuses_data(lambda: ModelNet40(root, split="train"), "objects of split train")
    (root / "modelnet40_train.txt").unlink()
    refuses_data(lambda: ModelNet40(root, split="train"), "modelnet40_train.txt", "this list")
    refuses(lambda: ModelNet40(root, split="val"), "split: expected one of train, test")
    (tmp_path / "modelnet40_ply_hdf5_2048").mkdir()
    (tmp_path / "modelnet40_ply_hdf5_2048/shape_names.txt").write_text("a")
    refuses_data(
        lambda: ModelNet40(tmp_path, split="train"), "one copy of the data", "name one of them"
    )


# ---- ShapeNetPart


def part_rows(low, high, n=30):
    part = RNG.integers(low, high, n)
    return np.concatenate(
        [RNG.normal(size=(n, 3)), unit(RNG.normal(size=(n, 3))), part[:, None]], 1
    )


@pytest.fixture()
def partset(tmp_path):
    "Written line by line, as the benchmark's files are."
    root, rows = tmp_path / "shapenetcore_partanno_segmentation_benchmark_v0_normal", {}
    (root / "train_test_split").mkdir(parents=True)
    (root / "synsetoffset2category.txt").write_text(
        "Airplane\t02691156\nMug\t03797390\nTable\t04379243\n"
    )
    for split, entries in dict(
        train=[("02691156", "a1", 0, 4), ("03797390", "m1", 36, 38)],
        val=[("04379243", "t1", 47, 50)],
        test=[("04379243", "t2", 47, 50)],
    ).items():
        for synset, model, low, high in entries:
            (root / synset).mkdir(exist_ok=True)
            rows[model] = part_rows(low, high)
            (root / synset / f"{model}.txt").write_text(
                "\n".join(" ".join(f"{x:.6f}" for x in row) for row in rows[model]) + "\n"
            )
        (root / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(
            json.dumps([f"shape_data/{s}/{m}" for s, m, *_ in entries])
        )
    return root, rows


def test_shapenetpart(partset, tmp_path):
    root, rows = partset
    read = ShapeNetPart(tmp_path, split="trainval")
    assert [read.name(i) for i in range(3)] == ["02691156-a1", "03797390-m1", "04379243-t1"] and [
        read.classes[k] for k in class_labels(read)
    ] == ["Airplane", "Mug", "Table"]
    for i, model in enumerate(("a1", "m1", "t1")):
        got = read.rows(i)
        assert np.allclose(
            got["xyz"], fit_radius(y_up_to_z_up(rows[model][:, :3])), atol=1e-5
        ) and np.allclose(got["normal"], y_up_to_z_up(rows[model][:, 3:6]), atol=1e-5)
        assert (
            np.array_equal(got["part"], rows[model][:, 6])
            and got["part"].dtype == np.int32
            and set(got["part"]) <= set(read.parts[read.classes[read.label(i)]])
        )
    assert [len(ShapeNetPart(root, split=s)) for s in ("train", "val", "test")] == [2, 1, 1]
    assert len(pickle.loads(pickle.dumps(read)).rows(0)["xyz"]) == 30


def test_shapenet_parts_number_through():
    parts = shapenet_parts()
    assert (
        len(parts) == 16
        and sum(parts.values(), []) == list(range(50))
        and list(parts) == sorted(parts)
    )
    assert {k: v for k, v in parts.items() if k in ("Car", "Motorbike", "Skateboard")} == dict(
        Car=[8, 9, 10, 11], Motorbike=[30, 31, 32, 33, 34, 35], Skateboard=[44, 45, 46]
    )


def test_shapenetpart_round_trip(tmp_path):
    rows = part_rows(36, 38)
    rows[:, :3] = fit_radius(rows[:, :3])
    read = ShapeNetPart(
        write_shapenetpart(tmp_path, dict(test=[("03797390", "m", rows)]), dict(Mug="03797390")),
        split="test",
    )
    assert np.allclose(read.rows(0)["xyz"], rows[:, :3], atol=1e-5) and np.array_equal(
        read.rows(0)["part"], rows[:, 6]
    )


def test_shapenetpart_refuses(partset, tmp_path):
    root, rows = partset
    plane, listed, table = (
        root / "02691156/a1.txt",
        root / "train_test_split/shuffled_train_file_list.json",
        root / "synsetoffset2category.txt",
    )
    make = lambda: ShapeNetPart(root, split="train")
    refuses_data(
        lambda: ShapeNetPart(root / "train_test_split", split="train"),
        "synsetoffset2category.txt",
        "shuffled_test_file_list.json",
    )
    refuses(
        lambda: ShapeNetPart(root, split="all"), "split: expected one of train, val, test, trainval"
    )
    plane.write_text("0 0 0 0 0 1 0\n1 0 0 0 0 1 36\n")
    refuses_data(lambda: make().rows(0), plane, "parts of a Airplane in -1..3", "found 36")
    plane.write_text("0 0 0 0 0 1 0\n1 0 0 0 0 1 0.5\n")
    refuses_data(lambda: make().rows(0), plane, "found 0.5")
    plane.write_text("0 0 0 0\n1 0 0 0\n")
    refuses_data(lambda: make().rows(0), plane, "[n 7]", "[2, 4]")
    plane.unlink()
    refuses_data(lambda: make().rows(0), plane, "nothing there")
    for text, found in (
        ("[", "does not load"),
        ("[]", "an empty list"),
        ("{}", "dict"),
        ('["02691156/a1"]', "'02691156/a1'"),
        ('["shape_data/00000000/a1"]', "'shape_data/00000000/a1'"),
    ):
        listed.write_text(text)
        refuses_data(make, listed, found)
    listed.unlink()
    refuses_data(make, listed, "this list", "is a folder with")
    table.write_text("Aeroplane\t02691156\n")
    refuses_data(make, table, "'Aeroplane 02691156'")


# ---- S3DIS


@pytest.fixture()
def areas(tmp_path):
    "As Pointcept's preprocessing writes them: labels as columns of int16."
    rooms = {}
    for area in range(1, 7):
        folder = tmp_path / f"Area_{area}" / "office_1"
        folder.mkdir(parents=True)
        n = 10 + area
        rooms[area] = dict(
            coord=RNG.normal(size=(n, 3)).astype(np.float32),
            color=RNG.integers(0, 256, (n, 3)).astype(np.uint8),
            segment=RNG.integers(-1, 13, (n, 1)).astype(np.int16),
            instance=RNG.integers(0, 5, (n, 1)).astype(np.int16),
        )
        for name, array in rooms[area].items():
            np.save(folder / f"{name}.npy", array)
    return tmp_path, rooms


def test_s3dis(areas):
    root, rooms = areas
    test = S3DIS(root, split="test")
    assert (
        len(test) == 1
        and test.name(0) == "Area_5/office_1"
        and test.label(0) is None
        and len(test.classes) == 13
    )
    got = test.rows(0)
    assert sorted(got) == ["color", "instance", "segment", "xyz"]
    for name, key in (("coord", "xyz"), ("color", "color")):
        assert np.array_equal(got[key], rooms[5][name]) and got[key].dtype == rooms[5][name].dtype
    for name in ("segment", "instance"):
        assert np.array_equal(got[name], rooms[5][name][:, 0]) and got[name].dtype == np.int32
    assert [S3DIS(root, split="train").name(i)[:6] for i in range(5)] == [
        f"Area_{a}" for a in (1, 2, 3, 4, 6)
    ]
    assert [
        r.name(0)[:6]
        for r in (S3DIS(root, split="val", val_area=2), S3DIS(root, split="test", test_area=3))
    ] == ["Area_2", "Area_3"]
    assert "Area_2/office_1" not in [i[0] for i in S3DIS(root, split="train", val_area=2).items]
    np.save(root / "Area_5/office_1/normal.npy", np.zeros((15, 3)))
    assert test.has(0, "normal") and test.rows(0)["normal"].dtype == np.float32
    refuses(lambda: class_labels(test), "found rooms")


def test_s3dis_round_trip(tmp_path):
    arrays = dict(
        coord=RNG.normal(size=(9, 3)).astype(np.float32),
        color=RNG.integers(0, 256, (9, 3)),
        segment=RNG.integers(0, 13, 9),
        instance=RNG.integers(0, 3, 9),
        normal=np.eye(3, dtype=np.float32)[RNG.integers(0, 3, 9)],
    )
    write_s3dis(tmp_path, "Area_5/hall_2", **arrays)
    got = pickle.loads(pickle.dumps(S3DIS(tmp_path, split="test"))).rows(0)
    assert all(np.array_equal(got["xyz" if k == "coord" else k], v) for k, v in arrays.items())


def test_s3dis_refuses(areas):
    root, rooms = areas
    room = root / "Area_5/office_1"
    read = lambda: S3DIS(root, split="test").rows(0)

    def with_array(name, array, *texts):
        np.save(room / f"{name}.npy", array)
        refuses_data(read, room / f"{name}.npy", *texts)
        np.save(room / f"{name}.npy", rooms[5][name])

    refuses_data(lambda: S3DIS(root / "x", split="test"), "Area_1 .. Area_6", "nothing there")
    refuses_data(lambda: S3DIS(root / "Area_1", split="test"), "a folder with office_1")
    refuses(lambda: S3DIS(root, split="val"), "val_area: expected one of 1, 2, 3, 4, 6")
    refuses(lambda: S3DIS(root, split="val", val_area=5), "val_area: expected one of", "got 5")
    refuses(
        lambda: S3DIS(root, split="test", test_area=7),
        "test_area: expected one of 1, 2, 3, 4, 5, 6, got 7",
    )
    with_array("coord", rooms[5]["coord"][:, :2], "[n 3]", "[15, 2]")
    with_array("coord", np.full((15, 3), np.nan), "finite numbers", "45 that are not")
    with_array("color", rooms[5]["color"][:4], "[15 3]", "[4, 3]")
    with_array("color", np.full((15, 3), 300), "colours in 0..255", "300")
    with_array("segment", np.full((15, 1), 13), "labels in -1..12", "13")
    with_array("instance", np.array(["a"] * 15), "numbers")
    with_array("segment", np.array(3), "[15]", "[]")
    np.save(room / "coord.npy", np.zeros((0, 3), np.float32))
    refuses_data(read, "at least one point")
    (room / "coord.npy").write_bytes(b"\x93NUMPY")
    refuses_data(read, room / "coord.npy", "a numpy array", "does not load")
    np.save(room / "coord.npy", rooms[5]["coord"])
    (room / "segment.npy").unlink()
    refuses_data(read, room / "segment.npy", "segment of each point")
    (room / "coord.npy").unlink()
    refuses_data(lambda: S3DIS(root, split="test"), root / "Area_5", "one folder a room")


# ---- labels of ScanNet


def test_scannet_labels():
    small, large = scannet_labels(), scannet_labels(200)
    assert (
        len(small.names) == 20
        and small.skip == (0, 1)
        and small.ids == sorted(small.ids)
        and not small.groups
        and len(small.val) == 20
    )
    assert [small.names[k] for k in (0, 1, 2, 7, 19)] == [
        "wall",
        "floor",
        "cabinet",
        "door",
        "otherfurniture",
    ]
    assert len(set(large.names)) == 200 == len(set(large.ids)) and large.ids == sorted(large.ids)
    assert {g: len(c) for g, c in large.groups.items()} == dict(
        head=66, common=68, tail=66
    ) and sorted(sum(large.groups.values(), [])) == list(range(200))
    assert [large.names[k] for k in large.skip] == ["wall", "floor"] and len(large.val) == 189
    refuses(lambda: scannet_labels(40), "classes: expected 20 or 200, got 40")


def test_every_layout_says_where_its_data_is():
    for layout in (
        downstream.SCANOBJECTNN,
        downstream.MODELNET40,
        downstream.SHAPENETPART,
        downstream.S3DIS_LAYOUT,
        SCANNET,
    ):
        message = layout.say("here", "this", "that")
        assert (
            "\n" not in message
            and message.startswith("here: expected this, found that; ")
            and layout.source in message
            and "<root>" in message
        )
