"""Classification: pooling, splits and episodes, voting by name, and whole runs of every layout on tiny data."""

import json
import os
import pickle
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from unipre3d.backbones import PointNet2, SparseUNet, StandardTransformer
from unipre3d.core import PointBatch
from unipre3d.data.augment import Augment
from unipre3d.data.labelled import write_modelnet40, write_scanobjectnn
from unipre3d.data.readers import Subset, class_labels, hold_out, take_shots
from unipre3d.data.samples import CloudSamples
from unipre3d.recipes import load_run
from unipre3d.runs.checkpoint import load_tensors
from unipre3d.runs.recipe import change
from unipre3d.runs.run import run_recipe
from unipre3d.tasks.classification import (
    ClassificationModel,
    ClassificationRecipe,
    class_probabilities,
    class_samples,
    classification_recipes,
    draw_episode,
    evaluate_classes,
    read_splits,
    score_classes,
    vote,
)
from unipre3d.tasks.heads import pool

NET2 = dict(
    centres=(16, 8),
    radii=(0.3, 0.6),
    neighbours=(8, 8),
    widths=((8, 16), (16, 16), (16, 32)),
    decoder_widths=((16,), (16,), (16,)),
)
SHAPES = np.array([[1.0, 1, 1], [1, 1, 0.1], [0.1, 0.1, 1], [1, 0.3, 0.3]], dtype=np.float32)


class Boxes:
    "A reader of boxes of four proportions."

    classes = ["cube", "plate", "pole", "beam"]

    def __init__(self, n=40, seed=0):
        self.n, self.seed = n, seed

    def __len__(self):
        return self.n

    def name(self, i):
        return f"{self.seed}/{i}"

    def label(self, i):
        return i % 4

    def rows(self, i):
        rng = np.random.default_rng((self.seed, i))
        return dict(
            xyz=(rng.random((96, 3), np.float32) - 0.5) * SHAPES[i % 4],
            color=(rng.random((96, 3)) * 255).astype(np.uint8),
        )

    def fingerprint(self):
        return "0" * 64


def model(seed=0, **how):
    torch.manual_seed(seed)
    return ClassificationModel(PointNet2(**NET2), 4, **how)


def tiny(**values):
    small = dict(
        backbone="PointNet2",
        backbone_options=NET2,
        n_points=64,
        steps=6,
        batch_size=8,
        lr=3e-3,
        validate_every=3,
        hidden=16,
    )
    return change(ClassificationRecipe(), **small | values)


def quiet(text):
    pass


@pytest.fixture(scope="module")
def scanobjectnn(tmp_path_factory):
    "Boxes in ScanObjectNN's files, five of each of four classes."
    root = tmp_path_factory.mktemp("sonn")
    for split, seed in (("train", 0), ("test", 1)):
        boxes = Boxes(40 if split == "train" else 16, seed)
        write_scanobjectnn(
            root,
            np.stack([boxes.rows(i)["xyz"] for i in range(len(boxes))]),
            class_labels(boxes),
            split=split,
        )
    return root


# ---------------------------------------------------------------- model and samples


def test_pooling_ignores_padding_order_and_empty_clouds():
    torch.manual_seed(0)
    p = PointBatch(torch.rand(7, 3), -torch.rand(7, 5), torch.tensor([0, 0, 2, 2, 2, 2, 2]), 4)
    out = pool(p)
    assert (
        torch.equal(out[0, :5], p.feat[:2].amax(0))
        and torch.allclose(out[2, 5:], p.feat[2:].mean(0))
        and not out[1].any()
        and not out[3].any()
    )
    p.feat.requires_grad_()
    pool(p).sum().backward()
    assert p.feat.grad.isfinite().all()


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: PointNet2(**NET2),
        lambda: StandardTransformer(
            num_groups=8,
            group_size=8,
            radius=None,
            encoder_widths=(8, 16, 16),
            encoder_dims=16,
            width=16,
            depth=1,
            num_heads=2,
        ),
        lambda: SparseUNet(
            in_channels=3,
            base_channels=8,
            channels=(8, 8, 8, 8),
            layers=(1, 1, 1, 1),
            voxel_size=0.1,
        ),
    ],
    ids=["all points", "group centres", "voxels"],
)
def test_any_backbone_classifies_and_a_batch_equals_its_clouds(backbone):
    torch.manual_seed(0)
    net = ClassificationModel(backbone(), 4).eval()
    samples = CloudSamples(Boxes(), n_points=64)
    together = net(samples.batch([(i, 0) for i in range(3)]).points)
    alone = torch.cat([net(samples[i].points) for i in range(3)])
    assert together.shape == (3, 4) and torch.allclose(together, alone, atol=1e-4)


