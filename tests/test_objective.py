"""What a render is compared by: each term trains alone, and is logged beside others."""

import csv
from dataclasses import replace

import pytest
import torch

from unipre3d.core import CameraBatch
from unipre3d.data.loading import make_loader
from unipre3d.data.scannet import write_box_rooms
from unipre3d.geometry.cameras import intrinsics_from_fov, look_at
from unipre3d.losses import ssim
from unipre3d.objective import RenderObjective, check_objective, depth_normals
from unipre3d.recipes import recipes
from unipre3d.runs.fit import fit
from unipre3d.runs.recipe import Run, change


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objective") / "rooms"
    splits = dict(a="train", b="train", c="val")
    return write_box_rooms(folder, rooms=splits, n_frames=8, hw=(24, 32), spacing=0.2)


def object_recipe(**terms):
    mini = recipes["object-transformer-mini"]
    options = mini.model.backbone_options | dict(num_groups=16, depth=1)
    small = dict(n_points=128, resolution=32, n_target=2, workers=0)
    return change(mini, terms=terms, backbone_options=options, **small)


def scene_recipe(rooms, **terms):
    mini = recipes["scene-sparseunet-mini"]
    options = mini.model.backbone_options | dict(voxel_size=0.2)
    small = dict(n_points=400, resolution=24, n_ref=2, n_target=2, workers=0)
    source = dict(source=str(rooms), initial_scale=0.15)
    return change(mini, terms=terms, backbone_options=options, **source, **small)


def one_step(recipe, folder):
    "A step without pictures and validation; the row of metrics.csv, and the parts that moved."
    torch.manual_seed(0)
    task = replace(recipe.build_task(), draw=None, validate=None)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}

    def batches(start, stop):
        return make_loader(task.samples, start, stop, batch_size=2)

    fit(task, batches, folder, optimiser=recipe.optimiser, run=Run(steps=1))
    moved = {name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])}
    with open(folder / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    return row, {name.split(".")[0] for name in moved}


@pytest.mark.parametrize("term", ["colour", "alpha", "ssim"])
def test_each_term_trains_objects_alone(term, tmp_path):
    row, moved = one_step(object_recipe(**{term: 1.0}), tmp_path)
    assert row["skipped"] == "0" and float(row["loss"]) > 0 and float(row["grad_norm"]) > 0
    assert {"backbone", "head"} <= moved
    assert not {"colour", "alpha", "depth", "ssim"} & row.keys()  # it is the loss itself


def test_depth_trains_a_scene_alone_and_objects_have_none(rooms, tmp_path):
    row, moved = one_step(scene_recipe(rooms, depth=1.0), tmp_path)
    assert row["skipped"] == "0" and float(row["loss"]) > 0 and float(row["grad_norm"]) > 0
    assert moved == {"backbone", "fusion", "head"}
    with pytest.raises(ValueError, match="depth: expected views with depth"):
        one_step(object_recipe(depth=1.0), tmp_path)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    "A few generated shapes, in a cache of their own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIPRE3D_CACHE", str(tmp_path_factory.mktemp("shapes")))
        yield dict(source="shapes", classes=("cup", "stool"), per_class=(2, 1, 0))


@pytest.mark.parametrize("term", ["depth", "normal"])
def test_geometry_trains_generated_shapes_alone(shapes, term, tmp_path):
    row, moved = one_step(change(object_recipe(**{term: 1.0}), **shapes), tmp_path)
    assert row["skipped"] == "0" and float(row["loss"]) > 0 and float(row["grad_norm"]) > 0
    assert {"backbone", "head"} <= moved


def test_depth_changes_no_picture_and_no_point(shapes):
    both, plain = (
        change(object_recipe(**terms), **shapes).build_task().samples[0]
        for terms in (dict(colour=1.0, depth=0.1), dict(colour=1.0))
    )
    assert torch.equal(both.points.xyz, plain.points.xyz)
    assert torch.equal(both.target.rgb, plain.target.rgb) and plain.target.depth is None
    hit = both.target.depth > 0
    assert hit.any() and not (hit & ~both.target.mask).any()


