"""Part segmentation: answers at every point from every kind of backbone, scores against plain ones, readers of all layouts, and whole runs on tiny data."""

import json
import os
import signal

import numpy as np
import pytest
import torch

from unipre3d.backbones import PointNet2, SparseUNet, StandardTransformer
from unipre3d.core import PointBatch
from unipre3d.data.augment import Augment
from unipre3d.data.labelled import ShapeNetPart, shapenet_parts, write_shapenetpart
from unipre3d.data.readers import Concat
from unipre3d.recipes import load_run
from unipre3d.runs.checkpoint import load_tensors
from unipre3d.runs.recipe import change
from unipre3d.runs.run import run_recipe
from unipre3d.tasks.heads import propagate
from unipre3d.tasks.metrics import own_parts
from unipre3d.tasks.parts import (
    LabelledParts,
    Majority,
    PartClouds,
    PartData,
    PartModel,
    PartRecipe,
    PartSamples,
    PartTable,
    evaluate_parts,
    number_parts,
    part_names,
    part_recipes,
    part_samples,
    predict_parts,
    read_parts,
    split_parts,
    spread,
    with_names,
)
from unipre3d.worlds.scans import embedded_part_shapes

NET2 = dict(
    centres=(16, 8),
    radii=(0.3, 0.6),
    neighbours=(8, 8),
    widths=((8, 16), (16, 16), (16, 32)),
    decoder_widths=((16,), (16,), (16,)),
)
BACKBONES = {
    "all points": lambda: PointNet2(**NET2),
    "group centres": lambda: StandardTransformer(
        num_groups=8,
        group_size=8,
        radius=None,
        encoder_widths=(8, 16, 16),
        encoder_dims=16,
        width=16,
        depth=1,
        num_heads=2,
    ),
    "voxels": lambda: SparseUNet(
        in_channels=3, base_channels=8, channels=(8, 8, 8, 8), layers=(1, 1, 1, 1), voxel_size=0.1
    ),
}
NAMES = {"mug": ["body", "handle"], "chair": ["seat", "back", "leg"]}
PARTS = number_parts(NAMES)


class Boxes:
    "A reader of boxes cut into layers; part 0 has no name."

    classes = ["chair", "mug"]

    def __init__(self, n=12, seed=0, points=96):
        self.n, self.seed, self.points = n, seed, points

    def __len__(self):
        return self.n

    def name(self, i):
        return f"{self.seed}/{i}"

    def label(self, i):
        return i % 2

    def rows(self, i):
        rng = np.random.default_rng((self.seed, i))
        xyz = (rng.random((self.points, 3), np.float32) - 0.5) * np.float32(
            [0.6, 0.6, 1] if i % 2 else [1, 1, 0.6]
        )
        part = 1 + ((xyz[:, 2] + 0.5) * (2 if i % 2 else 3)).astype(np.int32).clip(
            0, 1 if i % 2 else 2
        )
        part[:3] = 0
        number = np.arange(self.points, dtype=np.float32)[:, None].repeat(3, 1)
        return dict(xyz=xyz, color=number, part=part)

    def fingerprint(self):
        return f"{self.seed}" * 64


def clouds(**how):
    return PartClouds(Boxes(**how), NAMES)


def tiny(**values):
    small = dict(
        source="shapes",
        classes=("lamp", "stool"),
        per_class=(6, 2, 3),
        stored=96,
        backbone="PointNet2",
        backbone_options=NET2,
        n_points=64,
        steps=6,
        batch_size=4,
        lr=3e-3,
        validate_every=3,
        hidden=16,
    )
    return change(PartRecipe(), **small | values)


def quiet(text):
    pass


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    "Generated shapes of these tests, made in this process."
    before, os.environ["UNIPRE3D_CACHE"] = (
        os.environ.get("UNIPRE3D_CACHE"),
        str(tmp_path_factory.mktemp("cache")),
    )
    for split, many in zip(("train", "val", "test"), (6, 2, 3)):
        embedded_part_shapes(
            split=split, categories=("lamp", "stool"), per_category=many, points=96, workers=1
        )
    yield
    if before is None:
        del os.environ["UNIPRE3D_CACHE"]
    else:
        os.environ["UNIPRE3D_CACHE"] = before


# ---------------------------------------------------------------- propagating features


