"""LPIPS as a term of the objective.

The networks have their real layers. Their weights are drawn by a seed, and lie where torchvision keeps those that
it downloads: the trained ones are no part of this package.
"""

import sys

import pytest
import torch
from test_objective import object_recipe, one_step, rooms, scene_recipe  # noqa: F401

from unipre3d.cli import main
from unipre3d.losses import (
    PERCEPTUAL,
    PerceptualNet,
    _kept_net,
    lpips,
    perceptual_files,
    perceptual_net,
)
from unipre3d.objective import TERMS, RenderObjective, check_objective
from unipre3d.runs.recipe import change, check_changes
from unipre3d.tasks.pretrain import check_terms, pretrain_task


def save_layers(network, path):
    "Convolutions with weights drawn by a seed, under torchvision's names."
    torch.manual_seed(0)
    layers = PERCEPTUAL[network].layers().state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({f"features.{name}": value for name, value in layers.items()}, path)
    return path


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    "A cache of torch with both networks."
    home = tmp_path_factory.mktemp("torch")
    for network, kind in PERCEPTUAL.items():
        save_layers(network, home / "hub" / "checkpoints" / kind.file)
    return home


@pytest.fixture
def weights(torch_home, monkeypatch):
    "torch's cache is the one of this file."
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    return torch_home / "hub" / "checkpoints"


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    "torch's cache holds nothing."
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    return tmp_path / "empty" / "hub" / "checkpoints"


def images(*hw, count=2):
    return torch.rand(2, count, 3, *hw, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("network", PERCEPTUAL)
def test_equal_images_have_no_distance_and_no_gradient(weights, network):
    pred, target = images(64, 48)
    assert (lpips(pred, target, network) > 0).all()
    pred = target.clone().requires_grad_()
    found = lpips(pred, target, network)
    found.sum().backward()
    assert torch.equal(found, torch.zeros(2)) and not pred.grad.any()


@pytest.mark.parametrize("network", PERCEPTUAL)
def test_the_gradient_reaches_the_rendered_image_alone(weights, network):
    pred, target = images(40, 40)
    pred.requires_grad_()
    target.requires_grad_()
    lpips(pred, target, network).sum().backward()
    assert pred.grad.abs().flatten(1).amax(1).min() > 0 and target.grad is None
    net = perceptual_net(network, *perceptual_files(network))
    assert not net.training and not any(
        p.requires_grad or p.grad is not None for p in net.parameters()
    )


def test_the_gradient_is_that_of_differences(weights):
    pred, target = images(32, 32, count=1).double()
    way = torch.randn(pred.shape, generator=torch.Generator().manual_seed(2)).double()
    pred.requires_grad_()
    (slope,) = torch.autograd.grad(lpips(pred, target).sum(), pred)
    with torch.no_grad():
        ahead, behind = (lpips(pred + step * way, target).sum() for step in (1e-6, -1e-6))
    assert float((slope * way).sum()) == pytest.approx(float(ahead - behind) / 2e-6, rel=1e-4)
    lpips(*images(32, 32))  # and float32 again


def test_an_image_counts_by_itself_and_brighter_than_one_stays_so(weights):
    pred, target = images(33, 47)
    both = lpips(pred, target)
    alone = torch.cat([lpips(pred[k : k + 1], target[k : k + 1]) for k in range(2)])
    assert torch.allclose(both, alone, atol=1e-6)
    bright = (2 * pred).requires_grad_()
    lpips(bright, target).sum().backward()
    assert bright.grad[bright > 1].any()
    assert not torch.allclose(lpips(2 * pred, target), lpips((2 * pred).clamp(max=1), target))


def test_one_call_leaves_nothing_to_the_next(weights):
    _kept_net.cache_clear()
    pred, target = images(40, 33)
    with torch.inference_mode():
        first = lpips(pred, target)
    lpips(pred.bfloat16(), target.bfloat16())  # fewer digits, for itself alone
    drawn = pred.clone().requires_grad_()
    again = lpips(drawn, target)
    again.sum().backward()
    assert torch.equal(again, first) and drawn.grad.any()


@pytest.mark.parametrize("network", PERCEPTUAL)
def test_the_smallest_image_that_is_taken_is_the_smallest_that_works(weights, network):
    side = PERCEPTUAL[network].side
    assert lpips(*images(side, side), network).isfinite().all()
    with pytest.raises(ValueError, match=f"at least {side} x {side} pixels for {network!r}"):
        lpips(*images(side, side - 1), network)
    with pytest.raises(RuntimeError, match="too small"):
        PERCEPTUAL[network].layers()(torch.zeros(1, 3, side, side - 1))


@pytest.mark.parametrize("network", PERCEPTUAL)
def test_values_and_gradients_are_those_of_torchmetrics(torch_home, tmp_path, monkeypatch, network):
    "With torchvision, which builds the same networks and reads whole files of weights."
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    kind = PERCEPTUAL[network]
    torch.manual_seed(0)
    whole = tmp_path / "hub" / "checkpoints" / kind.file
    whole.parent.mkdir(parents=True)
    torch.save(getattr(models, kind.model)(weights=None).state_dict(), whole)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = LearnedPerceptualImagePatchSimilarity(network, reduction="sum", normalize=True)
    theirs.net.double()  # in float32 a ReLU near zero is open in one of both and closed in the other
    pred, target = images(64, 80).double()
    pred.requires_grad_()
    values = lpips(pred, target, network).sum(), theirs(pred, target)
    whole.unlink()  # VGG16's has half a gigabyte
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-6)
    ours, other = (torch.autograd.grad(value, pred)[0] for value in values)
    assert (ours - other).norm() <= 1e-4 * other.norm() and other.norm() > 0
    assert models.get_model_weights(kind.model).DEFAULT.url.endswith(f"/{kind.file}")


