"Point Transformer V3: released numbers, patches, levels, ragged batches, odd clouds."

import importlib.machinery
import importlib.util
import inspect
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from parity_cases import close
from unipre3d.backbones import PTv3, ptv3
from unipre3d.backbones.ptv3 import (
    CURVES,
    attend_rectangle,
    coarser_level,
    curve_codes,
    curve_digits,
    cut_patches,
    finest_level,
)
from unipre3d.core import PointBatch
from unipre3d.geometry.pointops import voxelize
from unipre3d.geometry.serialization import hilbert_code, z_code
from unipre3d.geometry.sparse import SubMConv3d, merge_voxels, point_cells

PARITY = Path(__file__).parent / "parity"
SMALL = dict(
    in_channels=4,
    stride=(2, 2),
    enc_depths=(2, 1, 1),
    enc_channels=(8, 16, 16),
    enc_num_head=(1, 2, 2),
    enc_patch_size=16,
    dec_depths=(1, 2),
    dec_channels=(12, 16),
    dec_num_head=(2, 2),
    dec_patch_size=16,
)


def cloud(n, seed=0, width=0.5):
    "n voxels with four features; one row a voxel, at its centre"
    g = torch.Generator().manual_seed(seed)
    cell = (torch.rand(4 * n, 3, generator=g) * width / 0.02).long().unique(dim=0)
    cell = cell[torch.randperm(len(cell), generator=g)[:n]]
    return (cell + 0.5) * 0.02, torch.randn(len(cell), 4, generator=g)


def pack(*clouds):
    batch = torch.cat([torch.full((len(x),), i) for i, (x, _) in enumerate(clouds)])
    return PointBatch(
        torch.cat([x for x, _ in clouds]), torch.cat([f for _, f in clouds]), batch, len(clouds)
    )


def small(**changes):
    torch.manual_seed(0)
    return PTv3(**SMALL | changes).eval()


def released(name):
    data, card = (
        load_file(PARITY / f"{name}.safetensors"),
        json.loads((PARITY / f"{name}.json").read_text()),
    )
    model = PTv3.from_released(card["kwargs"])
    state = {k.removeprefix("state/"): v for k, v in data.items() if k.startswith("state/")}
    model.load_state_dict(model.convert_released(state))
    return model.eval(), data, state


def compare_gradients(model, data):
    compared = 0
    for name, value in model.named_parameters():
        key = f"grad/state/encoder.{model.released_weight(name)[0]}"
        if key in data:
            close(value.grad, data[key])
            compared += 1
    assert compared == 4


# ---------------------------------------------------------------- the released model


def test_parity_without_fusion():
    model, data, _ = released("backbone_ptv3_nofusion_b1")
    feat = data["in/feat"].clone().requires_grad_()
    p = model(PointBatch(data["in/coord"], feat, torch.zeros(len(feat), dtype=torch.long), 1))
    assert torch.equal(point_cells(p, 0.02).index, data["out/indices"])
    close(p.feat, data["out/features"])
    (p.feat * data["loss/R"]).sum().backward()
    close(feat.grad, data["grad/in/feat"])
    compare_gradients(model, data)


def test_parity_with_the_recorded_point_fusion():
    "The recorded picks are appended to the stem's rows, at the centres of the recorded cells, and the sequence goes on from there."
    model, data, state = released("backbone_ptv3_fusion")
    feat, maps = (data[f"in/{k}"].clone().requires_grad_() for k in ("feat", "feat_2d"))
    stem = model.stem(
        PointBatch(data["in/coord"], feat, torch.zeros(len(feat), dtype=torch.long), 1)
    )
    pixels = maps.permute(0, 2, 3, 1).flatten(0, 2)
    pick = torch.cdist(data["out/sel_feat"], pixels.detach()).argmin(1)
    assert torch.equal(pixels.detach()[pick], data["out/sel_feat"])

    cell = torch.cat([data["in/grid_coord"], data["out/sel_grid_coord"]])
    merged = PointBatch(
        (cell + 0.5) * 0.02,
        torch.cat([stem.feat, pixels[pick]]),
        torch.zeros(len(cell), dtype=torch.long),
        1,
    )
    mix, norm = SubMConv3d(16, 16, 3, bias=True), torch.nn.BatchNorm1d(16).eval()
    mix.load_state_dict({k: state[f"fusion_mlps.0.{k}"] for k in ("weight", "bias")})
    norm.load_state_dict({k: state[f"fusion_mlps.1.{k}"] for k in norm.state_dict()})
    p = model.body(merged.with_feat(norm(mix(point_cells(merged, 0.02)).feat).relu()))
    assert torch.equal(point_cells(p, 0.02).index, data["out/indices"])
    close(p.feat, data["out/features"])
    (p.feat * data["loss/R"]).sum().backward()
    close(feat.grad, data["grad/in/feat"])
    close(maps.grad, data["grad/in/feat_2d"])
    close(mix.weight.grad, data["grad/state/fusion_mlps.0.weight"])
    compare_gradients(model, data)


