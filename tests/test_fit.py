"""The one training loop: rates by layer, frozen parts, going on after a stop, skipped steps."""

import csv
import json
import os
import signal

import pytest
import torch
from torch import nn

from unipre3d.backbones import Mamba3D, PointMLP, PointNet2, SparseUNet, StandardTransformer
from unipre3d.backbones.backbone import decay_names
from unipre3d.core import PointBatch
from unipre3d.data.samples import Labelled
from unipre3d.recipes import finetune_recipes, recipes
from unipre3d.runs.checkpoint import load_tensors, run_history, save_tensors
from unipre3d.runs.fit import (
    Task,
    fit,
    layer_order,
    new_accelerator,
    parameter_groups,
    set_training,
)
from unipre3d.runs.recipe import Optimiser, Recipe, Run, change, check_recipe
from unipre3d.runs.run import SMALL_BACKBONES, build_backbone
from unipre3d.tasks.classification import ClassificationModel
from unipre3d.tasks.heads import label_loss

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
        self.backbone = backbone
        width = backbone.width
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, classes))

    def forward(self, points):
        p = self.backbone(points)
        total = p.feat.new_zeros(p.size, p.feat.shape[1]).index_add(0, p.batch, p.feat)
        return self.head(total / p.counts[:, None])


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
    right = (logits.argmax(1) == batch.label).float().mean()
    return label_loss(logits, batch.label, 0.1), {"acc": right}


def run(
    folder,
    backbone=None,
    loss=loss,
    steps=10,
    batches=batches,
    validate=None,
    choose="",
    resume=False,
    accelerator=None,
    **values,
):
    "Train a small classifier; the values are those of the optimiser and of the run."
    torch.manual_seed(0)
    model = Classifier(backbone or transformer())
    columns = ("acc", "val")
    task = Task(
        "boxes", model, None, loss, None, {}, columns=columns, validate=validate, choose=choose
    )
    fields = Optimiser.__dataclass_fields__
    optimiser = {"lr": 3e-3} | {k: v for k, v in values.items() if k in fields}
    rest = {k: v for k, v in values.items() if k not in fields}
    done = fit(
        task,
        batches,
        folder,
        optimiser=Optimiser(**optimiser),
        run=Run(steps=steps, **rest),
        resume=resume,
        accelerator=accelerator,
    )
    return model, done


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- who learns how fast


def linear_and_convolutions(model):
    "Names of the weights of PyTorch's own matrix layers."
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {f"{k}.weight" for k, part in model.named_modules() if isinstance(part, kinds)}


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
    decayed = {name for name, p in model.named_parameters() if place[id(p)]["weight_decay"] > 0}
    assert decayed == decay_names(model) == linear_and_convolutions(model)
    assert decayed == {name for name, p in model.named_parameters() if p.ndim > 1}
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
    assert [row["frozen"] for row in rows_of(tmp_path)] == ["1", "1", "0", "0"]
    with pytest.raises(ValueError, match="expected names of parts such as backbone, head"):
        set_training(model, ["encoder"])


# ---------------------------------------------------------------- the loop


def test_a_batch_that_cannot_be_read_costs_no_step_before_it(tmp_path):
    "Saved before the error, so that a run that goes on equals one without it; before the first step nothing is written."

    def broken(start, stop):
        yield from batches(start, min(stop, 7))
        raise ValueError("0007.ply: expected a PLY file, found an empty file")

    def trained(folder, batches, **how):
        torch.manual_seed(0)
        task = Task("boxes", Classifier(transformer()), None, loss, None, {}, columns=("acc",))
        run = Run(steps=12, save_every=0)
        return fit(task, batches, folder, optimiser=Optimiser(lr=3e-3), run=run, **how)

    for name in ("whole", "parts", "first"):
        (tmp_path / name).mkdir()
    trained(tmp_path / "whole", batches)
    with pytest.raises(ValueError, match="0007.ply"):
        trained(tmp_path / "parts", broken)
    assert trained(tmp_path / "parts", batches, resume=True).step == 12
    a, b = (load_tensors(tmp_path / n / "checkpoint.safetensors")[0] for n in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="0007.ply"):
        trained(tmp_path / "first", lambda start, stop: broken(7, 7))
    assert not list((tmp_path / "first").glob("*.safetensors"))


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
        kept = [{k: v for k, v in r.items() if k != "seconds"} for r in rows_of(tmp_path / name)]
        rows.append(kept)
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
    assert [row["skipped"] for row in rows_of(tmp_path)] == ["0", "1", "0"]
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


