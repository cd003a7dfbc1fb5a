"""Point fusion: several clouds and views at once, bad depth, released numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from unipre3d.core import CameraBatch, PointBatch, ViewBatch
from unipre3d.fusion import (
    FeatureFusion,
    NoFusion,
    PointFusion,
    back_project,
    cloud_boxes,
    join_voxels,
    visible_pixels,
)
from unipre3d.geometry.cameras import intrinsics_from_fov, look_at, project, unproject
from unipre3d.geometry.sparse import merge_voxels

PARITY, VOXEL, HW = Path(__file__).parent / "parity", 0.1, (12, 16)


def cloud_and_views(seed, n=200, views=3):
    "A cloud in a box around the origin, and views from its middle whose depth ends inside the box or beyond it."
    g = torch.Generator().manual_seed(seed)
    points = PointBatch(
        torch.rand(n, 3, generator=g) * 4 - 2,
        torch.randn(n, 8, generator=g),
        torch.zeros(n, dtype=torch.long),
        1,
    )
    eye = torch.rand(views, 3, generator=g) - 0.5
    camera = CameraBatch(
        look_at(eye, torch.randn(views, 3, generator=g) * 3),
        intrinsics_from_fov(60, HW).repeat(views, 1, 1),
        HW,
        torch.zeros(views, dtype=torch.long),
    )
    ref = ViewBatch(
        camera, torch.rand(views, 3, *HW, generator=g), torch.rand(views, *HW, generator=g) * 3
    )
    return merge_voxels(points, VOXEL)[0], ref, torch.randn(views, 4, *HW, generator=g)


def together(parts):
    "Several clouds with their views and maps as one batch."
    points = PointBatch(
        torch.cat([p.xyz for p, _, _ in parts]),
        torch.cat([p.feat for p, _, _ in parts]),
        torch.cat([p.batch + i for i, (p, _, _) in enumerate(parts)]),
        len(parts),
    )
    cameras = [r.camera for _, r, _ in parts]
    camera = CameraBatch(
        torch.cat([c.world_to_cam for c in cameras]),
        torch.cat([c.K for c in cameras]),
        HW,
        torch.cat([c.batch + i for i, c in enumerate(cameras)]),
    )
    return (
        points,
        ViewBatch(
            camera,
            torch.cat([r.rgb for _, r, _ in parts]),
            torch.cat([r.depth for _, r, _ in parts]),
        ),
        torch.cat([m for _, _, m in parts]),
    )


@pytest.fixture
def fusion():
    torch.manual_seed(0)
    made = PointFusion(8, 4, voxel_size=VOXEL).eval()
    made.norm.running_mean.normal_()
    made.norm.running_var.uniform_(0.5, 2)
    return made


def test_clouds_together_equal_the_clouds_alone(fusion):
    parts = [
        cloud_and_views(0),
        cloud_and_views(1, n=40, views=2),
        cloud_and_views(2, n=1, views=1),
    ]
    points, ref, maps = together(parts)
    fused = fusion.early(points, maps, ref)
    for i, (p, r, m) in enumerate(parts):
        alone, own = fusion.early(p, m, r), fused.batch == i
        assert torch.equal(fused.xyz[own], alone.xyz)
        assert torch.allclose(fused.feat[own], alone.feat, atol=1e-5)
    assert int(fused.counts[0]) > int(points.counts[0])


def test_an_image_point_lies_in_the_box_and_carries_its_pixel():
    points, ref, maps = cloud_and_views(3)
    image = back_project(points, maps, ref)
    low, high = cloud_boxes(points)
    xyz, valid = unproject(ref.depth, ref.camera)
    kept = valid & (xyz >= low[0]).all(-1) & (xyz <= high[0]).all(-1)
    assert 0 < len(image) == int(kept.sum()) < kept.numel()
    assert torch.equal(image.feat, maps.permute(0, 2, 3, 1)[kept]) and torch.equal(
        image.xyz, xyz[kept]
    )


def test_a_coarser_map_is_read_at_the_pixel_that_covers_the_place():
    points, ref, maps = cloud_and_views(4)
    coarse = maps[:, :, ::2, ::2].contiguous()
    assert torch.equal(
        back_project(points, coarse, ref).feat,
        back_project(points, coarse.repeat_interleave(2, 2).repeat_interleave(2, 3), ref).feat,
    )


def test_a_voxel_averages_its_pixels_and_adds_them_to_its_row():
    at = lambda xyz, feat: PointBatch(
        torch.tensor(xyz), torch.tensor(feat), torch.zeros(len(xyz), dtype=torch.long), 1
    )
    points = at([[0.05, 0.05, 0.05], [0.55, 0.05, 0.05]], [[1.0], [10.0]])
    image = at(
        [[0.57, 0.05, 0.05], [0.51, 0.02, 0.01], [0.25, 0.25, 0.25], [-0.05, 0.05, 0.05]],
        [[2.0], [4.0], [5.0], [7.0]],
    )
    joined = join_voxels(points, image, 0.1)
    assert joined.feat[:, 0].tolist() == [1.0, 13.0, 5.0, 7.0]
    assert torch.equal(
        (joined.xyz / 0.1).floor(), torch.tensor([[0.0, 0, 0], [5, 0, 0], [2, 2, 2], [-1, 0, 0]])
    )


@pytest.mark.parametrize("depth", (0.0, -1.0, float("nan"), float("inf")))
def test_a_cloud_without_valid_depth_passes(fusion, depth):
    parts = [cloud_and_views(0), cloud_and_views(1)]
    parts[1] = (
        parts[1][0],
        replace(parts[1][1], depth=torch.full_like(parts[1][1].depth, depth)),
        parts[1][2],
    )
    points, ref, maps = together(parts)
    fused = fusion.early(points, maps, ref)
    assert int(fused.counts[1]) == int(points.counts[1]) and torch.equal(
        fused.xyz[fused.batch == 1], parts[1][0].xyz
    )
    assert fused.feat.isfinite().all()


def test_no_depth_and_wrong_depth_are_one_line_errors(fusion):
    points, ref, maps = cloud_and_views(0)
    with pytest.raises(ValueError, match="^back_project: expected reference views with depth"):
        fusion.early(points, maps, replace(ref, depth=None))
    with pytest.raises(ValueError, match="^ViewBatch.depth: expected shape"):
        replace(ref, depth=ref.depth[:, :5])
    with pytest.raises(ValueError, match="^back_project"):
        fusion.early(points, maps[:2], ref)


def test_an_empty_cloud_in_the_batch(fusion):
    (points, ref, maps), (other, _, _) = cloud_and_views(0), cloud_and_views(1)
    with_empty = PointBatch(other.xyz, other.feat, other.batch + 1, 2)
    fused = fusion.early(
        with_empty, maps, ref
    )  # the views show cloud 0, which has no points and so no box
    assert fused.counts.tolist() == [0, len(other)]


def test_gradients_reach_every_weight_and_the_points():
    torch.manual_seed(0)
    fusion = PointFusion(8, 4, voxel_size=VOXEL).train()
    points, ref, maps = cloud_and_views(5)
    points = points.with_feat(points.feat.requires_grad_())
    fusion.early(points, maps, ref).feat.square().sum().backward()
    for name, p in fusion.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    assert all(
        fusion.get_parameter(n).grad.abs().sum() > 0
        for n in ("image_proj.weight", "conv.weight", "norm.weight")
    )
    assert points.feat.grad.abs().sum() > 0


def test_released_numbers_where_no_voxel_is_doubled():
    released = load_file(PARITY / "pointfusion_nodup.safetensors")
    fusion = PointFusion(8, 8, voxel_size=0.02).eval()
    fusion.conv.load_state_dict(
        {k: released[f"state/fusion_mlps.0.{k}"] for k in ("weight", "bias")}
    )
    fusion.norm.load_state_dict(
        {k: released[f"state/fusion_mlps.1.{k}"] for k in fusion.norm.state_dict()}
    )
    f3, f2 = (released[k].clone().requires_grad_() for k in ("in/feat_3d", "out/sel_feat"))
    at = lambda cell, feat: PointBatch(
        (cell + 0.5) * 0.02, feat, torch.zeros(len(cell), dtype=torch.long), 1
    )
    out = fusion.mix(
        join_voxels(at(released["in/grid_coord"], f3), at(released["out/sel_grid_coord"], f2), 0.02)
    ).feat
    assert torch.allclose(out, released["out/features"], atol=1e-5)
    (out * released["loss/R"]).sum().backward()
    assert torch.allclose(f3.grad, released["grad/in/feat_3d"], atol=1e-5)
    assert torch.allclose(
        fusion.conv.weight.grad, released["grad/state/fusion_mlps.0.weight"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("mean, deviation", [(0.0, 1.0), (1e3, 1e-2), (-300.0, 0.5)])
def test_the_variance_of_a_map_does_not_cancel(mean, deviation):
    g = torch.Generator().manual_seed(0)
    maps = (torch.randn(2, 16, 24, 32, generator=g, dtype=torch.float64) * deviation + mean).float()
    fusion = FeatureFusion(8, 16)
    view = torch.tensor([0, 0, 1, 1])
    value = maps[view, :, torch.tensor([0, 5, 9, 23]), torch.tensor([0, 31, 7, 16])]
    exact = maps.double().unflatten(1, (4, 4)).flatten(2)
    middle, var = exact.mean(2)[view, :, None], exact.var(2, correction=0)[view, :, None]
    expected = (value.double().unflatten(1, (4, 4)) - middle) / (var + 1e-6).sqrt()
    found = fusion.normalise(value, view, maps)
    # a mean of 1000 is known to 3e-5, which is 3e-3 of a deviation of 0.01
    torch.testing.assert_close(found.double(), expected.flatten(1), rtol=1e-3, atol=2e-2)
    assert 0.5 < float(found.detach().std()) < 1.5


def test_scenes_and_objects_share_the_interface():
    points, ref, maps = cloud_and_views(6)
    assert NoFusion().early(points, maps, ref) is points
    late = FeatureFusion(8, 4).late(points, maps, ref)
    assert late.feat.shape == points.feat.shape and torch.equal(late.xyz, points.xyz)


def test_autocast_moves_no_point_and_picks_the_same_pixels(fusion):
    points, ref, maps = cloud_and_views(4, n=400)
    image, pairs, seen = (
        back_project(points, maps, ref),
        visible_pixels(points, ref.camera, HW),
        project(points.xyz, points.batch, ref.camera),
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = fusion.early(points, maps, ref)
        assert torch.equal(back_project(points, maps, ref).xyz, image.xyz)
        assert all(torch.equal(a, b) for a, b in zip(visible_pixels(points, ref.camera, HW), pairs))
        assert all(
            torch.equal(a, b) for a, b in zip(project(points.xyz, points.batch, ref.camera), seen)
        )
        late = FeatureFusion(8, 4).eval().late(points, maps, ref)
    assert (
        torch.equal(half.xyz, fusion.early(points, maps, ref).xyz)
        and half.feat.isfinite().all()
        and late.feat.isfinite().all()
    )