def test_features_are_propagated_within_their_own_cloud():
    features = PointBatch(
        torch.zeros(4, 3), torch.tensor([[1.0], [1.0], [2.0], [2.0]]), torch.tensor([0, 0, 2, 2]), 3
    )
    points = PointBatch(torch.rand(5, 3), torch.rand(5, 3), torch.tensor([0, 0, 2, 2, 2]), 3)
    for how in (dict(), dict(voxel_size=0.1), dict(voxel_size=5.0)):
        assert torch.allclose(
            propagate(features, points, **how)[:, 0], torch.tensor([1.0, 1, 2, 2, 2])
        )


def test_propagated_features_have_gradients():
    features = PointBatch(
        torch.rand(6, 3), torch.rand(6, 2, requires_grad=True), torch.zeros(6, dtype=torch.long), 1
    )
    for voxel_size in (None, 0.3):
        features.feat.grad = None
        propagate(
            features,
            PointBatch(torch.rand(9, 3), torch.rand(9, 3), torch.zeros(9, dtype=torch.long), 1),
            voxel_size=voxel_size,
        ).sum().backward()
        assert features.feat.grad.isfinite().all() and float(
            features.feat.grad.sum()
        ) == pytest.approx(18.0, abs=1e-4)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_backbone_predicts_at_every_point_and_a_batch_equals_its_clouds(kind):
    torch.manual_seed(0)
    net = PartModel(BACKBONES[kind](), 2, 5, hidden=16).eval()
    samples = PartSamples(clouds(), n_points=64)
    both, every = samples.batch([(0, 0), (1, 0)]), samples.queries([0, 1])
    assert net(both.points, both.category).shape == (128, 5)
    logits = net(both.points, both.category, every.points)
    assert logits.shape == (192, 5)
    for i in (0, 1):
        one, query = samples.batch([(i, 0)]), samples.queries([i])
        assert torch.allclose(
            net(one.points, one.category, query.points), logits[every.points.batch == i], atol=1e-5
        )


def test_category_changes_the_prediction_and_every_weight_learns():
    torch.manual_seed(0)
    net = PartModel(BACKBONES["group centres"](), 2, 5, hidden=16)
    batch = PartSamples(clouds(), n_points=64).batch([(0, 0), (1, 0), (2, 0)])
    assert not torch.allclose(
        net.eval()(batch.points, batch.category), net(batch.points, 1 - batch.category)
    )
    recipe = tiny(smoothing=0.1)
    task = recipe.build_task()
    batch = task.samples.batch([(0, 0), (1, 0), (2, 0)])
    net = PartModel(BACKBONES["group centres"](), 2, len(task.classes), hidden=16)
    loss, scores = task.loss(net.train(), batch)
    loss.backward()
    assert (
        all(
            p.grad is not None and p.grad.isfinite().all()
            for n, p in net.named_parameters()
            if "cls" not in n
        )
        and 0 <= scores["train_acc"] <= 1
    )


def test_a_linear_head_for_probes():
    net = PartModel(BACKBONES["all points"](), 2, 5, hidden=0)
    batch = PartSamples(clouds(), n_points=64).batch([(0, 0), (1, 0)])
    assert isinstance(net.head, torch.nn.Identity) and net(batch.points, batch.category).shape == (
        128,
        5,
    )
    count = sum(map(len, part_names(tiny().data).values()))
    assert len(tiny(probe=True).build_model(count).near.weight) == count == 8


# ---------------------------------------------------------------- labels and samples


def test_parts_are_numbered_through_all_categories():
    assert PARTS == {"mug": [0, 1], "chair": [2, 3, 4]}
    reader = clouds()
    assert reader.classes == ["mug", "chair"] and [reader.label(i) for i in (0, 1)] == [1, 0]
    for i in (0, 1):
        raw, got = reader.reader.rows(i)["part"], reader.rows(i)["part"]
        assert (got[:3] == -1).all() and set(got[3:].tolist()) == set(
            PARTS[reader.classes[reader.label(i)]]
        )
        assert (np.argsort(raw[3:], kind="stable") == np.argsort(got[3:], kind="stable")).all()
    assert (
        with_names(reader, fraction=0.99) == []
        and with_names(reader, fraction=0.9) == list(range(12))
        and with_names(reader, fraction=0.9, parts=3) == list(range(0, 12, 2))
    )
    with pytest.raises(ValueError, match="the reader has chair"):
        PartClouds(Boxes(), {"mug": ["body"]})


