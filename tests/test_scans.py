"Scans: what a depth camera sees of an object in a place, cut out well or badly."

import json

import numpy as np
import pytest

from unipre3d.data.labelled import ScanObjectNN, write_scanobjectnn
from unipre3d.worlds.mesh import plain_mesh
from unipre3d.worlds.scans import (
    VARIANTS,
    Scans,
    crop,
    draw_scan,
    embedded_scans,
    list_things,
    make_place,
    make_scans,
    surfels,
    thing_mesh,
    viewpoints,
)
from unipre3d.data.shapenet import ShapeNetViews
from unipre3d.worlds.sensor import depth_images, merge_views, sensor_depth
from unipre3d.worlds.shapes import block, make_mesh


def plain(piece):
    return plain_mesh(piece[0], piece[1], np.ones(piece.shape[1], np.int64), ["unlabelled", "body"])


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return Scans(
        make_scans(
            tmp_path_factory.mktemp("scans") / "train.npz",
            per_class=2,
            copies=2,
            points=256,
            workers=1,
        )
    )


def test_exact_depth_lies_on_the_near_sides():
    cube = plain(block(1, 1, 1, (0, 0, 0)))
    pose = np.eye(4)
    pose[:3, :4] = np.array([[1.0, 0, 0, 0], [0, 0, 1, -4], [0, -1, 0, 0.5]])  # looks along +y
    depth, slant, face, rays = depth_images(cube, pose[None], 0.3, 40)
    xyz = pose[:3, 3] + rays[depth > 0] * depth[depth > 0][:, None]
    assert (
        len(xyz) > 300
        and np.abs(xyz[:, 1] + 0.5).max() < 1e-4
        and np.abs(depth[depth > 0] - 3.5).max() < 1e-4
        and slant[depth > 0].min() > 0.9
    )


def test_noise_grows_with_distance_and_slanted_surfaces_get_lost():
    rng = np.random.default_rng(0)

    def error(z):
        d = np.full((2, 64, 64), float(z))
        out = sensor_depth(d, np.ones_like(d), rng)
        return np.std((out - d)[out > 0])

    assert 4 < error(4) / error(1) < 16 and error(1) < 0.01
    lost = lambda slant: (
        sensor_depth(np.ones((1, 64, 64)), np.full((1, 64, 64), slant), rng) == 0
    ).mean()
    assert lost(0.02) > 0.8 and lost(1.0) < 0.2


def test_fused_points_are_thinned():
    rng = np.random.default_rng(0)
    pose = np.eye(4)[None]
    rays = np.stack(
        [*np.meshgrid(np.linspace(-0.2, 0.2, 50), np.linspace(-0.2, 0.2, 50)), np.ones((50, 50))],
        -1,
    )[None]
    xyz, pixel = merge_views(np.ones((1, 50, 50)), rays, pose, 0.05, rng)
    assert (
        len(xyz) < 150
        and len(np.unique(np.floor(xyz / 0.05), axis=0)) <= len(xyz)
        and np.array_equal(rays.reshape(-1, 3)[pixel], xyz)
    )


def test_place_keeps_the_object_and_hides_nothing_inside_it():
    desk = make_mesh("desk", 0)
    for seed in range(5):
        place, middle, half = make_place(desk, "desk", np.random.default_rng(seed))
        mine = place.corners[: len(desk.corners)].reshape(-1, 3)
        assert (
            np.allclose(mine.max(0), middle + half)
            and np.allclose(mine.min(0), middle - half)
            and abs(mine[:, 2].min()) < 0.21
        )
        assert (place.part[: len(desk.corners)] == desk.part).all() and not place.part[
            len(desk.corners) :
        ].any()


def test_viewpoints_are_near_and_in_front():
    for seed in range(20):
        poses, tangent = viewpoints(
            np.zeros(3), np.array([0.5, 0.4, 0.6]), np.random.default_rng(seed)
        )
        assert (
            1 <= len(poses) <= 3
            and poses[0, 1, 3] < 0
            and np.linalg.norm(poses[:, :3, 3], axis=1).max() < 3.2
            and 0.2 < tangent < 1.5
        )
        assert (poses[:, 2, 3] > 0).all() and np.allclose(np.linalg.det(poses[:, :3, :3]), 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_scan_is_a_function_of_its_arguments(variant):
    mesh = make_mesh("chair", 1)
    a, b, c = (draw_scan(mesh, "chair", variant=variant, points=300, seed=s) for s in (1, 1, 2))
    assert all(np.array_equal(a[k], b[k]) for k in a) and not np.array_equal(a["xyz"], c["xyz"])
    assert (
        a["xyz"].shape == (300, 3)
        and a["xyz"].dtype == np.float32
        and abs(np.linalg.norm(a["xyz"], axis=1).max() - 0.65) < 1e-4
    )
    assert (
        (a["part"][~a["mask"]] == 0).all()
        and (a["part"][a["mask"]] > 0).all()
        and (variant != "OBJ_ONLY" or a["mask"].all())
    )


def test_a_crop_keeps_what_its_box_holds():
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-2, 2, (4000, 3))
    mask = (np.abs(xyz) < 0.5).all(1)
    only, background = (crop(xyz, mask, np.zeros(3), np.full(3, 0.5), v, rng) for v in VARIANTS[:2])
    assert (
        np.array_equal(only, np.flatnonzero(mask))
        and set(only) < set(background)
        and np.abs(xyz[background]).max() < 0.6
    )
    lost = [
        mask[crop(xyz, mask, np.zeros(3), np.full(3, 0.5), "PB_T50_RS", rng)].sum() / mask.sum()
        for _ in range(30)
    ]
    assert 0.15 < min(lost) and np.mean(lost) < 0.95
    with pytest.raises(ValueError, match="variant: expected one of"):
        crop(xyz, mask, np.zeros(3), np.ones(3), "BG", rng)


