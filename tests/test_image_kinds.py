"""Image models of other kinds by name: tiny ones with random weights, saved to a folder and loaded by its name."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

from unipre3d.image import (
    IMAGENET,
    TAEF2_FILES,
    CachedFeatures,
    FrozenEncoder,
    GlobalBlock,
    KLImageEncoder,
    LazyEncoder,
    PatchImageEncoder,
    TAEF2ImageEncoder,
    TinyImageEncoder,
    load_image_encoder,
    load_patches,
    model_hash,
)
from unipre3d.tasks.pretrain import GaussianModel, build_image_net, cached_image_net

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def images():
    return torch.rand(6, 3, 20, 28, generator=torch.Generator().manual_seed(0))


def save_tiny(folder, seed=0, width=8):
    from diffusers import AutoencoderTiny

    torch.manual_seed(seed)
    blocks = dict(num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1))
    widths = dict(encoder_block_out_channels=(width,) * 4, decoder_block_out_channels=(width,) * 4)
    AutoencoderTiny(**blocks, **widths).save_pretrained(folder)
    return folder


def save_kl(folder):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = dict(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2
    )
    AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks).save_pretrained(folder)
    return folder


def save_patches(folder, kind, seed=0):
    import transformers

    torch.manual_seed(seed)
    values = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    if kind == "siglip":
        config = transformers.SiglipVisionConfig(image_size=32, patch_size=8, **values)
        transformers.SiglipVisionModel(config).save_pretrained(folder)
    else:
        names = dict(dinov2="Dinov2", dinov2_with_registers="Dinov2WithRegisters")
        config = getattr(transformers, f"{names[kind]}Config")(
            image_size=42, patch_size=7, **values
        )
        getattr(transformers, f"{names[kind]}Model")(config).save_pretrained(folder)
    return folder


PATCHES = {"dinov2": (7, 42), "dinov2_with_registers": (7, 42), "siglip": (8, 32)}


def one_line(call, *words, kind=ValueError):
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_a_tiny_autoencoder_by_its_folder(tmp_path, images):
    net = load_image_encoder(save_tiny(tmp_path))
    assert isinstance(net, TinyImageEncoder) and net.width == 8 and not net.training
    maps = net(images)
    assert maps.shape == (6, 8, 20, 28) and not maps.requires_grad
    x = F.pad(images, (0, 4, 0, 4), mode="replicate")  # the next multiples of 8
    image = net.model.decode(net.model.encode(x * 2 - 1).latents).sample
    full = net(x)
    assert torch.allclose(net.model.decoder.layers[-1](full) * 2 - 1, image, atol=1e-5)
    assert torch.equal(full[..., :20, :28], maps)  # padding is what the net does itself


def save_taef2(folder):
    "Files with TAEF2's names and layers and untrained numbers: half of AutoencoderTiny's blocks get a branch."
    from diffusers import AutoencoderTiny
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = AutoencoderTiny(latent_channels=32)
    branches = dict(encoder=(11, 12, 13), decoder=(2, 3, 4))
    for half, file, first in zip(("encoder", "decoder"), TAEF2_FILES, (0, 1)):
        layers = getattr(net, half).layers
        for k in branches[half]:
            layers[k] = GlobalBlock(layers[k], 64)
        state = {}
        for name, value in layers.state_dict().items():
            number, _, rest = name.partition(".")
            state[f"{int(number) + first}.{rest}"] = value.half().contiguous()
        save_file(state, folder / file)
    return net


def test_two_files_of_taef2_are_read_into_the_layers_of_diffusers(tmp_path, images):
    made = save_taef2(tmp_path).half().float()
    net = load_image_encoder(tmp_path)
    assert isinstance(net, TAEF2ImageEncoder) and net.width == 64
    maps = net(images)
    assert maps.shape == (6, 64, 20, 28)
    x = F.pad(images, (0, 4, 0, 4), mode="replicate")
    image = made.decode(made.encode(x * 2 - 1).latents).sample
    assert torch.equal(made.decoder.layers[-1](net(x)) * 2 - 1, image)
    kept = CachedFeatures(LazyEncoder(tmp_path), 2**24, tmp_path / "maps")
    assert torch.allclose(kept(images), maps, atol=1e-5)
    model = GaussianModel(image=str(tmp_path), feature_cache_mb=0)
    assert isinstance(build_image_net(model), TAEF2ImageEncoder)


def test_other_files_in_the_place_of_taef2_are_named(tmp_path):
    save_taef2(tmp_path)
    encoder, decoder = (tmp_path / file for file in TAEF2_FILES)
    whole = encoder.read_bytes()
    encoder.write_bytes(decoder.read_bytes())
    one_line(lambda: load_image_encoder(tmp_path), str(encoder), "the layers of TAEF2")
    encoder.write_bytes(whole[: len(whole) // 2])
    one_line(lambda: load_image_encoder(tmp_path), str(encoder))
    encoder.write_bytes(whole)
    decoder.unlink()
    one_line(lambda: load_image_encoder(tmp_path), str(decoder), kind=FileNotFoundError)
    one_line(lambda: LazyEncoder(tmp_path), str(decoder), kind=FileNotFoundError)


def test_a_whole_diffusion_model_by_its_subfolder(tmp_path, images):
    save_kl(tmp_path / "vae")
    save_tiny(tmp_path / "small")
    nets = [load_image_encoder(tmp_path, subfolder=name) for name in ("vae", "small")]
    assert [type(net) for net in nets] == [KLImageEncoder, TinyImageEncoder]
    assert torch.equal(nets[0](images), KLImageEncoder.from_pretrained(tmp_path / "vae")(images))
    model = GaussianModel(image=str(tmp_path), image_subfolder="small", feature_cache_mb=0)
    assert isinstance(build_image_net(model), TinyImageEncoder)


@needs_transformers
@pytest.mark.parametrize("kind", PATCHES)
def test_patches_are_features_of_their_place(tmp_path, images, kind):
    patch, size = PATCHES[kind]
    net = load_image_encoder(save_patches(tmp_path, kind))
    assert isinstance(net, PatchImageEncoder) and net.width == 24
    short = size // patch
    assert net.map_hw((20, 28)) == (short, round(short * 28 / 20))
    maps = net(images)
    assert maps.shape == (6, 24, *net.map_hw((20, 28)))
    x = F.interpolate(images, [patch * s for s in maps.shape[-2:]], mode="bilinear", antialias=True)
    mean, deviation = IMAGENET if "dinov2" in kind else ([0.5] * 3, [0.5] * 3)
    x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    more = dict(interpolate_pos_encoding=True) if kind == "siglip" else {}
    rows = net.model(pixel_values=x, **more).last_hidden_state
    count = maps.shape[-2] * maps.shape[-1]
    assert torch.allclose(maps.flatten(2), rows[:, -count:].transpose(1, 2), atol=1e-5)
    assert rows.shape[1] - count == dict(dinov2=1, dinov2_with_registers=5, siglip=0)[kind]


@needs_transformers
def test_a_corner_of_the_image_is_a_corner_of_the_map(tmp_path):
    net = load_image_encoder(save_patches(tmp_path, "siglip"))
    plain = torch.full((1, 3, 32, 48), 0.5)
    other = plain.clone()
    other[..., 24:, 40:] = 1.0
    change = (net(other) - net(plain)).norm(dim=1)[0]
    assert change.argmax() == change.numel() - 1


@needs_transformers
@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damaged_weights_of_patches_are_named(tmp_path, damage):
    save_patches(tmp_path, "dinov2")
    weights = tmp_path / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        save_patches(tmp_path / "siglip", "siglip")
        weights.write_bytes((tmp_path / "siglip" / "model.safetensors").read_bytes())
    one_line(
        lambda: load_image_encoder(tmp_path),
        "model.safetensors",
        kind=FileNotFoundError if damage == "missing" else ValueError,
    )


def test_without_its_package_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    one_line(
        lambda: load_patches("facebook/dinov2-small", "dinov2"),
        "facebook/dinov2-small",
        "unipre3d[vision]",
        kind=ImportError,
    )


def test_other_kinds_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    one_line(lambda: load_image_encoder(tmp_path), "expected one of AutoencoderKL", "found bert")
    one_line(lambda: load_image_encoder("./none"), '"module:name"', kind=FileNotFoundError)
    (tmp_path / "config.json").write_text("{")
    one_line(lambda: load_image_encoder(tmp_path), "config.json")


def test_a_hub_id_without_a_network_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    one_line(
        lambda: load_image_encoder("nobody/no-such-model", subfolder="vae"),
        "vae/config.json",
        "not in the local cache",
        kind=FileNotFoundError,
    )


@needs_transformers
def test_weights_that_are_not_to_be_had_are_one_line(monkeypatch, tmp_path):
    "The settings were in the cache, the weights were not."
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    one_line(
        lambda: load_patches("nobody/no-such-model", "dinov2"),
        "model.safetensors",
        "not in the local cache",
        kind=FileNotFoundError,
    )


def test_a_folder_is_never_an_id_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "own").mkdir(parents=True)
    one_line(
        lambda: load_image_encoder("models/own", subfolder="vae"),
        "found no folder models/own/vae",
        kind=FileNotFoundError,
    )


def test_any_callable_of_a_module(tmp_path, monkeypatch, images):
    text = "def half(rgb):\n    return rgb[..., ::2, ::2] * 2\n\n\nhalf.width = 3\n\n\ndef none(rgb):\n    return rgb\n"
    (tmp_path / "own_encoder.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    net = cached_image_net(GaussianModel(image="own_encoder:half"))
    assert net.width == 3 and torch.equal(net(images), images[..., ::2, ::2] * 2)
    assert not isinstance(net, FrozenEncoder)  # what is not known is not kept
    for name, words in (("none", "a width"), ("nobody", "nobody")):
        one_line(lambda: load_image_encoder(f"own_encoder:{name}"), words)


def test_maps_of_one_model_are_never_those_of_another(tmp_path, images):
    names = set()
    for name, seed in (("a", 0), ("b", 1)):
        net = load_image_encoder(save_tiny(tmp_path / name, seed))
        cached = CachedFeatures(net, 2**24, tmp_path / "cache")
        first = cached(images)
        assert torch.allclose(first, net(images), atol=1e-5)
        assert torch.equal(CachedFeatures(net, 2**24, tmp_path / "cache")(images), first)
        names.add(cached.name)
    save_kl(tmp_path / "kl")
    names.add(model_hash(load_image_encoder(tmp_path / "kl")))
    assert len(names) == 3


def test_a_lazy_model_of_another_kind_is_the_same(tmp_path, images):
    save_tiny(tmp_path / "net")
    eager = CachedFeatures(load_image_encoder(tmp_path / "net"), 2**24, tmp_path / "a")(images)
    lazy = LazyEncoder(tmp_path / "net")
    assert lazy.net is None and lazy.width == 8
    assert torch.equal(CachedFeatures(lazy, 2**24, tmp_path / "b")(images), eager)
    later = CachedFeatures(LazyEncoder(tmp_path / "net"), 2**24, tmp_path / "b")
    assert torch.equal(later(images), eager) and later.net.net is None


@needs_transformers
def test_a_lazy_vision_transformer_is_the_same(tmp_path, images):
    save_patches(tmp_path / "net", "dinov2")
    plain = load_image_encoder(tmp_path / "net")
    cached = CachedFeatures(LazyEncoder(tmp_path / "net"), 2**24, tmp_path / "a")
    assert torch.allclose(cached(images), plain(images), atol=1e-5)
    assert cached.net.width == plain.width and cached.net.map_hw((20, 28)) == plain.map_hw((20, 28))
