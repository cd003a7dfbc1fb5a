"Sparse convolution: equal to dense convolution in values and gradients, at any number of threads, in any order of rows."

import configparser
import gc
import importlib.machinery
import sys
import types
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from packaging.requirements import Requirement

from unipre3d.core import PointBatch
from unipre3d.geometry.sparse import (
    Rulebook,
    Rules,
    SparseConv3d,
    SparseInverseConv3d,
    SparseTensor,
    SubMConv3d,
    _cut,
    _cut_compiled,
    _table_in_torch,
    cell_numbers,
    merge_voxels,
    neighbour_table,
    point_cells,
    sparse_conv,
    strided_rules,
    submanifold_rules,
)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_tensor(shape=(7, 6, 5), size=2, share=0.25, channels=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    cells = torch.stack(torch.where(torch.rand(size, *shape, generator=g) < share), 1)
    cells = cells[torch.randperm(len(cells), generator=g)]
    return SparseTensor(
        torch.randn(len(cells), channels, generator=g, dtype=dtype), cells, shape, size
    )


def occupied(x):
    return x.with_feat(torch.ones(len(x), 1, dtype=x.feat.dtype)).dense()


def weight_of(layer):
    return layer.weight.permute(0, 4, 1, 2, 3)


def rows_of(block, x):
    b, i, j, k = x.index.unbind(1)
    return block[b, :, i, j, k]


def close(a, b, dtype):
    torch.testing.assert_close(
        a,
        b,
        rtol=1e-4 if dtype == torch.float32 else 1e-9,
        atol=1e-5 if dtype == torch.float32 else 1e-10,
    )


def same_gradients(ours, theirs, leaves, dtype):
    g = torch.randn(ours.shape, dtype=dtype, generator=torch.Generator().manual_seed(5))
    for a, b in zip(
        torch.autograd.grad((ours * g).sum(), leaves, retain_graph=True),
        torch.autograd.grad((theirs * g).sum(), leaves, retain_graph=True),
    ):
        close(a, b, dtype)


def leaf(x):
    return x.with_feat(x.feat.detach().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [1, 3, 5, (3, 1, 5), (1, 1, 3), (3, 5, 1)])
def test_submanifold_equals_dense(kernel, dtype, threads):
    torch.manual_seed(0)
    x, layer = leaf(random_tensor(dtype=dtype)), SubMConv3d(3, 4, kernel, bias=True).to(dtype)
    y = layer(x)
    dense = rows_of(
        F.conv3d(
            x.dense(), weight_of(layer), layer.bias, padding=[k // 2 for k in layer.kernel_size]
        ),
        x,
    )
    assert torch.equal(y.index, x.index)
    close(y.feat, dense, dtype)
    same_gradients(y.feat, dense, [x.feat, layer.weight, layer.bias], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kernel, stride, padding",
    [
        (2, 2, 0),
        (3, 2, 1),
        (3, 1, 1),
        (3, 3, 0),
        (2, 1, 1),
        (1, 2, 0),
        ((3, 2, 1), (2, 1, 3), (1, 0, 0)),
        (4, 2, 3),
    ],
)
def test_strided_and_back_equal_dense(kernel, stride, padding, dtype, threads):
    torch.manual_seed(0)
    x = leaf(random_tensor(dtype=dtype))
    down, up = (
        SparseConv3d(3, 4, kernel, stride=stride, padding=padding, bias=True).to(dtype),
        SparseInverseConv3d(4, 2, kernel).to(dtype),
    )
    y = down(x)
    block = F.conv3d(x.dense(), weight_of(down), down.bias, stride=stride, padding=padding)
    reach = (
        F.conv3d(
            occupied(x),
            torch.ones(1, 1, *down.kernel_size, dtype=dtype),
            stride=stride,
            padding=padding,
        )
        > 0
    )
    assert y.shape == tuple(block.shape[2:]) and torch.equal(
        torch.stack(torch.where(reach[:, 0]), 1), y.index
    )  # all of them, in rising order
    close(y.feat, rows_of(block, y), dtype)
    same_gradients(y.feat, rows_of(block, y), [x.feat, down.weight, down.bias], dtype)
    z = up(y)
    back = F.conv_transpose3d(y.dense(), weight_of(up).transpose(0, 1), stride=stride)
    for axis, (p, n) in enumerate(
        zip(down.padding, x.shape)
    ):  # what lies in the margin goes, cells that no window reaches come
        back = F.pad(back, [0, 0] * (2 - axis) + [-p, n + p - back.shape[2 + axis]])
    assert torch.equal(z.index, x.index) and z.shape == x.shape and z._cache is x._cache
    close(z.feat, rows_of(back, x), dtype)
    same_gradients(z.feat, rows_of(back, x), [x.feat, down.weight, up.weight], dtype)


def test_gradcheck():
    torch.manual_seed(0)
    x = random_tensor((3, 3, 3), share=0.5)
    for rules, rows in (
        (submanifold_rules(x, 3), len(x)),
        (strided_rules(x, 2, 2)[1], len(x)),
        (strided_rules(x, 2, 1, 1)[1], len(x)),
        (strided_rules(x, 2, 2)[1].reversed(), len(strided_rules(x, 2, 2)[0])),
    ):
        kernel = 3 if rules.mirror else 2
        f, w = (
            torch.randn(rows, 2, dtype=torch.double, requires_grad=True),
            torch.randn(3, kernel, kernel, kernel, 2, dtype=torch.double, requires_grad=True),
        )
        assert torch.autograd.gradcheck(lambda f, w: sparse_conv(f, w, rules), (f, w))
        assert torch.autograd.gradcheck(lambda f: sparse_conv(f, w.detach(), rules), (f,))
        assert torch.autograd.gradcheck(lambda w: sparse_conv(f.detach(), w, rules), (w,))


def test_many_blocks_equal_dense(threads):
    x = leaf(random_tensor((24, 22, 20), size=2, share=0.45, channels=2))
    layer = SubMConv3d(2, 3).double()
    assert len(submanifold_rules(x, 3).forth.blocks) > 3
    dense = rows_of(F.conv3d(x.dense(), weight_of(layer), padding=1), x)
    close(layer(x).feat, dense, torch.float64)
    same_gradients(layer(x).feat, dense, [x.feat, layer.weight], torch.float64)
    down, up = (
        SparseConv3d(2, 3, 3, stride=2, padding=1).double(),
        SparseInverseConv3d(3, 2, 3).double(),
    )
    y = down(x)
    assert len(strided_rules(x, 3, 2, 1)[1].back.blocks) > 3
    dense = rows_of(F.conv3d(x.dense(), weight_of(down), stride=2, padding=1), y)
    close(y.feat, dense, torch.float64)
    same_gradients(y.feat, dense, [x.feat, down.weight], torch.float64)
    assert torch.equal(up(y).index, x.index)


@pytest.mark.parametrize("c_in, c_out", [(1, 1), (3, 5), (6, 16), (24, 24), (17, 33)])
@pytest.mark.parametrize("kernel", [3, (5, 1, 3)])
def test_compiled_equals_torch_and_double(c_in, c_out, kernel):
    "Values to 1e-6 of their norm, gradients to 2e-6; sums are the same whatever the threads, bit for bit."
    torch.manual_seed(0)
    x = random_tensor((14, 13, 12), size=2, share=0.3, channels=c_in)
    fine = submanifold_rules(x, kernel)
    coarse, down = strided_rules(x, 2, 2)
    weights = [
        torch.randn(c_out, *size, c_in) for size in (SubMConv3d(1, 1, kernel).kernel_size, (2,) * 3)
    ]
    cases = [(fine, weights[0], len(x)), (down, weights[1], len(x))]
    cases.append((down.reversed(), weights[1], len(coarse)))
    for rules, weight, rows in cases:
        feat = torch.randn(rows, c_in)
        results = {}
        for name, dtype, compiled, threads in (
            ("double", torch.float64, False, 1),
            ("torch", torch.float32, False, 1),
            ("compiled", torch.float32, True, 1),
            ("threads", torch.float32, True, 3),
        ):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (feat, weight)]
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            y = sparse_conv(*leaves, rules, compiled=compiled)
            factor = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
            results[name] = [y, *torch.autograd.grad((y * factor).sum(), leaves)]
            torch.set_num_threads(before)
        for exact, plain, ours, again in zip(*results.values()):
            assert (ours - exact).norm() <= 2e-6 * exact.norm()
            assert (plain - exact).norm() <= 2e-6 * exact.norm()
            assert torch.equal(ours, again)


def test_compiled_wants_only_what_is_needed_and_is_differentiable_once():
    x = random_tensor(dtype=torch.float32)
    rules = submanifold_rules(x, 3)
    weight = torch.randn(4, 3, 3, 3, 3, requires_grad=True)
    feat = x.feat.clone().requires_grad_()
    both = torch.autograd.grad(sparse_conv(feat, weight, rules).sum(), (feat, weight))
    (alone,) = torch.autograd.grad(sparse_conv(x.feat, weight, rules).sum(), weight)
    (other,) = torch.autograd.grad(sparse_conv(feat, weight.detach(), rules).sum(), feat)
    assert torch.equal(other, both[0]) and torch.equal(alone, both[1])
    y = sparse_conv(feat, weight, rules)
    (first,) = torch.autograd.grad(y.square().sum(), feat, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_features_that_the_rules_are_not_of_are_refused():
    x = random_tensor(dtype=torch.float32)
    rules = submanifold_rules(x, 3)
    weight = torch.randn(4, 3, 3, 3, 3)
    for compiled in (True, False):
        with pytest.raises(ValueError, match="sparse_conv.feat: expected .* rows as in the rules"):
            sparse_conv(x.feat[1:], weight, rules, compiled=compiled)
        with pytest.raises(ValueError, match="sparse_conv.weight: expected 27 offsets"):
            sparse_conv(x.feat, weight[:, :1], rules, compiled=compiled)
        with pytest.raises(ValueError, match="sparse_conv.weight: expected shape"):
            sparse_conv(x.feat, weight[..., :2], rules, compiled=compiled)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (5, 1, 3), (1, 5, 5)])
