"""How often the processor waits for the device: checks of a batch index stand at the door and nowhere else."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

from unipre3d.core import (
    CameraBatch,
    GaussianBatch,
    PointBatch,
    Sample,
    ViewBatch,
    cat_points,
    collate,
    to_device,
)
from unipre3d.geometry import pointops, sparse
from unipre3d.geometry.cameras import intrinsics_from_fov, look_at
from unipre3d.geometry.sparse import merge_voxels
from unipre3d.objective import render_loss
from unipre3d.recipes import find_recipe
from unipre3d.runs.fit import Task, forward, new_accelerator, take_step
from unipre3d.runs.recipe import change

WAITS = ("item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "tolist")
HW = (12, 16)


@contextmanager
def counted():
    "Within it, every call that reads a tensor's values is added to a list by its name."
    calls = []

    def watch(name, method):
        def call(self, *args, **options):
            calls.append(name)
            return method(self, *args, **options)

        return call

    with ExitStack() as stack:
        for name in WAITS:
            method = watch(name, getattr(torch.Tensor, name))
            stack.enter_context(mock.patch.object(torch.Tensor, name, method))
        yield calls


@pytest.fixture(scope="module")
def room():
    "Two clouds, with two views of each from its middle."
    g = torch.Generator().manual_seed(0)
    clouds = [torch.rand(n, 3, generator=g) * 4 - 2 for n in (300, 200)]
    points = PointBatch.pack(clouds, [torch.rand(len(xyz), 6, generator=g) for xyz in clouds])
    pose = look_at(torch.rand(4, 3, generator=g) - 0.5, torch.randn(4, 3, generator=g) * 3)
    K = intrinsics_from_fov(60, HW).repeat(4, 1, 1)
    camera = CameraBatch(pose, K, HW, torch.tensor([0, 0, 1, 1]))
    rgb, depth = torch.rand(4, 3, *HW, generator=g), torch.rand(4, *HW, generator=g) * 3
    views = ViewBatch(camera, rgb, depth)
    return Sample(points, views, views)


def gaussians_of(points):
    n = len(points)
    return dict(
        mean=points.xyz,
        scale=torch.ones(n, 3),
        quat=torch.ones(n, 4),
        opacity=torch.ones(n),
        sh=torch.zeros(n, 4, 3),
        batch=points.batch,
        size=points.size,
    )


def test_what_is_derived_is_not_checked_again(room):
    points, views = room.points, room.ref
    even = torch.arange(len(views)) % 2 == 0
    with counted() as calls:
        points.with_feat(points.xyz)
        points.derive(feat=points.xyz)
        cat_points(points, points)
        views.select(even)
        to_device(room, "cpu")
        room.to("cpu")
        GaussianBatch.trusted(**gaussians_of(points)).to("cpu")
        PointBatch.pack([points.xyz], [points.feat])
    assert calls == []


def test_the_constructor_checks_and_waits_once(room):
    points, camera = room.points, room.ref.camera
    falling = torch.tensor([1, 0, 0, 0])
    with counted() as calls:
        PointBatch(points.xyz, points.feat, points.batch, points.size)
    assert calls == ["tolist"]
    with counted() as calls:
        GaussianBatch(**gaussians_of(points))
    assert calls == ["tolist"]
    for wrong in (
        lambda: PointBatch(points.xyz, points.feat, points.batch.flip(0), points.size),
        lambda: replace(points, size=1),
        lambda: GaussianBatch(**gaussians_of(points) | dict(batch=points.batch - 1)),
        lambda: CameraBatch(camera.world_to_cam, camera.K, HW, falling),
        lambda: camera.select(torch.tensor([3, 0])),
        lambda: room.ref.select(torch.tensor([3, 0])),
    ):
        with pytest.raises(ValueError, match=r"\.batch: expected"):
            wrong()


def test_shapes_of_what_is_derived_are_checked(room):
    points = room.points
    for wrong in (
        lambda: points.with_feat(points.feat[1:]),
        lambda: points.derive(batch=points.batch[1:]),
        lambda: PointBatch.trusted(xyz=points.feat, feat=points.feat, batch=points.batch, size=2),
        lambda: room.ref.derive(depth=room.ref.depth[:, 1:]),
        lambda: GaussianBatch.trusted(**gaussians_of(points) | dict(sh=torch.zeros(500, 5, 3))),
    ):
        with pytest.raises(ValueError, match="expected"):
            wrong()


def test_packing_equals_the_constructor(room):
    clouds = [torch.rand(n, 3) for n in (0, 4, 0, 3, 0)]
    feats = [torch.rand(len(xyz), 2, dtype=torch.float64) for xyz in clouds]
    for given in (
        (clouds, feats),
        ([xyz.numpy() for xyz in clouds], [feat.numpy() for feat in feats]),
        (clouds, [feat.numpy() for feat in feats]),
    ):
        points = PointBatch.pack(*given)
        checked = replace(points)
        assert checked.counts.tolist() == [0, 4, 0, 3, 0]
        assert points.feat.dtype == torch.float64
        assert torch.equal(points.xyz, torch.cat(clouds))
        assert torch.equal(points.feat, torch.cat(feats))
    frozen = clouds[1].numpy()
    frozen.flags.writeable = False
    assert (
        PointBatch.pack([frozen], [frozen]).size == 1
    )  # a copy: nothing is written to the caller's
    for wrong in (([], []), (clouds, feats[:2]), (clouds, feats[::-1])):
        with pytest.raises(ValueError, match="^PointBatch.pack: expected"):
            PointBatch.pack(*wrong)


def test_collate_equals_the_parts(room):
    both = collate([room, room])
    assert torch.equal(both.points.batch, replace(both.points).batch)
    assert both.points.counts.tolist() == [300, 200, 300, 200]
    assert both.ref.camera.batch.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_one_forward_pass_of_a_scene_waits_seldom(room):
    recipe = change(find_recipe("scene-sparseunet-mini"), features=("color_signed", "normal"))
    model = recipe.build_predictor(8)
    maps = torch.randn(len(room.ref), 8, *HW)
    with counted() as calls:
        sample = room.to("cpu")
        model(sample.points, maps, sample.ref)
    assert len(calls) <= 50  # 101 when every layer checked the index; what is left builds rulebooks
    with counted() as calls:
        merge_voxels(room.points, 0.07)
    assert len(calls) == 1


@pytest.fixture
def as_a_gpu(monkeypatch):
    "What a GPU runs in the place of compiled functions, on this processor."
    monkeypatch.setattr(pointops, "_compiled", lambda *places: False)
    monkeypatch.setattr(sparse, "_cut_compiled", sparse._cut)
    monkeypatch.setattr(sparse, "CompiledConv", sparse._SparseConv)

    def table(number, shape, kernel):
        return sparse._table_in_torch(number, shape, kernel)

    monkeypatch.setattr(sparse, "neighbour_table", table)


@pytest.mark.parametrize(
    "name",
    [
        "object-transformer-mini",
        "object-pointnet2-mini",
        "scene-sparseunet-mini",
        "scene-ptv3-mini",
    ],
)
def test_a_training_step_waits_at_most_twenty_times(room, as_a_gpu, name):
    "Forward, backward, clipping, the optimiser and the row of the curve; SGD, whose state is on the device alone."
    scene = name.startswith("scene")
    recipe = find_recipe(name)
    recipe = change(recipe, features=("color_signed", "normal") if scene else ("xyz",))
    torch.manual_seed(0)
    model = recipe.build_predictor(8).train()
    maps = torch.randn(len(room.ref), 8, *HW)
    sample = room if scene else replace(room, points=room.points.derive(xyz=room.points.xyz / 4))

    def loss(model, batch):
        gaussians = model(batch.points, maps, batch.ref)
        total, _, image = render_loss(gaussians, batch.target, recipe.objective)
        return total, {"psnr": image.rgb.mean()}

    accelerator = new_accelerator(device="cpu")
    task = Task("steps", model, None, loss, None, {})
    model, descent = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    with counted() as calls:
        total, means = forward(task, model, sample, accelerator)
        norm, skipped = take_step(total, model, descent, accelerator, 1.0)
        accelerator.reduce(torch.stack(list(means.values())), "mean").tolist()
    assert not skipped and norm > 0
    assert len(calls) <= 20, calls
