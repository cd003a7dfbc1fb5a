"""The embedded furniture, the released layout, and the loaders."""

import configparser, csv, json, os, pickle, shutil, zipfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from unipre3d.core import CameraBatch, collate, data_dir
from unipre3d.data import shapenet
from unipre3d.data import objects
from unipre3d.worlds import furniture, prepare
from unipre3d.data.augment import Augment, about_z, move_cameras
from unipre3d.data.loading import StepSampler, eval_loader, make_loader
from unipre3d.data.samples import ViewSamples
from unipre3d.data.readers import read_views
from unipre3d.data.shapenet import (
    ShapeNetViews,
    export_objects,
    read_pose,
    split_objects,
    turntable,
)
from unipre3d.geometry.cameras import project

PARITY = Path(__file__).parent / "parity"


def cloud(reader, i):
    "The columns of a cloud as tensors with names."
    return SimpleNamespace(**{k: torch.from_numpy(v) for k, v in reader.rows(i).items()})


@pytest.fixture(scope="module")
def embedded():
    return ShapeNetViews()


@pytest.fixture(scope="module")
def rows():
    return objects.read_csv(data_dir() / "furniture.csv")


@pytest.fixture(scope="module")
def folder(embedded, tmp_path_factory):
    return export_objects(embedded, tmp_path_factory.mktemp("plain"), indices=[0, 200, 400])


@pytest.fixture()
def broken(folder, tmp_path):
    "A fresh copy of one exported object and the names of its files."
    data = ShapeNetViews(folder)
    synset, model = data.items[0]
    shutil.copytree(folder / synset / model, tmp_path / synset / model)
    (tmp_path / "convention.json").write_text((folder / "convention.json").read_text())
    easy = tmp_path / synset / model / "easy"
    return (
        tmp_path,
        easy / "00.png",
        easy / "00.txt",
        tmp_path / synset / model / "pts" / f"{synset}-{model}.npy",
    )


# ---- the embedded set


def test_what_is_in_the_archive(embedded, rows):
    assert len(rows) == len(embedded) >= 600
    assert [(r["class"], r["id"]) for r in rows] == embedded.items
    size = (data_dir() / "furniture.zip").stat().st_size
    assert size <= 48e6
    names = set(embedded.store.files.zip.namelist())
    assert len(names) == 3 + 26 * len(rows)
    assert {
        "chair",
        "table",
        "cabinet",
        "sofa",
        "bed",
        "door",
        "box",
        "shelf",
        "desk",
        "display",
        "bag",
        "sink",
        "toilet",
        "bin",
    } <= set(embedded.classes)


def test_no_family_in_two_splits(rows):
    sides = defaultdict(set)
    for r in rows:
        sides[r["family"]].add(r["split"])
    assert all(len(s) == 1 for s in sides.values())
    share = [sum(r["split"] == s for r in rows) / len(rows) for s in ("train", "val", "test")]
    np.testing.assert_allclose(share, [0.75, 0.10, 0.15], atol=0.02)
    for kind in {r["class"] for r in rows}:
        assert {r["split"] for r in rows if r["class"] == kind} >= {"train", "test"}, kind


def test_split_is_what_the_code_makes(rows):
    made = furniture.split_families(
        {r["id"]: r["class"] for r in rows}, {r["id"]: r["family"] for r in rows}
    )
    assert made == {r["id"]: r["split"] for r in rows}


def test_every_object_is_credited(rows):
    text = (data_dir() / "CREDITS.md").read_text(encoding="utf-8")
    for r in rows:
        assert f"| {r['id']} | {r['name']} | {r['creator']} |" in text
    for _, link in furniture.LICENCES.values():
        assert link in text
    assert "rendered" in text


def test_dropped_objects_have_a_reason_and_are_absent(rows):
    choices = objects.read_csv(data_dir() / "furniture_classes.csv")
    assert {c["id"] for c in choices if not c["dropped"]} == {r["id"] for r in rows}
    assert len({c["id"] for c in choices}) == len(choices) == 820


