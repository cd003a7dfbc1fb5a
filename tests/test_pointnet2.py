"PointNet++: ragged batches, order, odd clouds, sizes."

import pytest
import torch

from unipre3d.backbones.pointnet2 import FeaturePropagation, PointNet2, SetAbstraction
from unipre3d.core import PointBatch

SMALL = dict(
    centres=(24, 8),
    radii=(0.3, 0.6),
    neighbours=(12, 8),
    widths=((8, 12), (16,), (20, 24)),
    decoder_widths=((20,), (16,), (12, 14)),
)


def pack(*clouds):
    feat = torch.cat(clouds)
    return PointBatch(
        feat[:, :3],
        feat,
        torch.cat([torch.full((len(c),), i) for i, c in enumerate(clouds)]),
        len(clouds),
    )


def test_sizes():
    model = PointNet2()
    assert (model.stem_width, model.width) == (3, 128)
    widths = [m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert widths == [64, 64, 128, 128, 128, 256, 256, 512, 1024, 256, 256, 256, 128, 128, 128, 128]
    out = model.eval()(pack(torch.rand(700, 3) - 0.5))
    assert out.feat.shape == (700, 128)


def test_regions_are_seen_from_their_centre():
    torch.manual_seed(0)
    layer, cloud, shift = (
        SetAbstraction(2, (8, 8)).eval(),
        torch.rand(60, 3),
        torch.tensor([3.0, -1, 2]),
    )
    feat, batch = torch.randn(60, 2), torch.zeros(60, dtype=torch.long)
    here, there = (
        layer(PointBatch(xyz, feat, batch, 1), 10, 0.4, 60) for xyz in (cloud, cloud + shift)
    )
    torch.testing.assert_close(here.feat, there.feat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(here.xyz + shift, there.xyz)


def test_whole_clouds_of_different_sizes():
    torch.manual_seed(0)
    layer, clouds = (
        SetAbstraction(3, (8, 8)).eval(),
        [torch.rand(9, 3), torch.rand(0, 3), torch.rand(4, 3)],
    )
    rows = layer.summarise(pack(*clouds))
    assert not rows[1].any()
    for i in (0, 2):
        torch.testing.assert_close(rows[i], layer.layers(torch.cat([clouds[i]] * 2, 1)).amax(0))


def test_gradients():
    torch.manual_seed(0)
    down, up = SetAbstraction(3, (5,)).double().eval(), FeaturePropagation(8, (4,)).double().eval()
    points = pack(torch.rand(7, 3, dtype=torch.double), torch.rand(4, 3, dtype=torch.double))

    def run(feat):
        p = points.with_feat(feat)
        return up(p, down(p, 3, 0.6, 4)).feat

    assert torch.autograd.gradcheck(run, points.feat.clone().requires_grad_())


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="PointNet2.radii: expected 2 values"):
        PointNet2(**SMALL | dict(radii=(0.1,)))
    with pytest.raises(ValueError, match="PointNet2.widths: expected 3 values"):
        PointNet2(**SMALL | dict(widths=((8,), (8,))))
    with pytest.raises(ValueError, match="in_channels: expected at least 3"):
        PointNet2(in_channels=2)
    with pytest.raises(ValueError, match="unknown argument 'radius'"):
        PointNet2.from_released({"radius": 3})
    model = PointNet2.from_released(SMALL)
    state = {f"encoder.{k}": v for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="check prefix"):
        model.convert_released(state, prefix="backbone.")
    with pytest.raises(ValueError, match="expected \\[8, 6\\]"):
        model.convert_released(state | {"encoder.down.0.layers.0.weight": torch.zeros(2)})