@pytest.mark.parametrize(
    "how",
    [
        Augment(),
        Augment(drop=0.6),
        Augment(rotate="all", scale=(0.5, 2.0), translate=0.3, jitter=0.02, drop=0.6),
    ],
    ids=["plain", "drop", "all"],
)
def test_labels_follow_their_points(how):
    samples = PartSamples(clouds(), n_points=64, augment=how)
    for i in (0, 1):
        truth, seen = samples.source.rows(i)["part"], set()
        for draw in range(3):
            cloud = samples.cloud(i, draw)
            number = np.round(255 * cloud["color"][:, 0]).astype(
                int
            )  # each point carries its number
            assert (cloud["part"] == truth[number]).all() and len(cloud["xyz"]) == len(
                cloud["part"]
            ) <= 64
            seen.add(tuple(number))
        assert len(seen) == 3
    batch = samples.batch([(0, 1), (1, 1)])
    assert (
        isinstance(batch, LabelledParts)
        and batch.category.tolist() == [1, 0]
        and len(batch.label) == len(batch.points)
    )


def test_queries_are_all_points_as_they_are():
    samples = PartSamples(clouds(), n_points=10)
    every = samples.queries([1, 4])
    assert (
        np.array_equal(every.points.xyz[96:], samples.source.rows(4)["xyz"])
        and len(every.label) == 192
    )
    with pytest.raises(ValueError, match="expected samples without augmentation"):
        next(
            predict_parts(
                None, PartSamples(clouds(), augment=Augment(drop=0.5)), list(PARTS.values())
            )
        )


# ---------------------------------------------------------------- scores


def naive(pred, query):
    "IoUs of every shape and part, with sets."
    shapes = {}
    for b, kind in enumerate(query.category.tolist()):
        mine = (query.points.batch == b) & (query.label >= 0)
        p, t = pred[mine].tolist(), query.label[mine].tolist()
        for part in list(PARTS.values())[kind]:
            here, there = ({i for i, x in enumerate(labels) if x == part} for labels in (p, t))
            shapes.setdefault((kind, b), []).append(
                (part, len(here & there) / len(here | there) if here | there else 1.0, bool(there))
            )
    return shapes


class Random(torch.nn.Module):
    "Noise that depends on the place alone, not on the batch."

    def forward(self, points, category, places):
        gen = torch.sin(
            1000 * places.xyz @ torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
        )
        return gen + torch.linspace(-1, 1, 5) * places.xyz[:, 2:]


def test_scores_equal_plain_ones():
    samples = PartSamples(clouds(n=7), n_points=32)
    got, query = evaluate_parts(Random(), samples, PARTS, batch_size=3), samples.queries(range(7))
    pred = own_parts(
        Random()(None, None, query.points), query.category[query.points.batch], list(PARTS.values())
    )
    shapes = naive(pred, query)
    means = {key: np.mean([iou for _, iou, _ in v]) for key, v in shapes.items()}
    by = [np.mean([m for (k, _), m in means.items() if k == kind]) for kind in (0, 1)]
    assert (
        got["miou_i"] == pytest.approx(np.mean(list(means.values())))
        and got["miou_c"] == pytest.approx(np.mean(by))
        and list(got["category"].values()) == pytest.approx(by)
    )
    known = query.label >= 0
    assert got["acc"] == pytest.approx(float((pred == query.label)[known].float().mean()))
    table = got["table"].compute([f"{k} {p}" for k, own in NAMES.items() for p in own])
    for name, part in zip(table, range(5)):
        ious = [iou for v in shapes.values() for p, iou, there in v if p == part and there]
        assert table[name] == {"shapes": len(ious), "iou": pytest.approx(np.mean(ious))}
    assert not PartTable(2).compute(["a", "b"])


def test_the_floor_is_the_most_frequent_part():
    reader = clouds()
    floor = Majority(reader, 5)
    for i in (0, 1):
        part = reader.rows(i)["part"]
        query = PartSamples(reader).queries([i])
        every = np.concatenate([reader.rows(k)["part"] for k in range(i, 12, 2)])
        assert (
            floor(None, query.category, query.points).argmax(1)
            == np.bincount(every[every >= 0]).argmax()
        ).all() and len(part) == 96


# ---------------------------------------------------------------- data and recipes


def test_generated_shapes_split_by_number_and_come_back():
    recipe = tiny()
    train, val, test = split_parts(recipe)
    assert [len(r) for r in (train, val, test)] == [12, 4, 6] and train.classes == ["lamp", "stool"]
    names = [{r.name(i) for i in range(len(r))} for r in (train, val, test)]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    both, nobody, _ = split_parts(change(recipe, validation="none"))
    assert (
        isinstance(both, Concat)
        and nobody is None
        and len(both) == 16
        and both.name(13) == val.name(1)
        and both.label(13) == val.label(1)
        and both.fingerprint() != train.fingerprint()
    )
    with pytest.raises(ValueError, match='validation: expected "split" or "none"'):
        split_parts(change(recipe, validation="share"))
    assert spread(100, 3) == [0, 50, 99]


