"""One step of training on rooms, with every fusion; odd clouds and depth; cameras for a film of a room."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from unipre3d.backbones.sparseunet import SparseUNet
from unipre3d.core import collate
from unipre3d.data.augment import Augment
from unipre3d.data.loading import make_loader
from unipre3d.data.samples import ViewSamples, walk
from unipre3d.data.scannet import (
    ScanNetFrames,
    box_cameras,
    standard_intrinsics,
    write_box_rooms,
    write_cloud,
)
from unipre3d.fusion import FeatureFusion, NoFusion, PointFusion
from unipre3d.gaussians import GaussianHead
from unipre3d.geometry.cameras import project
from unipre3d.objective import RenderObjective, render_loss
from unipre3d.tasks.pretrain import UniPre3D, predict

HW = (12, 16)
EVEN = RenderObjective(background=(1.0, 1.0, 1.0), foreground_weight=1.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_box_rooms(
        tmp_path_factory.mktemp("steps") / "rooms",
        rooms=dict(a="train", b="train"),
        n_frames=8,
        hw=(24, 32),
        spacing=0.2,
    )


def samples(root, **options):
    return ViewSamples(
        ScanNetFrames(root, split="train", hw=HW),
        **dict(
            n_points=400,
            n_ref=2,
            n_target=2,
            max_gap=5,
            features=("normal", "color_signed"),
            center=True,
        )
        | options,
    )


def model(fusion):
    torch.manual_seed(0)
    backbone = SparseUNet(
        in_channels=6, base_channels=8, channels=(8, 16, 16, 8), layers=(1, 1, 1, 1), voxel_size=0.2
    )
    fusions = dict(
        none=NoFusion,
        feature=lambda: FeatureFusion(backbone.width, 8),
        point=lambda: PointFusion(8, 8, 0.2),
    )
    return UniPre3D(
        backbone, fusions[fusion](), GaussianHead(backbone.width, max_offset=0.2, initial_scale=0.1)
    )


def step(sample, net, fusion):
    torch.manual_seed(1)
    image_net = (
        None if fusion == "none" else torch.nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
    )
    gaussians = predict(sample.points, sample.ref, image_net, net)
    loss, _, image = render_loss(gaussians, sample.target, EVEN)
    loss.backward()
    return gaussians, loss, image.rgb


def finite(net, loss):
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert loss.isfinite() and all(g.isfinite().all() for g in grads.values())
    return {name for name, g in grads.items() if g.abs().max() > 0}


@pytest.mark.parametrize("fusion", ["none", "feature", "point"])
def test_a_step_reaches_every_part(root, fusion):
    sample, net = (
        samples(root, augment=Augment("up", (0.9, 1.1), mirror=True, color=0.1)).batch(
            [(0, 0), (1, 3)]
        ),
        model(fusion),
    )
    gaussians, loss, rendered = step(sample, net, fusion)
    assert rendered.shape == (4, 3, *HW) and gaussians.size == 2
    reached = finite(net, loss)
    parts = ["backbone.conv_input", "backbone.enc", "backbone.dec", "head.mlp"]
    if fusion != "none":
        parts += ["fusion.image_norm", "fusion.image_proj"]
    if fusion == "point":
        parts += ["fusion.conv", "fusion.norm"]
    assert not [p for p in parts if not any(name.startswith(p) for name in reached)]
    stem = len(net.backbone.stem(sample.points))
    assert (len(gaussians) > stem) if fusion == "point" else (len(gaussians) == stem)


@pytest.mark.parametrize("fusion", ["feature", "point"])
def test_a_room_without_depth_still_trains(root, fusion):
    sample, net = samples(root).batch([(0, 0), (1, 0)]), model(fusion)
    depth = sample.ref.depth.clone()
    depth[sample.ref.camera.batch == 0] = 0  # one room of two, then both
    for d in (depth, torch.zeros_like(depth)):
        net.zero_grad()
        gaussians, loss, _ = step(replace(sample, ref=replace(sample.ref, depth=d)), net, fusion)
        assert "head.mlp.0.weight" in finite(net, loss) and (gaussians.counts > 0).all()
    assert len(gaussians) == len(net.backbone.stem(sample.points))  # nothing was added


@pytest.mark.parametrize("fusion", ["none", "point"])
def test_a_cloud_of_one_point_trains_beside_a_room(root, tmp_path, fusion):
    import shutil

    shutil.copytree(root, tmp_path / "rooms")
    write_cloud(
        tmp_path / "rooms",
        "train",
        "a",
        coord=np.array([[2.0, 2, 1]]),
        color=np.full((1, 3), 9),
        normal=np.array([[0, 0, 1.0]]),
        segment20=np.zeros(1),
        instance=np.zeros(1),
    )
    data = samples(tmp_path / "rooms", features=("normal", "color_signed"), augment=Augment("up"))
    alone = data[0]
    assert alone.points.xyz.tolist() == [[0, 0, 0]] and alone.points.feat.shape == (1, 6)
    net = model(fusion)
    _, loss, _ = step(data.batch([(0, 0), (1, 0)]), net, fusion)
    assert "head.mlp.0.weight" in finite(net, loss)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_the_loader_train(root, workers):
    data, net = samples(root, n_points=200), model("point")
    seen = list(make_loader(data, 0, 2, batch_size=2, num_workers=workers))
    again = [
        data.batch(keys) for keys in make_loader(data, 0, 2, batch_size=2).batches.batch_sampler
    ]
    for a, b in zip(seen, again):
        assert torch.equal(a.points.xyz, b.points.xyz) and torch.equal(a.target.rgb, b.target.rgb)
    assert "head.mlp.0.weight" in finite(net, step(seen[1], net, "point")[1])


def test_batch_of_one_is_the_sample(root):
    data = samples(root)
    a, b = data.batch([(1, 2)]), collate([data[1, 2]])
    assert (
        torch.equal(a.points.feat, b.points.feat)
        and torch.equal(a.ref.depth, b.ref.depth)
        and a.label is b.label is None
    )


# ---- a film of a room


def test_a_tour_passes_the_filmed_poses(root):
    data = samples(root, n_points=None)
    n = len(data.source.frames(0))
    film, center = (
        data.tour(0, 3 * (n - 1) + 1, 24),
        data.source.array(0, "coord").mean(0, dtype=np.float64),
    )
    assert film.hw == (24, 32)
    torch.testing.assert_close(
        film.center[::3],
        torch.from_numpy(box_cameras(n)[:, :3, 3] - center).float(),
        atol=1e-4,
        rtol=0,
    )
    torch.testing.assert_close(
        film.cam_to_world[::3, :3, :3],
        torch.from_numpy(box_cameras(n)[:, :3, :3]).float(),
        atol=1e-4,
        rtol=0,
    )
    torch.testing.assert_close(
        film.K[0], torch.from_numpy(standard_intrinsics((24, 32))).float(), atol=1e-4, rtol=0
    )
    R = film.world_to_cam[:, :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand_as(R), atol=1e-5, rtol=0)
    assert (torch.linalg.det(R) > 0).all()
    points = data[0].points
    _, _, inside = project(points.xyz, points.batch, film)
    assert (inside.float().mean(1) > 0.02).all()  # the cloud is in every picture
    assert (film.center.diff(dim=0).norm(dim=1) < 1.6).all()


@pytest.mark.parametrize("frames, poses", [(1, 8), (5, 1), (3, 2), (20, 8)])
def test_a_walk_of_any_length(frames, poses):
    film = walk(frames, HW, np.linalg.inv(box_cameras(poses)), standard_intrinsics(HW))
    assert len(film) == frames and film.world_to_cam.isfinite().all()
    torch.testing.assert_close(
        film.center[0], torch.from_numpy(box_cameras(poses)[0, :3, 3]).float()
    )
    if frames > 1:
        torch.testing.assert_close(
            film.center[-1], torch.from_numpy(box_cameras(poses)[-1, :3, 3]).float()
        )


def test_a_room_without_usable_frames_is_left_out_and_said(root, tmp_path):
    import shutil

    shutil.copytree(root, tmp_path / "rooms")
    for k, p in enumerate(sorted((tmp_path / "rooms" / "2D" / "depth" / "a").iterdir())):
        if k:
            Image.fromarray(np.zeros((24, 32), np.uint16)).save(p)
    with pytest.warns(UserWarning) as said:
        data = samples(tmp_path / "rooms")
    assert any("left out 1 of 2 clouds" in str(w.message) for w in said) and len(data) == 1
    assert data.source.skipped == {"depth is empty": 7}
