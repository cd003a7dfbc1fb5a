"""The frozen image branch: parity with the released one, freezing, sizes, sources and their errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from warm import Command, script

from unipre3d.image import (
    CachedFeatures,
    KLImageEncoder,
    LazyEncoder,
    last_up_block,
    load_autoencoder,
    model_hash,
    rgb_features,
)
from unipre3d.tasks.autoencoder import new_autoencoder, reconstruct, save_autoencoder

PARITY = Path(__file__).parent / "parity"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Tiny convolutions are faster on one thread, far more so on a busy machine."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def released():
    "The released image branch: its autoencoder rebuilt from the side-car, its input and its outputs."
    from diffusers import AutoencoderKL

    tensors, card = (
        load_file(PARITY / "image_branch_vae.safetensors"),
        json.loads((PARITY / "image_branch_vae.json").read_text()),
    )
    vae, prefix = AutoencoderKL(**card["kwargs"]), "state/image_network.encoder."
    vae.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    return vae.eval(), tensors


@pytest.fixture(scope="module")
def mini():
    return KLImageEncoder.from_pretrained("mini")


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_parity_with_released(released):
    vae, t = released
    image = (t["in/image"].double() + 1) / 2  # the released code left out the scaling to -1..1
    ours, stored = KLImageEncoder(vae)(image), t["out/decoder_block_3"]
    assert ours.shape == stored.shape
    # values up to 4.2 after 40 float32 layers: the stored ones are themselves 2e-5 away from a float64 run
    assert (ours - stored).abs().max() < 5e-5 and (ours - stored).abs().mean() < 5e-6
    assert (
        KLImageEncoder(vae)(image.float()) - stored
    ).abs().max() < 1e-4  # float32 images lose the last bit
    assert (vae.encode(t["in/image"]).latent_dist.mode() - t["out/latent_mode"]).abs().max() < 1e-5


def test_scaling_matters(released):
    vae, t = released
    unscaled = (KLImageEncoder(vae)(t["in/image"]) - t["out/decoder_block_3"]).abs().max()
    assert unscaled > 1e-2
    x = t["in/image"]
    assert torch.equal(KLImageEncoder(vae)(x), last_up_block(vae, x * 2 - 1).detach())


def test_features_are_what_the_last_convolution_reads(mini):
    rgb = torch.rand(2, 3, 32, 40)
    decoder = mini.vae.decoder
    with torch.no_grad():
        finished = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(mini(rgb))))
    assert torch.allclose(((finished + 1) / 2).clamp(0, 1), reconstruct(mini.vae, rgb), atol=1e-5)


def test_frozen(mini):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.head = mini, torch.nn.Dropout()

    model = Model().train()
    assert model.head.training and not any(m.training for m in mini.modules())
    assert not any(p.requires_grad for p in mini.parameters())
    rgb = torch.rand(1, 3, 16, 16, requires_grad=True)
    before = {k: v.clone() for k, v in mini.state_dict().items()}
    features = mini(rgb)
    assert (
        not features.requires_grad and not features.is_inference()
    )  # it must be usable in a graph that others record
    assert all(torch.equal(v, before[k]) for k, v in mini.state_dict().items())
    assert torch.equal(features, mini(rgb))  # the mode, not a sample


@pytest.mark.parametrize("hw", [(64, 64), (30, 41), (1, 1), (9, 128), (120, 160)])
def test_any_size(mini, hw):
    rgb = torch.rand(2, 3, *hw)
    features = mini(rgb)
    assert (
        features.shape == (2, mini.width, *hw)
        and features.dtype == torch.float32
        and features.isfinite().all()
    )
    pad = F.pad(rgb, (0, -hw[1] % mini.factor, 0, -hw[0] % mini.factor), mode="replicate")
    assert torch.allclose(
        features, mini(pad)[..., : hw[0], : hw[1]], atol=1e-4
    )  # the top-left corner stays where it is


def test_no_images(mini):
    assert mini(torch.zeros(0, 3, 20, 20)).shape == (0, mini.width, 20, 20)


def test_chunks_and_order_do_not_matter(mini):
    rgb = torch.rand(7, 3, 24, 24)
    whole = mini(rgb)
    parts = KLImageEncoder(mini.vae, chunk=2)(rgb)
    assert torch.allclose(whole, parts, atol=1e-3) and torch.allclose(
        whole.flip(0), mini(rgb.flip(0)), atol=1e-3
    )


def test_other_dtypes(mini):
    rgb = torch.rand(1, 3, 16, 16)
    assert mini(rgb.double()).dtype == torch.float64
    assert torch.allclose(mini(rgb.double()).float(), mini(rgb), atol=1e-4)
    assert mini(rgb.half()).dtype == torch.float16


@pytest.mark.parametrize("image_net", ["mini", "rgb"])
@pytest.mark.parametrize(
    "rgb, word",
    [
        (torch.rand(2, 4, 8, 8), "[2, 4, 8, 8]"),
        (torch.rand(3, 8, 8), "[3, 8, 8]"),
        (torch.rand(2, 8, 8, 3), "[2, 8, 8, 3]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 8, 8), 255.0), "255"),
        (torch.full((1, 3, 8, 8), -1.0), "-1"),
        (torch.full((1, 3, 8, 8), torch.nan), "nan"),
    ],
)
def test_wrong_images_are_named(mini, image_net, rgb, word):
    with pytest.raises(ValueError) as error:
        (mini if image_net == "mini" else rgb_features)(rgb)
    assert word in one_line(error)


def test_rgb_features():
    rgb = torch.rand(2, 3, 8, 8, requires_grad=True)
    assert (
        torch.equal(rgb_features(rgb), rgb)
        and not rgb_features(rgb).requires_grad
        and rgb_features.width == 3
    )


def test_wrong_folders_are_named(tmp_path):
    for source in (tmp_path, tmp_path / "missing", "./missing", "missing"):
        with pytest.raises(FileNotFoundError) as error:
            KLImageEncoder.from_pretrained(source)
        assert str(source).lstrip("./") in one_line(error)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError) as error:
        load_autoencoder(tmp_path)
    assert "diffusion_pytorch_model.safetensors" in one_line(error)
    save_autoencoder(new_autoencoder((8, 8)), tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError) as error:
        load_autoencoder(tmp_path)
    assert str(tmp_path) in one_line(error)
    (tmp_path / "config.json").write_text("{ broken")
    with pytest.raises(ValueError) as error:
        load_autoencoder(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_wrong_model_is_named(tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(
        in_channels=4, out_channels=4, block_out_channels=(8,), norm_num_groups=8
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        load_autoencoder(tmp_path)
    assert "3 input channels" in one_line(error)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    with pytest.raises(ValueError) as error:
        load_autoencoder(tmp_path)
    assert "AutoencoderTiny" in one_line(error)


OFFLINE = """
import sys
from unipre3d.image import KLImageEncoder
import diffusers

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "time.sleep"):
        print(event, args)

