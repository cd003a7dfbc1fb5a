"Point Cloud Mamba: released numbers, orders, ragged batches, odd clouds."

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parity_cases import close
from unipre3d.backbones import PCM
from unipre3d.backbones.backbone import match_released
from unipre3d.backbones.pcm import thin
from unipre3d.core import PointBatch

PARITY = Path(__file__).parent / "parity" / "backbone_pcm_eval"
SMALL = dict(
    embed_dim=12,
    k_neighbors=(4, 4, 4, 4),
    mamba_blocks=(1, 1, 1, 1),
    orders=("xyz", "hilbert", "z", "zyx"),
    prompts_per_order=2,
    prompt_width=10,
    out_channels=9,
    spare_head=False,
)
# The recorded outputs of the encoder's levels come from a run whose PYTHONHASHSEED was another than that of the features.
LEVELS_PROMPT_ORDER = ("zyx", "hilbert", "xyz", "yzx", "yxz", "z", "z-trans", "zxy", "xzy")


def pack(*clouds):
    xyz = torch.cat(clouds)
    return PointBatch(
        xyz, xyz, torch.cat([torch.full((len(c),), i) for i, c in enumerate(clouds)]), len(clouds)
    )


@pytest.fixture
def released():
    data, card = (
        load_file(f"{PARITY}.safetensors"),
        json.loads(PARITY.with_suffix(".json").read_text()),
    )
    model = PCM.from_released(card["kwargs"], card["order_prompt_ranges"])
    state = {k.removeprefix("state/"): v for k, v in data.items() if k.startswith("state/")}
    model.load_state_dict(model.convert_released(state))
    return model.eval(), data, state, card


def cloud_of(pos):
    flat = pos.flatten(0, 1)
    return PointBatch(
        flat[:, :3], flat, torch.arange(len(pos)).repeat_interleave(pos.shape[1]), len(pos)
    )


def test_parity_with_the_released_model(released):
    model, data, state, _ = released
    pos = data["in/pos"].clone().requires_grad_()
    p = model.body(model.stem(cloud_of(pos)))
    assert torch.equal(p.xyz.view(2, 64, 3), data["out/center"])
    close(p.feat.view(2, 64, -1), data["out/pre_fusion"])

    weight = state["fusion_mlps.0.weight"].clone().requires_grad_()
    mixed = torch.cat([p.feat, data["out/mapped"].flatten(0, 1)], 1)
    features = model.norm(
        torch.nn.functional.linear(mixed, weight, state["fusion_mlps.0.bias"]).relu()
    ).view(2, 64, -1)
    close(features, data["out/features"])
    (features * data["loss/R"]).sum().backward()
    close(pos.grad, data["grad/in/pos"])
    close(weight.grad, data["grad/state/fusion_mlps.0.weight"])
    recorded = match_released(
        dict(model.named_parameters()), model.released_weight, data, "grad/state/encoder."
    )
    for name, value in recorded.weights.items():
        close(model.get_parameter(name).grad, value)
    assert not recorded.misfit and len(recorded.weights) == 3


def test_parity_of_every_level(released):
    model, data, _, _ = released
    model.prompt_order = LEVELS_PROMPT_ORDER
    for i, level in enumerate(model.encode(model.stem(cloud_of(data["in/pos"])))):
        assert torch.equal(level.xyz.view(2, -1, 3), data[f"out/enc_p{i}"])
        close(level.feat.view(2, len(level) // 2, -1).mT, data[f"out/enc_x{i}"])


def test_prompts_without_ranges_are_those_of_hash_seed_0(released):
    model, _, _, card = released
    assert PCM.from_released(card["kwargs"]).prompt_order == model.prompt_order
    assert (
        PCM.from_released(
            card["kwargs"] | {"order_prompt_ranges": card["order_prompt_ranges"]}
        ).prompt_order
        == model.prompt_order
    )


def test_equal_widths_share_one_position_layer():
    model = PCM(**SMALL | dict(dim_expansion=(1, 1, 1, 1)))
    keys = [model.released_weight(k)[0] for k in model.state_dict()]
    assert "encoder.pos_proj.weight" in keys and len(set(keys)) == len(keys)


def test_thinning_keeps_a_share_of_each_cloud():
    points = pack(torch.rand(21, 3), torch.rand(1, 3), torch.zeros(0, 3), torch.rand(8, 3))
    rows = thin(points, 4)
    assert (
        points.batch[rows].bincount(minlength=4).tolist() == [5, 1, 0, 2]
        and rows.diff().gt(0).all()
    )
    assert torch.equal(thin(points, 1), torch.arange(30))


def test_the_order_prompts_matter():
    torch.manual_seed(0)
    model, points = PCM(**SMALL).eval(), pack(torch.rand(64, 3))
    before = model(points).feat
    model.prompt_order = model.prompt_order[::-1]
    assert (model(points).feat - before).abs().max() > 1e-5


def test_too_few_points_for_training_is_said_so():
    with pytest.raises(
        ValueError, match="PCM.stem: expected at least 2 rows in the batch while training"
    ):
        PCM(**SMALL)(pack(torch.rand(1, 3)))
    with pytest.raises(ValueError, match="PCM.body: expected at least 2 rows"):
        PCM(**SMALL)(pack(torch.rand(9, 3)))
    assert PCM(**SMALL).eval()(pack(torch.rand(1, 3))).feat.isfinite().all()


def test_errors_name_the_argument(released):
    model, _, state, card = released
    with pytest.raises(ValueError, match="reducers: expected 4 values"):
        PCM(**SMALL, reducers=(2, 2))
    with pytest.raises(ValueError, match="orders: expected names among"):
        PCM(**SMALL | dict(orders=("xyz", "peano", "z", "zyx")))
    with pytest.raises(ValueError, match="prompt_order: expected each of orders once"):
        PCM(**SMALL, prompt_order=("xyz",))
    with pytest.raises(ValueError, match="expected 'decoder_args'"):
        PCM.from_released({"encoder_args": {}})
    wrong = card["kwargs"] | {
        "encoder_args": card["kwargs"]["encoder_args"] | {"normalize": "center"}
    }
    with pytest.raises(ValueError, match="normalize: expected 'anchor'"):
        PCM.from_released(wrong)
    with pytest.raises(ValueError, match="check prefix"):
        model.convert_released(state, prefix="backbone.")
    with pytest.raises(ValueError, match="expected \\[18"):
        model.convert_released(state | {"encoder.encoder.order_prompt.weight": torch.zeros(2)})