def test_surfels_cover_a_plane():
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 20), np.linspace(0, 1, 20)), -1).reshape(-1, 2)
    xyz = np.append(grid, np.zeros((400, 1)), 1)
    mesh = surfels(xyz, np.tile([0, 0, 1.0], (400, 1)), np.ones(400, int), ["unlabelled", "top"])
    assert len(mesh.corners) == 800 and np.abs(mesh.corners[..., 2]).max() < 1e-9
    at = np.random.default_rng(0).uniform(0.1, 0.9, (200, 2))
    low, high = mesh.corners[:, :, :2].min(1), mesh.corners[:, :, :2].max(1)
    assert ((at[:, None] > low) & (at[:, None] < high)).all(-1).any(1).all()


def test_set_of_scans(train, tmp_path):
    assert (
        train.classes == ScanObjectNN.classes
        and len(train) == 60
        and np.bincount(train.labels).tolist() == [4] * 15
    )
    row = train.rows(5)
    assert (
        row["xyz"].shape == (256, 3)
        and row["mask"].dtype == np.int32
        and train.classes[train.label(5)] == train.name(5).split("-")[0]
    )
    assert (
        not np.array_equal(train.rows(0)["xyz"], train.rows(1)["xyz"])
        and train.name(0)[:-2] == train.name(1)[:-2]
    )  # two scans of one object
    again = Scans(
        make_scans(tmp_path / "again.npz", per_class=2, copies=2, points=256, workers=2), points=100
    )
    assert all(
        np.array_equal(again.arrays[k], train.arrays[k]) for k in again.arrays
    ) and again.rows(3)["xyz"].shape == (100, 3)


def test_classes_stand_in_scanobjectnn_order_and_others_after_them(tmp_path):
    scans = Scans(
        make_scans(
            tmp_path / "x.npz", classes=["vase", "chair", "cup"], per_class=1, points=64, workers=1
        )
    )
    assert scans.classes == ["chair", "cup", "vase"] and sorted(scans.labels.tolist()) == [0, 1, 2]


def test_scans_become_scanobjectnn_files(train, tmp_path):
    write_scanobjectnn(
        tmp_path,
        train.arrays["xyz"],
        train.labels,
        mask=train.arrays["mask"],
        split="train",
        variant="PB_T50_RS",
    )
    real = ScanObjectNN(tmp_path, split="train", variant="PB_T50_RS")
    assert (
        [real.label(k) for k in range(len(real))] == train.labels.tolist()
        and np.allclose(real.rows(7)["xyz"], train.rows(7)["xyz"], atol=1e-5)
        and np.array_equal(real.mask(7), train.rows(7)["mask"])
    )


def test_furniture_families_stay_on_one_side(tmp_path):
    sides = {s: list_things("furniture", s, ScanObjectNN.classes) for s in ("train", "val", "test")}
    families = {s: {t["family"] for t in things} for s, things in sides.items()}
    assert (
        not families["train"] & families["test"]
        and not families["val"] & families["test"]
        and sum(map(len, sides.values())) > 200
    )
    thing = next(t for t in sides["test"] if t["class"] == "door")
    mesh = thing_mesh(thing, ShapeNetViews())
    assert (
        np.isfinite(mesh.corners).all()
        and 0.5 < np.ptp(mesh.corners.reshape(-1, 3), axis=0)[2] / float(thing["height"]) < 1.5
    )
    path = embedded_scans(
        source="furniture", split="test", classes=["toilet"], points=64, cache=tmp_path, workers=1
    )
    assert (
        len(Scans(path))
        and embedded_scans(
            source="furniture", split="test", classes=["toilet"], points=64, cache=tmp_path
        )
        == path
    )


def test_broken_files_are_named(tmp_path, train):
    (tmp_path / "cut.npz").write_bytes(train.path.read_bytes()[:4000])
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name, kind in (
        ("none.npz", FileNotFoundError),
        ("cut.npz", ValueError),
        ("other.npz", ValueError),
    ):
        with pytest.raises(kind, match=name) as problem:
            Scans(tmp_path / name)
        assert "\n" not in str(problem.value)
    with pytest.raises(ValueError, match="points: expected 1..256"):
        Scans(train.path, points=1000)
    for bad in (
        dict(source="clouds"),
        dict(split="dev"),
        dict(classes=["bath"]),
        dict(classes=[]),
        dict(classes=["pillow"], source="furniture"),
    ):
        with pytest.raises(ValueError, match="expected"):
            make_scans(tmp_path / "y.npz", workers=1, **bad)
    assert json.loads(json.dumps(train.about))["format"] == "unipre3d scans 1"