def test_cameras_are_exact(embedded):
    "Points fall on the object; one that misses lies in a pixel of the outline, less than a quarter of which is covered."
    share = []
    for i in range(0, len(embedded), 47):
        views, xyz = read_views(embedded, i), cloud(embedded, i).xyz
        uv, depth, inside = project(xyz, torch.zeros(len(xyz), dtype=torch.long), views.camera)
        assert inside.all()  # the whole object is in every view
        col, row = uv.floor().long().unbind(-1)
        near = torch.nn.functional.max_pool2d(views.mask[:, None].float(), 3, 1, 1)[:, 0] > 0
        hit, close = (
            m[torch.arange(24)[:, None], row, col].float().mean() for m in (views.mask, near)
        )
        assert hit >= 0.97 and close >= 0.999, embedded.items[i]
        share.append(hit)
        torch.testing.assert_close(
            views.camera.center.norm(dim=1),
            torch.full((24,), objects.DISTANCE),
            atol=1e-5,
            rtol=0,
        )
    assert torch.stack(share).mean() >= 0.99


def test_background_is_black(embedded):
    for i in range(0, len(embedded), 53):
        views = read_views(embedded, i)
        assert (
            not (views.rgb * ~views.mask[:, None]).any() and views.rgb.amax(1)[views.mask].min() > 0
        ), embedded.items[i]


def test_clouds(embedded):
    for i in range(0, len(embedded), 41):
        c = cloud(embedded, i)
        assert c.xyz.shape == (4096, 3) and c.xyz.norm(dim=1).max() <= objects.RADIUS + 1e-3
        assert (c.normal.norm(dim=1) - 1).abs().max() < 1e-5
        assert c.color.min() >= 0 and c.color.max() <= 1
        assert int(c.part.max()) < len(embedded.parts.get(embedded.items[i][0], ["unlabelled"]))


def test_point_colours_are_those_of_the_views(embedded):
    "A point in front is as bright as the pixel that it falls on."
    i = embedded.items.index(("chair", "cc0-plasticChair"))
    views, c = read_views(embedded, i), cloud(embedded, i)
    uv, depth, _ = project(c.xyz, torch.zeros(len(c.xyz), dtype=torch.long), views.camera)
    facing = (
        torch.einsum(
            "nd,vnd->vn",
            c.normal,
            torch.nn.functional.normalize(views.camera.center[:, None] - c.xyz, dim=-1),
        )
        > 0.5
    )
    v, n = facing.nonzero().unbind(1)
    x, y = uv[v, n].floor().long().unbind(-1)
    assert (views.rgb[v, :, y, x] - c.color[n]).abs().mean(1).median() < 0.02


