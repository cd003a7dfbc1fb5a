"PointNet++: ragged batches, order, odd clouds, sizes."
import pytest
import torch

from unipre3d.backbones.pointnet2 import FeaturePropagation, PointNet2, SetAbstraction
from unipre3d.core import PointBatch

SMALL = dict(centres=(24, 8), radii=(.3, .6), neighbours=(12, 8), widths=((8, 12), (16,), (20, 24)), decoder_widths=((20,), (16,), (12, 14)))


def pack(*clouds):
    feat = torch.cat(clouds)
    return PointBatch(feat[:, :3], feat, torch.cat([torch.full((len(c),), i) for i, c in enumerate(clouds)]), len(clouds))


def test_sizes():
    model = PointNet2()
    assert (model.stem_width, model.width) == (3, 128)
    widths = [m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert widths == [64, 64, 128, 128, 128, 256, 256, 512, 1024, 256, 256, 256, 128, 128, 128, 128]
    out = model.eval()(pack(torch.rand(700, 3) - .5))
    assert out.feat.shape == (700, 128)


@pytest.mark.parametrize("columns", [3, 6])
def test_a_batch_is_its_clouds(columns):
    torch.manual_seed(0)
    model = PointNet2(in_channels=columns, **SMALL).eval()
    clouds = [torch.rand(70, columns), torch.rand(0, columns), torch.rand(41, columns), torch.rand(1, columns), torch.rand(5, columns)]
    out = model(pack(*clouds))
    assert out.counts.tolist() == [70, 0, 41, 1, 5] and out.feat.shape[1] == model.width
    for i, cloud in enumerate(clouds):
        torch.testing.assert_close(out.feat[out.batch == i], model(pack(cloud)).feat, rtol=1e-4, atol=1e-5)


def test_permuted_points_permute_the_output():
    torch.manual_seed(0)
    model, cloud = PointNet2(**SMALL | dict(neighbours=(90, 24))).eval(), torch.rand(90, 3)  # balls that never overflow
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(89)])  # sampling starts at the first point
    torch.testing.assert_close(model(pack(cloud[order])).feat, model(pack(cloud)).feat[order], rtol=1e-4, atol=1e-5)


def test_regions_are_seen_from_their_centre():
    torch.manual_seed(0)
    layer, cloud, shift = SetAbstraction(2, (8, 8)).eval(), torch.rand(60, 3), torch.tensor([3., -1, 2])
    feat, batch = torch.randn(60, 2), torch.zeros(60, dtype=torch.long)
    here, there = (layer(PointBatch(xyz, feat, batch, 1), 10, .4, 60) for xyz in (cloud, cloud + shift))
    torch.testing.assert_close(here.feat, there.feat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(here.xyz + shift, there.xyz)


def test_whole_clouds_of_different_sizes():
    torch.manual_seed(0)
    layer, clouds = SetAbstraction(3, (8, 8)).eval(), [torch.rand(9, 3), torch.rand(0, 3), torch.rand(4, 3)]
    rows = layer.summarise(pack(*clouds))
    assert not rows[1].any()
    for i in (0, 2): torch.testing.assert_close(rows[i], layer.layers(torch.cat([clouds[i]] * 2, 1)).amax(0))


def test_gradients():
    torch.manual_seed(0)
    down, up = SetAbstraction(3, (5,)).double().eval(), FeaturePropagation(8, (4,)).double().eval()
    points = pack(torch.rand(7, 3, dtype=torch.double), torch.rand(4, 3, dtype=torch.double))
    def run(feat):
        p = points.with_feat(feat)
        return up(p, down(p, 3, .6, 4)).feat
    assert torch.autograd.gradcheck(run, points.feat.clone().requires_grad_())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("clouds", [
    [torch.full((40, 3), .2), torch.rand(50, 3)],                 # all points of one cloud coincide
    [torch.rand(20, 3).repeat(3, 1), torch.zeros(0, 3)],          # every point three times, and an empty cloud
    [torch.zeros(1, 3), torch.ones(2, 3)],                        # one point, and two that coincide
], ids=["coincident", "duplicated", "tiny"])
def test_odd_clouds_have_finite_gradients(train, clouds):
    torch.manual_seed(0)
    model = PointNet2(**SMALL).train(train)
    points = pack(*clouds)
    feat = points.feat.clone().requires_grad_()
    out = model(PointBatch(feat, feat, points.batch, points.size))
    (out.feat * torch.randn_like(out.feat)).sum().backward()
    assert out.feat.isfinite().all() and feat.grad.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() < 1e6 for p in model.parameters())


def test_one_point():
    model, single = PointNet2(**SMALL), pack(torch.zeros(1, 3))
    assert model.eval()(single).feat.isfinite().all()
    with pytest.raises(ValueError, match="body: expected at least 2 rows"): model.train()(single)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_nothing_in_nothing_out(size):
    none = PointBatch(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), size)
    out = PointNet2(**SMALL)(none)
    assert len(out) == 0 and out.size == size and out.feat.shape == (0, 14)


def test_extra_columns_are_read():
    torch.manual_seed(0)
    model, xyz = PointNet2(in_channels=6, **SMALL).eval(), torch.rand(50, 3)
    grey, red = torch.full((50, 3), .5), torch.tensor([[1., 0, 0]]).expand(50, 3)
    a, b = (model(pack(torch.cat([xyz, colour], 1))).feat for colour in (grey, red))
    assert (a - b).abs().max() > 1e-4
    with pytest.raises(ValueError, match="at least 6 columns"): model(pack(xyz))


def test_mixed_precision():
    torch.manual_seed(0)
    model, points = PointNet2(**SMALL), pack(torch.rand(60, 3), torch.rand(9, 3))
    exact = model(points).feat
    with torch.autocast("cpu", dtype=torch.bfloat16): rough = model(points).feat
    rough.float().square().sum().backward()
    assert (rough - exact).abs().mean() < .25 * exact.abs().mean()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    model, points = PointNet2(**SMALL).eval(), pack(torch.rand(40, 3))
    model.save_pretrained(tmp_path / "m")
    again = PointNet2.from_pretrained(tmp_path / "m")
    assert again.config == model.config and torch.equal(again(points).feat, model(points).feat)
    with pytest.raises(FileNotFoundError, match="config.json"): PointNet2.from_pretrained(tmp_path)
    (tmp_path / "m" / "config.json").write_text('{"backbone": "PTv3"}')
    with pytest.raises(ValueError, match="PTv3"): PointNet2.from_pretrained(tmp_path / "m")


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="PointNet2.radii: expected 2 entries"): PointNet2(**SMALL | dict(radii=(.1,)))
    with pytest.raises(ValueError, match="PointNet2.widths: expected 3 entries"): PointNet2(**SMALL | dict(widths=((8,), (8,))))
    with pytest.raises(ValueError, match="in_channels: expected at least 3"): PointNet2(in_channels=2)
    with pytest.raises(ValueError, match="unknown argument 'radius'"): PointNet2.from_released({"radius": 3})
    model = PointNet2.from_released(SMALL)
    state = {f"encoder.{k}": v for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="check prefix"): model.convert_released(state, prefix="backbone.")
    with pytest.raises(ValueError, match="expected \\[8, 6\\]"): model.convert_released(state | {"encoder.down.0.layers.0.weight": torch.zeros(2)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees():
    torch.manual_seed(0)
    model, points = PointNet2(**SMALL).eval(), pack(torch.rand(200, 3), torch.rand(50, 3))
    torch.testing.assert_close(model.cuda()(points.to("cuda")).feat.cpu(), model.cpu()(points).feat, rtol=1e-3, atol=1e-4)