def test_furniture_has_named_parts():
    furniture = PartData("furniture", "furniture", classes=("bed",))
    reader = read_parts(furniture, "test")
    rows = reader.rows(0)
    assert (
        len(reader)
        and reader.classes == ["bed"]
        and (rows["part"] >= 0).mean() >= 0.95
        and set(rows) >= {"xyz", "normal", "color", "part"}
    )
    with pytest.raises(ValueError, match="classes: expected some of bed, car"):
        part_names(PartData(layout="furniture", classes=("toy",)))
    with pytest.raises(ValueError, match="got none"):
        part_names(PartData(layout="shapes"))
    with pytest.raises(
        ValueError,
        match="classes: expected none .* for ShapeNetPart, of which all are kept; got chair",
    ):
        part_names(PartData(layout="shapenetpart", classes=("chair",)))


def test_recipes_build_and_missing_data_says_where_it_is():
    for name, recipe in part_recipes.items():
        if not recipe.data.source:
            with pytest.raises(ValueError) as error:
                recipe.build_task()
            assert (
                "\n" not in str(error.value)
                and "ShapeNetPart" in str(error.value)
                and "--data FOLDER" in str(error.value)
            )
        if "mini" in name:
            recipe.build_model(sum(map(len, part_names(recipe.data).values())))
            with pytest.raises(ValueError, match="classes: expected"):
                recipe.build_model(1)
    with pytest.raises(
        FileNotFoundError, match="expected synsetoffset2category.txt, found nothing there"
    ):
        full = part_recipes["part-shapenetpart"]
        read_parts(change(full, source="no/such/folder").data, "val")


@pytest.fixture(scope="module")
def shapenetpart(tmp_path_factory):
    "Mugs and caps in ShapeNetPart's files."
    parts, synsets = shapenet_parts(), {"Cap": "02954340", "Mug": "03797390"}

    def rows(kind, seed):
        rng = np.random.default_rng((seed, len(kind)))
        xyz = rng.random((80 + seed, 3)) - 0.5
        return np.concatenate(
            [xyz, np.tile([0, 0, 1.0], (len(xyz), 1)), parts[kind][0] + (xyz[:, 2:] > 0)], 1
        )

    shapes = {
        split: [
            (synsets[kind], f"{kind}{s}", rows(kind, s))
            for s in range(a, a + 3)
            for kind in synsets
        ]
        for split, a in (("train", 0), ("val", 10), ("test", 20))
    }
    return write_shapenetpart(tmp_path_factory.mktemp("part"), shapes, synsets)


def test_shapenetpart_from_files_to_a_record(shapenetpart, tmp_path):
    recipe = change(
        part_recipes["part-shapenetpart"],
        source=str(shapenetpart),
        backbone="PointNet2",
        backbone_options=NET2,
        features=("xyz",),
        n_points=64,
        steps=2,
        batch_size=4,
        warmup=0,
        hidden=16,
        workers=0,
        validate_every=2,
        mixed_precision="no",
    )
    train, raw = read_parts(recipe.data, "train"), ShapeNetPart(shapenetpart, split="train")
    assert (
        np.array_equal(train.rows(1)["part"], raw.rows(1)["part"])
        and train.classes == list(shapenet_parts())
        and train.label(0) == raw.label(0)
        and train.parts == shapenet_parts()
    )
    record = run_recipe("part-shapenetpart", recipe, tmp_path, device="cpu", say=quiet).record
    assert (
        len(record["classes"]) == 50
        and record["data"]["train"] == record["data"]["test"] == 6
        and set(record["details"]["category"]) == {"Cap", "Mug"}
    )
    assert split_parts(change(recipe, validation="none"))[0].name(6) == ShapeNetPart(
        shapenetpart, split="trainval"
    ).name(6)


