"""Files of Gaussians beside independent readers: gsply and SplatTransform where they are installed, trimesh always.

UNIPRE3D_SPLAT_TRANSFORM names the program of SplatTransform where it is not on the path."""

import gzip
import json
import math
import os
import shutil
import struct
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unipre3d.core import GaussianBatch
from unipre3d.formats import AXES, linear_colour, load_gaussians, save_gaussians
from unipre3d.gaussians import check_gaussians, covariance, ply_mode

SPLAT_TRANSFORM = os.environ.get("UNIPRE3D_SPLAT_TRANSFORM") or shutil.which("splat-transform")


def some_cloud(degree=3, n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = (degree + 1) ** 2
    spread = torch.tensor([1.0] + [0.2] * (k - 1))[:, None]
    return GaussianBatch(
        mean=torch.randn(n, 3, generator=g),
        scale=0.05 * torch.rand(n, 3, generator=g) + 0.01,
        quat=F.normalize(torch.randn(n, 4, generator=g), dim=1),
        opacity=0.05 + 0.9 * torch.rand(n, generator=g),
        sh=torch.randn(n, k, 3, generator=g).clamp(-3, 3) * spread,
        batch=torch.zeros(n, dtype=torch.long),
        size=1,
    )


def assert_same(found, wanted, *, rounded=False):
    "Two clouds, to the rounding of floats or to that of SPZ."
    rooms = dict(mean=1e-5, opacity=1 / 510, sh=1 / 37, scale=1 / 32) if rounded else {}
    for name in ("mean", "opacity", "sh"):
        gap = (getattr(found, name) - getattr(wanted, name)).abs().max()
        assert float(gap) <= rooms.get(name, 0) + 1e-5, name
    gap = (found.scale.log() - wanted.scale.log()).abs().max()
    assert float(gap) <= rooms.get("scale", 0) + 1e-5
    alike = (F.normalize(found.quat, dim=1) * wanted.quat).sum(1).abs()
    assert float(alike.min()) > 1 - (1e-5 if rounded else 1e-6)


@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("antialiased", [False, True])
def test_what_is_written_is_read(tmp_path, kind, degree, antialiased):
    cloud = some_cloud(degree)
    path = save_gaussians(cloud, tmp_path / f"a{kind}", antialiased)
    found, mode = load_gaussians(path)
    assert mode is antialiased and found.sh.shape == cloud.sh.shape
    assert_same(found, cloud, rounded=kind == ".spz")
    again = save_gaussians(cloud, tmp_path / f"b{kind}", antialiased)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "remark, mode",
    [
        ("comment SplatRenderMode: mip", True),
        ("comment splatrendermode: default", False),
        ("comment antialiased 1", True),
        ("comment antialiased 0", False),
        ("comment made by hand", False),
        ("comment antialiased", False),
    ],
)
def test_remarks_of_other_programs(tmp_path, remark, mode):
    path = save_gaussians(some_cloud(0), tmp_path / "a.ply")
    data = path.read_bytes().replace(b"comment SplatRenderMode: default", remark.encode())
    path.write_bytes(data)
    assert ply_mode(path) is mode


def test_a_plain_viewer_sees_coloured_points(tmp_path):
    import trimesh

    cloud = some_cloud()
    scene = trimesh.load_scene(save_gaussians(cloud, tmp_path / "a.glb"))
    (points,) = scene.geometry.values()
    signs = np.array(AXES[".glb"])
    np.testing.assert_allclose(points.vertices, cloud.mean.numpy() * signs, atol=1e-6)
    wanted = linear_colour(cloud).numpy()
    np.testing.assert_allclose(points.colors / 255, wanted, atol=1 / 255)


def test_the_glb_is_as_its_header_says(tmp_path):
    data = save_gaussians(some_cloud(1), tmp_path / "a.glb").read_bytes()
    magic, version, size, length, kind = struct.unpack_from("<4sIII4s", data)
    assert (magic, version, size, kind) == (b"glTF", 2, len(data), b"JSON") and length % 4 == 0
    scene = json.loads(data[20 : 20 + length])
    binary, tag = struct.unpack_from("<I4s", data, 20 + length)
    assert tag == b"BIN\0" and binary == scene["buffers"][0]["byteLength"]
    assert len(data) == 28 + length + binary
    primitive = scene["meshes"][0]["primitives"][0]
    assert primitive["mode"] == 0 and scene["extensionsUsed"] == ["KHR_gaussian_splatting"]
    splats = primitive["extensions"]["KHR_gaussian_splatting"]
    assert splats == dict(kernel="ellipse", colorSpace="srgb_rec709_display")
    assert len(primitive["attributes"]) == 5 + 4
    position = scene["accessors"][primitive["attributes"]["POSITION"]]
    assert len(position["min"]) == len(position["max"]) == 3


def test_the_bytes_of_a_gaussian_are_those_of_the_chapter(tmp_path):
    cloud = some_cloud(1)
    ply, spz, glb = (save_gaussians(cloud, tmp_path / f"a{kind}").read_bytes() for kind in AXES)
    assert len(ply.partition(b"end_header\n")[2]) == 104 * len(cloud)
    assert len(gzip.decompress(spz)) == 16 + 29 * len(cloud)
    binary = struct.unpack_from("<I", glb, 20 + struct.unpack_from("<I", glb, 12)[0])[0]
    assert binary == 108 * len(cloud)


