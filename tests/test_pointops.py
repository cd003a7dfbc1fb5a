"Point operations on ragged batches against one-cloud definitions."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unipre3d.geometry import pointops
from unipre3d.geometry.pointops import (
    _farthest_torch,
    _first_of,
    _nearest_of,
    _search,
    _weighted_rows,
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


def neighbours_of(query, owner, xyz, batch, size, k, radius):
    "The definition: a stable sort of the distances of each cloud, and the first points in the ball"
    near, ball = [], []
    for b in range(size):
        rows = (batch == b).nonzero()[:, 0]
        d2 = squared_distance(query[owner == b], xyz[rows])
        order = rows[d2.argsort(dim=1, stable=True)[:, :k]].tolist()
        near += [row + row[:1] * (k - len(row)) for row in order]
        for row, nearest in zip(d2, order):
            inside = rows[row < radius**2][:k].tolist() or nearest[:1]
            ball.append(inside + inside[:1] * (k - len(inside)))
    return torch.tensor(near).reshape(-1, k), torch.tensor(ball).reshape(-1, k)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_neighbours(sizes, k, device):
    xyz, batch, size = packed(sizes, device=device)
    place = xyz + 0.1, batch, xyz, batch, size
    near, ball = neighbours_of(*place, k, 0.25)
    assert torch.equal(knn(*place, k).cpu(), near)
    assert torch.equal(ball_query(*place, 0.25, k).cpu(), ball)
    if len(xyz):  # the torch version, in pieces that must not matter
        by_torch = _search(*place, lambda d2: _nearest_of(d2, k), chunk=100)
        assert torch.equal(by_torch.cpu(), near)
        by_torch = _search(*place, lambda d2: _first_of(d2, 0.25, k), chunk=100)
        assert torch.equal(by_torch.cpu(), ball)


def uniform(n, g):
    return torch.rand(n, 3, generator=g)


def gridded(n, g):
    return torch.randint(6, (n, 3), generator=g) / 4


def repeated(n, g):
    return torch.rand(max(1, n // 40), 3, generator=g)[
        torch.randint(max(1, n // 40), (n,), generator=g)
    ]


def equal(n, g):
    return torch.full((n, 3), 0.3)


def flat(n, g):
    return torch.rand(n, 3, generator=g) * torch.tensor([1.0, 1, 0])


def lonely(n, g):
    xyz = torch.rand(n, 3, generator=g) * 1e-3
    xyz[n // 2 :][:1] = 1e6
    return xyz


def far_away(n, g):
    return torch.rand(n, 3, generator=g) * 0.02 + 4096


SHAPES = [uniform, gridded, repeated, equal, flat, lonely, far_away]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", SHAPES)
def test_trees_find_what_the_definition_finds(make, dtype):
    sizes = [1500, 0, 5, 300, 1]
    g = torch.Generator().manual_seed(3)
    xyz = torch.cat([make(n, g) for n in sizes]).to(dtype)
    batch = torch.arange(5).repeat_interleave(torch.tensor(sizes))
    some = torch.arange(0, len(xyz), 7)
    extent = (xyz.amax(0) - xyz.amin(0)).max().clamp(min=0.1)
    query = torch.cat([xyz[some], xyz[some] + extent / 50])
    owner, order = batch[some].repeat(2).sort(stable=True)
    place = query[order], owner, xyz, batch, 5
    for k, radius in ((1, 0.01), (16, 0.1), (40, 0.4)):
        radius = radius * float(extent)
        near, ball = neighbours_of(*place, k, radius)
        assert torch.equal(knn(*place, k), near)
        assert torch.equal(ball_query(*place, radius, k), ball)
    for k in (1, 64, 2000):
        expected = _farthest_torch(xyz, batch, 5, k)
        assert torch.equal(farthest_point_sample(xyz, batch, 5, k), expected)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    make=st.sampled_from(SHAPES),
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=4),
    queries=st.integers(1, 30),
    k=st.integers(1, 70),
    radius=st.floats(1e-3, 2),
)
def test_trees_find_what_the_definition_finds_anywhere(seed, make, sizes, queries, k, radius):
    g = torch.Generator().manual_seed(seed)
    xyz = torch.cat([make(n, g) for n in sizes])
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    full = [b for b, n in enumerate(sizes) if n]
    query = make(queries * len(full), g)
    owner = torch.tensor(full, dtype=torch.long).repeat_interleave(queries)
    assert torch.equal(
        farthest_point_sample(xyz, batch, len(sizes), k), _farthest_torch(xyz, batch, len(sizes), k)
    )
    if full:
        place = query, owner, xyz, batch, len(sizes)
        near, ball = neighbours_of(*place, k, radius)
        assert torch.equal(knn(*place, k), near)
        assert torch.equal(ball_query(*place, radius, k), ball)


def test_further_columns_count():
    g = torch.Generator().manual_seed(0)
    columns = torch.rand(900, 6, generator=g)
    batch = torch.arange(2).repeat_interleave(torch.tensor([850, 50]))
    place = columns, batch, columns, batch, 2
    near, _ = neighbours_of(*place, 9, 0.1)
    assert torch.equal(knn(*place, 9), near)


def test_many_queries_keep_their_order():
    g = torch.Generator().manual_seed(0)
    xyz, query = torch.rand(50, 3, generator=g), torch.rand(pointops._SORTED + 3, 3, generator=g)
    place = query, torch.zeros(len(query)).long(), xyz, torch.zeros(50).long(), 1
    near, ball = neighbours_of(*place, 4, 0.2)
    assert torch.equal(knn(*place, 4), near)
    assert torch.equal(ball_query(*place, 0.2, 4), ball)


def test_results_do_not_depend_on_threads():
    xyz, batch, size = packed([3000, 200, 2000])
    threads = torch.get_num_threads()
    found = []
    for count in (1, 4):
        torch.set_num_threads(count)
        try:
            near = knn(xyz, batch, xyz, batch, size, 8)
            ball = ball_query(xyz, batch, xyz, batch, size, 0.1, 8)
            found.append((near, ball, farthest_point_sample(xyz, batch, size, 50)))
        finally:
            torch.set_num_threads(threads)
    for one, four in zip(*found):
        assert torch.equal(one, four)


def test_a_hundred_thousand_equal_points_are_searched_like_any_others():
    n = 100_000
    xyz, zero = torch.full((n, 3), 0.5), torch.zeros(n, dtype=torch.long)
    lowest = torch.arange(16).expand(n, 16)
    assert torch.equal(knn(xyz, zero, xyz, zero, 1, 16), lowest)
    assert torch.equal(ball_query(xyz, zero, xyz, zero, 1, 0.1, 16), lowest)
    assert torch.equal(farthest_point_sample(xyz, zero, 1, 2000), torch.arange(2000))


def test_distances_beyond_float32_are_no_neighbours():
    xyz = torch.tensor([[0.0, 0, 0], [3e30, 0, 0], [1, 0, 0], [-3e30, 0, 0]])
    zero = torch.zeros(4, dtype=torch.long)
    assert knn(xyz[:2], zero[:2], xyz, zero, 1, 3).tolist() == [[0, 2, 0], [1, 1, 1]]
    assert ball_query(xyz[:2], zero[:2], xyz, zero, 1, 2.0, 3).tolist() == [[0, 2, 0], [1, 1, 1]]
    assert torch.equal(farthest_point_sample(xyz, zero, 1, 4), _farthest_torch(xyz, zero, 1, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_coordinates_that_are_not_finite_change_no_other_row(bad):
    "A step that meets one is skipped by the loop; so nothing may be raised, or leave its cloud."
    xyz, batch, size = packed([6, 4])
    broken = xyz.clone()
    broken[7, 1] = bad
    first = batch == 0
    for k in (2, 9):
        for call in (
            lambda points: knn(xyz, batch, points, batch, size, k),
            lambda points: knn(points, batch, xyz, batch, size, k),
            lambda points: ball_query(xyz, batch, points, batch, size, 0.1, k),
        ):
            found = call(broken)
            assert torch.equal(found[first], call(xyz)[first])
            assert torch.equal(batch[found], batch[:, None].expand_as(found))
        rows = farthest_point_sample(broken, batch, size, k)
        assert torch.equal(rows, _farthest_torch(broken, batch, size, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gathering_in_pieces_changes_nothing(dtype):
    g = torch.Generator().manual_seed(0)
    weight, feat = torch.rand(103, 3, generator=g), torch.randn(50, 8, generator=g).to(dtype)
    index = torch.randint(50, (103, 3), generator=g)
    whole = (weight[..., None] * feat[index]).sum(1)
    for chunk in (1, 8 * 3 * 10, 2**22):
        found = _weighted_rows(weight, feat, index, chunk)
        assert found.dtype == whole.dtype and torch.equal(found, whole)


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
