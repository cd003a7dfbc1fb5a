"PointMLP: released numbers, ragged batches, odd clouds."

import pytest
import torch

from parity_cases import close, recorded
from unipre3d.backbones.pointmlp import (
    PointMLP,
    Stage,
    anchor_points,
    cloud_deviation,
)
from unipre3d.core import PointBatch
from unipre3d.geometry.pointops import interpolate, knn

SMALL = dict(
    embed_width=8,
    expansion=(2, 2),
    reduce=(2, 2),
    neighbours=(6, 4),
    pre_blocks=(1, 2),
    post_blocks=(2, 1),
    decoder_widths=(24, 16),
    decoder_blocks=(1, 2),
)


def pack(*clouds):
    feat = torch.cat(clouds)
    return PointBatch(
        feat[:, :3],
        feat,
        torch.cat([torch.full((len(c),), i) for i, c in enumerate(clouds)]),
        len(clouds),
    )


@pytest.fixture(params=["in3", "in4"])
def released(request):
    model, state, data = recorded(f"backbone_pointmlp_{request.param}_eval")
    model.load_state_dict(model.convert_released(state))
    return model.eval(), data, state


def test_parity_with_the_released_model(released):
    model, data, state = released
    pos = data["in/pos"].clone().requires_grad_()
    size, n, _ = pos.shape
    flat = pos.flatten(0, 1)
    points = PointBatch(flat[:, :3], flat, torch.arange(size).repeat_interleave(n), size)

    p = model.body(model.stem(points))
    close(p.feat.view(size, n, -1), data["out/pre_fusion"])
    torch.testing.assert_close(p.xyz.view(size, n, 3), data["out/center"][..., :3])

    mixed = torch.cat([p.feat, data["out/mapped"].flatten(0, 1)], 1)
    weight = state["fusion_mlps.0.weight"].clone().requires_grad_()
    features = model.norm(
        torch.nn.functional.linear(mixed, weight, state["fusion_mlps.0.bias"]).relu()
    ).view(size, n, -1)
    close(features, data["out/features"])

    (features * data["loss/R"]).sum().backward()
    close(pos.grad, data["grad/in/pos"])
    close(weight.grad, data["grad/state/fusion_mlps.0.weight"])
    ours = {f"encoder.{model.released_weight(k)[0]}": v for k, v in model.named_parameters()}
    recorded = [k.removeprefix("grad/state/") for k in data if k.startswith("grad/state/encoder.")]
    assert len(recorded) == 3
    for key in recorded:
        close(ours[key].grad, data[f"grad/state/{key}"].reshape(ours[key].shape))


