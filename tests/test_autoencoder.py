"""The small autoencoder: saving, training that resumes, the shipped weights."""

import json

import pytest
import torch

from unipre3d.core import data_dir
from unipre3d.data.shapenet import ShapeNetViews
from unipre3d.image import KLImageEncoder
from unipre3d.losses import psnr
from unipre3d.records import data_hash
from unipre3d.tasks.autoencoder import (
    cosine_lr,
    new_autoencoder,
    reconstruction_scores,
    save_autoencoder,
    shrink,
    split_images,
    train_autoencoder,
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


def test_training_learns_and_resumes(tmp_path):
    images = torch.zeros(12, 3, 40, 40, dtype=torch.uint8)
    for i, image in enumerate(images):
        image[:, 8 : 8 + 2 * i + 4, 10:30] = torch.tensor([250, 20 * i, 90])[:, None, None]
    options = dict(steps=12, batch=4, size=16, progress=False)
    fresh = lambda: new_autoencoder((8, 8), latent_channels=2)
    whole, log = train_autoencoder(images, vae=fresh(), **options)
    losses = log["loss"]
    assert sum(losses[-4:]) < sum(losses[:4]) and not whole.training

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
        train_autoencoder(images, vae=fresh(), out=tmp_path, save_every=4, **options)
    resumed, again = train_autoencoder(images, vae=fresh(), out=tmp_path, save_every=4, **options)
    assert again["loss"] == losses and all(
        torch.equal(a, b)
        for a, b in zip(resumed.state_dict().values(), whole.state_dict().values())
    )
    with pytest.raises(ValueError) as error:
        train_autoencoder(images, vae=fresh(), out=tmp_path, **(options | {"batch": 3}))
    assert "batch = 4 there, 3 now" in one_line(error)


def test_training_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    train_autoencoder(
        torch.zeros(4, 3, 16, 16, dtype=torch.uint8),
        vae=new_autoencoder((8, 8)),
        steps=1,
        batch=2,
        size=16,
        progress=False,
    )
    assert torch.equal(state, torch.get_rng_state())


def test_cosine():
    assert (
        cosine_lr(0, 1000, 1.0) < 0.02
        and cosine_lr(99, 1000, 1.0) > 0.9
        and cosine_lr(999, 1000, 1.0) < 1e-4
    )


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
