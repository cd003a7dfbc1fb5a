"""Recipes as files and folders of runs: what earlier versions wrote, and what nobody else may take."""

import json
import multiprocessing
import os
import time

import pytest
from warm import Launch, script

from unipre3d.cli import newest_run, prepare_command
from unipre3d.data.augment import Augment
from unipre3d.data.shapenet import ShapeNetViews, export_objects
from unipre3d.recipes import KINDS, finetune_recipes, read_recipe, recipes
from unipre3d.records import contents_hash, read_record, write_config, write_json
from unipre3d.runs.checkpoint import save_state
from unipre3d.runs.recipe import change, from_values, to_values
from unipre3d.runs.run import claim_folder, held, is_held, own_folder, run_recipe
from unipre3d.tasks.autoencoder import AutoencoderRecipe
from unipre3d.tasks.classification import ClassificationRecipe
from unipre3d.tasks.masked import MaskedRecipe
from unipre3d.tasks.pretrain import PretrainRecipe

# ---------------------------------------------------------------- files of earlier versions


def test_a_pretraining_of_an_earlier_version_is_read(tmp_path):
    old = {
        "name": "object-transformer-mini",
        "about": "as it was",
        "data": "shapes",
        "layout": "shapenet",
        "classes": ["chair", "lamp"],
        "per_class": [9, 2, 3],
        "features": ["xyz", "height"],
        "rotate": True,
        "backbone": "PointMLP",
        "backbone_options": {"embed_width": 8, "neighbours": [8, 8, 8, 8]},
        "background": [1.0, 1.0, 1.0],
        "eval_every": 7,
        "clip": 1.0,
        "ema": 0.99,
    }
    write_json(tmp_path / "config.json", old)
    name, recipe, classes = read_recipe(tmp_path)
    assert (name, classes, recipe.about) == ("object-transformer-mini", [], "as it was")
    values = dict(
        source="shapes",
        classes=("chair", "lamp"),
        per_class=(9, 2, 3),
        features=("xyz", "height"),
        augment=Augment(rotate="up"),
        backbone="PointMLP",
        backbone_options=dict(embed_width=8, neighbours=(8, 8, 8, 8)),
        background=(1.0, 1.0, 1.0),
        validate_every=7,
        clip=1.0,
        ema=0.99,
    )
    assert recipe == change(PretrainRecipe(), about="as it was", **values)
    write_json(tmp_path / "config.json", old | {"rotate": False})
    assert read_recipe(tmp_path)[1].data.augment == Augment()


def test_a_fine_tuning_of_an_earlier_version_is_read(tmp_path):
    old = {
        "name": "cls-furniture-mini",
        "task": "classification",
        "start": {"kind": "none", "init": "none"},
        "class_names": ["bed", "lamp"],
        "data": "furniture",
        "augment": {"rotate": "up", "scale": [0.8, 1.25], "shift": 0.05, "jitter": 0.01},
        "flip": True,
        "share": 0.2,
        "need": 0.5,
        "votes": 3,
        "validate_every": 9,
        "smoothing": 0.1,
    }
    write_json(tmp_path / "config.json", old)
    _, recipe, classes = read_recipe(tmp_path)
    augment = Augment(rotate="up", scale=(0.8, 1.25), translate=0.05, jitter=0.01, mirror=True)
    values = dict(
        source="furniture",
        augment=augment,
        validation_fraction=0.2,
        min_coverage=0.5,
        votes=3,
        validate_every=9,
        smoothing=0.1,
    )
    assert recipe == change(ClassificationRecipe(), **values) and classes == ["bed", "lamp"]
    masked = {"name": "m", "task": "masked reconstruction", "share": 0.7, "rotate": True}
    write_json(tmp_path / "config.json", masked)
    recipe = read_recipe(tmp_path)[1]
    augment = Augment(rotate="up")
    assert recipe == change(MaskedRecipe(), masked_fraction=0.7, augment=augment)


