"""Starting a task from a checkpoint, rates by layer, frozen parts, and the loop that goes on where it stopped."""

import csv
import json
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from unipre3d.backbones import Mamba3D, PointMLP, PointNet2, SparseUNet, StandardTransformer
from unipre3d.core import PointBatch
from unipre3d.data.samples import Labelled
from unipre3d.tasks.transfer import (
    FinetuneRecipe,
    build_backbone,
    finetune,
    label_loss,
    layer_order,
    loop_options,
    run_history,
    parameter_groups,
    set_training,
    start_from,
    start_released,
)
from unipre3d.pretrain import load_tensors, new_accelerator, save_tensors

SMALL = dict(
    num_groups=8,
    group_size=8,
    radius=None,
    encoder_widths=(8, 16, 16),
    encoder_dims=16,
    num_heads=2,
)
NET2 = dict(
    centres=(16, 8),
    radii=(0.3, 0.6),
    neighbours=(8, 8),
    widths=((8, 16), (16, 16), (16, 32)),
    decoder_widths=((16,), (16,), (16,)),
)


def transformer(seed=0, **sizes):
    torch.manual_seed(seed)
    return StandardTransformer(**SMALL | dict(width=16, depth=2) | sizes)


class Classifier(nn.Module):
    def __init__(self, backbone, classes=4):
        super().__init__()
        self.backbone, self.head = (
            backbone,
            nn.Sequential(
                nn.BatchNorm1d(backbone.width), nn.Dropout(0.3), nn.Linear(backbone.width, classes)
            ),
        )

    def forward(self, points):
        p = self.backbone(points)
        return self.head(
            p.feat.new_zeros(p.size, p.feat.shape[1]).index_add(0, p.batch, p.feat)
            / p.counts[:, None]
        )


def batches(start, stop):
    "Four kinds of boxes; a pure function of the step."
    shapes = torch.tensor([[1.0, 1, 1], [1, 1, 0.1], [0.1, 0.1, 1], [1, 0.3, 0.3]])
    for step in range(start, stop):
        g = torch.Generator().manual_seed(step)
        label = torch.randint(4, (8,), generator=g)
        xyz = ((torch.rand(8, 48, 3, generator=g) - 0.5) * shapes[label][:, None]).flatten(0, 1)
        yield Labelled(PointBatch(xyz, xyz, torch.arange(8).repeat_interleave(48), 8), label)


def loss(model, batch):
    logits = model(batch.points)
    return label_loss(logits, batch.label, 0.1), {
        "acc": float((logits.argmax(1) == batch.label).float().mean())
    }


def run(folder, backbone=None, loss=loss, steps=10, **how):
    torch.manual_seed(0)
    model = Classifier(backbone or transformer())
    return model, finetune(
        model, batches, loss, folder, steps=steps, **dict(lr=3e-3, columns=("acc", "val")) | how
    )