def test_samples_depend_on_seed_index_and_draw_alone():
    samples = CloudSamples(
        Boxes(), n_points=32, features=("xyz", "color"), augment=Augment(rotate="up", drop=0.5)
    )
    a, b = samples[3, 2], samples.batch([(1, 0), (3, 2)])
    assert torch.equal(b.points.xyz[b.points.batch == 1], a.points.xyz) and b.label.tolist() == [
        1,
        3,
    ]
    assert (
        a.points.feat.shape[1] == 6
        and a.points.feat[:, 3:].min() >= 0
        and a.points.feat[:, 3:].max() <= 1
    )
    assert not torch.equal(samples[3, 1].points.xyz[:5], a.points.xyz[:5])


def test_farthest_points_are_always_the_same_and_known_once():
    from unipre3d.geometry.pointops import farthest_point_sample

    even, some, wide = (
        CloudSamples(Boxes(), n_points=32, farthest=k, seed=3) for k in (32, 38, 500)
    )
    xyz = Boxes().rows(5)["xyz"]
    rows = farthest_point_sample(
        torch.from_numpy(xyz), torch.zeros(96, dtype=torch.long), 1, 38
    ).numpy()
    for draw in (0, 1):
        assert {tuple(p) for p in even[5, draw].points.xyz.tolist()} == {
            tuple(p) for p in xyz[rows[:32]].tolist()
        }
    a, b = ({tuple(p) for p in some[5, draw].points.xyz.tolist()} for draw in (0, 1))
    assert a != b and len(a) == len(b) == 32 and a | b <= {tuple(p) for p in xyz[rows].tolist()}
    assert torch.equal(
        wide[5, 1].points.xyz, CloudSamples(Boxes(), n_points=32, seed=3)[5, 1].points.xyz
    )  # a smaller cloud is drawn from whole
    held = some.known.items[5]
    assert (
        some[5, 7].label == 1
        and some.known.items[5] is held
        and not pickle.loads(pickle.dumps(some)).known.items
    )
    with pytest.raises(ValueError, match="farthest: expected 0 or at least the 32 points"):
        CloudSamples(Boxes(), n_points=32, farthest=20)
    full = classification_recipes["cls-modelnet40"]
    assert class_samples(full.data, Boxes()).farthest == 1024
    assert class_samples(full.data, Boxes(), seed=0).farthest == 1200 and full.data.augment.stretch
    assert [
        name
        for name, r in classification_recipes.items()
        if r.data.augment.stretch or r.data.sampling != "random"
    ] == ["cls-modelnet40"]
    with pytest.raises(ValueError, match='sampling: expected "random" or "fps"'):
        class_samples(replace(full.data, sampling="all"), Boxes())


def test_points_are_drawn_as_they_were_before_there_were_farthest_ones():
    samples = CloudSamples(Boxes(), n_points=32, seed=4)
    keep = np.random.default_rng((4, 2, 7)).choice(96, 32, replace=False)
    assert np.array_equal(samples[7, 2].points.xyz.numpy(), Boxes().rows(7)["xyz"][keep])


# ---------------------------------------------------------------- training, validation, queries


def test_held_out_and_shots_are_disjoint_and_balanced():
    labels = np.repeat([0, 1, 2], [30, 10, 2])
    learn, choose = hold_out(labels, 0.1)
    assert (
        not set(learn) & set(choose)
        and sorted([*learn, *choose]) == list(range(42))
        and np.bincount(labels[choose]).tolist() == [3, 1, 1]
    )
    assert np.bincount(labels[take_shots(labels, 5)]).tolist() == [5, 5, 2] and set(
        take_shots(labels, 2)
    ) < set(take_shots(labels, 5))
    assert not np.array_equal(take_shots(labels, 5, 0), take_shots(labels, 5, 1))


def test_queries_of_an_episode_are_never_in_its_support():
    labels = np.arange(200) % 8
    for seed in range(5):
        e = draw_episode(labels, 5, 5, 20, seed)
        assert (
            len(e.classes) == 5
            and not set(e.support) & set(e.query)
            and len(set(e.support)) == 25
            and len(set(e.query)) == 100
        )
        assert set(labels[e.support]) == set(labels[e.query]) == set(e.classes)
    assert len({tuple(draw_episode(labels, 5, 5, 20, s).support) for s in range(5)}) == 5
    across = draw_episode(labels, 3, 5, 4, test_labels=labels[:40])
    assert across.query.max() < 40 and set(labels[across.query]) == set(across.classes)
    with pytest.raises(
        ValueError,
        match="expected at least 5 classes with 10 training objects and 20 queries, found 0",
    ):
        draw_episode(labels, 5, 10)