def test_the_term_trains_objects_alone(weights, tmp_path):
    recipe = object_recipe(lpips=1.0)
    row, moved = one_step(recipe, tmp_path)
    assert row["skipped"] == "0" and float(row["loss"]) > 0 and float(row["grad_norm"]) > 0
    assert {"backbone", "head"} <= moved


def test_the_term_adds_up_and_has_a_column(weights, rooms, tmp_path):  # noqa: F811
    recipe = change(scene_recipe(rooms, colour=1.0, lpips=0.25), resolution=32)
    row, _ = one_step(recipe, tmp_path)
    total = float(row["colour"]) + 0.25 * float(row["lpips"])
    assert float(row["loss"]) == pytest.approx(total, rel=1e-5) and float(row["lpips"]) > 0


def test_another_network_and_another_file_have_an_effect(weights, tmp_path):
    rows = []
    torch.manual_seed(5)
    other = {
        name: torch.randn_like(v) / 30
        for name, v in torch.load(weights / PERCEPTUAL["alex"].file).items()
    }
    torch.save(other, tmp_path / "other.pth")
    for n, values in enumerate(
        ({}, dict(lpips_network="vgg"), dict(lpips_weights=str(tmp_path / "other.pth")))
    ):
        folder = tmp_path / str(n)
        folder.mkdir()
        row, _ = one_step(change(object_recipe(lpips=1.0), **values), folder)
        rows.append(float(row["loss"]))
    assert len(set(rows)) == 3


def one_line(call, kind, *words):
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_weights_that_are_not_here_are_named_before_data_are_read(empty_home):
    recipe = change(object_recipe(lpips=0.1), source="/nowhere", layout="shapenet")
    words = (
        "alexnet-owt-7be5be79.pth",
        "expected the weights of alexnet",
        "--lpips-weights",
        "torchvision.models",
    )
    one_line(lambda: pretrain_task(recipe), FileNotFoundError, str(empty_home), *words)
    vgg = change(recipe, lpips_network="vgg")
    one_line(lambda: pretrain_task(vgg), FileNotFoundError, str(empty_home), "vgg16-397923af.pth")
    named = change(recipe, lpips_weights="mine.pth")
    one_line(
        lambda: pretrain_task(named), FileNotFoundError, "mine.pth: expected the weights of alexnet"
    )
    assert not empty_home.exists()  # nothing was downloaded


