"""The small autoencoder: saving, training that resumes, the shipped weights."""

import json

import pandas as pd
import pytest
import torch

from unipre3d.core import data_dir
from unipre3d.data.shapenet import ShapeNetViews
from unipre3d.image import KLImageEncoder
from unipre3d.losses import psnr
from unipre3d.records import data_hash
from unipre3d.runs.checkpoint import load_tensors
from unipre3d.runs.recipe import Optimiser, change, learning_rate
from unipre3d.tasks.autoencoder import (
    Patches,
    autoencoder_recipes,
    new_autoencoder,
    reconstruction_scores,
    save_autoencoder,
    shrink,
    split_images,
    train_mini,
)

MINI = data_dir() / "autoencoder-mini"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Tiny convolutions are faster on one thread, far more so on a busy machine."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mini():
    return KLImageEncoder.from_pretrained("mini")


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_save_and_load(tmp_path):
    vae = new_autoencoder((8, 8), latent_channels=2, seed=3)
    save_autoencoder(vae, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()
    assert (
        next(vae.parameters()).dtype == torch.float32
    )  # saving in half precision leaves the model alone
    rgb = torch.rand(1, 3, 16, 16)
    loaded = KLImageEncoder.from_pretrained(tmp_path)
    assert next(loaded.parameters()).dtype == torch.float32
    assert (loaded(rgb) - KLImageEncoder(vae)(rgb)).abs().max() < 2e-2


def pictures():
    images = torch.zeros(12, 3, 40, 40, dtype=torch.uint8)
    for i, image in enumerate(images):
        image[:, 8 : 8 + 2 * i + 4, 10:30] = torch.tensor([250, 20 * i, 90])[:, None, None]
    return images


class Readers:
    "Twelve pictures in place of a split of objects."

    n_views = 1

    def __init__(self, root=None, split="train"):
        alpha = torch.full((12, 1, 40, 40), 255, dtype=torch.uint8)
        self.images = torch.cat([pictures(), alpha], 1).numpy()

    def __len__(self):
        return len(self.images)

    def pixels(self, i, k):
        return self.images[i]

    def fingerprint(self):
        return "0" * 64


@pytest.fixture
def small(monkeypatch):
    "The recipe of the shipped autoencoder, small, on twelve pictures."
    import unipre3d.tasks.autoencoder as module

    values = dict(channels=(8, 8), latent_channels=2, patch=16, batch_size=4, steps=12)
    tiny = change(autoencoder_recipes["autoencoder-mini"], save_every=4, warmup=9, **values)
    monkeypatch.setitem(autoencoder_recipes, "autoencoder-mini", tiny)
    monkeypatch.setattr(module, "ShapeNetViews", Readers)
    scores = lambda vae, rgb, mask: {"psnr": psnr(vae(rgb).sample, rgb).mean().item()}
    monkeypatch.setattr(module, "reconstruction_scores", scores)
    return tiny


def column(folder, name):
    return pd.read_csv(folder / "metrics.csv")[name].tolist()


def test_training_learns_and_resumes(small, tmp_path, monkeypatch):
    weights = train_mini(tmp_path / "whole")
    losses = column(tmp_path / "whole", "loss")
    assert sum(losses[-4:]) < sum(losses[:4]) and len(losses) == 12
    assert KLImageEncoder.from_pretrained(weights).width == 8

    class Stop(Exception):
        pass

    calls, step = [0], torch.optim.AdamW.step

    def interrupted(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] > 7:
            raise Stop
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        train_mini(tmp_path / "cut")
    assert (
        len(column(tmp_path / "cut", "loss")) == 7 and not (tmp_path / "cut" / "weights").exists()
    )
    train_mini(tmp_path / "cut")  # from step 4, where it was saved
    assert column(tmp_path / "cut", "loss") == losses
    a, b = (load_tensors(tmp_path / k / "checkpoint.safetensors")[0] for k in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    monkeypatch.setitem(autoencoder_recipes, "autoencoder-mini", change(small, batch_size=3))
    with pytest.raises(ValueError) as error:
        train_mini(tmp_path / "cut")
    assert "expected batch_size = 4" in one_line(error) and "got 3" in one_line(error)


def test_drawing_leaves_the_global_random_state_alone(small):
    state = torch.get_rng_state()
    task = small.build_task()
    task.samples.__getitems__([(0, 0), (1, 0)])
    assert torch.equal(state, torch.get_rng_state())
    images = (torch.rand(12, 3, 40, 40) * 255).byte()
    draws = [(0, 0), (0, 0), (1, 0), (0, 1)]  # seed, how often it was drawn before
    a, same, seed, later = (Patches(images, 16, s).__getitems__([(0, n), (1, n)]) for s, n in draws)
    assert torch.equal(a, same) and not torch.equal(a, seed) and not torch.equal(a, later)


def test_the_rate_warms_up_and_falls_to_zero():
    values = Optimiser(lr=1.0, warmup=99)
    rate = [learning_rate(step, 1000, values) for step in range(1000)]
    assert rate[0] < 0.02 and rate[99] > 0.9 and rate[999] < 1e-4
    assert autoencoder_recipes["autoencoder-mini"].optimiser.warmup == 99


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    b, mask = a.clone(), torch.zeros(2, 4, 4, dtype=torch.bool)
    b[:, :, 0, 0], mask[:, 0, :2] = 0.1, True
    assert torch.allclose(
        psnr(a, b, mask), torch.full((2,), 23.0103), atol=1e-3
    )  # half of the masked pixels are 20 dB off
    assert torch.allclose(psnr(a, b), torch.full((2,), 32.0412), atol=1e-3)


def test_shipped_weights():
    weights, record = (
        MINI / "diffusion_pytorch_model.safetensors",
        json.loads((data_dir() / "records" / "autoencoder-mini.json").read_text()),
    )
    assert (
        weights.stat().st_size <= 8e6
        and record["sha256"] == data_hash(weights)
        and record["bytes"] == weights.stat().st_size
    )
    assert record["data"]["split"] == "train" and record["data"]["images"] == 24 * len(
        ShapeNetViews(split="train")
    )
    assert record["data"]["sha256"] == data_hash(data_dir() / "furniture.zip")
    assert json.loads((MINI / "config.json").read_text())["_class_name"] == "AutoencoderKL"


@pytest.mark.parametrize("size, at_least", [(64, 28.0), (128, 28.0)])
def test_shipped_weights_rebuild_held_out_images(mini, size, at_least):
    rgb, mask = shrink(split_images(ShapeNetViews(split="val"), views=1), size)
    scores = reconstruction_scores(mini.vae, rgb[::2], mask[::2])
    assert (
        scores["psnr"] > at_least
        and scores["psnr"] > scores["blurred_psnr"] + 3 > scores["constant_psnr"] + 3
    )
    assert scores["psnr_foreground"] > scores["blurred_psnr_foreground"] + 3
