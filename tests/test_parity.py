"""Our cameras, fusion, head and loss against what the released modules compute (tests/parity/README.md)."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unipre3d.core import CameraBatch, PointBatch
from unipre3d.fusion import gather_visible
from unipre3d.gaussians import GaussianHead
from unipre3d.geometry.cameras import intrinsics_from_fov, unproject
from unipre3d.losses import psnr, weighted_mse

PARITY = Path(__file__).parent / "parity"


def parity(name):
    return load_file(PARITY / f"{name}.safetensors")


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def released_cloud(data):
    "Points and cameras of a released fusion case; released pixels are rounded, ours are floored, hence half a pixel."
    x, centre, maps = data["in/x"], data["in/center"], data["in/image_features"]
    B, N = centre.shape[:2]
    K = data["in/intrinsic_3x4"][:, :3].clone()
    K[:2, 2] += 0.5
    pose = torch.linalg.inv(data["in/c2w_transposed"].reshape(B, 4, 4).mT)
    batch = torch.arange(B).repeat_interleave(N)
    rows = x[:, x.shape[1] - N :].flatten(0, 1)  # without the CLS row
    cameras = CameraBatch(pose, K.repeat(B, 1, 1), tuple(maps.shape[2:]), torch.arange(B))
    return PointBatch(centre[..., :3].flatten(0, 1), rows, batch, B), cameras, maps


@pytest.mark.parametrize(
    "name", ["fusion_square_cls", "fusion_square_nocls_dim4", "fusion_square_nocls_mlp"]
)
def test_fusion_on_the_transposed_map_equals_the_released_one(name):
    data = parity(name)
    points, cameras, maps = released_cloud(data)
    maps = maps.clone().requires_grad_()
    feat, seen = gather_visible(points, maps.mT, cameras)
    B, N = data["in/center"].shape[:2]
    if not name.endswith("mlp"):
        assert torch.equal(
            seen.reshape(B, N), data["out/received_feature"].bool()
        )  # not recorded there
    fused = torch.cat([points.feat, feat], 1)
    if name.endswith("mlp"):
        fused = torch.relu(fused @ data["state/0.weight"].T + data["state/0.bias"])
    expected = data["out/fused"][:, -N:].flatten(0, 1)
    close(fused, expected)
    (fused * data["loss/R"][:, -N:].flatten(0, 1)).sum().backward()
    close(maps.grad, data["grad/in/image_features"])


@pytest.mark.parametrize("name", ["head_object", "head_scene"])
def test_head_activations(name):
    data = parity(name)
    if name == "head_object":
        raw, centre = data["in/raw_B_D_N"].mT, data["in/center"][..., :3]
        B, N = centre.shape[:2]
        batch, offset = torch.arange(B).repeat_interleave(N), 1.0
        expected = {
            k: data[f"out/{k}"].flatten(0, 1)
            for k in ("xyz", "opacity", "scaling", "features_dc", "features_rest")
        }
    else:
        batch, offset = data["in/indices_bxyz"][:, 0], 0.2
        raw, centre, B = data["in/raw_N_23"], data["in/coord"], int(batch.max()) + 1
        expected = {
            k: torch.cat([data[f"out/{k}_batch{b}"] for b in range(B)])
            for k in ("xyz", "opacity", "scaling", "rotation", "features_dc", "features_rest")
        }
    raw, centre = raw.reshape(-1, 23).contiguous(), centre.reshape(-1, 3)
    head = GaussianHead(8, max_offset=offset, min_scale=math.exp(-1))
    g = head.activate(raw, PointBatch(centre, centre, batch, B))
    close(g.mean, expected["xyz"])
    close(g.opacity[:, None], expected["opacity"])
    close(g.scale, expected["scaling"])
    close(g.sh[:, :1], expected["features_dc"])
    close(g.sh[:, 1:], expected["features_rest"])
    if "rotation" in expected:
        close(g.quat, expected["rotation"])
    else:  # the released object head normalises over the points
        unit = raw[:, 7:11].norm(dim=1) > 1e-6
        assert (g.quat.norm(dim=1) - 1)[unit].abs().max() < 1e-5 and (
            data["out/rotation"].flatten(0, 1) - g.quat
        )[unit].abs().max() > 0.01


def test_loss_and_psnr():
    data = parity("loss_black_bg")
    pred, gt = data["in/pred"].clone().requires_grad_(), data["in/gt"]
    mask = ~data["out/is_bg"].bool()
    loss = weighted_mse(pred, gt, mask)
    close(loss, data["out/focal_l2_4_1"])
    close(weighted_mse(pred, gt, mask, 1, 1), data["out/focal_l2_1_1"])
    close(weighted_mse(pred, gt, None), data["out/l2"])
    loss.backward()
    close(pred.grad, data["grad/in/pred(focal_l2_4_1)"])
    close(psnr(pred.detach(), gt), data["out/psnr_per_image"], 1e-4)


def test_scene_pixels_go_back_to_the_released_points():
    data = parity("cameras_scannet")
    depth = data["out/depth160x120"]
    K = torch.tensor([[144.46765125, 0, 80.0], [0, 144.46765125, 60.0], [0, 0, 1]])
    cameras = CameraBatch(
        data["out/w2c"], K.repeat(2, 1, 1), (120, 160), torch.zeros(2, dtype=torch.long)
    )
    xyz, valid = unproject(depth, cameras)
    released = data["out/unprojected_120x160x4"]
    close(xyz[valid], released[..., :3][valid], 1e-4)
    assert torch.equal(valid & (depth > 0.05), released[..., 3].bool())


def test_object_cameras_are_the_inverse_of_the_file():
    data = parity("cameras_shapenet")
    cameras = CameraBatch(
        data["out/w2c"],
        intrinsics_from_fov(49.13434264120263, (128, 128)).repeat(3, 1, 1),
        (128, 128),
        torch.zeros(3, dtype=torch.long),
    )
    close(cameras.cam_to_world, data["in/c2w_txt"])
    close(cameras.center, data["out/camera_center"])
