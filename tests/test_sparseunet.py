"SparseUNet: released numbers, ragged batches, odd clouds."

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from parity_cases import close
from unipre3d.backbones import SparseUNet
from unipre3d.backbones.sparseunet import unscramble
from unipre3d.core import PointBatch
from unipre3d.geometry.sparse import SparseTensor, SubMConv3d

PARITY = Path(__file__).parent / "parity"
SMALL = dict(
    base_channels=6,
    channels=(6, 8, 8, 10, 10, 8, 8, 7),
    layers=(1, 2, 1, 1, 1, 1, 1, 1),
    voxel_size=1 / 8,
)


def released(name):
    data, card = (
        load_file(PARITY / f"{name}.safetensors"),
        json.loads((PARITY / f"{name}.json").read_text()),
    )
    model = SparseUNet.from_released(card["kwargs"])
    state = {k.removeprefix("state/"): v for k, v in data.items() if k.startswith("state/")}
    model.load_state_dict(model.convert_released(state))
    return model.train(card["mode"] == "train"), data, state


def batch_of(data):
    sizes = torch.diff(data["in/offset"], prepend=data["in/offset"].new_zeros(1))
    return PointBatch(
        data["in/coord"],
        data["in/feat"].clone().requires_grad_(),
        torch.arange(len(sizes)).repeat_interleave(sizes),
        len(sizes),
    )


def check_gradients(model, data, loss, more=()):
    "Gradients of the recorded weights; those of kernels of size one are recorded in the released, scrambled layout."
    own = dict(model.named_parameters())
    keys = {"encoder." + model.released_weight(k)[0]: (k, model.released_weight(k)[1]) for k in own}
    wanted = [k for k in data if k.startswith("grad/state/encoder.")]
    found = torch.autograd.grad(
        loss,
        [own[keys[k.removeprefix("grad/state/")][0]] for k in wanted] + list(more),
        retain_graph=True,
    )
    for key, ours in zip(wanted, found):
        change = keys[key.removeprefix("grad/state/")][1]
        close(ours.flatten(), (change(data[key]) if change else data[key]).flatten(), 2e-4)
    return found[len(wanted) :]


@pytest.mark.parametrize(
    "name", ["backbone_sparseunet_nofusion_b2", "backbone_sparseunet_nofusion_b2_trainbn"]
)
def test_parity_with_the_released_model(name):
    model, data, _ = released(name)
    points = batch_of(data)
    out = model.body(model.stem(points))
    assert torch.equal(out.xyz, points.xyz) and torch.equal(out.batch, data["out/indices"][:, 0])
    close(out.feat, data["out/features"])
    (of_feat,) = check_gradients(model, data, (out.feat * data["loss/R"]).sum(), [points.feat])
    close(of_feat, data["grad/in/feat"], 2e-4)


def test_parity_of_running_statistics():
    model, data, _ = released("backbone_sparseunet_nofusion_b2_trainbn")
    model.body(model.stem(batch_of(data)))
    own = model.state_dict()
    recorded = {model.released_weight(k)[0]: k for k in own}
    for key in (k for k in data if k.startswith("out/after_forward/")):
        close(own[recorded[key.removeprefix("out/after_forward/")]], data[key])


def test_parity_with_released_point_fusion():
    "The released fusion appends its voxels and convolves; body must take the union row for row."
    model, data, state = released("backbone_sparseunet_fusion")
    points = batch_of(data)
    grid = torch.cat([data["in/grid_coord"], data["out/sel_grid_coord"]])
    index = torch.cat([torch.zeros(len(grid), 1, dtype=torch.long), grid], 1)
    fuse = SubMConv3d(8, 8, bias=True).eval()
    fuse.load_state_dict({k: state[f"fusion_mlps.0.{k}"] for k in ("weight", "bias")})
    rows = torch.cat([model.stem(points).feat, data["out/sel_feat"]])
    x = fuse(SparseTensor(rows, index, tuple((grid.amax(0) + 1).tolist()), 1)).feat
    bn = {k: state[f"fusion_mlps.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")}
    x = F.relu(
        F.batch_norm(x, bn["running_mean"], bn["running_var"], bn["weight"], bn["bias"], eps=1e-5)
    )
    out = model.body(PointBatch((grid + 0.5) * 0.02, x, index[:, 0], 1))
    close(out.feat, data["out/features"])
    (of_feat,) = check_gradients(model, data, (out.feat * data["loss/R"]).sum(), [points.feat])
    close(of_feat, data["grad/in/feat"], 2e-4)


def test_released_size():
    assert round(sum(p.numel() for p in SparseUNet().parameters()) / 1e6, 2) == 39.16
    assert round(sum(p.numel() for p in SparseUNet(out_channels=23).parameters()) / 1e6, 2) == 39.16


def pack(*clouds):
    xyz = torch.cat(clouds)
    feat = torch.cat([xyz.sin(), xyz.cos()], 1)
    return PointBatch(
        xyz, feat, torch.cat([torch.full((len(c),), i) for i, c in enumerate(clouds)]), len(clouds)
    )


def shell(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, 3, generator=g), dim=1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SparseUNet(**SMALL).eval()