def test_normals_from_the_command_line_and_a_start_without_them(shapenetpart, tmp_path):
    from unipre3d.cli import parse_recipe

    small = dict(
        embed_width=8,
        neighbours=(8, 8, 8, 8),
        pre_blocks=(1, 1, 1, 1),
        post_blocks=(1, 1, 1, 1),
        decoder_widths=(32, 16, 16, 16),
        decoder_blocks=(1, 1, 1, 1),
    )

    def recipe(*words):
        found, _ = parse_recipe(
            "finetune",
            "part-shapenetpart",
            part_recipes["part-shapenetpart"],
            [
                "--data",
                str(shapenetpart),
                "--steps",
                "2",
                "--batch-size",
                "4",
                "--n-points",
                "64",
                "--warmup",
                "0",
                "--workers",
                "0",
                "--mixed-precision",
                "no",
                "--validate-every",
                "2",
                *words,
            ],
        )
        return change(found, backbone_options=small, hidden=16)

    data = recipe().data
    assert data.features == ("xyz", "height") and data.augment == Augment(
        scale=(2 / 3, 1.5), stretch=True, translate=0.13
    )
    run_recipe("height", recipe(), tmp_path / "height", device="cpu", say=quiet)
    start = dict(init=tmp_path / "height", device="cpu")
    words = "--features", "xyz", "normal", "--validation", "none"
    with pytest.raises(
        ValueError,
        match=r"found 99.9%; embed.0.weight: expected \[8, 6\] for this model, got \[8, 4\]",
    ):
        run_recipe("normal", recipe(*words), tmp_path / "refused", **start, say=quiet)
    said = []
    partial = recipe(*words, "--min-coverage", ".99")
    record = run_recipe("normal", partial, tmp_path / "normal", **start, say=said.append).record
    assert (
        "99.9% of" in said[0]
        and "1 other shape" in said[0]
        and record["data"]["train"] == 12
        and record["data"]["val"] == 0
        and record["metrics"]["miou_c"] >= 0
    )
    samples = part_samples(partial.data, read_parts(data, "train"), seed=0)
    assert samples.augment == data.augment
    batch = samples.batch([(0, 1)])
    up = batch.points.feat[:, 3:]
    assert (
        torch.equal(batch.points.feat[:, :3], batch.points.xyz)
        and torch.allclose(up, up[:1].expand_as(up))
        and torch.allclose(up[0].norm(), torch.tensor(1.0))
    )


# ---------------------------------------------------------------- runs


def test_a_run_leaves_its_record_and_picture_and_starts_another(tmp_path):
    how = dict(device="cpu", say=quiet)
    record = run_recipe("tiny", tiny(), tmp_path / "a", **how).record
    assert (tmp_path / "a" / "parts.png").stat().st_size > 1000 and json.loads(
        (tmp_path / "a" / "record.json").read_text()
    )["details"] == record["details"]
    assert (
        set(record["metrics"]) == {"miou_c", "miou_i", "acc"}
        and record["details"]["floor"]["miou_c"] > 0
        and record["chosen"]["chosen_by"] == "val_miou_c"
    )
    assert record["classes"][0] == "lamp base" and {
        k.split()[0] for k in record["details"]["parts"]
    } == {"lamp", "stool"}
    recipe, model, names = load_run(tmp_path / "a")
    got = evaluate_parts(
        model,
        part_samples(recipe.data, read_parts(recipe.data, "test")),
        number_parts(part_names(recipe.data)),
    )
    assert got["miou_c"] == record["metrics"]["miou_c"] and names == record["classes"]
    linear = tiny(probe=True, steps=2)
    probe = run_recipe("probe", linear, tmp_path / "b", init=tmp_path / "a", **how).record
    before, after = (load_tensors(tmp_path / k / "checkpoint.safetensors")[0] for k in "ab")
    assert probe["start"]["coverage"] == 1.0 and all(
        torch.equal(before[k], after[k]) for k in before if k.startswith("backbone.")
    )


def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    import unipre3d.tasks.parts as module

    plain, seen = module.label_loss, []

    def stops(*args):
        seen.append(1)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)

    how = dict(device="cpu", say=quiet)
    run_recipe("tiny", tiny(), tmp_path / "straight", **how)
    monkeypatch.setattr(module, "label_loss", stops)
    cut = run_recipe("tiny", tiny(), tmp_path / "cut", **how)
    assert (cut.record, cut.ended) == (None, "interrupted")
    run_recipe("tiny", tiny(), tmp_path / "cut", resume=True, **how)
    a, b = (load_tensors(tmp_path / k / "checkpoint.safetensors")[0] for k in ("straight", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    one, other = (
        json.loads((tmp_path / k / "record.json").read_text()) for k in ("straight", "cut")
    )
    assert (
        one["metrics"] == other["metrics"]
        and one["history"] == other["history"]
        and other["resumed"]
    )