def test_the_released_voxels_are_ours():
    "Same occupied cells, same groups of points, and each recorded pick belongs to its voxel."
    data = load_file(PARITY / "gridsample_train.safetensors")
    xyz, theirs, picked = data["in/coord"], data["out/inverse"], data["out/coord"]
    batch = torch.zeros(len(xyz), dtype=torch.long)
    merged, ours = merge_voxels(PointBatch(xyz, data["in/color"], batch, 1), 0.02)
    cell = point_cells(merged, 0.02).index[:, 1:]
    assert torch.equal(cell[ours], data["out/all_grid_coord"])
    assert torch.equal(cell.unique(dim=0), data["out/grid_coord"].unique(dim=0)) and len(
        cell
    ) == len(picked)
    assert len(torch.stack([ours, theirs]).unique(dim=1).T) == len(cell)  # one to one
    for row, (point, color) in enumerate(zip(picked, data["out/color"])):
        members = theirs == row
        assert ((xyz[members] == point).all(1) & (data["in/color"][members] == color).all(1)).any()
    assert torch.equal(
        voxelize(picked, batch[: len(picked)], 0.02)[0], voxelize(xyz, batch, 0.02)[0]
    )


def test_codes_are_the_released_ones():
    data = load_file(PARITY / "serialization_codes.safetensors")
    batch = data["out/batch"]
    digits = torch.full(
        (2,), 5
    )  # the released code reads all clouds with the digits of the largest
    for i, curve in enumerate(CURVES):
        code = curve_codes(data["in/grid_coord"], batch, digits, curve)
        assert torch.equal(code, data["out/code"][i]) and torch.equal(
            code.argsort(), data["out/order"][i]
        )


def test_released_size_and_defaults():
    assert sum(p.numel() for p in PTv3().parameters()) == 46_166_272
    bare = PTv3.from_released(dict(in_channels=6, enable_flash=True, upcast_attention=False))
    assert bare.order == ("z", "z-trans") and {b.patch for stage in bare.enc for b in stage} == {48}
    assert [round(b.drop_path, 3) for stage in bare.enc for b in stage][::13] == [
        0,
        0.3,
    ] and bare.dec[3][0].drop_path == pytest.approx(0.3)
    with pytest.raises(ValueError, match="unknown argument 'depth'"):
        PTv3.from_released(dict(depth=3))
    with pytest.raises(ValueError, match="pdnorm_bn: expected False"):
        PTv3.from_released(dict(pdnorm_bn=True))
    with pytest.raises(ValueError, match="expected the key 'encoder.embedding.stem.conv.weight'"):
        small().convert_released({})


# ---------------------------------------------------------------- codes, patches, levels


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("top", [0, 1, 2, 7, 8, 100, 1023])
def test_codes_of_a_cloud_do_not_depend_on_its_neighbours(curve, top):
    cell = torch.randint(top + 1, (30, 3), generator=torch.Generator().manual_seed(top))
    cell[0] = top
    batch, digits = torch.zeros(30, dtype=torch.long), int(top).bit_length()
    assert curve_digits(cell, batch, 1).tolist() == [digits]
    turned = cell[:, [1, 0, 2]] if curve.endswith("trans") else cell
    want = (z_code if curve.startswith("z") else hilbert_code)(turned, digits)
    assert torch.equal(curve_codes(cell, batch, torch.tensor([digits]), curve), want)
    beside = (
        torch.cat([cell, torch.tensor([[0, 5, 3000]])]),
        torch.cat([batch, torch.ones(1, dtype=torch.long)]),
    )
    assert torch.equal(curve_codes(*beside, curve_digits(*beside, 2), curve)[:30], want)


