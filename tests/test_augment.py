"""Augmentation: what is drawn, and what moves together."""

import numpy as np
import pytest

from unipre3d.data.augment import Augment, augment, drop_points, random_rotation, rescale, rotate

UP, ALL = Augment(rotate="up"), Augment(rotate="all")


def test_changes_are_functions_of_the_seed_and_labels_follow():
    rng = np.random.default_rng(0)
    xyz = rng.normal(size=(50, 3)).astype(np.float32)
    cloud = dict(
        xyz=xyz,
        normal=xyz / np.linalg.norm(xyz, axis=1, keepdims=True),
        color=rng.random((50, 3), np.float32),
        part=np.arange(50),
    )
    how = Augment(rotate="all", scale=(0.5, 2.0), translate=0.1, jitter=0.01, drop=0.5, color=0.2)
    a, b = (augment(cloud, np.random.default_rng(7), how) for _ in range(2))
    assert (
        all((a[k] == b[k]).all() for k in cloud)
        and all(v.dtype == cloud[k].dtype for k, v in a.items())
        and len({len(v) for v in a.values()}) == 1
    )
    for how in (UP, ALL):
        turned = augment(cloud, np.random.default_rng(1), how)
        assert np.allclose(
            (turned["xyz"] * turned["normal"]).sum(1), (xyz * cloud["normal"]).sum(1), atol=1e-4
        )
    assert np.allclose(augment(cloud, np.random.default_rng(1), UP)["xyz"][:, 2], xyz[:, 2])
    assert (
        drop_points(cloud, np.random.default_rng(2), 0.9)["xyz"]
        == xyz[drop_points(cloud, np.random.default_rng(2), 0.9)["part"]]
    ).all()
    assert (
        np.abs(augment(cloud, np.random.default_rng(3), Augment(jitter=0.01))["xyz"] - xyz).max()
        <= 0.0301
    )
    assert np.linalg.det(rotate(dict(xyz=np.eye(3, dtype=np.float32)), np.eye(3))["xyz"]) == 1
    assert augment(dict(xyz=np.eye(3, dtype=np.float32)), rng, ALL)["xyz"].dtype == np.float32
    assert np.linalg.det(
        augment(dict(xyz=np.eye(3, dtype=np.float32)), rng, ALL)["xyz"]
    ) == pytest.approx(1, abs=1e-5)


def test_without_a_stretch_every_draw_is_as_it_was():
    "The numbers were written down before there was a stretch."
    xyz = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    got = augment(
        dict(xyz=xyz, part=np.arange(50)),
        np.random.default_rng(7),
        Augment(scale=(0.5, 2.0), translate=0.1, jitter=0.01, drop=0.5),
    )
    assert (
        len(got["xyz"]) == 33
        and got["part"][:3].tolist() == [0, 1, 3]
        and [v.hex() for v in got["xyz"][0].tolist()]
        == ["0x1.a28bd80000000p-5", "-0x1.80348a0000000p-3", "0x1.f5c03c0000000p-2"]
    )
    ratio = augment(dict(xyz=xyz), np.random.default_rng(7), Augment(scale=(0.5, 2.0)))["xyz"] / xyz
    assert np.ptp(ratio) < 1e-5


def test_a_stretch_has_a_factor_for_each_axis_and_keeps_normals_upright():
    rng = np.random.default_rng(0)
    tall = Augment(scale=(2 / 3, 1.5), stretch=True)
    factors = np.stack(
        [
            augment(dict(xyz=np.ones((1, 3), np.float32)), np.random.default_rng(s), tall)["xyz"][0]
            for s in range(400)
        ]
    )
    assert (
        factors.min() >= np.float32(2 / 3)
        and factors.max() <= 1.5
        and np.allclose(factors.mean(0), 13 / 12, atol=0.04)
        and np.abs(np.corrcoef(factors.T)[0, 1:]).max() < 0.15
    )
    normal = rng.normal(size=(50, 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    along = np.cross(normal, rng.normal(size=(50, 3)))  # directions along each point's surface
    cloud = dict(xyz=along.astype(np.float32), normal=normal.astype(np.float32), part=np.arange(50))
    got = augment(cloud, np.random.default_rng(3), tall)
    assert (
        np.allclose((got["xyz"] * got["normal"]).sum(1), 0, atol=1e-5)
        and np.allclose(np.linalg.norm(got["normal"], axis=1), 1, atol=1e-5)
        and got["normal"].dtype == np.float32
    )
    assert (
        np.abs((got["xyz"] * cloud["normal"]).sum(1)).max() > 0.1
    )  # left as they were they would lean
    assert np.isfinite(
        rescale(
            dict(xyz=np.ones((1, 3), np.float32), normal=np.zeros((1, 3), np.float32)),
            rng.uniform(0.5, 2, 3),
        )["normal"]
    ).all()
    with pytest.raises(ValueError, match="augment.stretch: expected augment.scale"):
        Augment(stretch=True)


def test_what_is_off_draws_nothing():
    "A change disturbs the draws of the later ones only by being on; the mirror is drawn last."
    rng = np.random.default_rng(0)
    cloud = dict(
        xyz=rng.normal(size=(50, 3)).astype(np.float32), color=rng.random((50, 3), np.float32)
    )
    many = dict(rotate="up", scale=(0.8, 1.2), translate=0.3, jitter=0.01, drop=0.4, color=0.2)
    flips = 0
    for seed in range(20):
        plain, mirrored = (
            augment(cloud, np.random.default_rng(seed), Augment(**many, mirror=flip))
            for flip in (False, True)
        )
        flips += not np.array_equal(plain["xyz"], mirrored["xyz"])
        assert np.array_equal(plain["xyz"] ** 2, mirrored["xyz"] ** 2)
        assert np.array_equal(plain["color"], mirrored["color"])
    assert 3 < flips < 17
    left = np.random.default_rng(1)
    augment(cloud, left, Augment())
    assert left.random() == np.random.default_rng(1).random()


def test_any_rotation_is_as_likely_as_any_other():
    R = np.stack([random_rotation(np.random.default_rng(s)) for s in range(2000)])
    assert np.allclose(R @ R.transpose(0, 2, 1), np.eye(3), atol=1e-12)
    assert np.abs(R.mean(0)).max() < 0.05  # no direction is preferred
    assert abs(np.trace(R, axis1=1, axis2=2).mean()) < 0.1  # of all rotations the mean trace is 0