sys.addaudithook(watch)
try:
    KLImageEncoder.from_pretrained("nobody/no-such-autoencoder")
except FileNotFoundError as error:
    print(error)
"""


def test_hub_id_offline_is_one_line_at_once(tmp_path):
    "At once: no connection is tried, and nothing is waited for."
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    (message,) = run.stdout.splitlines()
    assert "nobody/no-such-autoencoder" in message and '"mini"' in message and "folder" in message
    assert "Traceback" not in run.stderr


# -- maps that are computed once


@pytest.fixture
def images():
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_cached_maps_are_the_same_bits(mini, images, tmp_path):
    cached = CachedFeatures(mini, 2**22, tmp_path)
    plain = mini(images)
    assert torch.equal(cached(images), plain)
    order = torch.tensor([5, 1, 7])
    assert torch.equal(cached(images[order]), plain[order])
    assert torch.equal(CachedFeatures(mini, 2**22, tmp_path)(images), plain)  # a later run
    file = cached.file(tuple(plain.shape[1:]))
    assert (file.hits, file.misses) == (3, 8)


def test_what_is_missing_does_not_depend_on_its_neighbours(mini, images, tmp_path):
    alone = CachedFeatures(mini, 2**22, tmp_path / "a")(images[3:4])
    assert torch.equal(alone, CachedFeatures(mini, 2**22, tmp_path / "b")(images)[3:4])


def test_a_run_in_bfloat16_leaves_no_coarse_maps(mini, images, tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        coarse = mini(images)
        cached = CachedFeatures(mini, 2**22, tmp_path)(images)
    plain = mini(images)
    assert not torch.equal(coarse, plain)
    assert torch.equal(cached, plain)
    assert torch.equal(CachedFeatures(mini, 2**22, tmp_path)(images), plain)  # a later run


def test_a_damaged_map_is_made_again(mini, images, tmp_path):
    cached = CachedFeatures(mini, 2**22, tmp_path)
    plain = cached(images)
    (path,) = tmp_path.glob("feature-*.bin")
    data = bytearray(path.read_bytes())
    middle = [place + 40 for place in range(0, len(data), 24 + plain[0].nbytes)]
    for place in middle:
        data[place : place + 4] = b"oops"
    path.write_bytes(data)
    again = CachedFeatures(mini, 2**22, tmp_path)
    assert torch.equal(again(images), plain)
    assert again.file(tuple(plain.shape[1:])).hits == 0
    assert torch.equal(again(images), plain)
    assert again.file(tuple(plain.shape[1:])).hits == len(images)
    path.write_bytes(path.read_bytes()[:1000])  # cut short
    assert torch.equal(CachedFeatures(mini, 2**22, tmp_path)(images), plain)


def test_other_weights_have_other_maps(mini, images, tmp_path):
    import copy

    CachedFeatures(mini, 2**22, tmp_path)(images)
    other = copy.deepcopy(mini)
    with torch.no_grad():
        other.vae.decoder.conv_in.bias += 0.1
    assert torch.equal(CachedFeatures(other, 2**22, tmp_path)(images), other(images))


def test_another_kind_of_processor_has_maps_of_its_own():
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("a processor of one kind alone")
    code = (
        "from unipre3d.image import LazyEncoder, model_hash; print(model_hash(LazyEncoder('mini')))"
    )
    run = [sys.executable, "-c", code]
    env = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run(run, capture_output=True, text=True, env=env)
    names = [model_hash(LazyEncoder("mini")), done.stdout.strip()]
    assert [len(name) for name in names] == [16, 16] and names[0] != names[1]


def test_the_bound_is_kept(mini, tmp_path):
    record = 24 + 16 * 16 * 16 * 4
    cached = CachedFeatures(mini, 10 * record, tmp_path)
    for k in range(4):
        images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(k))
        assert torch.equal(cached(images), mini(images))
    (path,) = tmp_path.glob("feature-*.bin")
    assert path.stat().st_size <= 10 * record
    old = tmp_path / "feature-old-16x1x1-1.bin"
    old.write_bytes(b"1" * 20 * record)
    os.utime(old, (0, 0))
    CachedFeatures(mini, 10 * record, tmp_path)(images)
    assert not old.exists() and path.exists()


def test_a_folder_that_cannot_be_written(mini, images, tmp_path):
    (tmp_path / "file").write_text("no folder")
    cached = CachedFeatures(mini, 2**22, tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="--feature-cache-mb 0"):
        maps = cached(images)
    assert torch.equal(maps, mini(images))


def test_off_writes_nothing(images, tmp_path, monkeypatch):
    from unipre3d.tasks.pretrain import GaussianModel, cached_image_net

    monkeypatch.setenv("UNIPRE3D_CACHE", str(tmp_path / "cache"))
    off = cached_image_net(GaussianModel(feature_cache_mb=0))
    maps = off(images)
    assert isinstance(off, KLImageEncoder) and not (tmp_path / "cache").exists()
    on = cached_image_net(GaussianModel(feature_cache_mb=1))
    assert torch.equal(on(images), maps) and len(list((tmp_path / "cache").iterdir())) == 1


WRITER = """
import hashlib, sys
import numpy as np
from unipre3d.records import ArrayFile
file = ArrayFile(sys.argv[1], (64, 64), limit=30 * (24 + 4 * 64 * 64))
wrong = 0
for turn in range(20):
    for n in range(40):
        key = hashlib.blake2b(bytes([n]), digest_size=16).digest()
        known = file.get(key)
        if known is not None:
            wrong += int((known != n).any())
        file.put(key, np.full((64, 64), n))
print(wrong, file.hits)
"""


def test_processes_share_a_file(tmp_path):
    writer = tmp_path / "writer.py"
    writer.write_text(WRITER)
    running = [Command(writer, tmp_path / "shared.bin", entry=script) for _ in range(3)]
    for process in running:
        wrong, hits = process.communicate(timeout=300)[0].split()
        assert process.returncode == 0 and int(wrong) == 0 and int(hits) > 0