def test_an_autoencoder_of_an_earlier_version_is_read(tmp_path):
    old = {"name": "autoencoder-mini", "task": "autoencoder", "patch": 32, "shard_window": 0}
    write_json(tmp_path / "config.json", old)
    assert read_recipe(tmp_path)[1] == change(AutoencoderRecipe(), patch=32)
    assert "shard_window" not in to_values(AutoencoderRecipe())


def test_what_is_not_known_is_named_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the config.json of a run"):
        read_recipe(tmp_path)
    for values, says in (
        ({"name": "x", "warp": 1, "glow": 2}, "unknown values glow, warp"),
        ({"name": "x", "task": "juggling"}, "expected the run of one of pre-training"),
    ):
        write_json(tmp_path / "config.json", values)
        with pytest.raises(ValueError) as error:
            read_recipe(tmp_path)
        assert says in str(error.value) and "\n" not in str(error.value)


DAMAGED = [
    {"steps": "many"},
    {"steps": 1.5},
    {"steps": True},
    {"lr": None},
    {"features": "xyz"},
    {"features": ["xyz", 3]},
    {"augment": 3},
    {"augment": {"rotate": 3}},
    {"augment": {"spin": 1}},
    {"backbone_options": [1]},
    {"terms": {"colour": "much"}},
    {"per_class": [1, "2", 3]},
    {"task": ["pre-training"]},
    {"start": []},
    {"conditions": "none"},
    {"class_names": 3},
    {"name": 3},
    {"about": {}},
]


@pytest.mark.parametrize("values", DAMAGED, ids=str)
def test_a_config_with_other_types_is_refused_in_one_line(tmp_path, values):
    write_json(tmp_path / "config.json", {"name": "mine"} | values)
    with pytest.raises(ValueError, match="config.json: expected") as error:
        read_recipe(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [{"metrics": [1]}, {"values": 3}, {"steps": "3"}, {"history": []}, {"data": "x"}, {"kind": []}],
    ids=str,
)
def test_a_record_with_other_types_is_refused_in_one_line(tmp_path, values):
    record = read_record("object-transformer-mini")
    write_json(tmp_path / "record.json", record)
    assert read_record(tmp_path / "record.json") == record
    write_json(tmp_path / "record.json", record | values)
    with pytest.raises(ValueError, match="record.json: expected") as error:
        read_record(tmp_path / "record.json")
    assert "\n" not in str(error.value)


def test_a_config_that_was_changed_is_refused(tmp_path):
    write_config(tmp_path, {"name": "mine"} | to_values(PretrainRecipe()))
    assert read_recipe(tmp_path)[0] == "mine"
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"lr": 0.5})
    with pytest.raises(ValueError, match="found others; copy it again, or take sha256 out"):
        read_recipe(tmp_path)
    del config["sha256"]
    write_json(tmp_path / "config.json", config | {"lr": 0.5})
    assert read_recipe(tmp_path)[1].optimiser.lr == 0.5


@pytest.mark.parametrize("name", [*recipes, *finetune_recipes])
def test_every_recipe_comes_back_from_its_file(name):
    recipe = (recipes | finetune_recipes)[name]
    written = json.loads(json.dumps(to_values(recipe)))
    assert from_values(type(recipe), written) == recipe
    assert KINDS[recipe.task] is type(recipe)
    assert recipe.command == ("pretrain" if name in recipes else "finetune")


# ---------------------------------------------------------------- folders


def claim(folder, barrier, found):
    barrier.wait()
    found.put([str(claim_folder(folder)) for _ in range(5)])