def save_run(folder, backbone):
    return save_tensors(
        folder / "checkpoint.safetensors",
        {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
        | {"head.weight": torch.zeros(3)},
        {"step": 1},
    )


# ---------------------------------------------------------------- the start


def test_a_run_fills_the_whole_backbone(tmp_path):
    trained, net = transformer(0), transformer(1)
    save_run(tmp_path, trained)
    start = start_from(net, tmp_path)
    assert start.coverage == 1 and set(start.table.state) == {"loaded"} and not start.unused
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


def test_a_partial_start_reports_each_tensor(tmp_path):
    save_run(tmp_path, transformer(0))
    net = transformer(1, in_channels=6)
    start = start_from(net, tmp_path, need=0.5)
    odd = start.table[start.table.state != "loaded"]
    assert list(odd.index) == ["encoder.first.0.weight"] and 0.5 < start.coverage < 1
    assert start.coverage == pytest.approx(1 - 48 / start.table["values"].sum())
    shallow = start_from(transformer(1, depth=1), tmp_path)
    assert shallow.coverage == 1 and all(name.startswith("blocks.1.") for name in shallow.unused)


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


# ---------------------------------------------------------------- who learns how fast


def test_layers_of_a_transformer_decay_from_the_head_down():
    model = Classifier(transformer(depth=3))
    groups = parameter_groups(model, layer_decay=0.5, weight_decay=0.1)
    place = {id(p): g for g in groups for p in g["params"]}
    scale = {name: place[id(p)]["scale"] for name, p in model.named_parameters()}
    assert len(place) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    assert scale["head.2.weight"] == 1 and scale["backbone.norm.weight"] == 0.5
    assert [scale[f"backbone.blocks.{i}.fc1.weight"] for i in (2, 1, 0)] == [0.25, 0.125, 0.0625]
    assert (
        scale["backbone.encoder.first.0.weight"]
        == scale["backbone.cls_token"]
        == scale["backbone.position.0.weight"]
        == 0.03125
    )
    assert all((place[id(p)]["weight_decay"] > 0) == (p.ndim > 1) for p in model.parameters())
    assert {g["scale"] for g in parameter_groups(model)} == {1.0}
    with pytest.raises(ValueError, match="layer_decay: expected above 0"):
        parameter_groups(model, layer_decay=0.0)


def test_layers_follow_the_order_in_which_they_run():
    assert (
        (order := layer_order(PointNet2(**NET2)))["down.0"]
        < order["down.2"]
        < order["up.0"]
        < order["up.2"]
    )
    unet = SparseUNet(
        in_channels=3, base_channels=8, channels=(8, 8, 8, 8), layers=(1, 1, 1, 1), voxel_size=0.1
    )
    order = layer_order(unet)
    assert (
        order["conv_input"] == 0
        and order["enc.0"] < order["enc.1"] < order["dec.1"] < order["dec.0"]
    )  # the decoder is numbered from the fine end


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: PointMLP(embed_width=8, neighbours=(8, 8, 8, 8)),
        lambda: Mamba3D(num_groups=8, group_size=8, encoder_widths=(8, 16, 16), width=16, depth=2),
    ],
)
def test_other_backbones_have_an_order_too_and_stay_as_they_were(backbone):
    net = backbone()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    order = layer_order(net)
    assert min(order.values()) == 0 and len(set(order.values())) > 2 and net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    "backbone", [transformer, lambda: PointNet2(**NET2)], ids=["transformer", "pointnet2"]
)
def test_a_probe_moves_its_head_alone_with_statistics_and_tokens(tmp_path, backbone):
    net = backbone()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model, done = run(tmp_path, net, steps=4, frozen_steps=4)
    assert done.ended == "finished" and all(
        torch.equal(before[k], v) for k, v in model.backbone.state_dict().items()
    )
    assert model.head[0].num_batches_tracked == 4 and not model.backbone.training


def test_after_the_warm_up_everything_moves(tmp_path):
    net = PointNet2(**NET2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model, _ = run(tmp_path, net, steps=4, frozen_steps=2, warmup=1)
    after = model.backbone.state_dict()
    assert (
        all(not torch.equal(before[k], after[k]) for k in before if not k.endswith("bias"))
        and after["down.0.layers.1.num_batches_tracked"] == 2
    )
    with open(tmp_path / "metrics.csv") as file:
        assert [r["frozen"] for r in csv.DictReader(file)] == ["1", "1", "0", "0"]
    with pytest.raises(ValueError, match="expected names of parts such as backbone, head"):
        set_training(model, ["encoder"])


# ---------------------------------------------------------------- the loop


@pytest.fixture
def float16():
    "Makes accelerators whose loss is scaled as for float16, here by 2^127, which overflows at first."

    def make():
        accelerator = new_accelerator(device="cpu")
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**127, backoff_factor=2.0**-40
        )
        return accelerator

    yield make
    new_accelerator()


