"Point operations on ragged batches against one-cloud definitions."

import pytest
import torch

from unipre3d.geometry import pointops
from unipre3d.geometry.pointops import (
    ball_query,
    farthest_point_sample,
    interpolate,
    knn,
    squared_distance,
    three_nn,
    voxel_mean,
    voxelize,
)

SIZES = [[50], [40, 0, 7, 1], [0, 3, 30], [1, 1, 1], [0, 0]]
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def packed(sizes, seed=0, device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    xyz = torch.rand(sum(sizes), 3, generator=g, dtype=dtype)
    return (
        xyz.to(device),
        torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device),
        len(sizes),
    )


def clouds(xyz, batch, size):
    "(row numbers, points) of each cloud"
    for b in range(size):
        rows = (batch == b).nonzero()[:, 0].tolist()
        yield rows, xyz[batch == b]


def fps_reference(xyz, k):
    chosen = [0][: len(xyz)]
    while len(chosen) < min(k, len(xyz)):
        gap = squared_distance(xyz, xyz[chosen]).amin(1)
        gap[chosen] = -1
        chosen.append(int(gap.argmax()))
    return chosen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_farthest_points(sizes, k, device):
    xyz, batch, size = packed(sizes, device=device)
    expected = [
        rows[i] for rows, cloud in clouds(xyz, batch, size) for i in fps_reference(cloud, k)
    ]
    assert farthest_point_sample(xyz, batch, size, k).tolist() == expected


def test_farthest_points_are_distinct_where_points_coincide():
    xyz = torch.tensor([[0.0, 0, 0], [1, 0, 0]]).repeat(5, 1)
    index = farthest_point_sample(xyz, torch.zeros(10, dtype=torch.long), 1, 8)
    assert len(set(index.tolist())) == 8 and index[:2].tolist() == [0, 1]
    assert sorted(
        farthest_point_sample(xyz, torch.zeros(10, dtype=torch.long), 1, 99).tolist()
    ) == list(range(10))


def test_farthest_points_move_with_the_cloud():
    xyz, batch, size = packed([200, 100])
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.double)).Q
    moved = xyz.double() @ turn.T + 3
    assert torch.equal(
        farthest_point_sample(xyz.double(), batch, size, 30),
        farthest_point_sample(moved, batch, size, 30),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_neighbours(sizes, k, device, monkeypatch):
    monkeypatch.setattr(pointops._search, "__defaults__", (100,))  # tiny pieces must not matter
    xyz, batch, size = packed(sizes, device=device)
    query = xyz + 0.1
    near, ball = (
        knn(query, batch, xyz, batch, size, k),
        ball_query(query, batch, xyz, batch, size, 0.25, k),
    )
    assert near.shape == ball.shape == (len(query), k)
    for rows, cloud in clouds(xyz, batch, size):
        for row in rows:
            d2 = squared_distance(query[row][None], cloud)[0]
            order = [rows[i] for i in d2.argsort(stable=True)[:k].tolist()]
            assert near[row].tolist() == order + order[:1] * (k - len(order))
            inside = [rows[i] for i in (d2 < 0.25**2).nonzero()[:k, 0].tolist()] or [
                rows[int(d2.argmin())]
            ]
            assert ball[row].tolist() == inside + inside[:1] * (k - len(inside))


def test_the_surface_of_a_ball_is_outside():
    xyz, zero = (
        torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0.25, 0, 0]]),
        torch.zeros(3, dtype=torch.long),
    )
    assert ball_query(xyz[:1], zero[:1], xyz, zero, 1, 0.5, 3).tolist() == [[0, 2, 0]]
    assert ball_query(xyz[:1] + 9, zero[:1], xyz, zero, 1, 0.5, 2).tolist() == [[1, 1]]


def test_close_points_far_from_the_origin_are_told_apart():
    xyz = torch.tensor([[1000.0, 1000, 1000], [1000.001, 1000, 1000], [1000.0005, 1000, 1000]])
    zero = torch.zeros(3, dtype=torch.long)
    assert knn(xyz, zero, xyz, zero, 1, 1)[:, 0].tolist() == [0, 1, 2]


def test_squared_distance_gradient():
    a, b = (
        torch.rand(2, 3, 3, dtype=torch.double, requires_grad=True),
        torch.rand(2, 4, 3, dtype=torch.double, requires_grad=True),
    )
    assert torch.autograd.gradcheck(squared_distance, (a, b))
    torch.testing.assert_close(squared_distance(a, b).sqrt(), torch.cdist(a, b))