def test_processes_that_claim_a_folder_at_once_get_different_ones(tmp_path):
    fork = multiprocessing.get_context("fork")
    barrier, found = fork.Barrier(4), fork.Queue()
    folder = tmp_path / "runs" / "object-transformer-mini"
    workers = [fork.Process(target=claim, args=(folder, barrier, found)) for _ in range(4)]
    for worker in workers:
        worker.start()
    names = [name for _ in workers for name in found.get(timeout=60)]
    for worker in workers:
        worker.join(60)
    assert len(set(names)) == 20 and str(folder) in names
    assert {path.name for path in folder.parent.iterdir()} == {
        folder.name,
        *(f"{folder.name}-{k}" for k in range(2, 21)),
    }


def test_an_exact_folder_is_that_one_or_none(tmp_path):
    assert claim_folder(tmp_path / "a", exact=True) == tmp_path / "a"
    (tmp_path / "a" / "notes.txt").touch()
    with pytest.raises(ValueError, match="expected an empty folder"):
        claim_folder(tmp_path / "a", exact=True)


def test_a_folder_of_a_run_that_was_killed_at_once_is_free(tmp_path):
    (tmp_path / "config.json.3.partial").write_text('{"name": "to')
    (tmp_path / "running.lock").touch()
    with own_folder(tmp_path, exact=True) as folder:
        assert [path.name for path in folder.iterdir()] == ["running.lock"]
    assert not list(tmp_path.iterdir())


def claim_exactly(folder, barrier, found):
    barrier.wait()
    try:
        with own_folder(folder, exact=True):
            found.put(str(folder))
            barrier.wait()
    except ValueError as error:
        found.put(error)
        barrier.wait()