def test_compiled_tables_and_pairs_equal_those_of_torch(kernel):
    x = random_tensor((9, 8, 7), size=2, share=0.4)
    margin = [width // 2 for width in kernel]
    shape = tuple(side + 2 * air for side, air in zip(x.shape, margin))
    index = x.index[x._cache["order"]] + torch.tensor([0, *margin])
    number = cell_numbers(index, shape)
    table = neighbour_table(number, shape, kernel)
    assert torch.equal(table, _table_in_torch(number, shape, kernel))
    for side in (1, 7, 50, len(number)):
        for ours, plain in zip(_cut_compiled(table, side), _cut(table, side)):
            assert torch.equal(ours.long(), plain[: len(ours)].long())


def test_order_of_rows_is_free_and_results_repeat():
    torch.manual_seed(0)
    x, layers = (
        random_tensor(dtype=torch.float32),
        torch.nn.Sequential(
            SubMConv3d(3, 4, 5), SparseConv3d(4, 5), SubMConv3d(5, 5), SparseInverseConv3d(5, 2)
        ),
    )
    y = layers(x)
    assert torch.equal(y.feat, layers(SparseTensor(x.feat, x.index, x.shape, x.size)).feat)
    p = torch.randperm(len(x))
    close(
        layers(SparseTensor(x.feat[p], x.index[p], x.shape, x.size)).feat, y.feat[p], torch.float32
    )


def test_batch_equals_each_alone_and_clouds_do_not_touch():
    x, layer = random_tensor(size=3), SubMConv3d(3, 4, 5).double()
    y = layer(x)
    for b in range(3):
        own = x.index[:, 0] == b
        one = SparseTensor(x.feat[own], x.index[own] * torch.tensor([0, 1, 1, 1]), x.shape, 1)
        close(layer(one).feat, y.feat[own], torch.float64)
    wall = SparseTensor(
        torch.ones(2, 1), torch.tensor([[0, 0, 0, 3], [0, 0, 1, 0]]), (1, 2, 4), 1
    )  # neighbours by number, not in space
    assert len(submanifold_rules(wall, 3).forth.src) == 2


def test_levels_nest():
    x = random_tensor((16, 16, 16), share=0.1)
    a, b = SparseConv3d(3, 4).double(), SparseConv3d(4, 4).double()
    up = SparseInverseConv3d(4, 4).double()
    y = b(a(x))
    middle = up(SubMConv3d(4, 4).double()(y))
    fine = up(SubMConv3d(4, 4).double()(middle))
    assert torch.equal(middle.index, a(x).index) and torch.equal(fine.index, x.index)
    assert fine._cache is x._cache and middle._cache is a(x)._cache and fine._origin is None
    with pytest.raises(
        ValueError, match="SparseInverseConv3d: expected a tensor that a SparseConv3d made"
    ):
        up(fine)
    with pytest.raises(
        ValueError,
        match="kernel_size: expected that of the SparseConv3d that is undone, \\(2, 2, 2\\), got \\(3, 3, 3\\)",
    ):
        SparseInverseConv3d(4, 4, 3)(y)


def test_rulebooks_are_built_once_and_freed():
    x = random_tensor()
    first = SubMConv3d(3, 3).double()(x)
    assert submanifold_rules(first, (3, 3, 3)) is submanifold_rules(x, 3)
    y = SparseConv3d(3, 3).double()(first)
    assert SparseConv3d(3, 5).double()(x)._cache is y._cache
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(submanifold_rules(y, 3))
        del x, first, y
        assert alive() is None  # no cycle keeps a room in memory
    finally:
        gc.enable()


def test_a_cell_alone_and_an_empty_tensor():
    layers = torch.nn.Sequential(
        SubMConv3d(3, 4), SparseConv3d(4, 5, bias=True), SparseInverseConv3d(5, 2)
    )
    one = SparseTensor(torch.randn(1, 3), torch.tensor([[0, 1, 1, 1]]), (2, 2, 2), 1)
    close(
        layers(one).feat,
        (
            layers[2].weight[:, 1, 1, 1]
            @ (
                layers[1].weight[:, 1, 1, 1] @ (layers[0].weight[:, 1, 1, 1] @ one.feat[0])
                + layers[1].bias
            )
        )[None],
        torch.float32,
    )
    empty = SparseTensor(
        torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 4, dtype=torch.long), (4, 4, 4), 2
    )
    y = layers(empty)
    y.feat.sum().backward()
    assert (
        y.feat.shape == (0, 2)
        and y.dense().shape == (2, 2, 4, 4, 4)
        and layers[0].weight.grad.eq(0).all()
    )