def test_too_large_a_grid_is_an_error():
    cell = torch.tensor([[0, 0, 2**21]])
    with pytest.raises(ValueError, match="use a larger voxel_size"):
        curve_codes(cell, torch.zeros(1, dtype=torch.long), torch.tensor([22]), "z")


def test_last_patch_borrows_and_short_clouds_do_not():
    cut = cut_patches(torch.arange(16), torch.tensor([10, 0, 3, 1, 2]), 4)
    assert [p.tolist() for p in cut.rows.split(cut.lengths.tolist())] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 6, 7],
        [10, 11, 12],
        [13],
        [14, 15],
    ]
    assert torch.equal(cut.rows[cut.back], torch.arange(16)) and cut.back.unique().numel() == 16
    assert cut_patches(torch.arange(8), torch.tensor([8, 0]), 4).mask is None
    assert len(cut_patches(torch.arange(0), torch.tensor([0, 0]), 4).rows) == 0


def test_masked_attention_equals_patches_alone_with_gradients():
    cut = cut_patches(torch.arange(14), torch.tensor([9, 3, 2]), 4)
    qkv = torch.randn(len(cut.rows), 3, 2, 4, dtype=torch.float64, requires_grad=True)
    parts = []
    for part in qkv.split(cut.lengths.tolist()):
        q, k, v = part.permute(1, 2, 0, 3)
        parts.append(((q @ k.mT / 2).softmax(-1) @ v).transpose(0, 1))
    ours, theirs = attend_rectangle(qkv, cut), torch.cat(parts)
    assert torch.allclose(ours, theirs)
    r = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad((ours * r).sum(), qkv), torch.autograd.grad((theirs * r).sum(), qkv)
    ):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_coarser_cells(stride):
    x, f = cloud(150)
    level = finest_level(
        point_cells(pack((x, f), cloud(7, 1), (x[:0], f[:0]), cloud(1, 2)), 0.02), CURVES
    )
    coarse = coarser_level(level, stride)
    index = level.cells.index.clone()
    index[:, 1:] //= stride
    assert torch.equal(coarse.cells.index[coarse.inverse], index) and len(coarse) == len(
        index.unique(dim=0)
    )
    for a, b in zip(coarse.codes, finest_level(coarse.cells, CURVES).codes):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("order", [CURVES, ("hilbert",)])
def test_a_batch_equals_its_clouds_alone(order):
    model = small(order=order)
    x, f = cloud(170)
    clouds = [
        (x, f),
        cloud(40, 1, 0.9),
        (x[:0], f[:0]),
        cloud(5, 2, 0.1),
        cloud(1, 3),
        cloud(17, 4),
    ]
    out = model(pack(*clouds))
    assert out.counts.tolist() == [170, 40, 0, 5, 1, 17] and out.feat.isfinite().all()
    for i, one in enumerate(clouds):
        if len(one[0]):
            assert torch.allclose(out.feat[out.batch == i], model(pack(one)).feat, atol=1e-5)


def test_all_empty():
    x, f = cloud(3)
    for model in (small(), small().train()):
        assert model(pack((x[:0], f[:0]), (x[:0], f[:0]))).feat.shape == (0, 12)


def test_permuted_points_give_permuted_rows():
    (x, f), model = cloud(200), small()
    order = torch.randperm(200)
    assert torch.allclose(
        model(pack((x[order], f[order]))).feat, model(pack((x, f))).feat[order], atol=1e-5
    )