@pytest.mark.parametrize("degree", [0, 3])
def test_beside_gsply(tmp_path, degree):
    gsply = pytest.importorskip("gsply")
    cloud = some_cloud(degree)
    sign = torch.tensor(AXES[".spz"])
    for kind, read in ((".ply", gsply.plyread), (".spz", gsply.read_spz)):
        found = read(str(save_gaussians(cloud, tmp_path / f"a{kind}")))
        signs = sign if kind == ".spz" else torch.ones(3)
        rounded = kind == ".spz"
        mean = torch.as_tensor(np.array(found.means)) * signs
        assert float((mean - cloud.mean).abs().max()) < 1e-5
        quat = torch.as_tensor(np.array(found.quats)) * F.pad(signs, (1, 0), value=1.0)
        alike = (F.normalize(quat, dim=1) * cloud.quat).sum(1).abs()
        assert float(alike.min()) > 1 - 1e-5
        scale = torch.as_tensor(np.array(found.scales))
        assert float((scale - cloud.scale.log()).abs().max()) < (1 / 31 if rounded else 1e-5)
        opacity = torch.as_tensor(np.array(found.opacities)).reshape(-1).sigmoid()
        assert float((opacity - cloud.opacity).abs().max()) < (1 / 500 if rounded else 1e-5)
        dc = torch.as_tensor(np.array(found.sh0))
        assert float((dc - cloud.sh[:, 0]).abs().max()) < (1 / 37 if rounded else 1e-5)
        if degree and not rounded:
            rest = torch.as_tensor(np.array(found.shN)).reshape(-1, 15, 3)
            assert float((rest - cloud.sh[:, 1:]).abs().max()) < 1e-5
    theirs = gsply.plyread(str(tmp_path / "a.ply"))
    gsply.plywrite(str(tmp_path / "theirs.ply"), theirs)
    assert_same(load_gaussians(tmp_path / "theirs.ply")[0], cloud)


@pytest.mark.skipif(not SPLAT_TRANSFORM, reason="SplatTransform is not installed")
def test_beside_splat_transform(tmp_path):
    cloud = some_cloud()
    save_gaussians(cloud, tmp_path / "a.ply")
    save_gaussians(cloud, tmp_path / "a.spz")
    for source, target in ((".ply", ".ply"), (".ply", ".glb"), (".spz", ".ply"), (".spz", ".glb")):
        path = tmp_path / f"theirs{target}"
        command = [SPLAT_TRANSFORM, "-w", str(tmp_path / f"a{source}"), str(path)]
        subprocess.run(command, check=True, capture_output=True)
        assert_same(load_gaussians(path)[0], cloud, rounded=source == ".spz")


def test_ellipsoids_do_not_change_with_the_axes(tmp_path):
    cloud = some_cloud()
    wanted = covariance(cloud.scale, cloud.quat)
    for kind, signs in AXES.items():
        found, _ = load_gaussians(save_gaussians(cloud, tmp_path / f"a{kind}"))
        gap = (covariance(found.scale, found.quat) - wanted).abs().max() / wanted.abs().max()
        assert float(gap) < (0.1 if kind == ".spz" else 1e-5) and math.prod(signs) == 1


REFUSED = [
    ("a.spz", b"NGSP" + bytes(60), "version 4"),
    ("a.spz", b"text", "does not load"),
    ("a.glb", b"glTF" + bytes(40), "version 0"),
    ("a.glb", b"", "an empty file"),
    ("a.splat", b"", "ends in .ply, .spz, .glb"),
]


@pytest.mark.parametrize("name, data, message", REFUSED)
def test_other_files_are_refused_in_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load_gaussians(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    cloud = some_cloud(0)
    with pytest.raises(ValueError, match="one cloud"):
        save_gaussians(cloud.derive(size=2), tmp_path / "a.spz")
    with pytest.raises(ValueError, match="coordinates below"):
        save_gaussians(cloud.derive(mean=cloud.mean * 1e8), tmp_path / "a.spz")
    for kind in AXES:
        path = tmp_path / f"a{kind}"
        with pytest.raises(ValueError, match="mean: expected finite"):
            save_gaussians(cloud.derive(mean=cloud.mean / 0), path)
        with pytest.raises(ValueError, match="scale: expected deviations from 0, found 180 below"):
            save_gaussians(cloud.derive(scale=-cloud.scale), path)
        assert not path.exists()


def test_a_rotation_of_next_to_no_length_is_counted():
    cloud = some_cloud(0)
    quat = cloud.quat.clone()
    quat[0] = 1e-30
    with pytest.warns(UserWarning, match=f"left out 1 of {len(quat)} Gaussians"):
        found = check_gaussians(cloud.derive(quat=quat), "a.glb")
    assert torch.allclose(found.quat.norm(dim=1), torch.ones(len(quat) - 1))