def test_the_command_line_says_it_in_one_line(empty_home, tmp_path, capsys):
    words = [
        "pretrain",
        "object-transformer-mini",
        "--lpips",
        "0.1",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(words) != 0
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "alexnet-owt-7be5be79.pth" in said
    assert not (tmp_path / "run").exists()


def test_a_file_of_something_else_is_named(weights, tmp_path):
    alex, vgg = (weights / PERCEPTUAL[network].file for network in ("alex", "vgg"))
    broken = tmp_path / "cut.pth"
    broken.write_bytes(alex.read_bytes()[:1000])
    page = tmp_path / "page.pth"
    page.write_text("<html>sign in</html>")
    state = torch.load(alex)
    state["features.0.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    state["features.0.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save(state, tmp_path / "shape.pth")
    for network, file, words in (
        ("alex", vgg, "found no features.3"),
        ("vgg", alex, "found no features."),
        ("alex", broken, "that does not load"),
        ("alex", page, "found a web page"),
        ("alex", tmp_path / "nan.pth", "expected finite weights"),
        ("alex", tmp_path / "shape.pth", "size mismatch"),
    ):
        recipe = change(object_recipe(lpips=1.0), lpips_network=network, lpips_weights=str(file))
        one_line(lambda: check_terms(recipe), ValueError, str(file), words)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers_are_named(weights, tmp_path, dtype):
    state = torch.load(weights / PERCEPTUAL["alex"].file)
    state["features.3.weight"] = state["features.3.weight"].to(dtype)
    torch.save(state, tmp_path / "other.pth")
    wrong = change(object_recipe(lpips=1.0), lpips_weights=str(tmp_path / "other.pth"))
    words = str(tmp_path / "other.pth"), f"found features.3.weight of {dtype}"
    one_line(lambda: check_terms(wrong), ValueError, *words)


def test_what_is_no_file_of_tensors_is_named(weights, tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    wrong = change(object_recipe(lpips=1.0), lpips_weights=str(tmp_path / "list.pth"))
    one_line(lambda: check_terms(wrong), ValueError, "list.pth", "found a list in it")
    wrong = change(wrong, lpips_weights=["one.pth", "two.pth"])
    expected = "lpips_weights: expected the path of one file, got ['one.pth', 'two.pth']"
    one_line(lambda: check_terms(wrong), ValueError, expected)


def test_the_network_is_read_once(weights, monkeypatch):
    reads = []
    read = PerceptualNet.__init__

    def noted(net, *how):
        reads.append(how)
        read(net, *how)

    monkeypatch.setattr(PerceptualNet, "__init__", noted)
    _kept_net.cache_clear()
    check_terms(object_recipe(lpips=1.0))
    lpips(*images(40, 40))
    lpips(*images(40, 40).double())
    assert len(reads) == 1


def test_without_torchmetrics_one_line_names_the_extra(weights, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "torchmetrics", raising=False)
    recipe = object_recipe(lpips=1.0)
    one_line(
        lambda: check_terms(recipe), ImportError, "torchmetrics", "pip install 'unipre3d[lpips]'"
    )


def test_values_that_cannot_be_or_have_no_effect_are_refused(weights):
    one_line(
        lambda: check_objective(RenderObjective(lpips_network="resnet")),
        ValueError,
        "lpips_network: expected one of alex, vgg; got 'resnet'",
    )
    usual = object_recipe(colour=1.0)
    for values in (dict(lpips_network="vgg"), dict(lpips_weights="mine.pth")):
        name = next(iter(values)).replace("_", "-")
        changed = change(usual, **values)
        one_line(lambda: check_changes(changed, usual), ValueError, name, "with an lpips term")
        check_changes(change(object_recipe(lpips=1.0), **values), object_recipe(lpips=1.0))
    small = change(object_recipe(lpips=1.0), resolution=24)
    one_line(
        lambda: check_terms(small), ValueError, "at least 31 pixels for 'alex'", "--resolution 24"
    )
    volume = change(object_recipe(lpips=1.0), scene="volume")
    one_line(
        lambda: check_terms(volume), ValueError, "terms.lpips: expected colour, alpha or depth"
    )


def test_a_run_without_the_term_reads_no_weights(empty_home):
    assert list(TERMS)[-1] == "lpips"
    assert len(pretrain_task(object_recipe(colour=1.0, lpips=0.0)).samples)
