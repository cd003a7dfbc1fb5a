"""Runs and files as exhibits: one frame for all of it, pages that need nothing, a live server that ends, faults in one line."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from untrained import save_run

from unipre3d.cli import main, reach
from unipre3d.core import GaussianBatch
from unipre3d.data.augment import PosedViews
from unipre3d.data.clouds import write_cloud
from unipre3d.data.imports import nearest_points
from unipre3d.data.scannet import write_box_rooms
from unipre3d.formats import load_gaussians, save_gaussians
from unipre3d.gaussians import covariance
from unipre3d.recipes import finetune_recipes, recipes
from unipre3d.render import render
from unipre3d.runs.recipe import change
from unipre3d.view import (
    _add_gaussians,
    check_port,
    draw_scenes,
    exhibit_of_file,
    exhibit_of_run,
    exhibit_page,
    holds_gaussians,
    open_any,
    serve_exhibit,
    strongest,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import check_site  # noqa: E402

HAS_VISER = importlib.util.find_spec("viser") is not None
needs_viser = pytest.mark.skipif(not HAS_VISER, reason="viser is not installed")
RNG = np.random.default_rng(0)
XYZ = RNG.normal(size=(500, 3)).astype(np.float32)
COLOR = RNG.random((500, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def object_run(tmp_path_factory):
    name = "object-transformer-mini"
    return save_run(tmp_path_factory.mktemp("runs") / "object", name, recipes[name])


@pytest.fixture(scope="module")
def room_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms")
    write_box_rooms(folder / "box")
    name = "scene-sparseunet-mini"
    recipe = change(recipes[name], source=str(folder / "box"), image_cache_mb=0)
    return save_run(folder / "run", name, recipe)


def some_gaussians(n=300, degree=1):
    g = torch.Generator().manual_seed(0)
    return GaussianBatch(
        mean=torch.randn(n, 3, generator=g),
        scale=0.02 + 0.1 * torch.rand(n, 3, generator=g),
        quat=torch.nn.functional.normalize(torch.randn(n, 4, generator=g), dim=1),
        opacity=0.1 + 0.9 * torch.rand(n, generator=g),
        sh=0.4 * torch.randn(n, (degree + 1) ** 2, 3, generator=g),
        batch=torch.zeros(n, dtype=torch.long),
        size=1,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "One cloud, one mesh and one splat in several formats."
    folder = tmp_path_factory.mktemp("files")
    write_cloud(folder / "cloud.ply", XYZ, COLOR)
    np.save(folder / "cloud.npy", XYZ)
    np.savetxt(folder / "cloud.xyz", XYZ)
    trimesh.creation.box().export(folder / "box.obj")
    trimesh.creation.box().export(folder / "box.glb")
    for ending in ("ply", "spz", "glb"):
        save_gaussians(some_gaussians(), folder / f"splat.{ending}")
    return folder


def refuses(call, *words, kind=ValueError):
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


# ---------------------------------------------------------------- one frame


def on_photos(exhibit):
    "Points that are nearest in their pixel: their colours, and those of the pictures, [k 3] each."
    K = exhibit.camera.K.double().numpy()
    pose = exhibit.camera.world_to_cam.double().numpy()
    views = PosedViews(exhibit.photos, None, None, pose, K)
    own, seen = [], []
    for v, photo in enumerate(exhibit.photos):
        _, (row, column, index) = nearest_points(exhibit.xyz.astype(np.float64), views, v)
        own.append(exhibit.colorings["colour"][index])
        seen.append(photo[row, column])
    return np.concatenate(own) / 255, np.concatenate(seen) / 255


def test_points_and_pictures_of_an_object_are_in_one_frame(object_run):
    exhibit = exhibit_of_run(object_run, index=3)
    own, seen = on_photos(exhibit)
    assert (seen.max(1) > 0).mean() > 0.95  # on the object, not on the black behind it
    moved = exhibit.xyz[:, [1, 0, 2]]
    own, seen = on_photos(type(exhibit)(**vars(exhibit) | dict(xyz=moved)))
    assert (seen.max(1) > 0).mean() < 0.95


def test_points_and_pictures_of_a_room_are_in_one_frame(room_run):
    exhibit = exhibit_of_run(room_run)
    assert abs(exhibit.xyz.mean(0)).max() < 0.05  # about its mean, as the model has it
    own, seen = on_photos(exhibit)
    near = np.abs(own - seen).mean()
    assert near < 0.06 and near < 0.5 * np.abs(own[RNG.permutation(len(own))] - seen).mean()
    assert exhibit.background == (1.0, 1.0, 1.0) and len(exhibit.camera) > exhibit.references > 1


def test_what_is_rendered_is_what_the_renderer_gives(object_run):
    exhibit = exhibit_of_run(object_run)
    rgb = render(exhibit.gaussians, exhibit.camera, torch.zeros(3)).rgb.detach().clamp(0, 1)
    assert np.abs(rgb.permute(0, 2, 3, 1).numpy() * 255 - exhibit.rendered).max() <= 0.51
    again = exhibit_of_run(object_run / "checkpoint.safetensors")
    assert np.array_equal(again.rendered, exhibit.rendered)
    assert np.array_equal(again.colorings["features"], exhibit.colorings["features"])


def test_points_keep_their_order(files):
    exhibit = exhibit_of_file(files / "cloud.ply")
    assert np.array_equal(exhibit.xyz, XYZ)
    assert np.array_equal(exhibit.colorings["colour"], np.round(255 * COLOR).astype(np.uint8))
    some = exhibit_of_file(files / "cloud.ply", points=100)
    place = [np.flatnonzero((XYZ == row).all(1))[0] for row in some.xyz]
    assert place == sorted(place) and len(place) == 100
    assert some.remarks == ("100 of 500 points are shown",)


@pytest.mark.parametrize("ending", ["ply", "spz", "glb"])
def test_the_means_of_a_splat_are_its_cloud(files, ending):
    path = files / f"splat.{ending}"
    exhibit = exhibit_of_file(path, "none")
    gaussians, _ = load_gaussians(path)
    assert holds_gaussians(path) and torch.equal(exhibit.gaussians.mean, gaussians.mean)
    assert np.array_equal(exhibit.xyz, gaussians.mean.numpy())
    up = exhibit_of_file(path, "none", up="y")
    assert np.abs(up.xyz - up.gaussians.mean.numpy()).max() < 1e-6
    assert np.array_equal(up.xyz[:, 2], exhibit.xyz[:, 1])


def test_a_splat_far_from_the_origin(tmp_path):
    far = some_gaussians()
    far = far.derive(mean=1000 * far.mean + torch.tensor([2e5, 0.0, 0.0]), scale=30 * far.scale)
    save_gaussians(far, tmp_path / "far.ply")
    exhibit = exhibit_of_file(tmp_path / "far.ply", "none")
    assert np.abs(exhibit.xyz - exhibit.gaussians.mean.numpy()).max() < 0.1
    assert np.abs(exhibit.xyz).max() < 1e4  # about an origin of its own


@pytest.mark.parametrize("up", ["z", "y"])
def test_harmonics_that_are_left_out_are_a_remark(tmp_path, up):
    for degree in (0, 1, 2, 3):
        save_gaussians(some_gaussians(degree=degree), tmp_path / "splat.ply")
        exhibit = exhibit_of_file(tmp_path / "splat.ply", "none", up=up)
        said = "harmonics above degree 1 are left out" in "\n".join(exhibit.remarks)
        assert said == ("harmonics above degree 1" in exhibit_page(exhibit)) == (degree > 1)


def test_a_few_gaussians_far_away_do_not_move_the_picture(tmp_path):
    cloud = some_gaussians()
    cloud.mean[:3] += 100
    save_gaussians(cloud, tmp_path / "splat.ply")
    page = exhibit_page(exhibit_of_file(tmp_path / "splat.ply", "none"))
    middles = [json.loads(text) for text in re.findall(r'"camera":{"at":(\[[^\]]*\])', page)]
    assert len(middles) == 2 and np.abs(middles).max() < 0.5


def test_a_film_of_flat_gaussians(tmp_path, capsys):
    cloud = some_gaussians()
    cloud.scale[:, 2] = 0.0
    save_gaussians(cloud, tmp_path / "flat.glb")
    assert main(["render", str(tmp_path / "flat.glb"), "--frames", "1", "--size", "32"]) == 0
    with Image.open(tmp_path / "film-flat.gif") as film:
        assert np.asarray(film.convert("RGB")).std() > 10


@pytest.mark.parametrize("ending", ("ply", "spz", "glb"))
def test_the_mode_of_a_splat_is_that_of_its_header(tmp_path, ending):
    for antialiased in (False, True):
        save_gaussians(some_gaussians(), tmp_path / f"a.{ending}", antialiased=antialiased)
        exhibit = exhibit_of_file(tmp_path / f"a.{ending}", "none")
        assert exhibit.antialiased is antialiased
        assert ("for the antialiased mode" in exhibit_page(exhibit)) is antialiased
        assert (f'"mip":{int(antialiased)}' in exhibit_page(exhibit)) is True


def test_the_reach_of_more_points_than_torch_takes_quantiles_of():
    xyz = torch.zeros(2**24 + 8, 3)
    xyz[: 2**20, 0] = 7.0  # one of sixteen
    assert reach(xyz) == 7.0 and reach(xyz[2**20 :]) == 1e-6


def test_other_files_hold_no_gaussians(files):
    for name in ("cloud.ply", "cloud.npy", "box.obj", "box.glb"):
        assert not holds_gaussians(files / name)
        assert open_any(files / name)[2] is None


# ---------------------------------------------------------------- the page


def check_page(page, canvases, pictures=0):
    "Whole, and nothing of it lies elsewhere."
    assert page.startswith("<!doctype html>") and page.endswith("</html>")
    assert page.count("<canvas") == canvases and page.count("<img") == pictures
    assert not re.search(
        r"""(?:src|href)\s*=\s*["'](?!data:)|@import|url\(|//cdn|https?://""", page
    )
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) == canvases