def test_packing_is_exact():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(500, 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    once = objects.unpack_cloud(
        objects.pack_cloud(
            rng.uniform(-0.65, 0.65, (500, 3)),
            normal,
            rng.integers(0, 256, (500, 3)).astype(np.uint8),
            rng.integers(0, 9, 500),
        )
    )
    again = objects.unpack_cloud(
        objects.pack_cloud(*(once[k] for k in ("xyz", "normal", "color", "part")))
    )
    for k in once:
        np.testing.assert_array_equal(once[k], again[k])


@pytest.mark.skipif(
    "UNIPRE3D_FURNITURE_DEB" not in os.environ,
    reason="set UNIPRE3D_FURNITURE_DEB to the source package",
)
def test_rebuild_equals_the_archive(embedded, tmp_path):
    ids = ["cc0-plasticChair", "kator-coffee-mug", "scopia-bed1"]
    out = furniture.build_furniture(
        os.environ["UNIPRE3D_FURNITURE_DEB"],
        tmp_path / "out",
        tmp_path / "work",
        workers=1,
        ids=ids,
    )
    with zipfile.ZipFile(out) as z:
        for name in z.namelist():
            if name.count("/") > 1:
                assert z.read(name) == embedded.store.read(name), name


# ---- the layout


def test_folder_equals_zip(embedded, folder):
    plain = ShapeNetViews(folder)
    assert len(plain) == 3
    for i in range(3):
        j = embedded.items.index(plain.items[i])
        a, b = read_views(plain, i), read_views(embedded, j)
        assert (
            torch.equal(a.rgb, b.rgb)
            and torch.equal(a.mask, b.mask)
            and torch.equal(a.camera.world_to_cam, b.camera.world_to_cam)
        )
        for k in ("xyz", "normal", "color", "part"):
            assert torch.equal(getattr(cloud(plain, i), k), getattr(cloud(embedded, j), k))


def test_export_as_released_reads_back_aligned(embedded, tmp_path):
    i = embedded.items.index(("chair", "cc0-plasticChair"))
    export_objects(embedded, tmp_path, convention="released", indices=[i])
    data = ShapeNetViews(tmp_path, convention="released")
    a, b = cloud(data, 0).xyz, cloud(embedded, i).xyz
    torch.testing.assert_close(a, b - b.mean(0), atol=1e-6, rtol=0)
    one = torch.zeros(len(a), dtype=torch.long)
    torch.testing.assert_close(
        project(a, one, read_views(data, 0).camera)[0],
        project(b, one, read_views(embedded, i).camera)[0],
        atol=1e-3,
        rtol=0,
    )


@pytest.mark.parametrize("convention", ["released", None])
def test_cameras_move_with_the_radius(embedded, tmp_path, convention):
    "An object of another size falls on the same pixels, because its cameras come as much nearer."
    i = embedded.items.index(("chair", "cc0-plasticChair"))
    export_objects(embedded, tmp_path, convention=convention or "unipre3d", indices=[i])
    plain = ShapeNetViews(tmp_path, convention=convention)
    one = torch.zeros(4096, dtype=torch.long)
    want = project(cloud(plain, 0).xyz, one, read_views(plain, 0).camera)
    for radius in (0.65, 0.3):
        fitted = ShapeNetViews(tmp_path, convention=convention, radius=radius)
        xyz, camera = cloud(fitted, 0).xyz, read_views(fitted, 0).camera
        assert abs(float(xyz.norm(dim=1).max()) - radius) < 1e-6 and xyz.mean(0).abs().max() < 1e-6
        got = project(xyz, one, camera)
        torch.testing.assert_close(got[0], want[0], atol=2e-3, rtol=0)
        ratio = got[1] / want[1]
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), atol=1e-4, rtol=1e-4)
        assert torch.equal(read_views(fitted, 0).rgb, read_views(plain, 0).rgb)
    assert "radius" not in plain.convention and plain.radius is None  # today's behaviour by default


def write_released(root, parity):
    "Three views in the released layout, from the parity images and cameras."
    easy = root / "03001627" / "m" / "easy"
    easy.mkdir(parents=True)
    (root / "03001627" / "m" / "pts").mkdir()
    for k in range(3):
        Image.fromarray(parity[f"in/png{k}_HWC"].astype(np.uint8)).save(easy / f"{k:02d}.png")
        (easy / f"{k:02d}.txt").write_text(
            "\n".join(" ".join(repr(float(x)) for x in row) for row in parity["in/c2w_txt"][k])
        )
    (easy / "rendering_metadata.txt").write_text("")
    return root / "03001627" / "m" / "pts" / "03001627-m.npy"


def test_parity_of_cameras_and_images(tmp_path):
    parity = load_file(PARITY / "cameras_shapenet.safetensors")
    np.save(write_released(tmp_path, parity), np.zeros((4, 3), np.float32))
    for size in (16, 32):
        data = ShapeNetViews(tmp_path, convention="released", size=size, z_up=False, views=3)
        views = read_views(data, 0)
        np.testing.assert_allclose(views.camera.world_to_cam, parity["out/w2c"], atol=1e-6)
        np.testing.assert_allclose(data.cam_to_world(0), parity["out/c2w"], atol=1e-6)
        np.testing.assert_allclose(views.camera.center, parity["out/camera_center"], atol=1e-5)
        np.testing.assert_allclose(views.rgb, parity[f"out/image{size}"], atol=1e-6)
    turned = read_views(
        ShapeNetViews(tmp_path, convention="released", views=3), 0
    ).camera.world_to_cam
    np.testing.assert_allclose(turned, parity["out/w2c"] @ np.diag([1, -1, -1, 1]), atol=1e-6)