def test_normals_train_a_scene_alone(rooms, tmp_path):
    row, moved = one_step(scene_recipe(rooms, normal=1.0), tmp_path)
    assert row["skipped"] == "0" and float(row["loss"]) > 0
    assert moved == {"backbone", "fusion", "head"}


def test_normals_move_with_the_world():
    "Cameras and world rotated together: the same angles between normals, rotated vectors."
    depth = torch.rand(1, 6, 8, generator=torch.Generator().manual_seed(0)) * 0.05 + 2
    eye = torch.tensor([[0.3, -2.0, 0.4]])
    K, hw = intrinsics_from_fov(50.0, (6, 8))[None], (6, 8)
    camera = CameraBatch(look_at(eye), K, hw, torch.zeros(1, dtype=torch.long))
    angle = torch.tensor(0.7)
    R = torch.eye(4)
    R[:2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    turned = camera.derive(world_to_cam=camera.world_to_cam @ R.T)
    normal, known = depth_normals(depth, camera)
    moved, same = depth_normals(depth, turned)
    assert torch.equal(known, same) and known.any()
    assert torch.allclose(normal @ R[:3, :3].T, moved, atol=1e-3)


def test_terms_add_up_and_each_has_a_column(rooms, tmp_path):
    terms = dict(colour=1.0, alpha=0.5, ssim=0.25)
    row, _ = one_step(object_recipe(**terms), tmp_path)
    total = sum(weight * float(row[name]) for name, weight in terms.items())
    assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
    alone, _ = one_step(object_recipe(colour=1.0), tmp_path)
    assert float(alone["loss"]) == float(row["colour"])
    row, _ = one_step(scene_recipe(rooms, colour=1.0, depth=0.1, ssim=0.0), tmp_path)
    assert float(row["loss"]) == pytest.approx(float(row["colour"]) + 0.1 * float(row["depth"]))
    assert "ssim" not in row


@pytest.mark.parametrize(
    "values, says",
    [
        (
            dict(terms={"color": 1.0}),
            "expected some of colour, alpha, depth, ssim, normal, lpips; got 'color'",
        ),
        (dict(terms={"colour": -1.0}), "terms.colour: expected a weight of at least 0"),
        (dict(terms={"colour": float("nan")}), "terms.colour: expected a weight of at least 0"),
        (dict(terms={}), "at least one term"),
        (dict(background=(255.0, 255.0, 255.0)), "background: expected three numbers in 0..1"),
        (dict(foreground_weight=0.0, background_weight=0.0), "foreground_weight"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(values, says):
    with pytest.raises(ValueError) as error:
        check_objective(RenderObjective(**values))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("hw", [(6, 6), (11, 7), (64, 64), (30, 40)])
def test_structural_similarity_and_its_gradient_are_those_of_torchmetrics(hw):
    from torchmetrics.functional.image import structural_similarity_index_measure

    gen = torch.Generator().manual_seed(0)
    target = torch.rand(3, 3, *hw, generator=gen)
    target[1] = 0.3  # without any variance
    noise = torch.randn(target.shape, generator=gen)
    pred = (target + 0.2 * noise).requires_grad_()
    ours = ssim(pred, target)
    theirs = structural_similarity_index_measure(pred, target, data_range=1.0, reduction="none")
    assert torch.allclose(ours, theirs, atol=2e-6)
    slopes = [torch.autograd.grad(score.sum(), pred)[0] for score in (ours, theirs)]
    assert torch.allclose(*slopes, atol=2e-6)


def test_structural_similarity_refuses_what_no_window_fits():
    small = torch.rand(1, 3, 5, 20)
    with pytest.raises(ValueError, match="at least 6 x 6 pixels, got 5 x 20"):
        ssim(small, small)
    with pytest.raises(ValueError, match="ssim"):
        ssim(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9))