def test_the_page_of_a_run_holds_everything(object_run, room_run):
    for run, views in ((object_run, 5), (room_run, None)):
        exhibit = exhibit_of_run(run)
        page = exhibit_page(exhibit)
        check_page(page, 2, 2 * (views or len(exhibit.photos)))
        assert "features" in page and page == exhibit_page(exhibit_of_run(run))


NAMES = "cloud.ply cloud.npy cloud.xyz box.obj box.glb splat.ply splat.spz splat.glb".split()


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_a_file(files, name):
    exhibit = exhibit_of_file(files / name)
    check_page(exhibit_page(exhibit), 1 + ("splat" in name))
    assert list(exhibit.colorings) == [next(iter(exhibit.colorings)), "features"]


def test_a_large_splat_is_thinned_by_what_it_covers():
    many = some_gaussians(200)
    few = strongest(many, 50)
    assert len(few) == 50
    area = many.opacity * many.scale.topk(2, dim=1).values.prod(1)
    assert set(few.mean[:, 0].tolist()) == set(many.mean[area.topk(50).indices, 0].tolist())


def test_a_page_says_for_how_many_points_it_has_room(tmp_path):
    exhibit = exhibit_of_file(write_cloud(tmp_path / "cloud.ply", RNG.random((60_001, 3))), "none")
    assert exhibit.remarks == ("60,000 of 60,001 points are shown",)
    whole = replace(exhibit, xyz=np.zeros((60_001, 3), np.float32), remarks=())
    whole.colorings["height"] = np.zeros((60_001, 3), np.uint8)
    assert "the picture has room for 60,000 of them" in exhibit_page(whole)


