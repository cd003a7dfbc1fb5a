"""Views by attention: the same interface as Gaussians, in the objective and in a run."""

import pytest
import torch
from torch.nn import functional as F
from untrained import save_run

from unipre3d.cli import main
from unipre3d.core import CameraBatch, PointBatch, ViewBatch
from unipre3d.geometry.cameras import intrinsics_from_fov, look_at
from unipre3d.objective import RenderObjective, render_loss
from unipre3d.photograph import PhotographHead, cell_rays, take_photographs
from unipre3d.recipes import finetune_recipes, load_run, recipes
from unipre3d.runs.recipe import change, check_recipe
from unipre3d.runs.run import build_backbone, run_recipe
from unipre3d.runs.starts import start_from
from unipre3d.tasks.pretrain import pretrain_task
from unipre3d.view import exhibit_of_run

HW = (16, 20)
EYES = torch.tensor([[0.0, -2.0, 0.3], [1.5, 1.0, 0.5], [-1.0, 1.6, 0.1]])


def cameras(batch, hw=HW):
    K = intrinsics_from_fov(50.0, HW).expand(len(batch), 3, 3)
    return CameraBatch(look_at(EYES[: len(batch)]), K, hw, torch.tensor(batch))


def clouds(*sizes):
    gen = torch.Generator().manual_seed(0)
    xyz = [0.2 * torch.randn(n, 3, generator=gen) for n in sizes]
    return PointBatch.pack(xyz, [torch.randn(n, 6, generator=gen) for n in sizes])


def small_head():
    torch.manual_seed(0)
    return PhotographHead(6, query_width=16, depth=2, edge=4)


def pictures(head, points, camera):
    with torch.no_grad():
        return take_photographs(head(points), camera).rgb


def test_each_view_shows_its_own_cloud():
    head, points = small_head(), clouds(30, 0, 50)
    both = pictures(head, points, cameras([0, 2, 2]))
    for cloud, views in ((0, [0]), (2, [1, 2])):
        own = points.batch == cloud
        alone = PointBatch.pack([points.xyz[own]], [points.feat[own]])
        camera = cameras([0, 2, 2]).select(torch.tensor(views))
        camera = camera.derive(batch=torch.zeros(len(views), dtype=torch.long))
        assert torch.allclose(both[views], pictures(head, alone, camera), atol=1e-5)
    assert not torch.allclose(both[1], both[2], atol=1e-4)  # another side of the same cloud