def test_low_precision_and_autocast():
    x, layer = random_tensor(dtype=torch.float32), SubMConv3d(3, 4)
    exact = layer(x).feat
    assert (layer(x.with_feat(x.feat.bfloat16())).feat - exact).abs().max() < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = SparseConv3d(4, 2)(layer(x)).feat
    rough.float().sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_neighbour_table_against_a_dictionary():
    x = random_tensor((5, 4, 6), size=2)
    order, kernel = x._cache["order"], (3, 5, 3)
    cells = [tuple(c) for c in x.index[order].tolist()]
    place = {c: n for n, c in enumerate(cells)}
    table = neighbour_table(
        cell_numbers(x.index[order] + torch.tensor([0, 1, 2, 1]), (7, 8, 8)), (7, 8, 8), kernel
    )
    for k, d in enumerate(
        torch.cartesian_prod(*[torch.arange(n) - n // 2 for n in kernel]).tolist()
    ):
        assert table[k].tolist() == [
            place.get((b, i + d[0], j + d[1], l + d[2]), -1) for b, i, j, l in cells
        ]
    book = Rulebook.from_table(table, order, order)
    assert len(Rules(book, len(x)).back.src) == len(book.src)


def test_errors_name_the_argument():
    index, feat = torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 2)
    bad = {
        "expected dtype torch.int64": dict(index=index.int()),
        "expected k in 0..2, found 3..3": dict(shape=(4, 4, 3)),
        "expected batch in 0..0, found 1..1": dict(index=index + torch.tensor([1, 0, 0, 0])),
        "expected i in 0..3, found -1..-1": dict(index=index - torch.tensor([0, 2, 0, 0])),
        "\\(0, 1, 2, 3\\) more than once": dict(index=index.repeat(2, 1), feat=feat.repeat(2, 1)),
        "expected shape \\[n 4\\]": dict(index=index[:, :3]),
        "too many cells": dict(shape=(2**21, 2**21, 2**21)),
        "SparseTensor.shape: expected": dict(shape=(4, 4)),
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message) as error:
            SparseTensor(**dict(feat=feat, index=index, shape=(4, 4, 4), size=1) | change)
        assert "\n" not in str(error.value)
    x = SparseTensor(feat, index, (4, 4, 4), 1)
    with pytest.raises(ValueError, match="with n = 2"):
        SparseTensor(torch.ones(2, 2), index, (4, 4, 4), 1)
    with pytest.raises(ValueError, match="expected odd widths"):
        SubMConv3d(2, 2, 4)
    with pytest.raises(ValueError, match="expected features with 3 channels"):
        SubMConv3d(3, 2)(x)
    with pytest.raises(ValueError, match="SparseConv3d.stride: expected"):
        SparseConv3d(2, 2, stride=0)
    with pytest.raises(ValueError, match="wider than the block"):
        SparseConv3d(2, 2, 7)(x)
    with pytest.raises(
        ValueError, match="backend: expected 'auto', 'torch' or 'spconv', got 'cuda'"
    ):
        SubMConv3d(2, 2, backend="cuda")
    with pytest.raises(ValueError, match="needs a CUDA tensor"):
        SubMConv3d(2, 2, backend="spconv")(x)


def test_voxels_keep_the_order_of_first_points():
    g = torch.Generator().manual_seed(0)
    xyz, batch = torch.randn(300, 3, generator=g) * 0.2, torch.tensor([0] * 120 + [2] * 180)
    points = PointBatch(xyz, torch.randn(300, 2, generator=g, requires_grad=True), batch, 3)
    voxels, inverse = merge_voxels(points, 0.1)
    seen = {}
    for row, cell in enumerate(torch.cat([batch[:, None], (xyz / 0.1).floor().long()], 1).tolist()):
        seen.setdefault(tuple(cell), []).append(row)
    assert [inverse[rows].tolist() for rows in seen.values()] == [
        [n] * len(rows) for n, rows in enumerate(seen.values())
    ]
    for n, rows in enumerate(seen.values()):
        torch.testing.assert_close(voxels.feat[n], points.feat[rows].mean(0))
        torch.testing.assert_close(voxels.xyz[n], xyz[rows].mean(0))
    assert torch.equal(
        torch.cat([voxels.batch[:, None], (voxels.xyz / 0.1).floor().long()], 1),
        torch.tensor(list(seen)),
    )
    voxels.feat.sum().backward()
    assert points.feat.grad.isfinite().all()
    with pytest.raises(ValueError, match="found two in one; merge them first"):
        point_cells(points, 0.1)
    cells = point_cells(voxels, 0.1)
    assert cells.feat is voxels.feat and all(s % 16 == 0 for s in cells.shape)
    assert torch.equal(cells.index[cells.index[:, 0] == 2].amin(0), torch.tensor([2, 0, 0, 0]))


def test_means_stay_in_their_cells():
    g = torch.Generator().manual_seed(1)
    edge = (
        torch.randint(-50, 50, (4000, 3), generator=g) * 0.02
    )  # on the faces of cells, where rounding decides
    xyz = torch.cat([edge, edge, edge])[torch.randperm(12000, generator=g)]
    points = PointBatch(xyz, xyz, torch.zeros(12000, dtype=torch.long), 1)
    voxels, inverse = merge_voxels(points, 0.02)
    assert torch.equal((voxels.xyz / 0.02).floor()[inverse], (xyz / 0.02).floor())


def test_nothing_becomes_nothing():
    none = PointBatch(torch.zeros(0, 3), torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 2)
    voxels, inverse = merge_voxels(none, 0.1)
    assert len(voxels) == len(inverse) == len(point_cells(voxels, 0.1)) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "spconv"])