def test_anchors_are_the_released_ones(released):
    model, data, _ = released
    size, n, _ = data["in/pos"].shape
    columns, batch = data["in/pos"].flatten(0, 1), torch.arange(size).repeat_interleave(n)
    for stage, reduce in enumerate(model.reduce):
        anchor = anchor_points(columns, batch, size, reduce, model.three_in_memory)
        start = torch.arange(size)[:, None] * (len(columns) // size)
        assert torch.equal(anchor.view(size, -1) - start, data[f"out/fps_idx_stage{stage}"])
        columns, batch = columns[anchor], batch[anchor]


def test_released_size():
    assert sum(p.numel() for p in PointMLP().parameters()) == 15_079_360
    assert (
        sum(p.numel() for p in PointMLP.from_released({}).parameters()) == 15_079_424
    )  # reads height too
    assert PointMLP().width == 128


@pytest.mark.parametrize("columns", [3, 5])
def test_a_batch_is_its_clouds(columns):
    torch.manual_seed(0)
    model = PointMLP(in_channels=columns, **SMALL).eval()
    clouds = [
        torch.rand(70, columns),
        torch.rand(0, columns),
        torch.rand(41, columns),
        torch.rand(1, columns),
        torch.rand(5, columns),
    ]
    out = model(pack(*clouds))
    assert out.counts.tolist() == [70, 0, 41, 1, 5] and out.feat.shape[1] == model.width
    for i, cloud in enumerate(clouds):
        torch.testing.assert_close(
            out.feat[out.batch == i], model(pack(cloud)).feat, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("columns", [3, 4])
def test_permuted_points_permute_the_output(columns):
    torch.manual_seed(0)
    model, cloud = PointMLP(in_channels=columns, **SMALL).eval(), torch.rand(90, columns)
    order = torch.cat(
        [torch.tensor([0]), 1 + torch.randperm(89)]
    )  # sampling starts at the first point
    torch.testing.assert_close(
        model(pack(cloud[order])).feat, model(pack(cloud)).feat[order], rtol=1e-4, atol=1e-5
    )


def test_further_columns_count_as_distance():
    torch.manual_seed(0)
    points = pack(torch.rand(30, 4), torch.rand(3, 4))
    args = (points.feat, points.batch, points.feat, points.batch, 2)
    index = knn(*args, 6)
    d2 = (
        (points.feat[:, None] - points.feat[None])
        .square()
        .sum(-1)
        .masked_fill(points.batch[:, None] != points.batch, torch.inf)
    )
    assert torch.equal(index[:30], d2[:30].argsort(1)[:, :6]) and torch.equal(
        index[30:, :3], d2[30:].argsort(1)[:, :3]
    )
    assert torch.equal(
        index[30:, 3:], index[30:, :1].expand(3, 3)
    )  # too few points: the nearest again
    known = torch.tensor([0, 4, 9, 20, 31, 32])  # two known points in the second cloud
    value = torch.randn(6, 5)
    place = points.feat, points.batch, points.feat[known], value, points.batch[known], 2
    d2 = d2[:, known]
    near = d2.argsort(1)[:, :3]
    weight = 1 / (d2.gather(1, near) + 1e-8)
    expected = (weight[..., None] * value[near]).sum(1) / weight.sum(1, keepdim=True)
    torch.testing.assert_close(interpolate(*place), expected)


def test_stage_gradients():
    torch.manual_seed(0)
    stage = Stage(3, 4, 3, 1, 1).double().eval()
    cloud, batch = torch.rand(9, 3, dtype=torch.double), torch.tensor([0] * 5 + [1] * 4)
    anchor = torch.tensor([0, 3, 5, 8])
    feature = torch.randn(9, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: stage(cloud, x, batch, 2, anchor), feature)


def test_deviation_of_a_cloud():
    torch.manual_seed(0)
    groups, batch = 5 + torch.randn(7, 4, 3), torch.tensor([0, 0, 0, 2, 2, 2, 2])
    groups[3:] *= 20
    out = cloud_deviation(groups, batch, 3)
    torch.testing.assert_close(out[[0, 2]], torch.stack([groups[:3].std(), groups[3:].std()]))
    assert out[1] == 1e-12


def test_errors_name_the_argument(released):
    with pytest.raises(ValueError, match="PointMLP.neighbours: expected 2 values"):
        PointMLP(**SMALL | dict(neighbours=(6, 6, 6)))
    with pytest.raises(ValueError, match="in_channels: expected at least 3"):
        PointMLP(in_channels=2)
    with pytest.raises(ValueError, match="at least 4 columns"):
        PointMLP(in_channels=4, **SMALL)(pack(torch.rand(9, 3)))
    with pytest.raises(ValueError, match="unknown argument 'embed'"):
        PointMLP.from_released({"embed": 3})
    with pytest.raises(ValueError, match="normalize: expected 'anchor'"):
        PointMLP.from_released({"normalize": "center"})
    model, _, state = released
    with pytest.raises(ValueError, match="check prefix"):
        model.convert_released(state, prefix="backbone.")
    with pytest.raises(ValueError, match="expected \\[8"):
        model.convert_released(state | {"encoder.embedding.net.0.weight": torch.zeros(2)})