def test_batch_equals_each_cloud_alone(model):
    a, b = shell(300), shell(500, 1) * 0.7 + 2
    both = model(pack(a, torch.zeros(0, 3), b))
    assert both.counts[1] == 0
    close(both.feat[both.batch == 0], model(pack(a)).feat)
    close(both.feat[both.batch == 2], model(pack(b)).feat)


def test_order_of_points_only_orders_rows(model):
    points = pack(shell(400), shell(300, 1))
    order = torch.cat([torch.randperm(400), 400 + torch.randperm(300)])
    mixed = PointBatch(points.xyz[order], points.feat[order], points.batch, 2)
    a, b = model(points), model(mixed)
    key = lambda p: [
        tuple(c) for c in torch.cat([p.batch[:, None], (p.xyz * 8).floor().long()], 1).tolist()
    ]
    place = {c: n for n, c in enumerate(key(a))}
    close(b.feat, a.feat[[place[c] for c in key(b)]])


def test_body_keeps_any_order_of_rows(model):
    p = model.stem(pack(shell(400)))
    order = torch.randperm(len(p))
    q = model.body(PointBatch(p.xyz[order], p.feat[order], p.batch, 1))
    close(q.feat, model.body(p).feat[order])
    assert torch.equal(q.xyz, p.xyz[order])


def test_whole_voxels_of_translation_change_nothing(model):
    points = pack(shell(400), shell(200, 1))
    move = torch.tensor([[3.0, -17, 40], [-5, 2, 1]])[points.batch] / 8  # each cloud by its own
    close(
        model(PointBatch(points.xyz + move, points.feat, points.batch, 2)).feat, model(points).feat
    )


def test_one_point_a_voxel_keeps_its_rows(model):
    p = model.stem(pack(shell(500)))
    again = pack(p.xyz)
    assert torch.equal(model(again).xyz, p.xyz)


def test_gradients_with_duplicated_points(model):
    xyz = shell(200).repeat(3, 1)
    points = pack(xyz, xyz + 1)
    points = points.with_feat(points.feat.requires_grad_())
    model.train()(points).feat.square().sum().backward()
    assert points.feat.grad.isfinite().all() and all(
        p.grad is not None and p.grad.isfinite().all() for p in model.parameters()
    )


def test_odd_clouds(model):
    one = model(pack(torch.ones(1, 3)))
    assert one.feat.shape == (1, 7) and one.feat.isfinite().all()
    for mode in (True, False):
        none = model.train(mode)(pack(torch.zeros(0, 3), torch.zeros(0, 3)))
        assert none.feat.shape == (0, 7) and none.size == 2
    assert all(b.isfinite().all() for b in model.buffers())
    with pytest.raises(ValueError, match="at least 2 cells at every level while training"):
        model.train()(pack(torch.ones(1, 3)))
    two = model.train()(pack(shell(100), torch.ones(1, 3)))
    assert two.feat.isfinite().all()


def test_wider_inputs_and_last_layer():
    torch.manual_seed(0)
    narrow = SparseUNet(**SMALL | dict(in_channels=3, out_channels=5)).eval()
    points = pack(shell(100))
    out = narrow(points)
    assert out.feat.shape[1] == 5 == narrow.width == narrow.body_width and narrow.stem_width == 6
    close(out.feat, narrow(points.with_feat(points.feat[:, :3])).feat)


def test_unscrambled_kernel():
    w, x = torch.randn(5, 1, 1, 1, 7), torch.randn(4, 7)
    assert torch.allclose(F.linear(x, unscramble(w)), x @ w.view(7, 5), atol=1e-6)


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    points = pack(shell(100))
    assert torch.equal(SparseUNet.from_pretrained(tmp_path / "m")(points).feat, model(points).feat)


def test_mixed_precision(model):
    points = pack(shell(200), shell(100, 1))
    exact = model(points).feat
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(points).feat
    rough.float().square().sum().backward()
    close(rough.float(), exact, 0.1)


def test_errors_name_the_argument(model):
    points = pack(shell(50))
    with pytest.raises(
        ValueError,
        match="channels: expected as many as layers, an even number, got 3 channels and 4 layers",
    ):
        SparseUNet(channels=(8, 8, 8), layers=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="SparseUNet.voxel_size: expected a length above 0"):
        SparseUNet(**SMALL | dict(voxel_size=0))
    with pytest.raises(ValueError, match="at least 6 columns"):
        model.stem(points.with_feat(points.xyz))
    p = model.stem(points)
    with pytest.raises(ValueError, match="found two in one; merge them first"):
        model.body(PointBatch(p.xyz.repeat(2, 1), p.feat.repeat(2, 1), p.batch.repeat(2), 1))
    with pytest.raises(ValueError, match="unknown argument 'num_class'"):
        SparseUNet.from_released(dict(num_class=2))
    with pytest.raises(ValueError, match="check prefix"):
        released("backbone_sparseunet_fusion")[0].convert_released({})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees(model):
    points = pack(shell(400), shell(300, 1))
    torch.testing.assert_close(
        model.cuda()(points.to("cuda")).feat.cpu(), model.cpu()(points).feat, rtol=1e-3, atol=1e-4
    )