def test_gpu_agrees(backend):
    if backend == "spconv":
        pytest.importorskip("spconv.pytorch")
    torch.manual_seed(0)
    x = leaf(random_tensor((16, 16, 16), dtype=torch.float32, channels=8))
    layers = torch.nn.Sequential(
        SubMConv3d(8, 16, 5, bias=True, backend=backend),
        SparseConv3d(16, 24, bias=True, backend=backend),
        SubMConv3d(24, 24, backend=backend),
        SparseInverseConv3d(24, 8, backend=backend),
    )
    cpu = torch.nn.Sequential(
        SubMConv3d(8, 16, 5, bias=True),
        SparseConv3d(16, 24, bias=True),
        SubMConv3d(24, 24),
        SparseInverseConv3d(24, 8),
    )
    cpu.load_state_dict(layers.state_dict())
    want = cpu(x).feat
    expected = torch.autograd.grad(want.square().sum(), [x.feat, *cpu.parameters()])
    there = x.to("cuda")
    y = layers.cuda()(there)
    torch.testing.assert_close(y.feat.cpu(), want, rtol=1e-3, atol=1e-4)
    for a, b in zip(
        torch.autograd.grad(y.feat.square().sum(), [there.feat, *layers.parameters()]), expected
    ):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-3)


def imitate_spconv(monkeypatch):
    "A module with the parts of spconv's interface that are used, the same demands, and our sums behind them."
    from unipre3d.geometry import sparse

    class Tensor:
        def __init__(self, features, indices, spatial_shape, batch_size, indice_dict=None):
            assert (
                indices.dtype == torch.int32
                and batch_size > 0
                and isinstance(spatial_shape, list)
                and features.device.type != "meta"
            )
            self.features, self.indices, self.spatial_shape, self.batch_size, self.indice_dict = (
                features,
                indices,
                spatial_shape,
                batch_size,
                indice_dict or {},
            )

    class Layer(torch.nn.Module):
        subm = inverse = False

        def __init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride=1,
            padding=0,
            bias=True,
            indice_key=None,
        ):
            super().__init__()
            assert not bias and indice_key
            self.kernel_size, self.key, self.weight = (
                kernel_size,
                indice_key,
                torch.nn.Parameter(torch.zeros(out_channels, *kernel_size, in_channels)),
            )
            self.stride, self.padding = stride, padding

        def forward(self, x):
            assert self.training and self.weight.device.type != "meta"
            known, ours = (
                dict(x.indice_dict),
                SparseTensor(x.features, x.indices.long(), tuple(x.spatial_shape), x.batch_size),
            )
            data = known.get(self.key)
            if self.inverse:
                return Tensor(
                    sparse_conv(x.features, self.weight, data["rules"].reversed()),
                    data["from"].indices,
                    data["from"].spatial_shape,
                    x.batch_size,
                    known,
                )
            assert data is None or self.subm, "only support reuse subm indices"
            if self.subm:
                coarse, rules = (
                    ours,
                    data["rules"] if data else submanifold_rules(ours, tuple(self.kernel_size)),
                )
            else:
                coarse, rules = strided_rules(
                    ours, tuple(self.kernel_size), tuple(self.stride), tuple(self.padding)
                )
            known[self.key] = {"rules": rules, "from": x}
            return Tensor(
                sparse_conv(x.features, self.weight, rules),
                coarse.index.int(),
                list(coarse.shape),
                x.batch_size,
                known,
            )

    module = types.ModuleType("spconv.pytorch")
    module.SparseConvTensor = Tensor
    module.SubMConv3d, module.SparseConv3d, module.SparseInverseConv3d = (
        type(k, (Layer,), v)
        for k, v in (("SubM", {"subm": True}), ("Strided", {}), ("Inverse", {"inverse": True}))
    )
    package = types.ModuleType("spconv")
    package.pytorch = module
    monkeypatch.setitem(sys.modules, "spconv", package)
    monkeypatch.setitem(sys.modules, "spconv.pytorch", module)
    monkeypatch.setattr(sparse, "_use_spconv", lambda owner, backend, x: backend != "torch")


