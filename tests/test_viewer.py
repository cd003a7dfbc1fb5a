"""The viewers' pages in a browser: pixels against the package's renderer, colourings, keys and fingers."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unipre3d.core import CameraBatch, GaussianBatch
from unipre3d.geometry.cameras import intrinsics_from_fov, look_at
from unipre3d.render import render
from unipre3d.viewer import gaussian_viewer, label_palette, place_camera, point_viewer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import check_site  # noqa: E402

H, W = 120, 160


def some_gaussians(n=400, bands=4):
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.rand(*s, generator=g)
    return GaussianBatch(
        mean=r(n, 3) - 0.5,
        scale=0.02 + 0.08 * r(n, 3),
        quat=torch.nn.functional.normalize(r(n, 4) - 0.5, dim=1),
        opacity=0.1 + 0.9 * r(n),
        sh=torch.cat([2 * r(n, 1, 3) - 1, 0.6 * r(n, bands - 1, 3) - 0.3], 1),
        batch=torch.zeros(n, dtype=torch.long),
        size=1,
    )


@pytest.fixture(scope="module")
def window():
    with check_site.browser() as (found, why):
        if why:
            pytest.skip(f"no page opened: {why}")
        page = found.new_page(viewport={"width": W, "height": 400})
        page.faults = []
        page.on("pageerror", lambda e: page.faults.append(str(e)))
        yield page
        assert page.faults == []


def show(page, text):
    page.set_content(
        f"<style>body {{ margin: 0 }} .viewer canvas {{ border-radius: 0 !important; outline: none !important }}</style>{text}"
    )
    page.wait_for_function("() => document.querySelector('.viewer').dataset.drawn", timeout=20_000)
    if "needs WebGL 2" in page.inner_text(".viewer-hint"):
        pytest.skip("this browser has no WebGL 2")


def pixels(page):
    page.wait_for_timeout(200)
    return (
        np.asarray(
            Image.open(io.BytesIO(page.locator("canvas").screenshot())).convert("RGB")
        ).astype(float)
        / 255
    )


@pytest.mark.parametrize(
    "azimuth, elevation, bands, antialiased",
    [
        (40, 20, 4, False),
        (190, -50, 4, False),
        (75, 10, 1, False),
        (-20, 60, 9, False),
        (40, 20, 4, True),
    ],
)
def test_the_page_shows_what_render_shows(window, azimuth, elevation, bands, antialiased):
    g = some_gaussians(bands=bands)
    if antialiased:  # of which the blur is a large part
        g = g.derive(scale=0.15 * g.scale)
    mode = dict(antialiased=antialiased)
    how = dict(azimuth=azimuth, elevation=elevation, background=(0.2, 0.1, 0.0))
    show(window, gaussian_viewer(g, **how, **mode))
    c = place_camera(g.mean, azimuth=azimuth, elevation=elevation, distance=None, fov=49.134)
    way = torch.tensor(
        [
            np.cos(c["azimuth"]) * np.cos(c["elevation"]),
            np.sin(c["azimuth"]) * np.cos(c["elevation"]),
            np.sin(c["elevation"]),
        ]
    )
    at = torch.tensor(c["at"])
    focal = H / 2 / np.tan(c["fov"] / 2)
    K = torch.tensor([[[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]]], dtype=torch.float32)
    camera = CameraBatch(
        look_at((at + c["distance"] * way)[None].float(), at.float()[None]),
        K,
        (H, W),
        torch.zeros(1, dtype=torch.long),
    )
    if bands > 4:
        g = GaussianBatch(g.mean, g.scale, g.quat, g.opacity, g.sh[:, :4], g.batch, 1)
    background = torch.tensor([0.2, 0.1, 0.0])

    def rendered(**mode):
        return render(g, camera, background, **mode).rgb[0].clamp(0, 1).permute(1, 2, 0).numpy()

    expected = rendered(**mode)
    found = pixels(window)
    assert found.shape == expected.shape and expected.std() > (0.04 if antialiased else 0.1)
    assert (
        not antialiased or np.abs(expected - rendered()).max() > 0.25
    )  # what the page may not miss
    assert np.abs(found - expected).mean() < 0.01 and np.abs(found - expected).max() < 0.12


def test_it_spins_until_it_is_touched(window):
    show(window, gaussian_viewer(some_gaussians(), spin=90))
    first = pixels(window)
    assert np.abs(pixels(window) - first).max() > 0.1
    window.locator("canvas").focus()
    window.keyboard.press("ArrowLeft")
    still = pixels(window)
    assert np.abs(pixels(window) - still).max() == 0


def test_keys_turn_and_zoom_and_home_returns(window):
    show(window, gaussian_viewer(some_gaussians()))
    first = pixels(window)
    window.locator("canvas").focus()
    for key in ("ArrowLeft", "ArrowUp", "+", "+"):
        before = pixels(window)
        window.keyboard.press(key)
        assert np.abs(pixels(window) - before).max() > 0.1, key
    window.keyboard.press("Home")
    assert np.abs(pixels(window) - first).max() == 0


def test_a_drag_turns_and_the_wheel_zooms_only_after_a_click(window):
    show(window, gaussian_viewer(some_gaussians()))
    first = pixels(window)
    window.mouse.move(80, 60)
    window.mouse.wheel(0, 200)
    assert np.abs(pixels(window) - first).max() == 0
    window.mouse.down()
    window.mouse.move(50, 70, steps=3)
    window.mouse.up()
    turned = pixels(window)
    assert np.abs(turned - first).max() > 0.1
    window.mouse.wheel(0, 200)
    assert np.abs(pixels(window) - turned).max() > 0.1


def test_buttons_switch_colourings(window):
    xyz = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    show(
        window,
        point_viewer(
            xyz,
            torch.tensor([[1.0, 0, 0]]).expand(500, 3),
            {"left & right": (xyz[:, 0] > 0.5).long(), "none": torch.full((500,), -1)},
            names=["low", "high"],
            background=(0, 0, 0),
            size=0.05,
        ),
    )
    red = pixels(window)
    assert red[..., 0].max() == 1 and red[..., 1:].max() == 0
    assert window.locator(".viewer-legend:visible").count() == 0
    window.get_by_role("button", name="left & right").click()
    assert pixels(window)[..., 2].max() > 0.2 and window.locator(
        ".viewer-legend:visible"
    ).inner_text().split() == ["low", "high"]
    window.get_by_role("button", name="none").click()
    grey = pixels(window)
    assert np.abs(grey[..., 0] - grey[..., 1]).max() == 0 and abs(grey.max() - 64 / 255) < 0.01


def test_what_shows_its_back_is_left_out(window):
    up, down = (
        torch.tensor([0.0, 0.0, 1.0]).expand(500, 3),
        torch.tensor([0.0, 0.0, -1.0]).expand(500, 3),
    )
    plane = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 1.0, 0.0]
    )
    seen = lambda **how: (
        show(
            window,
            point_viewer(
                plane, torch.ones(500, 3), background=(0, 0, 0), size=0.05, elevation=60, **how
            ),
        ),
        pixels(window),
    )[1]
    assert seen().max() == 1 and 0.8 < seen(normal=up).max() < 1 and seen(normal=down).max() == 0


def test_answers_stand_beside_the_truth_in_the_same_colours(window):
    xyz = torch.rand(300, 3, generator=torch.Generator().manual_seed(0))
    show(
        window,
        point_viewer(
            xyz,
            labels={
                "answer": torch.zeros(300).long(),
                "truth": torch.arange(300) % 2,
                "rgb": torch.ones(300, 3),
            },
            names=["wall", "floor", "<b>"],
            background=(0, 0, 0),
        ),
    )
    assert window.locator(".viewer-legend:visible").inner_text().split() == ["wall"]
    window.get_by_role("button", name="truth").click()
    assert window.locator(".viewer-legend:visible").inner_text().split() == ["wall", "floor"]
    window.get_by_role("button", name="rgb").click()
    assert pixels(window).max() == 1 and len({tuple(c) for c in label_palette(200).tolist()}) == 201


def test_faults_are_said_in_one_line():
    g = some_gaussians(10)
    two = GaussianBatch(g.mean, g.scale, g.quat, g.opacity, g.sh, torch.arange(10) // 5, 2)
    for call, words in (
        (lambda: gaussian_viewer(two), "expected one cloud, got 2"),
        (lambda: gaussian_viewer(some_gaussians(0)), "got 0"),
        (lambda: point_viewer(g.mean), "got neither"),
        (lambda: point_viewer(g.mean, g.mean[:3]), "colour: expected 10 rows like xyz, got 3"),
        (
            lambda: point_viewer(g.mean, g.mean, normal=g.mean[:4]),
            "normal: expected 10 rows like xyz, got 4",
        ),
        (
            lambda: point_viewer(g.mean, labels=torch.arange(10) * 100),
            "labels up to 254, found 900",
        ),
    ):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