def test_points_may_come_in_any_order():
    head, points = small_head(), clouds(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = PointBatch.pack([points.xyz[order]], [points.feat[order]])
    images = [pictures(head, p, cameras([0, 0])) for p in (points, shuffled)]
    assert torch.allclose(*images, atol=1e-5)


def test_a_ray_is_the_same_wherever_on_it_the_camera_stands():
    world = look_at(EYES[:1])
    K = torch.tensor([[[20.0, 0, 2], [0, 20, 2], [0, 0, 1]]])  # the axis is the middle of a cell
    near, far = world.clone(), world.clone()
    far[:, 2, 3] += 3.0
    one = torch.zeros(1, dtype=torch.long)
    rays = [cell_rays(CameraBatch(pose, K, (4, 4), one), 4) for pose in (near, far)]
    assert torch.allclose(*rays, atol=1e-6)
    wider = [cell_rays(CameraBatch(pose, K, (4, 8), one), 4)[:, 1] for pose in (near, far)]
    assert not torch.allclose(*wider, atol=1e-2)


def test_an_image_with_a_cut_cell_is_part_of_the_whole_one():
    head, points = small_head(), clouds(25)
    whole = pictures(head, points, cameras([0, 0]))
    cut = pictures(head, points, cameras([0, 0], hw=(14, 17)))
    assert torch.allclose(whole[:, :, :14, :17], cut, atol=1e-6)


def test_every_parameter_has_a_gradient_and_a_bad_feature_gives_a_loss_that_is_none():
    head, points = small_head(), clouds(25)
    target = ViewBatch(
        cameras([0, 0]), torch.rand(2, 3, *HW), mask=torch.ones(2, *HW, dtype=torch.bool)
    )
    loss, _, image = render_loss(head(points), target, RenderObjective())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert (image.alpha == 1).all() and not image.depth.any()
    broken = points.with_feat(points.feat.index_fill(0, torch.tensor([3]), float("nan")))
    loss, _, _ = render_loss(head(broken), target, RenderObjective())
    assert loss.isnan()


def test_the_loss_is_the_squared_error_of_the_pixels():
    head, points = small_head(), clouds(25)
    target = ViewBatch(
        cameras([0, 0]), torch.rand(2, 3, *HW), mask=torch.ones(2, *HW, dtype=torch.bool)
    )
    values = RenderObjective(foreground_weight=1.0, background=(0.3, 0.6, 0.9))
    loss, _, _ = render_loss(head(points), target, values)
    expected = F.mse_loss(pictures(head, points, target.camera), target.rgb)
    assert torch.allclose(loss, expected, atol=1e-6)  # whatever the background


# ---------------------------------------------------------------- a run


def tiny(**values):
    mini = recipes["object-attention-mini"]
    options = mini.model.backbone_options | dict(num_groups=16, depth=1)
    small = dict(
        n_points=128, resolution=16, n_target=2, workers=0, steps=3, batch_size=2, warmup=0
    )
    small |= dict(query_width=16, query_depth=1, image="rgb")
    small |= dict(validate_every=0, save_every=0, picture_every=0)
    return change(mini, backbone_options=options, **small | values)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "attention"
    return run_recipe("object-attention-mini", tiny(), folder, say=lambda text: None)


@pytest.mark.parametrize("term", ["alpha", "depth", "normal"])
def test_terms_of_shape_are_refused_in_one_line(term):
    with pytest.raises(ValueError, match=f"terms.{term}: expected colour, ssim or lpips") as error:
        pretrain_task(tiny(terms={"colour": 1.0, term: 0.1}))
    assert "\n" not in str(error.value)


def test_rooms_are_refused_before_any_is_composed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "pretrain scene-sparseunet-mini --scene attention --device cpu --rooms 7"
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert "scene: expected gaussians or volume with --layout scannet, got attention" in said
    assert len(said.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("values", [dict(query_width=18), dict(query_pixels=6), dict(scene="odd")])
def test_sizes_that_cannot_be_are_refused(values):
    with pytest.raises(ValueError, match=f"^{[*values][0]}: expected"):
        check_recipe(tiny(**values))


def test_a_term_of_whole_images_trains():
    task = pretrain_task(tiny(terms={"colour": 1.0, "ssim": 0.1}))
    loss, scores = task.loss(task.model, task.samples.batch([(0, 0), (1, 0)]))
    assert loss.isfinite() and set(scores) == {"psnr", "colour", "ssim"}


def test_a_run_is_scored_on_whole_images_and_loads(run):
    metrics = run.record["metrics"]
    assert metrics["psnr"] > 3 and metrics["images"] == 2 * metrics["clouds"]
    assert metrics["gaussians_per_cloud"] == 0
    recipe, model, _ = load_run(run.folder)
    assert recipe == tiny() and isinstance(model.head, PhotographHead)


def test_the_backbone_starts_a_fine_tuning(run):
    options = tiny().model.backbone_options
    start = change(finetune_recipes["cls-furniture-mini"], backbone_options=options)
    backbone = build_backbone(start)
    assert start_from(backbone, run.folder).coverage == 1
    _, model, _ = load_run(run.folder)
    trained = model.backbone.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["object-attention-mini", "object-volume-mini"])
def test_a_run_without_gaussians_can_be_viewed(name, tmp_path):
    recipe = change(recipes[name], resolution=16, image="rgb", n_points=128, image_cache_mb=0)
    exhibit = exhibit_of_run(save_run(tmp_path / "run", name, recipe))
    assert exhibit.gaussians is None
    assert exhibit.rendered.shape == exhibit.photos.shape
