"Released checkpoints: every recorded backbone from every wrapping, whole predictors, and files that must be refused."

import os
import pickle
import re
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from parity_cases import PARITY, RECORDED, check_features, close, load_file, recorded
from unipre3d.backbones import PointNet2
from unipre3d.fusion import FeatureFusion, NoFusion, PointFusion
from unipre3d.gaussians import GaussianHead
from unipre3d.tasks.pretrain import UniPre3D
from unipre3d.released import compare_released, load_released

plain = lambda state, under: {
    under + k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")
}
WRAPPINGS = {
    "as recorded": lambda s: s,
    "encoder alone": lambda s: plain(s, ""),
    "bare beside fusion": lambda s: {k.removeprefix("encoder."): v for k, v in s.items()},
    "distributed": lambda s: {"module." + k: v for k, v in s.items()},
    "distributed twice": lambda s: {"module.module." + k: v for k, v in s.items()},
    "released training": lambda s: {
        "iteration": 9,
        "optimizer_state_dict": {
            "state": {0: {"exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "model_state_dict": {
            f"point_network.{k}" if k.startswith("encoder.") else k: v for k, v in s.items()
        }
        | {"image_network.vae.encoder.conv_in.weight": torch.zeros(2)},
        "best_PSNR": 20.0,
    },
    "without images": lambda s: plain(s, "network.encoder."),
    "average beside": lambda s: (
        {"initted": torch.tensor(True), "step": torch.tensor([5])}
        | {f"ema_model.module.{k}": v for k, v in s.items()}
        | {
            f"online_model.module.{k}": torch.randn_like(v.float()).to(v.dtype)
            for k, v in s.items()
        }
    ),
    "average after": lambda s: {
        "state_dict": {k: v * 0 for k, v in s.items()},
        "state_dict_ema": s,
        "epoch": 3,
    },
    "segmentor": lambda s: {
        "state_dict": plain(s, "module.backbone.")
        | {"module.seg_head.weight": torch.zeros(20, 3), "module.seg_head.bias": torch.zeros(20)}
    },
    "field": lambda s: {
        "base_model": plain(s, "module.model.encoder."),
        "metrics": {"acc": 80.0},
        "epoch": 300,
    },
    "state": lambda s: {"model_state": plain(s, "backbone.")},
}


@pytest.mark.parametrize("name", RECORDED)
def test_every_recorded_backbone_from_every_wrapping(name, tmp_path):
    model, state, data = recorded(name)
    torch.save(WRAPPINGS["released training"](state), tmp_path / "model.pth")
    load_released(model, tmp_path / "model.pth")
    with torch.no_grad():
        check_features(model.eval() if "trainbn" not in name else model, state, data)
    own = {k: v.clone() for k, v in recorded(name)[0].state_dict().items()}
    weights = compare_released(model, state)[1]
    for wrapping, wrap in WRAPPINGS.items():
        model.load_state_dict(own)
        report = load_released(model, wrap(state))
        assert report.coverage == 1 and not report.problems() and len(report.loaded) == len(own), (
            wrapping
        )
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items()), wrapping
    save_file(state, tmp_path / "model.safetensors")
    model.load_state_dict(own)
    load_released(model, tmp_path / "model.safetensors", root="encoder")
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["backbone_transformer_eval", "backbone_mamba3d_eval", "backbone_sparseunet_fusion"]
)
def test_what_is_wrong_is_said_in_one_line_and_changes_nothing(name):
    model, state, _ = recorded(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    some = [k for k in state if k.startswith("encoder.") and not k.endswith("num_batches_tracked")]
    a, b = some[len(some) // 3], some[-1]
    loaded = compare_released(model, state)[0].loaded
    ours = {v: k for k, v in loaded.items()}

    def refused(state, *words, **options):
        with pytest.raises(ValueError) as error:
            load_released(model, state, **options)
        said = str(error.value)
        assert "\n" not in said and all(w in said for w in words), said
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())

    refused({k: v for k, v in state.items() if k != a}, "1 missing in the file", a, ours[a])
    refused({k: v for k, v in state.items() if k not in (a, b)}, "2 missing in the file")
    refused(state | {a: torch.zeros(*state[a].shape, 2)}, "1 of another shape", a, "got")
    refused(
        {k: v for k, v in state.items() if k != b} | {a: torch.zeros(7)},
        "1 missing in the file",
        "1 of another shape",
    )
    top = some[0].split(".")
    refused(
        state | {".".join([*top[:-1], "more"]): torch.zeros(1)},
        "1 in the file without a place",
        "more",
    )
    refused({"epoch": 3}, "no tensor at all")
    refused({"a": torch.zeros(1)}, "found none among 1 keys", type(model).__name__)
    refused(state, "leave_out", "'nothing_like_it'", leave_out=["nothing_like_it"])
    two = lambda x, y: (
        {x + k: v for k, v in state.items()} | {y + k: v + 1 for k, v in state.items()}
    )
    refused(two("student.", "teacher."), "found 2", "pass root=")
    refused(two("semantic.", "geometric."), "found 2")  # no average, though it has the letters
    assert (
        compare_released(model, {x + k: v for k, v in state.items() for x in ("last.", "best.")})[
            0
        ].coverage
        == 1
    )
    refused(state, "below 'decoder.'", root="decoder")
    refused(state | {a: state[a].to("meta")}, a, "without values")
    for nothing in (None, 3, model):
        refused(nothing, "expected a file or a dictionary", type(nothing).__name__)

    report = load_released(model, {k: v for k, v in state.items() if k != a}, leave_out=[ours[a]])
    assert report.left_out == (ours[a],) and 0 < report.coverage < 1 and "left out" in str(report)
    assert torch.equal(before[ours[a]], model.state_dict()[ours[a]]) and not torch.equal(
        before[ours[b]], model.state_dict()[ours[b]]
    )


def test_counters_may_be_missing_and_half_precision_may_be_kept():
    model, state, data = recorded("backbone_pointmlp_in3_eval")
    load_released(model, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")})
    with torch.no_grad():
        check_features(model, state, data)
    load_released(model, {k: v.half() if v.is_floating_point() else v for k, v in state.items()})
    assert model.embed[0].weight.dtype == torch.float32


def test_a_deeper_checkpoint_is_not_a_shallower_model():
    model, state, _ = recorded("backbone_transformer_eval")
    shallow = type(model)(**model.config | dict(depth=1))
    with pytest.raises(
        ValueError,
        match="11 in the file without a place in the model, first 'encoder.blocks.blocks.1",
    ):
        load_released(shallow, state)
    assert (
        load_released(shallow, state, leave_out=["blocks.blocks.1", "blocks.blocks.2"]).coverage
        == 1
        if model.config["depth"] > 2
        else True
    )


# ---------------------------------------------------------------- whole predictors


def predictor_state(state, head, image_width=32, width=16, network="point_network"):
    "A released predictor's state around a recorded encoder and fusion."
    whole = {f"{network}.{k}" if k.startswith("encoder.") else k: v for k, v in state.items()}
    whole |= {f"{network}.final.{k}": v for k, v in head.mlp.state_dict().items()}
    whole |= {
        "image_conv.0.weight": torch.rand(image_width),
        "image_conv.0.bias": torch.rand(image_width),
        "image_conv.1.weight": torch.randn(width, image_width, 1, 1),
        "image_conv.1.bias": torch.rand(width),
    }
    return whole | {
        "sh_to_v_transform": torch.eye(3)[None],
        "v_to_sh_transform": torch.eye(3)[None],
        "image_network.vae.decoder.norm.weight": torch.zeros(4),
    }


@pytest.mark.parametrize(
    "name", ["backbone_transformer_eval", "backbone_pcm_eval", "backbone_pointmlp_in4_eval"]
)
def test_a_whole_object_predictor(name):
    backbone, state, data = recorded(name)
    model = UniPre3D(
        backbone, FeatureFusion(backbone.body_width, 32), GaussianHead(backbone.width, hidden=8)
    )
    head = GaussianHead(backbone.width, hidden=8)
    whole = predictor_state(state, head, width=backbone.body_width)
    report = load_released(model, {"model_state_dict": whole})
    assert report.coverage == 1 and report.root == "model_state_dict."
    assert sorted(k.split(".")[1] for k in report.left_over) == [
        "image_network",
        "sh_to_v_transform",
        "v_to_sh_transform",
    ]
    with torch.no_grad():
        check_features(model.backbone, state, data)
    assert torch.equal(model.head.mlp[2].weight, head.mlp[2].weight) and torch.equal(
        model.fusion.mlp[0].weight, state["fusion_mlps.0.weight"]
    )
    assert torch.equal(model.fusion.image_proj.weight, whole["image_conv.1.weight"][..., 0, 0])

    load_released(backbone, {"model_state_dict": whole})  # a backbone alone takes its own part
    with pytest.raises(ValueError, match="missing in the file, first 'fusion"):
        load_released(
            model,
            {
                k.replace("point_network", "network"): v
                for k, v in whole.items()
                if "fusion" not in k and "image_conv" not in k
            },
        )
    assert (
        load_released(
            model, {k.replace("point_network.", ""): v for k, v in whole.items()}
        ).coverage
        == 1
    )
    bare = UniPre3D(backbone, NoFusion(), GaussianHead(backbone.width, hidden=8))
    assert (
        load_released(
            bare,
            {
                k.replace("point_network", "network"): v
                for k, v in whole.items()
                if "fusion" not in k and "image_conv" not in k
            },
        ).coverage
        == 1
    )


def test_the_recorded_image_branch():
    data = load_file(PARITY / "image_branch_vae.safetensors")
    model = UniPre3D(
        PointNet2(
            centres=(8, 4),
            radii=(0.2, 0.4),
            neighbours=(4, 4),
            widths=((8,), (8,), (8,)),
            decoder_widths=((8,), (8,), (12,)),
        ),
        FeatureFusion(12, 32),
        NoFusion(),
    )
    load_released(
        model,
        {k.removeprefix("state/"): v for k, v in data.items() if k.startswith("state/")},
        leave_out=["backbone", "fusion.mlp"],
    )
    model.fusion.image_norm.num_groups = (
        32  # one channel each in this tiny record; 32 groups of four at the real size, as ours
    )
    maps = data["out/decoder_block_3"]
    close(
        model.fusion.image_proj(model.fusion.image_norm(maps).permute(0, 2, 3, 1)).permute(
            0, 3, 1, 2
        ),
        data["out/image_conv"],
    )


@pytest.mark.parametrize("name", ["backbone_sparseunet_fusion", "backbone_ptv3_fusion"])
def test_a_whole_scene_predictor(name):
    "Its images pass through other layers, and it has no head of its own: both are left out, in so many words."
    backbone, state, data = recorded(name)
    model = UniPre3D(backbone, PointFusion(backbone.stem_width, 32), GaussianHead(backbone.width))
    whole = {f"point_network.{k}" if k.startswith("encoder.") else k: v for k, v in state.items()}
    with pytest.raises(ValueError, match="missing in the file"):
        load_released(model, whole)
    load_released(model, whole, leave_out=["head", "fusion.image_norm", "fusion.image_proj"])
    with torch.no_grad():
        check_features(model.backbone, state, data)
    assert torch.equal(model.fusion.conv.weight, state["fusion_mlps.0.weight"]) and torch.equal(
        model.fusion.norm.running_var, state["fusion_mlps.1.running_var"]
    )


def test_checkpoints_of_our_own():
    backbone, _, _ = recorded("backbone_transformer_eval")
    model, other = (
        UniPre3D(
            recorded("backbone_transformer_eval")[0],
            FeatureFusion(backbone.width, 8),
            GaussianHead(backbone.width),
        )
        for _ in range(2)
    )
    load_released(
        other,
        {"model." + k: v for k, v in model.state_dict().items()} | {"optimizer.0": torch.zeros(1)},
    )
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    load_released(backbone, model.state_dict())
    assert all(
        torch.equal(v, model.state_dict()["backbone." + k])
        for k, v in backbone.state_dict().items()
    )
    small = PointNet2(
        centres=(8, 4),
        radii=(0.2, 0.4),
        neighbours=(4, 4),
        widths=((8,), (8,), (8,)),
        decoder_widths=((8,), (8,), (8,)),
    )
    assert (
        load_released(small, {"module.encoder." + k: v for k, v in small.state_dict().items()}).root
        == "module.encoder."
    )


# ---------------------------------------------------------------- files


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_file_that_holds_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, state, _ = recorded("backbone_pointmlp_in3_eval")
    torch.save(state | {"surprise": Code()}, "zip.pth")
    torch.save(state | {"surprise": Code()}, "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps({"surprise": Code()}, protocol=2))
    torch.save(model, "module.pth")
    for name in ("zip.pth", "old.pth", "raw.pkl", "module.pth"):
        with pytest.raises(ValueError) as error:
            load_released(model, name)
        assert re.match(
            rf"{name}: expected tensors and plain values, found (posix\.system|unipre3d\.\S+|something else)",
            str(error.value),
        ) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints(tmp_path):
    model, state, _ = recorded("backbone_pointmlp_in3_eval")
    save_file(state, tmp_path / "whole.safetensors")
    torch.save(state, tmp_path / "whole.pth")
    for name in ("whole.safetensors", "whole.pth"):
        (tmp_path / f"cut_{name}").write_bytes((tmp_path / name).read_bytes()[:5000])
    for at in range(200, 20_000, 1980):
        (tmp_path / f"cut_{at}.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:at])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "page.pth").write_text("<html>Not found</html>")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    for name in (
        "cut_whole.safetensors",
        "cut_whole.pth",
        "empty.pth",
        "page.pth",
        "list.pth",
        "tensor.pth",
        *(p.name for p in tmp_path.glob("cut_*0.pth")),
    ):
        with pytest.raises(ValueError) as error:
            load_released(model, tmp_path / name)
        assert (
            str(error.value).count(name) == 1
            and "\n" not in str(error.value)
            and "expected" in str(error.value)
        ), str(error.value)
    for name in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="expected a checkpoint"):
            load_released(model, name)


def test_objects_beside_the_weights_are_left_out_and_nothing_runs(tmp_path, monkeypatch):
    """What OmegaConf leaves in an optimiser's state when `betas` come from a configuration, and a program; written with the library there, read without it."""
    (tmp_path / "omegaconf").mkdir()
    (tmp_path / "omegaconf" / "__init__.py").touch()
    (tmp_path / "omegaconf" / "listconfig.py").write_text(
        "open(__file__ + '.imported', 'a').write('x')\n"
        "class ListConfig:\n    def __init__(self, content): self._content, self._parent = content, self\n    def __setstate__(self, state): raise SystemExit('ran')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from omegaconf.listconfig import ListConfig

    mark = tmp_path / "omegaconf" / "listconfig.py.imported"
    model, state, data = recorded("backbone_pointmlp_in3_eval")
    save = lambda name, **more: torch.save(
        WRAPPINGS["released training"](state)
        | {"optimizer": {"param_groups": [{"betas": ListConfig([0.9, 0.999]), "lr": 0.1}]}}
        | more,
        tmp_path / name,
    )
    save("run.pth")
    save("program.pth", surprise=Program(f"open({str(tmp_path / 'written')!r}, 'w')"))
    save("forbidden.pth", surprise=Forbidden())
    for name in [n for n in sys.modules if n.startswith("omegaconf")]:
        monkeypatch.delitem(sys.modules, name)
    mark.unlink()
    torch.save({"model": state, "surprise": Huge()}, tmp_path / "huge.pth")
    known = set(torch.serialization.get_safe_globals())
    for name in ("run.pth", "program.pth", "huge.pth"):
        assert load_released(model, tmp_path / name).coverage == 1
        with torch.no_grad():
            check_features(model, state, data)
    with pytest.raises(
        ValueError, match="expected tensors and plain values, found .*save the state dict alone"
    ):
        load_released(model, tmp_path / "forbidden.pth")
    torch.save({"all": ListConfigLike()}, tmp_path / "none.pth")
    with pytest.raises(
        ValueError,
        match="expected tensors and plain values, found .*ListConfigLike.*save the state dict alone",
    ):
        load_released(model, tmp_path / "none.pth")
    torch.save({"model": state, "settings": Settings(lr=0.1)}, tmp_path / "items.pth")
    with pytest.raises(ValueError, match="expected tensors and plain values, found .*Settings, "):
        load_released(model, tmp_path / "items.pth")
    assert set(torch.serialization.get_safe_globals()) == known  # nothing is trusted afterwards
    assert (
        not mark.exists()
        and "omegaconf" not in sys.modules
        and not (tmp_path / "written").exists()
        and not (tmp_path / "trapped").exists()
    )


class Program:
    "Pickled as a line of code."

    def __init__(self, text):
        self.text = text

    def __reduce__(self):
        return exec, (self.text,)


class Forbidden:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


class ListConfigLike:
    pass


class Huge:
    "A call with many arguments, then a state."

    def __reduce__(self):
        return eval, ("1",) * 100_000, {"a": [0] * 1000}


class Settings(dict):
    pass