@pytest.mark.parametrize(
    "how",
    [{}, dict(ema=0.9, frozen_steps=6, layer_decay=0.7), dict(mixed=True)],
    ids=["plain", "averaged, frozen first, by layer", "float16"],
)
def test_resumed_equals_uninterrupted(tmp_path, how, float16):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    how = dict(how)
    accelerator = float16 if how.pop("mixed", False) else lambda: None
    how = how | dict(
        validate_every=3,
        choose="val",
        validate=lambda model: {
            "val": float(sum(p.detach().double().sum() for p in model.parameters()))
        },
    )
    run(tmp_path / "whole", accelerator=accelerator(), **how)
    seen = []

    def stops(model, batch):
        seen.append(1)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(model, batch)

    _, first = run(tmp_path / "parts", loss=stops, accelerator=accelerator(), **how)
    _, second = run(tmp_path / "parts", resume=True, accelerator=accelerator(), **how)
    assert (first.step, first.ended, second.step, second.ended) == (
        5,
        "interrupted",
        10,
        "finished",
    )
    rows = []
    for name in ("whole", "parts"):
        with open(tmp_path / name / "metrics.csv") as file:
            rows.append(
                [{k: v for k, v in r.items() if k != "seconds"} for r in csv.DictReader(file)]
            )
    assert rows[0] == rows[1] and len(rows[0]) == 10
    for file in ("checkpoint.safetensors", "resume.safetensors"):
        a, b = (load_tensors(tmp_path / name / file)[0] for name in ("whole", "parts"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_validation_keeps_its_best_step_and_patience_ends_the_run(tmp_path):
    scores, weights = iter([0.2, 0.6, 0.6, 0.1, 0.1]), []

    def validate(model):
        weights.append(model.head[2].weight.detach().clone())
        return {"val": next(scores)}

    _, done = run(tmp_path, validate=validate, validate_every=2, choose="val", patience=2)
    kept, meta = load_tensors(tmp_path / "checkpoint.safetensors")
    assert (done.step, done.best_step, done.best, done.ended) == (
        8,
        4,
        0.6,
        "patience",
    ) and meta == {"step": 4, "chosen_by": "val", "score": 0.6}
    _, again = run(
        tmp_path, validate=validate, validate_every=2, choose="val", patience=2, resume=True
    )  # as when the test was cut short: nothing is learned any more
    assert again == done
    assert torch.equal(kept["head.2.weight"], weights[1])
    with pytest.raises(ValueError, match="choose: expected one of acc, val"):
        run(tmp_path, validate=validate, choose="oa")


def test_a_step_that_is_not_finite_is_skipped(tmp_path):
    calls = []

    def breaks(model, batch):
        calls.append(1)
        value, scores = loss(model, batch)
        return (value * float("nan") if len(calls) == 2 else value), scores

    model, _ = run(tmp_path, loss=breaks, steps=3)
    with open(tmp_path / "metrics.csv") as file:
        assert [r["skipped"] for r in csv.DictReader(file)] == ["0", "1", "0"]
    assert all(p.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- clouds and recipes


def test_loss_equals_torch_and_ignores_what_has_no_label():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 5, requires_grad=True), torch.randint(5, (9,))
    assert torch.allclose(
        label_loss(logits, labels, 0.2),
        nn.functional.cross_entropy(logits, labels, label_smoothing=0.2),
    )
    half = labels.clone()
    half[4:] = -1
    assert torch.allclose(
        label_loss(logits, half), nn.functional.cross_entropy(logits[:4], labels[:4])
    )
    label_loss(logits, half.fill_(-1)).backward()
    assert not logits.grad.any()


def test_recipe_values_become_a_backbone_and_loop_options():
    recipe = FinetuneRecipe(
        backbone="PointNet2", backbone_options=NET2, features=("xyz", "height"), probe=True, steps=7
    )
    assert build_backbone(recipe).in_channels == 4 and loop_options(recipe)["frozen_steps"] == 7
    with pytest.raises(ValueError, match="frozen_steps: expected 0 with probe"):
        loop_options(FinetuneRecipe(probe=True, frozen_steps=3))
    with pytest.raises(ValueError, match="backbone_options: PointNet2 does not take them"):
        build_backbone(FinetuneRecipe(backbone="PointNet2", backbone_options=dict(depth=3)))


def test_the_scaler_of_float16_goes_on_after_an_overflow(tmp_path, float16):
    "The scaler must see the overflow, step down, and train in the end."
    model, _ = run(tmp_path, steps=6, ema=0.5, accelerator=float16())
    with open(tmp_path / "metrics.csv", newline="") as file:
        skipped = [int(row["skipped"]) for row in csv.DictReader(file)]
    assert skipped[0] == 1 and skipped[-1] == 0 and sorted(skipped, reverse=True) == skipped
    assert all(p.isfinite().all() for p in model.parameters())
    json.dumps(course := run_history(tmp_path / "metrics.csv", every=1), allow_nan=False)
    assert (
        course["train"]["grad_norm"][0] is None
        and course["train"]["grad_norm"][-1] > 0
        and course["val"] == {"step": []}
    )