def test_released_foreground_is_the_alpha(tmp_path):
    "A black part of an object belongs to it, a colour where alpha is 0 does not; without alpha the colour decides."
    parity = load_file(PARITY / "cameras_shapenet.safetensors")
    np.save(write_released(tmp_path, parity), np.zeros((4, 3), np.float32))
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[8:24, 8:24] = [90, 60, 30, 255]
    rgba[8:16, 8:24, :3] = 0  # black, and the object's
    rgba[:4, :, :3] = 200  # bright, and nobody's
    easy = tmp_path / "03001627" / "m" / "easy"
    Image.fromarray(rgba).save(easy / "00.png")
    Image.fromarray(rgba[..., :3]).save(easy / "01.png")
    for size in (None, 16):
        data = ShapeNetViews(tmp_path, convention="released", size=size, views=3)
        step = 32 // (size or 32)
        seen, plain = data.view(0, 0), data.view(0, 1)
        assert seen.mask[8 // step : 24 // step, 8 // step : 24 // step].all()
        assert not seen.mask[: 4 // step].any()
        assert np.array_equal(plain.mask, plain.rgb.any(-1)) and plain.mask[: 2 // step].all()
        image = Image.fromarray(rgba) if size is None else Image.fromarray(rgba).resize((16, 16))
        assert np.array_equal(seen.rgb, np.asarray(image)[..., :3])  # colours as before


def test_parity_of_points_and_rotation(tmp_path):
    parity = load_file(PARITY / "shapenet_points_and_rotation.safetensors")
    raw = parity["in/raw_for_center"]
    moved = shapenet.released_points(raw)
    c = parity["out/centered"]
    np.testing.assert_allclose(moved, np.stack([-c[:, 2], c[:, 0], -c[:, 1]], 1), atol=1e-6)
    p = parity["in/points"]
    np.testing.assert_allclose(
        shapenet.released_points(p) - shapenet.released_points(p)[0],
        (parity["out/transform_point_data"] - parity["out/transform_point_data"][0]),
        atol=1e-6,
    )
    n, R = len(parity["in/w2c"]), parity["out/rot_mat"]
    xyz = parity["out/transform_point_data"] @ R.T
    turned = CameraBatch(
        torch.from_numpy(move_cameras(parity["in/w2c"], R)),
        torch.eye(3).repeat(n, 1, 1),
        (8, 8),
        torch.zeros(n, dtype=torch.long),
    )
    np.testing.assert_allclose(xyz, parity["out/rotated_pos"], atol=2e-6)
    np.testing.assert_allclose(turned.world_to_cam, parity["out/rotated_extrinsic"], atol=2e-6)
    np.testing.assert_allclose(turned.center, parity["out/camera_centers"], atol=1e-5)


def test_parity_of_the_video_path():
    want = load_file(PARITY / "cameras_continuous_pose.safetensors")["out/c2w_400x4x4"]
    np.testing.assert_allclose(turntable(200, z_up=False), want, atol=2e-6)


# ---- splits of files that bring no table


@pytest.fixture()
def bare(tmp_path):
    "Forty objects in two synsets of the released layout: folders with a cloud, nothing else."
    for k in range(40):
        synset = ("02691156", "03001627")[k % 2]
        pts = tmp_path / "root" / synset / f"m{k}" / "pts"
        pts.mkdir(parents=True)
        np.save(pts / f"{synset}-m{k}.npy", np.eye(3, dtype=np.float32))
        (pts.parent / "easy").mkdir()
        for view in range(24):
            for end in ("png", "txt"):
                (pts.parent / "easy" / f"{view:02d}.{end}").touch()
    return tmp_path / "root"


def released(root, split=None, **options):
    return ShapeNetViews(root, split=split, convention="released", **options)


def test_without_lists_names_decide(bare):
    with pytest.warns(
        UserWarning,
        match=r"^[^\n]*root: no lists train.txt, val.txt, test.txt \(one <synset>-<model> a line\)[^\n]*$",
    ) as said:
        parts = {s: released(bare, s).items for s in ("train", "val", "test")}
    assert {s: len(p) for s, p in parts.items()} == dict(train=30, val=2, test=8) and len(
        {str(w.message) for w in said}
    ) == 1
    assert sorted(sum(parts.values(), [])) == released(bare).items
    with pytest.warns(UserWarning):
        assert set(released(bare, "test", classes=["03001627"]).items) == {
            i for i in parts["test"] if i[0] == "03001627"
        }
    with pytest.raises(ValueError) as e:
        released(bare, "tset")
    one_line(e, "train, val, test", "tset")


def test_a_list_decides(bare):
    (bare / "train.txt").write_text("02691156-m0.npy\n03001627-m1\n\n03001627-gone\n")
    with pytest.warns(UserWarning, match="left out 1 of 3 objects.*03001627-gone"):
        data = released(bare, "train")
    assert data.items == [("02691156", "m0"), ("03001627", "m1")]
    with pytest.raises(FileNotFoundError) as e:
        released(bare, "val")  # a list for one split and none for another
    one_line(e, bare / "val.txt", "<synset>-<model>")
    with pytest.warns(UserWarning), pytest.raises(ValueError) as e:
        released(bare, "train", classes=[])
    one_line(e, bare, "train")


def test_objects_that_lack_a_file_are_left_out_and_counted(bare):
    whole = released(bare).items
    (bare / "02691156" / "m4" / "easy" / "05.png").unlink()
    (bare / "03001627" / "m7" / "easy" / "23.txt").unlink()
    (bare / "03001627" / "m9" / "pts" / "03001627-m9.npy").unlink()
    with pytest.warns(
        UserWarning,
        match=r"^[^\n]*root: left out 3 of 40 objects that lack a file, such as 02691156/m4/easy/05.png$",
    ):
        data = released(bare)
    assert data.items == [i for i in whole if i[1] not in ("m4", "m7", "m9")]
    with pytest.warns(UserWarning, match="left out 2 of 40"):
        assert len(released(bare, views=20).items) == 38  # view 23 is not asked for
    (bare / "train.txt").write_text("03001627-m9\n")
    with pytest.raises(FileNotFoundError) as e:
        released(bare, "train")
    one_line(e, "03001627-m9.npy", "none has its points and 24 views")


@pytest.mark.parametrize("text", ["", "02691156/m0\n", "no list at all\n" * 9])
def test_error_a_list_that_names_nothing(bare, text):
    (bare / "val.txt").write_text(text)
    with pytest.raises(ValueError) as e:
        released(bare, "val")
    one_line(e, bare / "val.txt", "<synset>-<model>", "there is 02691156/m0")


def test_error_a_root_that_is_too_high(bare):
    merged = bare.parent / "merged"
    merged.mkdir()
    bare.rename(merged / "image")
    with pytest.raises(ValueError) as e:
        released(merged, "train")
    one_line(e, merged, "<synset>/<model>/pts/<synset>-<model>.npy", "synsets")
    (merged / "train.txt").write_text("02691156-m0\n")
    with pytest.raises(ValueError) as e:
        released(merged, "train")
    one_line(e, merged / "train.txt", "'02691156-m0'", "there is image/02691156", "synsets")


@pytest.mark.parametrize("counts", [[4] * 10, [1] * 12, [2, 1], [40], [30, 1, 1], [3, 3, 3]])
@pytest.mark.parametrize(
    "shares", [(0.8, 0.1, 0.1), (0.75, 0.05, 0.2), (0.1, 0.8, 0.1), (0.9, 0, 0.1)]
)
def test_no_split_is_empty(counts, shares):
    objects = [(f"class{c}", f"{k}") for c, n in enumerate(counts) for k in range(n)]
    made = split_objects(objects, shares)
    assert set(made) == set(objects) and made == split_objects(objects[::-1], shares)
    have = Counter(made.values())
    assert all(have[s] for s, share in zip(("train", "val", "test"), shares) if share) and (
        "val" in have
    ) == bool(shares[1])
    assert have["train"] >= 1 and sum(have.values()) == len(objects)


def test_a_tenth_of_ten_small_classes(tmp_path, monkeypatch):
    "40 meshes in ten classes: a tenth of each class rounds to nothing, a tenth of all does not."
    monkeypatch.setattr(prepare, "read_mesh", lambda path, up: path)
    monkeypatch.setattr(prepare, "prepare_own", lambda mesh, name, kind, **_: ({}, {}))
    files = [tmp_path / f"class{k % 10}" / f"{k}.obj" for k in range(40)]
    with zipfile.ZipFile(prepare.prepare_meshes(files, tmp_path / "mine.zip")) as z:
        rows = list(csv.DictReader(z.read("objects.csv").decode().splitlines()))
    assert Counter(r["split"] for r in rows) == dict(train=32, val=4, test=4)
    assert all(
        sum(r["class"] == f"class{k}" and r["split"] == "train" for r in rows) >= 2
        for k in range(10)
    )
    monkeypatch.setattr(prepare, "prepare_own", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(ValueError) as e:
        prepare.prepare_meshes(files[:2], tmp_path / "few.zip")
    one_line(e, "prepare_meshes: split", "train, val, test", "found 2")
    assert not (tmp_path / "few.zip").exists()


def test_trimesh_has_what_is_called():
    "`trimesh.load_scene` came with 4.6."
    config = configparser.ConfigParser()
    config.read(Path(__file__).parent.parent / "settings.ini")
    (low,) = [
        w.removeprefix("trimesh>=")
        for w in config["DEFAULT"]["requirements"].split()
        if w.startswith("trimesh")
    ]
    assert tuple(map(int, low.split("."))) >= (4, 6)


# ---- errors: one line that names the file, what was expected and what was found


def one_line(info, *words):
    text = str(info.value)
    assert "\n" not in text and "expected" in text, text
    for w in words:
        assert str(w) in text, text


def test_error_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        ShapeNetViews(tmp_path / "nowhere")
    one_line(e, tmp_path / "nowhere")


def test_error_no_convention(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(ValueError) as e:
        ShapeNetViews(tmp_path)
    one_line(e, "convention.json", "released")


def test_error_empty_root(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        ShapeNetViews(tmp_path, convention="released")
    one_line(e, tmp_path)


def test_error_not_an_archive(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError) as e:
        ShapeNetViews(tmp_path / "x.zip")
    one_line(e, "x.zip")


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "gray"])
def test_error_image(broken, damage):
    root, png, _, _ = broken
    if damage == "missing":
        png.unlink()
    if damage == "truncated":
        png.write_bytes(png.read_bytes()[:200])
    if damage == "text":
        png.write_text("hello")
    if damage == "gray":
        Image.open(png).convert("L").save(png)
    with pytest.raises(FileNotFoundError if damage == "missing" else ValueError) as e:
        read_views(ShapeNetViews(root), 0, [0])
    one_line(e, png)


@pytest.mark.parametrize(
    "text, word",
    [
        ("1 2 3", 3),
        ("x " * 16, "text"),
        ("inf " + "0 " * 15, "inf"),
        ("2 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1", "rigid"),
        ("-1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1", "determinant"),
        ("1 0 0 0 0 1 0 0 0 0 1 0 0 0 1 1", "rigid"),
    ],
)
def test_error_camera(broken, text, word):
    root, _, txt, _ = broken
    txt.write_text(text)
    with pytest.raises(ValueError) as e:
        read_views(ShapeNetViews(root), 0, [0])
    one_line(e, txt, word)


def test_error_missing_camera(broken):
    root, _, txt, _ = broken
    txt.unlink()
    with pytest.raises(FileNotFoundError) as e:
        read_views(ShapeNetViews(root), 0, [0])
    one_line(e, txt)


@pytest.mark.parametrize(
    "rows, word",
    [
        (np.zeros((0, 3)), "empty"),
        (np.zeros((5, 4)), "[5, 4]"),
        (np.zeros(5), "[5]"),
        (np.full((5, 3), np.nan), "15"),
    ],
)
def test_error_cloud(broken, rows, word):
    root, _, _, npy = broken
    np.save(npy, rows)
    with pytest.raises(ValueError) as e:
        ShapeNetViews(root).rows(0)
    one_line(e, npy, word)
    npy.write_bytes(npy.read_bytes()[:40])
    with pytest.raises(ValueError) as e:
        ShapeNetViews(root).rows(0)
    one_line(e, npy)


def test_error_options(embedded):
    for wrong in (dict(split="holdout"), dict(classes=["dragon"]), dict(convention="mine")):
        with pytest.raises(ValueError) as e:
            ShapeNetViews(**wrong)
        one_line(e)
    for wrong in (dict(features=("smell",)), dict(n_ref=20, n_target=5)):
        with pytest.raises(ValueError) as e:
            ViewSamples(embedded, **wrong)
        one_line(e)
    with pytest.raises(ValueError) as e:
        ViewSamples(embedded, sampling="best")[0]
    one_line(e, "best")
    with pytest.raises(ValueError) as e:
        read_views(ShapeNetViews(resample="magic"), 0, [0])
    one_line(e, "magic")


def test_error_wrong_deb(tmp_path):
    (tmp_path / "x.deb").write_bytes(b"!<arch>\n")
    with pytest.raises(ValueError) as e:
        furniture.find_deb(tmp_path / "x.deb")
    one_line(e, "x.deb", furniture.SHA256[:12])
    with pytest.raises(FileNotFoundError) as e:
        furniture.find_deb(tmp_path / "y.deb")
    one_line(e, "y.deb")


# ---- cache and processes


def test_cache_bound():
    data = ShapeNetViews(size=64, cache_bytes=3 * 4 * 64 * 64)
    first = data.pixels(0, 0)
    assert data.pixels(0, 0) is first
    for k in range(10):
        data.pixels(1, k)
    assert data.cache.used <= data.cache.limit and data.cache.used == sum(
        v.nbytes for v in data.cache.items.values()
    )
    assert data.pixels(0, 0) is not first
    np.testing.assert_array_equal(data.pixels(0, 0), first)


def test_poses_and_farthest_points_are_kept_without_a_cache(folder, monkeypatch):
    "Whatever cache_bytes is: camera files are read once, farthest points searched once, and the numbers stay the same."
    from unipre3d.data import samples as module

    searches, reads = [], []
    monkeypatch.setattr(
        module,
        "farthest_point_sample",
        lambda *args, search=module.farthest_point_sample: (
            searches.append(args[2]) or search(*args)
        ),
    )
    monkeypatch.setattr(
        shapenet, "read_pose", lambda *args: reads.append(args[1]) or read_pose(*args)
    )
    data = ViewSamples(ShapeNetViews(folder, size=32), sampling="fps", n_points=64)
    keys = [(0, 0), (2, 0), (0, 1)]
    first, again = data.batch(keys), data.batch(keys)
    assert same(first, again) and searches == [2] and len(reads) == 2 * 24
    assert (
        not data.source.cache.items and data.source.facts.used <= data.source.facts.limit == 2**29
    )
    assert data.known.items[0].dtype == np.int16 and data.known.limit == 2**28
    kept = ViewSamples(
        ShapeNetViews(folder, size=32, cache_bytes=2**24), sampling="fps", n_points=64
    )
    assert same(first, kept.batch(keys)) and not pickle.loads(pickle.dumps(data)).known.items


def test_pickle(embedded):
    copy = pickle.loads(pickle.dumps(embedded))
    assert torch.equal(read_views(copy, 3, [1]).rgb, read_views(embedded, 3, [1]).rgb)


def test_resize_modes(embedded):
    box = read_views(ShapeNetViews(size=64, resample="box"), 0, [0])
    full = read_views(embedded, 0, [0])
    torch.testing.assert_close(
        box.rgb, torch.nn.functional.avg_pool2d(full.rgb, 2), atol=1.01 / 255, rtol=0
    )
    assert box.camera.K[0, 0, 0] * 2 == pytest.approx(full.camera.K[0, 0, 0].item())
    assert not (box.mask & ~torch.nn.functional.max_pool2d(full.mask.float(), 2).bool()).any()


# ---- samples and loading


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in (
            (a.points.xyz, b.points.xyz),
            (a.points.feat, b.points.feat),
            (a.points.batch, b.points.batch),
            (a.ref.rgb, b.ref.rgb),
            (a.target.rgb, b.target.rgb),
            (a.target.camera.world_to_cam, b.target.camera.world_to_cam),
            (a.label, b.label),
        )
    )


def samples(**options):
    return ViewSamples(ShapeNetViews(split="val", size=32), n_points=64, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(augment=Augment(rotate="up"), features=("xyz", "normal", "height")),
        dict(sampling="fps", n_ref=2),
    ],
)
def test_a_batch_is_its_samples_collated(options):
    data, keys = samples(**options), [(3, 0), (1, 5), (3, 2)]
    a, b = data.batch(keys), collate([data[k] for k in keys])
    assert (
        same(a, b)
        and torch.equal(a.ref.camera.batch, b.ref.camera.batch)
        and torch.equal(a.target.mask, b.target.mask)
    )


def test_loader_resumes_and_workers_agree():
    spin = Augment(rotate="up")
    data = samples(augment=spin)
    whole = list(make_loader(data, 0, 12, batch_size=8))
    assert len(whole) == 12 and whole[0].points.size == 8
    resumed = list(make_loader(samples(augment=spin), 7, 12, batch_size=8))
    assert all(same(a, b) for a, b in zip(whole[7:], resumed))
    parallel = list(make_loader(data, 7, 12, batch_size=8, num_workers=2))
    assert all(same(a, b) for a, b in zip(whole[7:], parallel))
    assert not same(whole[0], next(iter(make_loader(data, 0, 1, batch_size=8, seed=1))))


def test_steps_go_through_whole_epochs():
    sampler = StepSampler(n=10, batch_size=4, seed=3, start=0, stop=5)
    keys = [k for batch in sampler for k in batch]
    for epoch in (0, 1):
        assert sorted(i for i, e in keys if e == epoch) == list(range(10))
    assert len(set(keys)) == 20


def test_processes_share_a_step():
    ranks = [StepSampler(n=10, batch_size=2, seed=3, stop=5, rank=r, world_size=2) for r in (0, 1)]
    one = StepSampler(n=10, batch_size=4, seed=3, stop=5)
    for step in range(5):
        assert ranks[0].batch(step) + ranks[1].batch(step) == one.batch(step)


def test_views_are_disjoint_and_change_with_the_draw():
    data = samples(n_ref=2, n_target=6)
    a, b = data[0, 0], data[0, 1]
    assert not same(a, b) and same(a, data[0, 0])
    both = torch.cat([a.ref.camera.world_to_cam, a.target.camera.world_to_cam]).reshape(8, -1)
    assert len(torch.unique(both, dim=0)) == 8


def test_evaluation_is_fixed_and_complete():
    a, b = (list(eval_loader(samples(), batch_size=16)) for _ in range(2))
    assert all(same(x, y) for x, y in zip(a, b)) and sum(x.points.size for x in a) == len(samples())


@pytest.mark.parametrize("world_size", [2, 3, 50])
def test_evaluation_is_shared_among_processes(world_size):
    "Every world_size-th batch for each; together every cloud once, in batches as of one process."
    data = samples()
    whole = list(eval_loader(data, batch_size=8))
    shards = [
        eval_loader(data, batch_size=8, rank=r, world_size=world_size) for r in range(world_size)
    ]
    assert sum(map(len, shards)) == len(whole)
    for r, shard in enumerate(shards):
        own = whole[r::world_size]
        assert len(own) == len(list(shard)) and all(same(a, b) for a, b in zip(shard, own))


def test_rotation_keeps_every_pixel(embedded):
    xyz, camera = cloud(embedded, 5).xyz, read_views(embedded, 5, [0, 1, 2]).camera
    turned_xyz = xyz @ torch.from_numpy(about_z(1.2)).T
    pose = move_cameras(camera.world_to_cam.numpy(), about_z(1.2))
    turned = replace(camera, world_to_cam=torch.from_numpy(pose))
    one = torch.zeros(len(xyz), dtype=torch.long)
    torch.testing.assert_close(
        project(turned_xyz, one, turned)[0], project(xyz, one, camera)[0], atol=1e-3, rtol=0
    )
    assert (turned_xyz - xyz).abs().max() > 0.1


@pytest.mark.parametrize(
    "features, width", [(("xyz",), 3), (("xyz", "height"), 4), (("xyz", "normal", "color"), 9)]
)
def test_features(features, width):
    s = samples(features=features)[0]
    assert s.points.feat.shape == (64, width)
    assert torch.equal(s.points.feat[:, :3], s.points.xyz)


def test_farthest_points_are_spread_and_fixed():
    a, b = (samples(sampling="fps")[0, d].points.xyz for d in (0, 1))
    assert torch.equal(a, b)
    gap = lambda x: (torch.cdist(x, x) + torch.eye(len(x))).min(1).values.min()
    assert gap(a) > gap(samples()[0].points.xyz)


class Broken:
    "Samples of which one file is missing."

    def __len__(self):
        return 4

    def __getitems__(self, keys):
        raise FileNotFoundError(
            "chair/points.npy: expected the points of an object, found no such file"
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_data_is_the_same_line_whichever_process_read_it(workers):
    with pytest.raises(FileNotFoundError) as error:
        list(make_loader(Broken(), 0, 1, batch_size=2, num_workers=workers))
    assert (
        str(error.value) == "chair/points.npy: expected the points of an object, found no such file"
        and error.value.__cause__ is not error.value
    )