def test_names_of_files_do_not_break_the_page(tmp_path):
    path = tmp_path / "<b>&\"'.ply"
    write_cloud(path, XYZ)
    page = exhibit_page(exhibit_of_file(path, "none"))
    assert "<b>" not in page and "&lt;b&gt;&amp;" in page


def test_the_page_in_a_browser(object_run):
    with check_site.browser() as (browser, why):
        if why:
            pytest.skip(f"no page opened: {why}")
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.set_content(exhibit_page(exhibit_of_run(object_run)))
        drawn = "() => [...document.querySelectorAll('.viewer')].every(one => one.dataset.drawn)"
        page.wait_for_function(drawn, timeout=60_000)
        if "needs WebGL 2" in page.inner_text(".viewer-hint >> nth=0"):
            pytest.skip("this browser has no WebGL 2")
        points = page.locator("canvas").first
        page.wait_for_timeout(200)
        before = points.screenshot()
        page.get_by_role("button", name="features").click()
        page.wait_for_timeout(200)
        assert points.screenshot() != before
        pictures = page.locator("img").evaluate_all("all => all.map(one => one.naturalWidth)")
        assert pictures == [64] * 10 and faults == []


# ---------------------------------------------------------------- live


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@needs_viser
def test_a_live_server_has_every_node_and_ends(object_run):
    exhibit = exhibit_of_run(object_run)
    server = serve_exhibit(exhibit, port=0)
    port = server.get_port()
    try:
        names = ["reference/points", "rendered/gaussians", "features/points"]
        names += [f"{scene}/reference 1" for scene in ("reference", "rendered", "features")]
        names += [f"rendered/target {k}" for k in (1, 2, 3, 4)]
        nodes = [server.scene.get_handle_by_name(f"/{name}") for name in names]
        assert None not in nodes
        for v, node in ((0, nodes[3]), (1, nodes[6])):
            assert np.abs(node.position - exhibit.camera.center[v].numpy()).max() < 1e-6
        points = server.scene.get_handle_by_name("/reference/points")
        assert np.array_equal(points.points, exhibit.xyz)
        refuses(lambda: serve_exhibit(exhibit, port=port), "--port", str(port), kind=OSError)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=20) as answer:
            assert answer.status == 200
    finally:
        server.stop()
    check_port("127.0.0.1", port)


