"Standard Transformer: released numbers, ragged batches, odd clouds."

import pytest
import torch

from parity_cases import close, recorded
from unipre3d.backbones import StandardTransformer
from unipre3d.backbones import layers
from unipre3d.backbones.layers import GroupEncoder, GroupMax, LinearMax, drop_path, linear_max
from unipre3d.backbones.transformer import group_points
from unipre3d.core import PointBatch

SMALL = dict(
    num_groups=16,
    group_size=8,
    radius=0.3,
    encoder_widths=(16, 24, 32),
    encoder_dims=24,
    width=24,
    depth=3,
    num_heads=3,
)


def pack(*clouds):
    xyz = torch.cat(clouds)
    return PointBatch(
        xyz, xyz, torch.cat([torch.full((len(c),), i) for i, c in enumerate(clouds)]), len(clouds)
    )


@pytest.fixture
def released():
    model, state, data = recorded("backbone_transformer_eval")
    model.load_state_dict(model.convert_released(state))
    return model.eval(), data, state


def test_parity_with_the_released_model(released):
    model, data, state = released
    pos = data["in/pos"].clone().requires_grad_()
    flat = pos.flatten(0, 1)
    points = PointBatch(
        flat, flat, torch.arange(len(pos)).repeat_interleave(pos.shape[1]), len(pos)
    )

    _, centre, near = group_points(points, model.num_groups, model.group_size, model.radius)
    base = torch.arange(len(pos)) * pos.shape[1]
    assert torch.equal(centre.view(2, -1) - base[:, None], data["out/fps_idx"])
    assert torch.equal(near.view(2, 16, -1) - base[:, None, None], data["out/ball_idx"])

    tokens = model.stem(points)
    torch.testing.assert_close(tokens.xyz.view(2, 16, 3), data["out/center"])
    p, cls = model.summarise(tokens)
    close(p.feat.view(2, 16, -1), data["out/pre_fusion"][:, 1:])
    close(cls, data["out/pre_fusion"][:, 0])

    mixed = torch.cat([p.feat, data["out/mapped"][:, 1:].flatten(0, 1)], 1)
    weight = state["fusion_mlps.0.weight"].clone().requires_grad_()
    fused = torch.nn.functional.linear(mixed, weight, state["fusion_mlps.0.bias"]).relu()
    features = model.norm(fused).view(2, 16, -1)
    close(features, data["out/features"])

    (features * data["loss/R"]).sum().backward()
    close(pos.grad, data["grad/in/pos"])
    close(weight.grad, data["grad/state/fusion_mlps.0.weight"])
    ours = dict(model.named_parameters())
    for name in ("cls_token", "blocks.0.qkv.weight", "encoder.first.0.weight"):
        recorded = data[f"grad/state/encoder.{model.released_weight(name)[0]}"]
        close(ours[name].grad, recorded.reshape(ours[name].shape))


def test_nearest_groups():
    points = pack(torch.rand(50, 3))
    groups, centre, near = group_points(points, 8, 5, None)
    assert groups.shape == (8, 5, 3) and torch.equal(near[:, 0], centre)


def test_group_encoder_gradients():
    torch.manual_seed(0)
    encoder = GroupEncoder(3, 4, (5, 6, 7)).double()
    assert torch.autograd.gradcheck(
        encoder, torch.randn(3, 4, 3, dtype=torch.double, requires_grad=True)
    )


def test_group_maximum():
    torch.manual_seed(0)
    x = torch.randint(4, (6, 5, 3)).float()
    a, b, g = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.randn(6, 3)
    GroupMax.apply(a).backward(g), b.amax(1).backward(g)
    torch.testing.assert_close(a.grad, b.grad)
    assert torch.autograd.gradcheck(
        GroupMax.apply, torch.rand(4, 5, 3, dtype=torch.double, requires_grad=True)
    )


def test_linear_maximum():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 4).double()
    x = torch.randn(11, 5, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(LinearMax.apply, (x, layer.weight))
    torch.testing.assert_close(linear_max(x, layer), layer(x).amax(1))
    assert linear_max(x[:0], layer).shape == (0, 4)


def test_linear_maximum_without_a_bias():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 4, bias=False)
    x = torch.randn(11, 5, 3, requires_grad=True)
    wanted, inputs = layer(x).amax(1), [x, layer.weight]
    found, g = linear_max(x, layer), torch.randn(11, 4)
    torch.testing.assert_close(found, wanted)
    pair = [torch.autograd.grad(top, inputs, g) for top in (found, wanted)]
    torch.testing.assert_close(*pair)


def test_maximum_of_nothing():
    layer = torch.nn.Linear(3, 4)
    for shape in ((5, 0, 3), (0, 0, 3)):
        with pytest.raises(ValueError, match="at least one row") as error:
            linear_max(torch.zeros(shape), layer)
        assert "\n" not in str(error.value)
    encoder = GroupEncoder(3, 4, (5, 6, 7)).eval()
    assert encoder(torch.zeros(0, 5, 3)).shape == (0, 4)
    x = torch.randn(5, 2, 3, requires_grad=True)
    top = LinearMax.apply(x, torch.zeros(0, 3))
    assert top.shape == (5, 0)
    assert not torch.autograd.grad(top.sum(), x)[0].any()


def test_linear_maximum_in_pieces(monkeypatch):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(3, 4), torch.randn(11, 5, 3)
    whole = linear_max(x, layer)
    monkeypatch.setattr(layers, "NEAR", 45)  # two groups at once
    torch.testing.assert_close(linear_max(x, layer), whole)


def test_equal_rows_give_the_weights_one_gradient():
    torch.manual_seed(0)
    encoder = GroupEncoder(3, 4, (5, 6, 7)).double().eval()  # in training statistics count rows
    x = torch.randn(6, 4, 3, dtype=torch.double)
    padded, g = torch.cat([x, x[:, :1], x[:, :1]], 1), torch.randn(6, 4, dtype=torch.double)
    weights = list(encoder.parameters())
    found = [torch.autograd.grad(encoder(groups), weights, g) for groups in (x, padded)]
    torch.testing.assert_close(*found)


def test_what_is_no_number_stays_so():
    layer, x = torch.nn.Linear(3, 4), torch.randn(3, 5, 3)
    x[1, 2, 0] = float("nan")
    x.requires_grad_()
    top = linear_max(x, layer)
    assert top[1].isnan().all() and top[[0, 2]].isfinite().all()
    grad = torch.autograd.grad(GroupMax.apply(x), x, torch.ones(3, 3))[0]
    assert grad[1, :, 0].isnan().all() and grad[0].isfinite().all()


def test_stochastic_depth_keeps_the_mean():
    torch.manual_seed(0)
    x = drop_path(torch.ones(20_000, 1, 1), 0.3, True)
    assert abs(x.mean() - 1) < 0.02 and x.unique().numel() == 2 and x.min() == 0


def test_errors_name_the_argument(released):
    with pytest.raises(ValueError, match="num_heads: expected a divisor of width = 24"):
        StandardTransformer(**SMALL | dict(num_heads=5))
    with pytest.raises(ValueError, match="unknown argument 'trans_dims'"):
        StandardTransformer.from_released({"trans_dims": 3})
    model, _, state = released
    with pytest.raises(ValueError, match="check prefix"):
        model.convert_released(state, prefix="backbone.")
    with pytest.raises(ValueError, match="expected \\[24"):
        model.convert_released(state | {"encoder.cls_token": torch.zeros(2)})
