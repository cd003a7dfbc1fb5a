"""Rays through a lattice: the same interface as Gaussians, in the objective and in a run."""

import pytest
import torch
from torch.nn import functional as F

from unipre3d.core import CameraBatch, PointBatch, ViewBatch
from unipre3d.geometry.cameras import intrinsics_from_fov, look_at
from unipre3d.objective import RenderObjective, render_loss
from unipre3d.recipes import load_run, recipes
from unipre3d.runs.recipe import change
from unipre3d.runs.run import run_recipe
from unipre3d.tasks.pretrain import pretrain_task
from unipre3d.volume import VolumeHead, pick_pixels, render_volume

HW = (16, 20)


def cameras(batch):
    eye = torch.tensor([[0.0, -2.0, 0.3], [1.5, 1.0, 0.5], [-1.0, 1.6, 0.1]])[: len(batch)]
    K = intrinsics_from_fov(50.0, HW).expand(len(batch), 3, 3)
    return CameraBatch(look_at(eye), K, HW, torch.tensor(batch))


def clouds(*sizes):
    gen = torch.Generator().manual_seed(0)
    xyz = [0.2 * torch.randn(n, 3, generator=gen) for n in sizes]
    return PointBatch.pack(xyz, [torch.randn(n, 6, generator=gen) for n in sizes])


def small_head(**how):
    torch.manual_seed(0)
    return VolumeHead(6, corners=8, lattice_width=4, hidden=8, samples=12, finer=4, **how).eval()


def test_each_view_shows_its_own_cloud():
    head, points = small_head(), clouds(30, 50)
    both = render_volume(head(points), cameras([0, 1, 1]), torch.zeros(3))
    for cloud, views in ((0, [0]), (1, [1, 2])):
        own = points.batch == cloud
        alone = PointBatch.pack([points.xyz[own]], [points.feat[own]])
        camera = cameras([0, 1, 1]).select(torch.tensor(views))
        camera = camera.derive(batch=torch.zeros(len(views), dtype=torch.long))
        image = render_volume(head(alone), camera, torch.zeros(3))
        for name in ("rgb", "alpha", "depth"):
            found, wanted = getattr(both, name)[views], getattr(image, name)
            assert torch.allclose(found, wanted, atol=1e-5), name


def test_points_may_come_in_any_order():
    head, points = small_head(), clouds(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = PointBatch.pack([points.xyz[order]], [points.feat[order]])
    images = [render_volume(head(p), cameras([0, 0]), torch.ones(3)) for p in (points, shuffled)]
    assert torch.allclose(images[0].rgb, images[1].rgb, atol=1e-5)


def test_a_ray_that_meets_no_box_shows_the_background():
    head, points = small_head(), clouds(20)
    away = look_at(torch.tensor([[0.0, -2.0, 0.0]]), at=(0.0, -4.0, 0.0))
    camera = CameraBatch(away, cameras([0]).K, HW, torch.tensor([0]))
    colour = torch.tensor([0.2, 0.4, 0.6])
    image = render_volume(head(points), camera, colour)
    assert torch.equal(image.rgb, colour[None, :, None, None].expand(1, 3, *HW))
    assert not image.alpha.any() and not image.depth.any()


def test_loss_of_all_pixels_is_that_of_the_image():
    head, points = small_head(), clouds(25)
    camera = cameras([0, 0])
    gen = torch.Generator().manual_seed(2)
    rgb = torch.rand(2, 3, *HW, generator=gen)
    mask = rgb[:, 0] > 0.5
    views = ViewBatch(camera, rgb, depth=rgb[:, 1] + 1, mask=mask)
    values = RenderObjective(terms={"colour": 1.0, "alpha": 0.5, "depth": 0.1})
    whole, _, _ = render_loss(head(points), views, values)
    pixels = pick_pixels(views, HW[0] * HW[1])
    assert sorted(map(tuple, pixels.pixels[0].tolist())) == sorted(
        (x + 0.5, y + 0.5) for y in range(HW[0]) for x in range(HW[1])
    )
    some, _, _ = render_loss(head(points), pixels, values)
    assert torch.allclose(whole, some, atol=1e-5)


def test_every_parameter_has_a_gradient_and_a_bad_feature_gives_a_loss_that_is_none():
    head, points = small_head().train(), clouds(25)
    camera = cameras([0, 0])
    target = ViewBatch(camera, torch.rand(2, 3, *HW), mask=torch.ones(2, *HW, dtype=torch.bool))
    loss, _, _ = render_loss(head(points), pick_pixels(target, 50), RenderObjective())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    broken = points.with_feat(points.feat.index_fill(0, torch.tensor([3]), float("nan")))
    loss, _, _ = render_loss(head(broken), pick_pixels(target, 50), RenderObjective())
    assert loss.isnan()


def test_outline_of_a_ball_is_fitted():
    "Some steps with alpha alone bring the coverage to the mask of a larger ball."
    gen = torch.Generator().manual_seed(0)
    xyz = F.normalize(torch.randn(200, 3, generator=gen), dim=1)
    camera = cameras([0, 0, 0])
    true = small_head(margin=0.1)(PointBatch.pack([0.35 * xyz], [torch.zeros(200, 6)]))
    mask = render_volume(true, camera, torch.zeros(3)).alpha > 0.5
    target = ViewBatch(camera, torch.zeros(3, 3, *HW), mask=mask)
    head = small_head(margin=0.1).train()
    points = PointBatch.pack([0.2 * xyz], [torch.ones(200, 6)])
    values = RenderObjective(terms={"alpha": 1.0})
    rule = torch.optim.Adam(head.parameters(), 2e-2)
    errors = []
    for _ in range(60):
        loss, _, _ = render_loss(head(points), target, values)
        rule.zero_grad()
        loss.backward()
        rule.step()
        errors.append(float(loss.detach()))
    assert errors[-1] < 0.5 * errors[0]


def tiny(**values):
    mini = recipes["object-volume-mini"]
    options = mini.model.backbone_options | dict(num_groups=16, depth=1)
    small = dict(
        n_points=128, resolution=16, n_target=2, workers=0, steps=3, batch_size=2, warmup=0
    )
    small |= dict(corners=6, lattice_width=4, rays=12, ray_samples=6, finer_samples=2, image="rgb")
    return change(mini, backbone_options=options, classes=(), **small | values)


def test_terms_of_whole_images_are_refused_in_one_line():
    for term in ("ssim", "normal"):
        with pytest.raises(ValueError, match=f"terms.{term}: expected colour, alpha or depth"):
            pretrain_task(tiny(terms={"colour": 1.0, term: 0.1}))


def test_a_run_by_rays_is_scored_on_whole_images_and_loads(tmp_path):
    samples = pretrain_task(tiny()).samples.source
    few = change(tiny(), validate_every=0, save_every=0, picture_every=0)
    record = run_recipe("object-volume-mini", few, tmp_path / "run", say=lambda text: None).record
    assert len(samples) and record["metrics"]["psnr"] > 3
    assert record["metrics"]["gaussians_per_cloud"] == 0
    recipe, model, _ = load_run(tmp_path / "run")
    assert recipe.model.scene == "volume" and isinstance(model.head, VolumeHead)
