"""Starting a task from a checkpoint: what is loaded, what is refused, and what is said of both."""

import json

import pytest
import torch

from unipre3d.backbones import PointNet2, StandardTransformer
from unipre3d.recipes import finetune_recipes
from unipre3d.records import data_hash
from unipre3d.runs.checkpoint import save_tensors
from unipre3d.runs.recipe import change
from unipre3d.runs.run import build_backbone
from unipre3d.runs.starts import check_init, percent, start_from, start_released, start_summary

SMALL = dict(
    num_groups=8,
    group_size=8,
    radius=None,
    encoder_widths=(8, 16, 16),
    encoder_dims=16,
    num_heads=2,
)


def transformer(seed=0, **sizes):
    torch.manual_seed(seed)
    return StandardTransformer(**SMALL | dict(width=16, depth=2) | sizes)


def save_run(folder, backbone):
    return save_tensors(
        folder / "checkpoint.safetensors",
        {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
        | {"head.weight": torch.zeros(3)},
        {"step": 1},
    )


def test_a_run_fills_the_whole_backbone(tmp_path):
    trained, net = transformer(0), transformer(1)
    save_run(tmp_path, trained)
    start = start_from(net, tmp_path)
    assert start.coverage == 1 and set(start.table.state) == {"loaded"} and not start.unexpected
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in trained.state_dict().items())
    assert (
        "100.0%" in str(start)
        and start_from(transformer(), tmp_path / "checkpoint.safetensors").kind == "run"
    )


@pytest.mark.parametrize(
    "sizes, says",
    [
        (dict(depth=3), "blocks.2.norm1.weight: not in the file"),
        (dict(width=32), "expected [32] for this model, got [16]"),
        (dict(in_channels=6), "expected [8, 6] for this model, got [8, 3]"),
    ],
)
def test_a_start_that_covers_too_little_is_refused_and_changes_nothing(tmp_path, sizes, says):
    save_run(tmp_path, transformer(0))
    net = transformer(1, **sizes)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError) as error:
        start_from(net, tmp_path)
    assert (
        says in str(error.value)
        and "\n" not in str(error.value)
        and str(tmp_path) in str(error.value)
    )
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def refusal_of(net, init):
    with pytest.raises(ValueError) as error:
        start_from(net, init)
    assert "\n" not in str(error.value) and str(init) in str(error.value)
    return str(error.value)


def test_weights_of_another_backbone_are_named(tmp_path):
    save_run(tmp_path, transformer(0))
    values = {"name": "object-tiny", "backbone": "StandardTransformer", "features": ["xyz"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    said = refusal_of(PointNet2(), tmp_path)
    assert "they are of a StandardTransformer, and this run has a PointNet2" in said
    assert "--backbone StandardTransformer" in said and "weights of a PointNet2 with --init" in said
    assert refusal_of(PointNet2(), tmp_path / "checkpoint.safetensors").endswith("with --init")
    assert start_from(PointNet2(), tmp_path, min_coverage=0).coverage < 1
    assert "use the sizes of the checkpoint" in refusal_of(transformer(1, width=32), tmp_path)
    columns = refusal_of(transformer(1, in_channels=6), tmp_path)
    assert "they read 3 columns of a point, and this run has 6: pass --data.features xyz" in columns


@pytest.mark.parametrize(
    "name, wanted", [("objects", "xyz normal color_signed"), ("rooms", "normal color_signed")]
)
def test_shipped_weights_name_their_columns(name, wanted):
    kind = {"objects": "cls-folder-mini", "rooms": "sem-folder-mini"}[name]
    net = build_backbone(change(finetune_recipes[kind], features=("xyz",)))
    assert f"pass --data.features {wanted}, or" in refusal_of(net, name)


def test_a_config_of_something_else_is_named(tmp_path):
    save_run(tmp_path, transformer(0))
    (tmp_path / "config.json").write_text('{"features": 3}')
    assert "config.json: expected what a run or weights say" in refusal_of(transformer(1), tmp_path)


def test_a_partial_start_reports_each_tensor(tmp_path):
    save_run(tmp_path, transformer(0))
    net = transformer(1, in_channels=6)
    start = start_from(net, tmp_path, min_coverage=0.5)
    odd = start.table[start.table.state != "loaded"]
    assert list(odd.index) == ["encoder.first.0.weight"] and 0.5 < start.coverage < 1
    assert start.coverage == pytest.approx(1 - 48 / start.table["values"].sum())
    shallow = start_from(transformer(1, depth=1), tmp_path)
    assert shallow.coverage == 1 and all(
        name.startswith("blocks.1.") for name in shallow.unexpected
    )


def test_a_released_file_is_a_start_and_a_wrong_one_is_named(tmp_path):
    trained = transformer(0)
    state = {
        f"module.point_network.encoder.{trained.released_weight(k)[0]}": v
        for k, v in trained.state_dict().items()
    }
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "official.pth")
    net = transformer(1)
    start = start_from(net, tmp_path / "official.pth")
    assert (
        start.kind == "released"
        and start.coverage == 1
        and torch.equal(net.reduce.weight, trained.reduce.weight)
    )
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth"):
        start_released(transformer(), tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        start_from(transformer(), tmp_path / "nowhere")
    save_tensors(tmp_path / "checkpoint.safetensors", {"weight": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="expected tensors named backbone"):
        start_from(transformer(), tmp_path)


def test_a_record_says_where_the_weights_came_from(tmp_path):
    save_run(tmp_path, transformer(0))
    (tmp_path / "config.json").write_text(json.dumps({"name": "object-tiny"}))
    found = start_summary(start_from(transformer(1), tmp_path))
    file = tmp_path / "checkpoint.safetensors"
    assert found["recipe"] == "object-tiny" and found["sha256"] == data_hash(file)
    assert (found["kind"], found["coverage"]) == ("run", 1.0)
    nothing = start_summary(start_from(transformer(1), "none"))
    assert nothing["kind"] == "none" and nothing["recipe"] is nothing["sha256"] is None
    with pytest.raises(FileNotFoundError, match='--init: expected "none"'):
        check_init(tmp_path / "nowhere")
    assert percent(0.9999) == "99.9%"  # never all of it where something is missing


def test_a_folder_with_the_name_of_shipped_weights_does_not_hide_them(tmp_path, monkeypatch):
    from unipre3d.core import data_dir
    from unipre3d.runs.starts import shipped

    monkeypatch.chdir(tmp_path)
    there = data_dir() / "weights" / "objects"
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "chair.ply").touch()  # somebody's clouds
    assert shipped("objects") == there
    (tmp_path / "objects" / "config.json").touch()  # a run, or weights
    assert shipped("objects") == "objects"
    assert shipped("none") == "none" and shipped(str(there)) == str(there)