def test_recipe_values_become_a_backbone_and_a_frozen_run(tmp_path):
    net2 = dict(backbone="PointNet2", backbone_options=NET2, features=("xyz", "height"))
    recipe = change(Recipe(), **net2, probe=True, steps=7)
    assert build_backbone(recipe).in_channels == 4
    _, done = run(tmp_path, PointNet2(**NET2), steps=3, probe=True)
    assert [row["frozen"] for row in rows_of(tmp_path)] == ["1"] * done.step
    with pytest.raises(ValueError, match="frozen_steps: expected 0 with probe"):
        check_recipe(change(Recipe(), probe=True, frozen_steps=3))
    with pytest.raises(ValueError, match="backbone_options: PointNet2 does not take them"):
        build_backbone(change(recipe, backbone_options=dict(depth=3)))


def test_the_scaler_of_float16_goes_on_after_an_overflow(tmp_path, float16):
    "The scaler must see the overflow, step down, and train in the end."
    model, _ = run(tmp_path, steps=6, ema=0.5, accelerator=float16())
    skipped = [int(row["skipped"]) for row in rows_of(tmp_path)]
    assert skipped[0] == 1 and skipped[-1] == 0 and sorted(skipped, reverse=True) == skipped
    assert all(p.isfinite().all() for p in model.parameters())
    json.dumps(course := run_history(tmp_path / "metrics.csv", every=1), allow_nan=False)
    assert (
        course["train"]["grad_norm"][0] is None
        and course["train"]["grad_norm"][-1] > 0
        and course["val"] == {"step": []}
    )


def test_weight_decay_is_the_same_in_pretraining_and_in_tasks():
    before = recipes["object-transformer-mini"].build_predictor(8)
    after = finetune_recipes["cls-furniture-mini"].build_model(8)
    for model in (before, after):
        groups = parameter_groups(model, weight_decay=0.1)
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        names = {name for name, p in model.named_parameters() if id(p) in decayed}
        assert names == decay_names(model) == linear_and_convolutions(model)
        assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    shared = {name for name in decay_names(before) if name.startswith("backbone.")}
    assert shared == {name for name in decay_names(after) if name.startswith("backbone.")}


@pytest.mark.parametrize("name", ["PointNet2", "PointMLP", "PCM", "Mamba3D"])
def test_weight_decay_spares_what_is_no_matrix(name):
    model = ClassificationModel(build_backbone(change(Recipe(), **small(name))), 3)
    groups = parameter_groups(model, weight_decay=0.1)
    place = {id(p): bool(group["weight_decay"]) for group in groups for p in group["params"]}
    decays = {name: place[id(p)] for name, p in model.named_parameters()}
    assert {name for name, on in decays.items() if on} == decay_names(model)
    assert linear_and_convolutions(model) <= decay_names(model)
    assert not any(on for name, on in decays.items() if name.endswith("bias"))


def small(name):
    return dict(backbone=name, backbone_options=SMALL_BACKBONES[name])


def test_a_batch_that_is_not_finite_leaves_no_trace(tmp_path):
    kept = {}

    def broken(start, stop):
        for step, batch in enumerate(batches(start, stop), start):
            if step == 1:
                points = batch.points
                feat = points.feat.clone()
                feat[7] = torch.nan
                batch = Labelled(points.with_feat(feat), batch.label)
            yield batch

    def watch(model, batch):
        state = {k: v.clone() for k, v in model.named_buffers()}
        kept[len(kept)] = state | {k: p.detach().clone() for k, p in model.named_parameters()}
        return loss(model, batch)

    model, done = run(tmp_path, PointNet2(**NET2), watch, steps=3, batches=broken, ema=0.5)
    assert [row["skipped"] for row in rows_of(tmp_path)] == ["0", "1", "0"]
    assert done.skipped == 1 and any("running_mean" in name for name in kept[0])
    assert all(torch.equal(kept[1][name], kept[2][name]) for name in kept[1])
    assert not all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    weights, _ = load_tensors(tmp_path / "checkpoint.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_step_schedule_changes_the_rate(tmp_path):
    how = dict(schedule="step", decay_every=2, decay=0.5)
    run(tmp_path, PointNet2(**NET2), steps=5, lr=0.008, **how)
    rates = [float(row["lr"]) for row in rows_of(tmp_path)]
    assert rates == pytest.approx([0.008, 0.008, 0.004, 0.004, 0.002])


def test_the_state_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    model, _ = run(tmp_path, steps=2)
    state, meta = load_tensors(tmp_path / "resume.safetensors")
    names = [name for name, _ in model.named_parameters()]
    old = {}
    for key, value in state.items():
        part, _, rest = key.partition("/")
        if part == "optimizer":
            name, _, entry = rest.rpartition("/")
            key = f"optimizer/{names.index(name)}/{entry}"
        old[key] = value
    save_tensors(tmp_path / "resume.safetensors", old, meta)
    with pytest.raises(ValueError, match="an earlier version wrote it") as error:
        run(tmp_path, steps=4, resume=True)
    assert "\n" not in str(error.value) and "start again" in str(error.value)