@pytest.mark.parametrize("empty", [False, True])
def test_of_processes_that_want_one_folder_at_once_one_gets_it(tmp_path, empty):
    fork = multiprocessing.get_context("fork")
    for k in range(5):
        folder = tmp_path / f"run-{k}"
        if empty:
            folder.mkdir()
        barrier, found = fork.Barrier(4), fork.Queue()
        workers = [
            fork.Process(target=claim_exactly, args=(folder, barrier, found)) for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        results = [found.get(timeout=60) for _ in workers]
        for worker in workers:
            worker.join(60)
        assert [result for result in results if isinstance(result, str)] == [str(folder)]
        refused = [result for result in results if not isinstance(result, str)]
        assert all("in use by another process" in str(error) for error in refused)


def hold_often(folder, inside, most, held_at_all):
    for _ in range(200):
        try:
            with held(folder):
                with inside.get_lock():
                    inside.value += 1
                    most.value = max(most.value, inside.value)
                    held_at_all.value += 1
                time.sleep(0.0002)
                with inside.get_lock():
                    inside.value -= 1
        except ValueError:
            pass


def test_no_two_hold_a_folder(tmp_path):
    fork = multiprocessing.get_context("fork")
    inside, most, held_at_all = (fork.Value("i", 0) for _ in range(3))
    args = (tmp_path, inside, most, held_at_all)
    workers = [fork.Process(target=hold_often, args=args) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert most.value == 1 and held_at_all.value > 20
    assert not list(tmp_path.iterdir()) and not is_held(tmp_path)


def test_a_run_that_someone_works_on_is_not_the_newest(tmp_path):
    for name in ("toy", "toy-2"):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, {"name": "toy"})
        save_state(tmp_path / name, {}, {"step": 1})
    os.utime(tmp_path / "toy", (1, 1))
    assert newest_run("toy", tmp_path) == tmp_path / "toy-2"
    with held(tmp_path / "toy-2"):
        assert newest_run("toy", tmp_path) == tmp_path / "toy"
        with held(tmp_path / "toy"), pytest.raises(FileNotFoundError, match="found none"):
            newest_run("toy", tmp_path)


LAUNCH = """
import os, sys, time
from pathlib import Path
from unipre3d.cli import main

words = "finetune cls-furniture-mini --classes bed lamp --n-points 64 --depth 1 --num-groups 8 --group-size 8"
words += " --device cpu --steps 1 --batch-size 4 --validate-every 0 --save-every 0 --out"
status = main([*words.split(), sys.argv[1]])
ended = Path(sys.argv[2])
(ended / os.environ["RANK"]).touch()
while len(list(ended.iterdir())) < 2:  # the launcher kills the other as soon as one has failed
    time.sleep(0.05)
sys.exit(status)
"""


def test_where_the_first_process_refuses_the_others_end_too(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    path, ended = tmp_path / "launch.py", tmp_path / "ended"
    path.write_text(LAUNCH)
    ended.mkdir()
    run = Launch(2, path, tmp_path / "taken", ended, entry=script)
    try:
        _, errors = run.communicate(timeout=240)
    finally:
        run.kill()
    refusals = [line for line in errors.splitlines() if line.startswith("unipre3d: --out")]
    assert run.returncode and len(refusals) == 2, errors[-3000:]
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]


def test_a_run_goes_on_with_its_own_values(tmp_path):
    small = dict(
        classes=("bed", "lamp"),
        n_points=64,
        batch_size=4,
        steps=3,
        save_every=1,
        backbone_options=dict(num_groups=8, group_size=8, depth=1),
    )
    recipe = change(finetune_recipes["cls-furniture-mini"], **small)
    how = dict(device="cpu", say=lambda text: None)
    done = run_recipe("cls-furniture-mini", recipe, tmp_path / "run", **how)
    assert done.ended == "finished" and done.record["resumed"] is False
    other = change(recipe, lr=0.5)
    with pytest.raises(ValueError, match="--resume: expected lr = 0.001, with which") as error:
        run_recipe("cls-furniture-mini", other, tmp_path / "run", resume=True, **how)
    assert "\n" not in str(error.value)


def test_images_that_changed_are_noticed(tmp_path):
    "The names and sizes of the files stay."
    small = dict(n_points=64, batch_size=2, steps=3, save_every=1, workers=0, image="rgb")
    small |= dict(resolution=16, n_target=1, image_cache_mb=0, source=str(tmp_path / "data"))
    options = dict(num_groups=8, group_size=8, depth=1)
    recipe = recipes["object-transformer-mini"]
    recipe = change(recipe, **small, backbone_options=recipe.model.backbone_options | options)
    embedded = ShapeNetViews()
    splits = [embedded.table[item]["split"] for item in embedded.items]
    export_objects(embedded, tmp_path / "data", indices=[splits.index(s) for s in ("train", "val")])
    how = dict(device="cpu", say=lambda text: None)
    folder = tmp_path / "run"
    assert run_recipe("object-transformer-mini", recipe, folder, **how).ended == "finished"
    before = contents_hash(tmp_path / "data")
    run_recipe("object-transformer-mini", recipe, folder, resume=True, **how)
    image = sorted((tmp_path / "data").rglob("*.png"))[0]
    content = bytearray(image.read_bytes())
    content[-13] ^= 1
    image.write_bytes(content)
    assert contents_hash(tmp_path / "data") != before
    with pytest.raises(ValueError, match=r"began with data \(contents changed\)"):
        run_recipe("object-transformer-mini", recipe, folder, resume=True, **how)


def test_a_data_set_that_cannot_be_read_has_no_next_command(tmp_path, capsys):
    import trimesh

    (tmp_path / "box").mkdir()
    for k in range(3):
        trimesh.creation.box((0.5, 0.3 + 0.2 * k, 0.4)).export(tmp_path / "box" / f"box{k}.ply")
    small = ["--size", "16", "--points", "64", "--out", str(tmp_path / "mine.zip")]
    for more, says in (
        (["--views", "5"], "next: unipre3d pretrain"),
        (["--views", "5", "--split", "1", "0", "0"], "does not read it"),
        (["--views", "2"], "does not read it"),
    ):
        assert prepare_command([str(tmp_path / "box"), *small, *more]) == 0
        said = capsys.readouterr().out
        assert says in said and ("next:" in said) == (says.startswith("next"))