def test_a_selection_renumbers_its_classes():
    chosen = Subset(Boxes(), [2, 3, 6], classes=[2, 3])
    assert (
        chosen.classes == ["pole", "beam"]
        and class_labels(chosen).tolist() == [0, 1, 0]
        and chosen.name(2) == "0/6"
    )
    with pytest.raises(ValueError, match="got one of cube"):
        Subset(Boxes(), [0], classes=[1])


# ---------------------------------------------------------------- scores


def test_scores_equal_torchmetrics():
    torch.manual_seed(0)
    p, truth = torch.rand(60, 4).softmax(1), torch.randint(4, (60,))
    ours = score_classes(p, truth)
    for name, average in (("oa", "micro"), ("macc", "macro")):
        assert ours[name] == pytest.approx(float(multiclass_accuracy(p, truth, 4, average=average)))
    assert torch.equal(ours["confusion"], multiclass_confusion_matrix(p, truth, 4))


def test_voting_says_so_and_averages_probabilities():
    net, samples = (
        model(),
        CloudSamples(Boxes(8), n_points=32, augment=Augment(rotate="up")),
    )
    voted = vote(net, samples, 3)
    assert sorted(voted) == ["confusion_voting3", "macc_voting3", "oa_voting3"]
    mean = torch.stack([class_probabilities(net, samples, d)[0] for d in (1, 2, 3)]).mean(0)
    assert voted["oa_voting3"] == pytest.approx(
        (mean.argmax(1).numpy() == class_labels(Boxes(8))).mean()
    )
    assert not any("voting" in k for k in evaluate_classes(net, samples))
    with pytest.raises(ValueError, match="votes: expected at least 2"):
        vote(net, samples, 1)
    a, b = (class_probabilities(net, samples, batch_size=n)[0] for n in (3, 8))
    assert torch.allclose(a, b, atol=1e-5) and torch.allclose(a.sum(1), torch.ones(8))


# ---------------------------------------------------------------- runs


def test_a_run_leaves_what_it_promises_and_comes_back(scanobjectnn, tmp_path):
    recipe = tiny(
        layout="scanobjectnn",
        source=str(scanobjectnn),
        votes=2,
        augment=Augment(rotate="up", scale=(0.9, 1.1)),
    )
    said = []
    record = run_recipe("cls-test", recipe, tmp_path / "run", say=said.append).record
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json",
        "metrics.csv",
        "checkpoint.safetensors",
        "resume.safetensors",
        "confusion.png",
        "record.json",
    }
    assert record == json.loads((tmp_path / "run" / "record.json").read_text()) | {
        "values": record["values"]
    }
    assert set(record["metrics"]) == {"oa", "macc", "oa_voting2", "macc_voting2"} and record[
        "data"
    ] | {"sha256": 0, "name": 0} == dict(train=36, val=4, test=16, sha256=0, name=0)
    assert (
        np.sum(record["details"]["confusion"]) == 16
        and record["chosen"]["step"] in (3, 6)
        and record["start"]["kind"] == "none"
        and "from nothing" in said[0]
    )
    again, net, names = load_run(tmp_path / "run")
    assert again == recipe and names == record["classes"] and not net.training
    test = CloudSamples(read_splits(recipe.data)[2], n_points=64)
    assert evaluate_classes(net, test)["oa"] == record["metrics"]["oa"]

    probe = change(recipe, probe=True, votes=0, steps=2)
    how = dict(init=tmp_path / "run", say=said.append)
    second = run_recipe("cls-test", probe, tmp_path / "probe", **how).record
    a, b = (load_tensors(tmp_path / f / "checkpoint.safetensors")[0] for f in ("run", "probe"))
    assert (
        all(torch.equal(a[k], b[k]) for k in a if k.startswith("backbone."))
        and len(second["start"]["sha256"]) == 64
    )
    with pytest.raises(ValueError, match="expected at least 100.0% of the PointNet2"):
        other = NET2 | dict(decoder_widths=((16,), (16,), (8,)))
        run_recipe("cls-test", change(recipe, backbone_options=other), tmp_path / "wrong", **how)
    assert not (tmp_path / "wrong").exists()


def test_an_interrupted_run_goes_on_to_the_same_end(scanobjectnn, tmp_path, monkeypatch):
    recipe = tiny(layout="scanobjectnn", source=str(scanobjectnn))
    whole = run_recipe("cls-test", recipe, tmp_path / "whole", say=quiet).record
    import unipre3d.tasks.classification as module

    plain, seen = module.label_loss, []

    def stops(*args):
        seen.append(1)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)

    monkeypatch.setattr(module, "label_loss", stops)
    said = []
    cut = run_recipe("cls-test", recipe, tmp_path / "parts", say=said.append)
    assert (cut.record, cut.ended) == (None, "interrupted")
    assert "go on with: unipre3d finetune cls-test --resume" in said[-1]
    end = run_recipe("cls-test", recipe, tmp_path / "parts", resume=True, say=said.append)
    parts = end.record
    assert end.ended == "finished" and end.folder == tmp_path / "parts"
    assert parts["resumed"] and all(
        parts[k] == whole[k] for k in ("metrics", "details", "history", "chosen", "start")
    )