@needs_viser
def test_the_switch_shows_one_scene(files):
    import viser

    server = viser.ViserServer(host="127.0.0.1", port=0, verbose=False)
    try:
        switch = draw_scenes(server, exhibit_of_file(files / "splat.ply"))
        scenes = ("reference", "rendered", "features")
        nodes = [server.scene.get_handle_by_name(f"/{name}") for name in scenes]
        assert switch.options == scenes
        assert [node.visible for node in nodes] == [True, False, False]
        for k in (1, 2, 0):
            switch.value = scenes[k]
            wanted = [j == k for j in range(3)]
            end = time.monotonic() + 20
            while [node.visible for node in nodes] != wanted and time.monotonic() < end:
                time.sleep(0.01)  # the answer comes from another thread
            assert [node.visible for node in nodes] == wanted
    finally:
        server.stop()


@needs_viser
@pytest.mark.parametrize("sizes", [(1e-4, 1e-4, 1e-4), (0.05, 0.05, 5e-4), (300.0, 200.0, 100.0)])
def test_viser_gets_gaussians_of_every_size_and_shape(sizes):
    "It sends variances in half precision, where 0.0001^2 is none and 300^2 infinite."
    import viser

    rng = torch.Generator().manual_seed(0)
    gaussians = GaussianBatch(
        mean=torch.randn(20, 3, generator=rng),
        scale=torch.tensor(sizes).expand(20, 3),
        quat=torch.nn.functional.normalize(torch.randn(20, 4, generator=rng)),
        opacity=torch.full((20,), 0.5),
        sh=torch.zeros(20, 4, 3),
        batch=torch.zeros(20, dtype=torch.long),
        size=1,
    )
    server = viser.ViserServer(host="127.0.0.1", port=0, verbose=False)
    try:
        _add_gaussians(server, "/g", gaussians)
        node = server.scene.get_handle_by_name("/g")
        rows = node.buffer.copy().view(np.uint8).reshape(20, 32)
        unit = float(np.ravel(node.scale)[0])
    finally:
        server.stop()
    centres = rows[:, :12].copy().view(np.float32) * unit
    np.testing.assert_allclose(centres, gaussians.mean, rtol=1e-6)
    upper = rows[:, 16:28].copy().view(np.float16).astype(np.float64)
    whole = upper[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(20, 3, 3) * unit**2
    wanted = covariance(gaussians.scale, gaussians.quat).numpy()
    np.testing.assert_allclose(whole, wanted, atol=1e-3 * max(sizes) ** 2)
    assert np.isfinite(whole).all() and (np.linalg.eigvalsh(whole)[:, 1] > 0).all()


@needs_viser
def test_a_viewer_from_a_shell_ends_at_ctrl_c(files):
    port = free_port()
    words = ["-m", "unipre3d", "view", str(files / "cloud.npy"), "--from", "none"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    job = subprocess.Popen(
        [sys.executable, *words, "--port", str(port)], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        lines = [job.stdout.readline() for _ in range(2)]
        assert "500 points" in lines[0] and f"http://127.0.0.1:{port}" in lines[1]
        urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=20).close()
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=60) == 0
    finally:
        job.kill()
        job.wait()
    check_port("127.0.0.1", port)


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refuses(lambda: check_port("127.0.0.1", port), "--port", str(port), kind=OSError)
    check_port("127.0.0.1", port)
    refuses(lambda: check_port("127.0.0.1", -1), "--port: expected a number in 0..65535")


# ---------------------------------------------------------------- the command line


def test_a_page_from_a_shell(files, object_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["view", str(object_run), "--out", "deep/run.html", "--index", "2"]) == 0
    check_page(Path("deep/run.html").read_text(encoding="utf-8"), 2, 10)
    assert main(["view", str(files / "splat.glb"), "--out", "splat.html", "--points", "9"]) == 0
    said = capsys.readouterr().out
    assert "page: splat.html" in said and "9 of 300 points are shown" in said


@pytest.mark.skipif(HAS_VISER, reason="viser is installed")
def test_without_viser_a_page_is_written_and_said_so(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["view", str(files / "cloud.npy"), "--from", "none"]) == 0
    said = capsys.readouterr().out
    assert 'pip install "unipre3d[view]"' in said and "page: cloud-view.html" in said
    check_page(Path("cloud-view.html").read_text(encoding="utf-8"), 1)
    assert main(["view", str(files / "cloud.npy"), "--port", "9999"]) == 2
    assert "--port" in capsys.readouterr().err


def test_faults_are_one_line(files, object_run, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((object_run / "config.json").read_bytes())
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.abc").write_text("1 2 3")
    (tmp_path / "bad.ply").write_text("ply")
    fine = save_run(
        tmp_path / "fine",
        "cls-shapes-mini",
        finetune_recipes["cls-shapes-mini"],
        [str(k) for k in range(15)],
    )
    cloud = str(files / "cloud.npy")
    for words, expected in (
        ([str(tmp_path / "nowhere")], "nowhere: expected a run folder or a file"),
        ([str(tmp_path / "empty")], "empty"),
        ([str(bare)], "checkpoint.safetensors"),
        ([str(fine)], "pre-training"),
        ([str(tmp_path / "odd.abc")], "odd.abc: expected a cloud, a mesh or a splat (.ply, "),
        ([str(tmp_path / "bad.ply")], "bad.ply: expected"),
        ([cloud, "--from", "nobody"], "nobody: expected objects, rooms"),
        ([cloud, "--up", "q"], "up: expected"),
        ([cloud, "--unit", "mm"], "--unit: counts only for rooms"),
        ([str(object_run), "--split", "none"], "none"),
        ([str(object_run), "--index", "-1"], "--index: expected 0.."),
        ([], "expected a run folder or a file"),
        ([cloud, "--prot", "3"], "--prot"),
    ):
        page = ["--out", str(tmp_path / "page.html")] if words else []
        assert main(["view", *words, *page]) == 2, words
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and expected in said, said
    bad = str(tmp_path / "bad.ply")  # it would be refused, too, where it is read
    assert main(["view", bad, "--out", str(tmp_path / "page.png")]) == 2
    assert "--out: expected a name that ends in .html" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