@pytest.mark.parametrize("cells", [(1, 0, 0), (0, -3, 0), (5, 7, -11), (4, 4, 4)])
def test_moving_by_whole_voxels_changes_nothing(cells):
    (x, f), model = cloud(120), small(voxel_size=2**-6)
    x = (x / 0.02) / 64
    assert torch.allclose(
        model(pack((x + torch.tensor(cells) / 64, f))).feat, model(pack((x, f))).feat, atol=1e-5
    )


def test_an_added_voxel_in_a_far_corner_moves_the_coarse_cells():
    (x, f), model = cloud(120), small()
    far = pack((torch.cat([x, x.amin(0, keepdim=True) - 0.02]), torch.cat([f, f[:1]])))
    assert not torch.allclose(model(far).feat[:120], model(pack((x, f))).feat, atol=1e-3)


def test_rows_stay_in_order_of_first_points_and_duplicates_share_a_gradient():
    (x, f), model = cloud(60), small()
    points = pack((x[[3, 3, 0, 1, 3, 2]], f[[3, 3, 0, 1, 3, 2]].clone().requires_grad_()))
    p = model.stem(points)
    assert torch.allclose(p.xyz, x[[3, 0, 1, 2]]) and p.feat.shape == (4, 8)
    out = model.body(p)
    assert torch.equal(out.xyz, p.xyz)
    grad = torch.autograd.grad(out.feat.square().sum(), points.feat)[0]
    assert grad.isfinite().all() and torch.equal(grad[0], grad[4])


def test_two_rows_in_a_voxel_are_an_error():
    p = small().stem(pack(cloud(20)))
    with pytest.raises(ValueError, match="merge"):
        small().body(PointBatch(p.xyz[[0, 0, 1]], p.feat[[0, 0, 1]], p.batch[[0, 0, 1]], 1))


def test_body_takes_voxels_that_the_stem_did_not_make():
    (x, f), model = cloud(90), small()
    p, other = model.stem(pack((x[:50], f[:50]))), torch.randn(40, 8)
    union = model.body(
        PointBatch(
            torch.cat([p.xyz, x[50:]]),
            torch.cat([p.feat, other]),
            torch.zeros(90, dtype=torch.long),
            1,
        )
    )
    assert union.feat.shape == (90, 12) and torch.equal(union.xyz[:50], p.xyz)


def test_training_shuffles_curves_and_drops_branches():
    p = pack(cloud(150), cloud(30, 1))

    def twice(**changes):
        model = small(**changes).train()
        stem = model.stem(p)
        return model.body(stem).feat, model.body(stem).feat

    a, b = twice(shuffle_orders=False, drop_path=0.0)
    assert torch.equal(a, b)
    for changes in (
        dict(shuffle_orders=True, drop_path=0.0),
        dict(shuffle_orders=False, drop_path=0.5),
    ):
        assert not torch.equal(*twice(**changes))
    model = small().train()
    model(p).feat.square().sum().backward()
    assert all(v.grad is not None and v.grad.isfinite().all() for v in model.parameters())


def test_training_on_a_single_row_is_a_clear_error():
    with pytest.raises(ValueError, match="expected at least 2 rows"):
        small().train()(pack(cloud(1)))
    x, f = cloud(2)
    near = torch.tensor([[0.01, 0.01, 0.01], [0.03, 0.01, 0.01]])
    with pytest.raises(ValueError, match="expected at least 2 rows"):
        small().train()(pack((near, f)))