def test_a_point_that_is_no_number_costs_a_step_and_the_record_says_so(
    scanobjectnn, tmp_path, monkeypatch
):
    plain = CloudSamples.cloud

    def broken(self, index, draw):
        cloud = plain(self, index, draw)
        if draw == 0 and self.seed == 5 and index == broken.index:
            cloud["xyz"][3] = np.nan
        return cloud

    broken.index = 7
    monkeypatch.setattr(CloudSamples, "cloud", broken)
    values = dict(layout="scanobjectnn", source=str(scanobjectnn), seed=5, steps=4, batch_size=9)
    said = []
    found = run_recipe("cls-test", tiny(**values), tmp_path / "run", say=said.append)
    assert found.record["skipped"] == 1 and found.record["steps"] == 4
    assert any(text.startswith("1 of 4 steps were skipped") for text in said)
    weights, _ = load_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_modelnet40_and_episodes_run_from_a_folder(tmp_path):
    for split, n, seed in (("train", 16, 0), ("test", 12, 1)):
        clouds = [
            (Boxes.classes[i % 4], np.concatenate([Boxes(n, seed).rows(i)["xyz"]] * 2, 1))
            for i in range(n)
        ]
        write_modelnet40(tmp_path / "data", clouds, Boxes.classes, split=split, form="ply_hdf5")
    recipe = tiny(
        layout="modelnet40",
        source=str(tmp_path / "data"),
        ways=2,
        shots=2,
        queries=3,
        validation="none",
        batch_size=4,
        steps=2,
    )
    record = run_recipe("episode", recipe, tmp_path / "run", say=quiet).record
    assert (
        len(record["classes"]) == 2
        and record["data"]["train"] == 4
        and np.sum(record["details"]["confusion"]) == 6
        and record["chosen"] == {"step": 2, "chosen_by": "last", "score": None}
    )


@pytest.mark.parametrize(
    "values, says",
    [
        (dict(layout="scanobjectnn"), "data: this recipe needs ScanObjectNN"),
        (dict(layout="shapenet"), "layout: expected one of furniture"),
        (
            dict(layout="modelnet40", source="here"),
            "classes: expected none (--classes without names) for ModelNet40, of which all are kept; got chair, table",
        ),
        (dict(validation="test"), 'validation: expected "split"'),
        (dict(ways=5, shots=5), "an episode has no validation objects"),
        (dict(batch_size=1), "batch_size: expected"),
    ],
)
def test_mistakes_are_one_line(tmp_path, values, says):
    with pytest.raises(ValueError) as error:
        recipe = tiny(**dict(classes=("chair", "table")) | values)
        run_recipe("wrong", recipe, tmp_path / "run", say=quiet)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_missing_data_is_named_with_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="get it from hkust-vgd") as error:
        full = classification_recipes["cls-scanobjectnn"]
        read_splits(replace(full.data, source=str(tmp_path / "nothing")))
    assert "nothing there" in str(error.value)


def test_mini_recipes_fit_the_backbone_that_pretraining_made():
    from unipre3d.recipes import recipes

    before = recipes["object-transformer-mini"]
    for name in ("cls-furniture-mini", "cls-shapes-mini"):
        after = classification_recipes[name]
        assert after.model.backbone == before.model.backbone
        groups = dict(num_groups=128)  # of pre-training; no weight knows how many there are
        assert after.model.backbone_options | groups == before.model.backbone_options
        assert after.data.features == before.data.features
    assert (
        classification_recipes["cls-scanobjectnn"].model.backbone_options
        == recipes["object-transformer"].model.backbone_options
        == {}
    )


def test_the_command_line_changes_the_recipe_of_scanobjectnn():
    from unipre3d.cli import parse_recipe

    words = "--backbone PCM --n-points 1024 --lr 1e-4 --smoothing .3 --augment.scale .9 1.1".split()
    full = classification_recipes["cls-scanobjectnn"]
    recipe, _ = parse_recipe("finetune", "cls-scanobjectnn", full, words)
    augment = replace(full.data.augment, scale=(0.9, 1.1))
    values = dict(backbone="PCM", n_points=1024, lr=1e-4, smoothing=0.3, augment=augment)
    assert recipe == change(full, **values)
