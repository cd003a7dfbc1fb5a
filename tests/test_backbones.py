"What every backbone keeps: a batch is its clouds, order does not matter, odd clouds are defined, weights save and load."

import pytest
import torch

from parity_cases import RECORDED, check_features, close, recorded
from unipre3d import backbones
from unipre3d.backbones.backbone import Backbone, decay_names
from unipre3d.core import PointBatch
from unipre3d.released import load_released

# Small models in which no ball and no patch overflows, so that the order of the points can only order the rows.
SMALL = {
    "StandardTransformer": dict(
        num_groups=16,
        group_size=8,
        radius=None,
        encoder_widths=(16, 24, 32),
        encoder_dims=24,
        width=24,
        depth=2,
        num_heads=3,
    ),
    "PointNet2": dict(
        centres=(16, 6),
        radii=(0.2, 0.4),
        neighbours=(64, 64),
        widths=((8, 12), (12, 16), (16, 24)),
        decoder_widths=((16,), (16,), (12, 12)),
    ),
    "PointMLP": dict(
        embed_width=8,
        expansion=(2, 2),
        reduce=(2, 2),
        neighbours=(6, 4),
        pre_blocks=(1, 2),
        post_blocks=(2, 1),
        decoder_widths=(24, 16),
        decoder_blocks=(1, 2),
    ),
    "PCM": dict(
        embed_dim=12,
        k_neighbors=(4, 4, 4, 4),
        mamba_blocks=(1, 1, 1, 1),
        orders=("xyz", "hilbert", "z", "zyx"),
        prompts_per_order=2,
        prompt_width=10,
        out_channels=9,
        grid_size=1e-4,
        spare_head=False,
    ),
    "Mamba3D": dict(
        num_groups=16, group_size=8, encoder_widths=(8, 12, 16), width=24, depth=2, d_state=4
    ),
    "SparseUNet": dict(
        in_channels=3,
        base_channels=6,
        channels=(6, 8, 8, 8, 8, 7),
        layers=(1,) * 6,
        voxel_size=0.05,
    ),
    "PTv3": dict(
        in_channels=3,
        stride=(2,),
        enc_depths=(1, 1),
        enc_channels=(8, 16),
        enc_num_head=(1, 2),
        enc_patch_size=16,
        dec_depths=(1,),
        dec_channels=(12,),
        dec_num_head=(2,),
        dec_patch_size=16,
        voxel_size=0.05,
    ),
}
MILLIONS = {
    "StandardTransformer": 29.07,
    "PointMLP": 15.08,
    "PCM": 36.75,
    "Mamba3D": 22.03,
    "SparseUNet": 39.16,
    "PTv3": 46.17,
}  # sizes of the released models

every = pytest.mark.parametrize("name", SMALL)


def test_no_backbone_is_left_out():
    found = {
        n
        for n in dir(backbones)
        if isinstance(getattr(backbones, n), type) and issubclass(getattr(backbones, n), Backbone)
    } - {"Backbone"}
    assert found == set(SMALL)


def small(name, **changes):
    torch.manual_seed(0)
    return getattr(backbones, name)(**SMALL[name] | changes)


def pack(*clouds):
    feat = torch.cat(clouds)
    return PointBatch(
        feat[:, :3],
        feat,
        torch.cat([torch.full((len(c),), i) for i, c in enumerate(clouds)]),
        len(clouds),
    )


def cloud(n, seed=0, columns=3):
    return torch.rand(n, columns, generator=torch.Generator().manual_seed(seed)) - 0.5


def in_the_order_of(out, other):
    "Features of `out`, each row where `other` has the same place."
    distance, row = torch.cdist(
        other.xyz, out.xyz, compute_mode="donot_use_mm_for_euclid_dist"
    ).min(1)
    assert len(out) == len(other) and distance.max() < 1e-5 and len(row.unique()) == len(row)
    return out.feat[row]


@every
def test_widths_are_what_the_parts_return(name):
    model = small(name).eval()
    stem = model.stem(pack(cloud(64), cloud(40, 1)))
    body = model.body(stem)
    assert (stem.feat.shape[1], body.feat.shape[1], model.norm(body.feat).shape[1]) == (
        model.stem_width,
        model.body_width,
        model.width,
    )


@pytest.mark.parametrize("name", MILLIONS)
def test_released_size(name):
    more = dict(out_channels=23) if name == "SparseUNet" else {}
    model = getattr(backbones, name)(**more)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == MILLIONS[name]
    keys = [model.released_weight(k)[0] for k in model.state_dict()]
    assert len(set(keys)) == len(keys)


@every
def test_a_batch_is_its_clouds_alone(name):
    model = small(name).eval()
    clouds = [cloud(70), torch.zeros(0, 3), cloud(23, 1), cloud(1, 2), cloud(5, 3)]
    out = model(pack(*clouds))
    for i, alone in enumerate(clouds):
        single = model(pack(alone))
        assert len(single) == (out.batch == i).sum() <= len(alone) and (len(single) > 0) == (
            len(alone) > 0
        )
        if len(single):
            close(out.feat[out.batch == i], single.feat)
        torch.testing.assert_close(out.xyz[out.batch == i], single.xyz)