def test_spconv_built_for_processors_is_not_taken(monkeypatch):
    from unipre3d.geometry import sparse

    for built, cpu_only in (("CPU", True), ("CUDA", False)):
        package, facts = types.ModuleType("spconv"), types.ModuleType("spconv.cppconstants")
        package.__spec__ = importlib.machinery.ModuleSpec("spconv", None)
        facts.CPU_ONLY_BUILD = cpu_only
        monkeypatch.setitem(sys.modules, "spconv", package)
        monkeypatch.setitem(sys.modules, "spconv.cppconstants", facts)
        sparse.spconv_build.cache_clear()
        assert sparse.spconv_build() == built
    sparse.spconv_build.cache_clear()
    monkeypatch.undo()
    sparse.spconv_build.cache_clear()


@pytest.mark.parametrize("build", ["", "CPU", "CUDA"])
@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_spconv_counts_for_tensors_on_a_gpu_and_a_build_for_it(monkeypatch, build, cuda, dtype):
    from unipre3d.geometry import sparse

    monkeypatch.setattr(sparse, "spconv_build", lambda: build)
    device = "cuda:0" if cuda else "cpu"
    x = SimpleNamespace(feat=SimpleNamespace(is_cuda=cuda, dtype=dtype, device=device))
    able = cuda and build == "CUDA"
    theirs = dtype in (torch.float32, torch.float16)
    assert sparse._use_spconv("SubMConv3d", "auto", x) is (able and theirs)
    assert sparse._use_spconv("SubMConv3d", "torch", x) is False
    if able:
        assert sparse._use_spconv("SubMConv3d", "spconv", x) is True
        return
    words = f"found a tensor on {device} and {build or 'no'} build of spconv"
    with pytest.raises(ValueError, match=words):
        sparse._use_spconv("SubMConv3d", "spconv", x)