def test_patch_of_the_whole_cloud_is_plain_attention():
    "With patches longer than the cloud the curve no longer matters."
    p = pack(cloud(60))
    outs = []
    for order in (("z",), ("hilbert-trans",)):
        outs.append(small(order=order, enc_patch_size=1000, dec_patch_size=1000)(p).feat)
    assert torch.allclose(*outs, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(order=("peano",)), "expected some of z"),
        (dict(stride=(2, 3)), "powers of two"),
        (dict(stride=(2,)), "expected 2 values"),
        (dict(enc_channels=(8, 16)), "enc_channels: expected 3 values"),
        (dict(dec_num_head=(5, 2)), "dec_num_head: expected divisors"),
        (dict(voxel_size=0), "voxel_size"),
        (dict(enc_patch_size=0), "patch"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


def test_too_few_columns():
    x, f = cloud(9)
    with pytest.raises(ValueError, match="at least 4 columns"):
        small().stem(pack((x, f[:, :3])))


def test_save_and_load(tmp_path):
    model, p = small(), pack(cloud(50))
    model.save_pretrained(tmp_path)
    assert torch.equal(PTv3.from_pretrained(tmp_path)(p).feat, model(p).feat)


# ---------------------------------------------------------------- attention of packed sequences


def some_patches():
    torch.manual_seed(0)
    patches = cut_patches(
        torch.randperm(32), torch.tensor([23, 0, 9]), 16
    )  # of 16, 16 and 9 places
    return torch.randn(int(patches.lengths.sum()), 3, 2, 8), patches


def each_alone(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **how):
    "What torch's kernel computes, a sequence at a time; its own refuses processors."
    assert not how and cu_seq_q is cu_seq_k and max_q == max_k == int(cu_seq_q.diff().max())
    assert cu_seq_q.dtype == torch.int32 and query.shape[1:] == key.shape[1:] == (2, 8)
    cuts = cu_seq_q[1:-1].tolist()
    parts = zip(*(x.tensor_split(cuts) for x in (query, key, value)))
    sequences = ([x.transpose(0, 1) for x in part] for part in parts)
    return torch.cat([F.scaled_dot_product_attention(*s).transpose(0, 1) for s in sequences])


def test_torchs_packed_attention_is_taken_where_it_is_and_called_as_it_wants_to_be(monkeypatch):
    "Bound to the signature of the installed torch; the result is that of the padded rectangle."
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    wants = inspect.signature(varlen.varlen_attn)
    calls = []

    def kernel(*args, **how):
        calls.append(wants.bind(*args, **how))
        return each_alone(*args, **how)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    flash = types.ModuleType("flash_attn")  # is here too, and torch's own comes first
    flash.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    ptv3.packed_kernel.cache_clear()
    qkv, patches = some_patches()
    starts = F.pad(patches.lengths.cumsum(0), (1, 0)).int()
    found = ptv3.packed_kernel()(qkv, starts, patches.longest)
    ptv3.packed_kernel.cache_clear()
    assert len(calls) == 1 and patches.mask is not None
    assert torch.allclose(found, ptv3.attend_rectangle(qkv, patches), atol=1e-6)


@pytest.mark.parametrize("there", [True, False])
def test_without_torchs_packed_attention_flash_attention_is_taken_if_it_is_there(
    monkeypatch, there
):
    find = importlib.util.find_spec
    missing = {"torch.nn.attention.varlen"} | (set() if there else {"flash_attn"})
    flash = types.ModuleType("flash_attn")
    flash.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    flash.flash_attn_varlen_qkvpacked_func = object()
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    ptv3.packed_kernel.cache_clear()
    found = ptv3.packed_kernel()
    ptv3.packed_kernel.cache_clear()
    assert found is (flash.flash_attn_varlen_qkvpacked_func if there else None)


@pytest.mark.parametrize(
    "cuda, dtype, width, packed",
    [
        (True, torch.bfloat16, 8, True),
        (True, torch.float16, 16, True),
        (True, torch.float32, 8, False),
        (True, torch.bfloat16, 12, False),
        (False, torch.bfloat16, 8, False),
    ],
)
def test_packed_attention_is_for_half_precision_on_a_gpu(monkeypatch, cuda, dtype, width, packed):
    _, patches = some_patches()
    count = int(patches.lengths.sum())
    qkv = SimpleNamespace(is_cuda=cuda, dtype=dtype, shape=(count, 3, 2, width))
    qkv.contiguous = lambda: "whole"
    monkeypatch.setattr(ptv3, "packed_kernel", lambda: lambda *args: ("packed", args))
    monkeypatch.setattr(ptv3, "attend_rectangle", lambda *args: ("rectangle", args))
    kind, args = ptv3.attend(qkv, patches)
    assert kind == ("packed" if packed else "rectangle")
    if packed:
        whole, starts, longest = args
        assert whole == "whole" and longest == patches.longest
        assert starts.tolist() == [0, *patches.lengths.cumsum(0).tolist()]
