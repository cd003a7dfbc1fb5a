"Mamba3D: released numbers, ragged batches, odd clouds."

import pytest
import torch

from parity_cases import close, recorded
from unipre3d.backbones import Mamba3D
from unipre3d.backbones.backbone import match_released
from unipre3d.backbones.mamba3d import LocalPooling, spread_centres
from unipre3d.core import PointBatch

SMALL = dict(num_groups=16, group_size=8, encoder_widths=(16, 24, 32), width=24, depth=2)


def pack(*clouds):
    xyz = torch.cat(clouds)
    return PointBatch(
        xyz, xyz, torch.cat([torch.full((len(c),), i) for i, c in enumerate(clouds)]), len(clouds)
    )


@pytest.fixture
def released():
    model, state, data = recorded("backbone_mamba3d_eval")
    model.load_state_dict(model.convert_released(state))
    return model.eval(), data, state


def test_parity_with_the_released_model(released):
    model, data, state = released
    pos = data["in/pos"].clone().requires_grad_()
    flat = pos.flatten(0, 1)
    points = PointBatch(
        flat[:, :3], flat, torch.arange(len(pos)).repeat_interleave(pos.shape[1]), len(pos)
    )
    p, cls = model.summarise(model.stem(points))
    close(p.feat.view(2, 16, -1), data["out/pre_fusion"][:, 1:])
    close(cls, data["out/pre_fusion"][:, 0])
    close(model.body(model.stem(points)).feat.view(2, 16, -1), data["out/pre_fusion"][:, 1:])

    mixed = torch.cat([p.feat, data["out/mapped"][:, 1:].flatten(0, 1)], 1)
    weight = state["fusion_mlps.0.weight"].clone().requires_grad_()
    features = model.norm(
        torch.nn.functional.linear(mixed, weight, state["fusion_mlps.0.bias"]).relu()
    ).view(2, 16, -1)
    close(features, data["out/features"])
    (features * data["loss/R"]).sum().backward()
    close(pos.grad, data["grad/in/pos"])
    close(weight.grad, data["grad/state/fusion_mlps.0.weight"])
    recorded = match_released(
        dict(model.named_parameters()), model.released_weight, data, "grad/state/encoder."
    )
    for name, value in recorded.weights.items():
        close(model.get_parameter(name).grad, value)
    assert not recorded.misfit and len(recorded.weights) == 4


def test_the_centres_and_not_the_cls_position_come_back(released):
    model, data, _ = released
    points = pack(*data["in/pos"][..., :3])
    out = model(points)
    assert out.xyz.shape == (32, 3) and (out.xyz[:, None] == points.xyz).all(-1).any(1).all()
    close(data["out/center"], model.cls_pos.expand(2, 1, -1))  # what the released code returns


def test_points_near_the_origin_are_passed_over():
    cloud = torch.cat([torch.zeros(1, 3), torch.rand(30, 3) * 0.015, torch.eye(3), -torch.eye(3)])
    assert spread_centres(pack(cloud, cloud), 20).sort().values.tolist() == [
        0,
        *range(31, 37),
        37,
        *range(68, 74),
    ]


def test_released_statistics_are_those_of_the_batch():
    torch.manual_seed(0)
    model = Mamba3D(**SMALL, batch_statistics=True).eval()
    a, b = torch.randn(60, 3) * 0.3, torch.randn(60, 3) * 0.05
    assert (model(pack(a, b)).feat[:16] - model(pack(a)).feat).abs().max() > 1e-3
    own = Mamba3D(**SMALL).eval()
    own.load_state_dict(model.state_dict())
    torch.testing.assert_close(own(pack(a)).feat, model(pack(a)).feat, rtol=1e-5, atol=1e-6)


def test_large_features_do_not_overflow_the_pooling():
    torch.manual_seed(0)
    pool, near = LocalPooling(4, False), torch.randint(10, (10, 3))
    pool.alpha.data.fill_(1e3)
    assert pool(torch.randn(10, 4), near, torch.zeros(10, dtype=torch.long), 1).isfinite().all()


def test_errors_name_the_argument(released):
    with pytest.raises(ValueError, match="unknown argument 'trans_dims'"):
        Mamba3D.from_released({"trans_dims": 3})
    with pytest.raises(ValueError, match="bimamba_type: expected 'v4'"):
        Mamba3D.from_released({"bimamba_type": "v2"})
    with pytest.raises(ValueError, match="encoder_dims: expected trans_dim = 24"):
        Mamba3D.from_released({"trans_dim": 24, "encoder_dims": 12})
    model, _, state = released
    with pytest.raises(ValueError, match="check prefix"):
        model.convert_released(state, prefix="backbone.")
    with pytest.raises(ValueError, match="expected \\[24"):
        model.convert_released(state | {"encoder.cls_token": torch.zeros(2)})