@every
def test_order_of_points_only_orders_rows(name):
    "As long as the first point stays first: sampling starts there."
    model, points = small(name).eval(), cloud(64)
    order = torch.cat(
        [torch.tensor([0]), 1 + torch.randperm(63, generator=torch.Generator().manual_seed(1))]
    )
    straight, mixed = model(pack(points)), model(pack(points[order]))
    close(in_the_order_of(mixed, straight), straight.feat)


def check_finite(model, points):
    feat = points.feat.clone().requires_grad_()
    out = model(PointBatch(feat[:, :3], feat, points.batch, points.size))
    (out.feat * torch.randn_like(out.feat)).sum().backward()
    assert out.feat.isfinite().all() and feat.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "clouds",
    [
        [torch.full((40, 3), 0.2), cloud(50)],  # all points of one cloud coincide
        [cloud(20).repeat(3, 1), torch.zeros(0, 3)],  # every point three times, and an empty cloud
        [torch.zeros(1, 3), torch.full((2, 3), 0.3)],  # one point, and two that coincide
    ],
    ids=["coincident", "duplicated", "tiny"],
)
def test_odd_clouds_have_finite_gradients(name, train, clouds):
    check_finite(small(name).train(train), pack(*clouds))


@every
def test_one_point_is_defined_or_refused_in_one_line(name):
    model, single = small(name), pack(torch.full((1, 3), 0.1))
    check_finite(model.eval(), single)
    try:
        out = model.train()(single)
    except ValueError as error:
        assert "at least 2" in str(error) and "training" in str(error) and "\n" not in str(error)
    else:
        assert out.feat.isfinite().all()


@every
@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_nothing_in_nothing_out(name, size, train):
    model = small(name).train(train)
    out = model(
        PointBatch(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), size)
    )
    assert out.feat.shape == (0, model.width) and out.size == size
    assert all(b.isfinite().all() for b in model.buffers())


@pytest.mark.parametrize(
    "name", [n for n in SMALL if n != "Mamba3D"]
)  # Mamba3D reads coordinates only
def test_extra_columns_are_read(name):
    model = small(name, in_channels=6).eval()
    xyz = cloud(50)
    colour = torch.linspace(0, 1, 50)[:, None] * torch.tensor([1.0, 0.5, 0])
    a, b = (model(pack(torch.cat([xyz, c], 1))).feat for c in (torch.zeros(50, 3), colour))
    assert (a - b).abs().max() > 1e-4
    with pytest.raises(
        ValueError, match=f"{name}.stem: expected points.feat with at least 6 columns"
    ):
        model(pack(xyz))


@every
def test_mixed_precision(name):
    model, points = small(name).eval(), pack(cloud(60), cloud(30, 1))
    exact = model(points).feat
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(points).feat
    rough.float().square().sum().backward()
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max().clamp_min(1)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every
def test_save_and_load(name, tmp_path):
    model, points = small(name).eval(), pack(cloud(40))
    model.save_pretrained(tmp_path)
    again = getattr(backbones, name).from_pretrained(tmp_path)
    assert (
        again.config == model.config
        and not again.training
        and torch.equal(again(points).feat, model(points).feat)
    )
    other = backbones.PCM if name != "PCM" else backbones.PTv3
    with pytest.raises(ValueError, match=f"expected backbone '{other.__name__}', found '{name}'"):
        other.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        getattr(backbones, name).from_pretrained(tmp_path)


@every
def test_weight_decay_shrinks_matrices_only(name):
    model = small(name)
    parameters, decayed = dict(model.named_parameters()), decay_names(model)
    assert decayed and decayed <= parameters.keys()
    assert all(parameters[k].ndim >= 2 and k.endswith("weight") for k in decayed)
    kept = parameters.keys() - decayed
    tokens = {"A_log", "D", "alpha", "beta", "prompt", "cls_token", "cls_pos"}
    for k in kept:  # vectors of norms and biases, and numbers that are no matrix of a layer
        last = k.rsplit(".", 1)[-1]
        assert last in tokens or (parameters[k].ndim == 1 and last.endswith(("weight", "bias"))), k


@every
def test_unknown_released_argument(name):
    with pytest.raises(ValueError) as error:
        getattr(backbones, name).from_released({"no_such_thing": 1})
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("case", RECORDED)
def test_released_weights_give_released_features(case, tmp_path):
    "From a file of torch.save, as a training run would leave it."
    model, state, data = recorded(case)
    torch.save(
        {"iteration": 3, "model_state_dict": {f"module.{k}": v for k, v in state.items()}},
        tmp_path / "run.pth",
    )
    assert load_released(model, tmp_path / "run.pth").coverage == 1
    with torch.no_grad():
        check_features(model, state, data)


@every
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees(name):
    model, points = small(name).eval(), pack(cloud(200), cloud(50, 1))
    cpu = model(points)
    gpu = model.cuda()(points.to("cuda")).to("cpu")
    torch.testing.assert_close(gpu.feat, cpu.feat, rtol=1e-3, atol=1e-3)