def test_no_queries_and_no_points():
    xyz, batch, size = packed([4, 0])
    none, nobody = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    assert knn(none, nobody, xyz, batch, size, 3).shape == (0, 3)
    assert ball_query(none, nobody, none, nobody, size, 0.1, 3).shape == (0, 3)
    assert interpolate(none, nobody, xyz, xyz, batch, size).shape == (0, 3)
    for search in (knn, lambda *a: ball_query(*a[:-1], 0.1, a[-1])):
        with pytest.raises(ValueError, match="cloud 1 is empty"):
            search(torch.zeros(1, 3), torch.tensor([1]), xyz, batch, size, 3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power", [1, 2])
def test_interpolation(power, device):
    xyz, batch, size = packed([40, 0, 2, 1], device=device)
    query, owner, _ = packed([9, 0, 5, 2], seed=1, device=device)
    feat = torch.rand(len(xyz), 4, device=device)
    out = interpolate(query, owner, xyz, feat, batch, size, power=power)
    for row, b in enumerate(owner.tolist()):
        cloud, values = xyz[batch == b], feat[batch == b]
        d2 = squared_distance(query[row][None], cloud)[0]
        best = d2.argsort()[:3]
        w = 1 / (d2[best] ** (power / 2) + 1e-8)
        torch.testing.assert_close(
            out[row], (w[:, None] * values[best]).sum(0) / w.sum(), rtol=1e-4, atol=1e-5
        )
    constant = interpolate(
        query, owner, xyz, torch.ones(len(xyz), 1, device=device), batch, size, power=power
    )
    torch.testing.assert_close(constant, torch.ones_like(constant))
    known = interpolate(xyz, batch, xyz, feat, batch, size, power=power)
    torch.testing.assert_close(known, feat, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("power", [1, 2])
def test_interpolation_gradients(power):
    xyz, batch, size = packed([6, 2], dtype=torch.double)
    query, owner, _ = packed([3, 2], seed=1, dtype=torch.double)
    inputs = [t.requires_grad_() for t in (query, xyz, torch.rand(8, 2, dtype=torch.double))]
    assert torch.autograd.gradcheck(
        lambda q, x, f: interpolate(q, owner, x, f, batch, size, power=power), inputs
    )
    same = torch.zeros(4, 3, requires_grad=True)
    zero = torch.zeros(4, dtype=torch.long)
    interpolate(same, zero, same, torch.rand(4, 2), zero, 1, power=power).sum().backward()
    assert same.grad.isfinite().all()


def test_three_nearest():
    xyz, batch, size = packed([30, 5])
    index, d2 = three_nn(xyz, batch, xyz, batch, size)
    assert torch.equal(index[:, 0], torch.arange(35)) and d2[:, 0].max() == 0
    torch.testing.assert_close(
        d2, torch.stack([squared_distance(xyz[i][None], xyz[index[i]])[0] for i in range(35)])
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_voxels(sizes, device):
    xyz, batch, size = packed(sizes, device=device)
    xyz = xyz - 0.5  # floor, not truncation
    cell, inverse = voxelize(xyz, batch, 0.3)
    expected = [(b, *(p / 0.3).floor().long().tolist()) for b, p in zip(batch.tolist(), xyz)]
    assert [tuple(c) for c in cell.tolist()] == sorted(set(expected))
    assert [tuple(cell[i].tolist()) for i in inverse] == expected
    mean = voxel_mean(xyz, inverse, len(cell))
    for i in range(len(cell)):
        torch.testing.assert_close(mean[i], xyz[inverse == i].mean(0))
    assert (cell[1:, 0] >= cell[:-1, 0]).all()  # packed, as every batch is


def test_voxel_mean_gradient():
    x = torch.rand(7, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: voxel_mean(x, torch.tensor([0, 2, 1, 0, 0, 2, 1]), 3), x
    )


def test_errors_are_one_line():
    xyz, batch, size = packed([4])
    for call, text in (
        (
            lambda: farthest_point_sample(xyz, batch, size, 0),
            "farthest_point_sample.k: expected at least 1, got 0",
        ),
        (lambda: knn(xyz, batch, xyz, batch, size, 0), "knn.k"),
        (lambda: ball_query(xyz, batch, xyz, batch, size, 0.1, -1), "ball_query.k"),
        (lambda: voxelize(xyz, batch, 0.0), "voxel_size: expected a length above 0"),
        (lambda: voxelize(xyz, batch, 1e-8), "use a larger voxel"),
    ):
        with pytest.raises(ValueError, match=text) as error:
            call()
        assert "\n" not in str(error.value)


def test_clouds_of_very_different_length():
    xyz, batch, size = packed([3000, 10])
    near = knn(xyz[-10:], batch[-10:], xyz, batch, size, 2)
    assert (near >= 3000).all() and torch.equal(near[:, 0], torch.arange(3000, 3010))