def test_the_extra_of_that_name_is_for_pythons_that_have_it():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(Path(__file__).resolve().parent.parent / "settings.ini")
    wanted = settings["DEFAULT"]["spconv-cu120_requirements"].split()
    (extra,) = [Requirement(text) for text in wanted if "spconv" in text]
    assert extra.name == "spconv-cu120"
    for python, there in (("3.11", True), ("3.12", False), ("3.13", False)):
        assert extra.marker.evaluate({"python_version": python}) is there
    usual = settings["DEFAULT"]["gpu_requirements"]
    assert "spconv-cu126" in usual and "spconv-cu120" not in usual


@pytest.mark.parametrize("mode", [True, False])
def test_spconv_is_called_as_it_wants_to_be(monkeypatch, mode):
    torch.manual_seed(0)
    layers = (
        torch.nn.Sequential(
            SubMConv3d(3, 4, 5, bias=True),
            SubMConv3d(4, 4, 5),
            SubMConv3d(4, 4, 1),
            SparseConv3d(4, 5, bias=True),
            SubMConv3d(5, 5),
            SparseConv3d(5, 5, 3, padding=1),
            SparseInverseConv3d(5, 5, 3),
            SparseInverseConv3d(5, 2, bias=True),
        )
        .double()
        .train(mode)
    )
    x = leaf(random_tensor((9, 8, 7)))
    want = layers(x)
    imitate_spconv(monkeypatch)
    found = layers(SparseTensor(x.feat, x.index, x.shape, x.size))
    assert (
        torch.equal(found.index, want.index)
        and found.shape == want.shape
        and set(found._cache["spconv"]) == {"subm (5, 5, 5)"}
    )
    close(found.feat, want.feat, torch.float64)
    same_gradients(found.feat, want.feat, [x.feat, *layers.parameters()], torch.float64)
    empty = SparseTensor(
        torch.zeros(0, 3, dtype=torch.double), torch.zeros(0, 4, dtype=torch.long), (8, 8, 8), 1
    )
    assert layers(empty).feat.shape == (0, 2)
