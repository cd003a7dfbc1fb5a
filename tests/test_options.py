"What is accepted has an effect, or is refused in one line."

import re
from dataclasses import fields
from pathlib import Path

import pytest

from unipre3d.cli import main
from unipre3d.recipes import finetune_recipes, recipes
from unipre3d.runs.recipe import change, check_changes, check_recipe, groups, value_of

EVERY = recipes | finetune_recipes
MINI = {name: recipe for name, recipe in EVERY.items() if "mini" in name}

# Values that no table needs: a name that a reader, a backbone or the objective looks up and refuses itself, or one with
# an effect whatever it is.
FREE = {
    "source",
    "layout",
    "features",
    "classes",
    "backbone",
    "backbone_options",
    "image",
    "image_subfolder",
    "lpips_weights",
}
FREE |= {"fusion", "terms", "backend", "variant", "probe", "group_unmoved", "keep_workers"}

WRONG = {
    "augment": None,  # see below
    "schedule": "odd",
    "mixed_precision": "fp99",
    "convention": "mine",
    "per_class": (-1, 1, 1),
    "sampling": "some",
    "intrinsics": "guess",
    "background": (255.0, 255.0, 255.0),
    "validation": "much",
    "labels": 21,
    "test_split": "all",
    "crop": "cube",
    "channels": (0,),
    "votes": 1,
}  # of the values that are no numbers; a number is tried at -1, and at 2 or more where it is a fraction


def wrong_values(name, value):
    "Settings of a value that no run can have."
    if name == "augment":
        return [type(value)(jitter=-0.1), type(value)(translate=-1.0)]
    if name in WRONG:
        return [WRONG[name]]
    return [-1, float("nan"), float("inf")] if isinstance(value, float) else [-1]


@pytest.mark.parametrize("name", MINI)
def test_every_value_of_a_recipe_is_limited_and_its_recipe_is_not_refused(name):
    recipe = MINI[name]
    check_recipe(recipe)
    check_changes(recipe, recipe)
    for value in groups(recipe):
        if value in FREE:
            continue
        assert value in recipe.limits, f"{value} has no limit"
        for wrong in wrong_values(value, value_of(recipe, value)):
            with pytest.raises(ValueError, match=f"^{value}: expected .*, got ") as error:
                check_recipe(change(recipe, **{value: wrong}))
            assert "\n" not in str(error.value)


FRACTIONS = "ema layer_decay decay min_coverage dropout smoothing masked_fraction overlap validation_fraction".split()


@pytest.mark.parametrize("name", FRACTIONS)
def test_a_fraction_is_at_most_one(name):
    having = [recipe for recipe in EVERY.values() if name in groups(recipe)]
    assert having
    for recipe in having:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            check_recipe(change(recipe, **{name: 2.0}))


def another(value):
    "Some other value of the kind."
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value / 2 if isinstance(value, float) and value else value + 1
    if isinstance(value, tuple):
        return tuple(v + 1 for v in value) if value and isinstance(value[0], int) else ("chair",)
    return value + "x"


@pytest.mark.parametrize("name", EVERY)
def test_a_change_without_effect_is_refused_and_a_default_is_not(name):
    recipe = EVERY[name]
    check_recipe(recipe)
    tried = 0
    for value, (when, counts) in recipe.conditions.items():
        if value not in groups(recipe) or counts(recipe):
            continue
        tried += 1
        wrong = change(recipe, **{value: another(value_of(recipe, value))})
        option = value.replace("_", "-")
        with pytest.raises(ValueError, match=re.escape(f"{option}: counts only {when}; expected ")):
            check_changes(wrong, recipe)
    assert tried, "a recipe has at least the factors of the other schedule, or patience"


COUNTS = [
    ("object-transformer-mini", dict(source="shapes"), dict(per_class=(9, 9, 9))),
    ("object-transformer-mini", dict(schedule="step"), dict(decay=0.5)),
    ("object-transformer", {}, dict(decay_every=10)),
    ("scene-ptv3-mini", {}, dict(rooms=15)),
    ("scene-sparseunet", {}, dict(max_gap=3)),
    ("object-transformer-mini", {}, dict(foreground_weight=2.0)),
    ("cls-shapes-mini", {}, dict(variant="OBJ_BG")),
    ("cls-shapes-mini", {}, dict(per_class=(9, 9, 9))),
    ("cls-furniture-mini", dict(ways=5, validation="none", shots=5), dict(queries=9)),
    ("cls-furniture-mini", {}, dict(hidden=64)),
    ("part-shapes-mini", {}, dict(per_class=(9, 9, 9))),
    ("sem-s3dis", {}, dict(test_area=2)),
    ("sem-rooms-mini", dict(validation="share"), dict(validation_fraction=0.2)),
]


@pytest.mark.parametrize("name, before, values", COUNTS)
def test_a_change_with_an_effect_is_accepted(name, before, values):
    usual = EVERY[name]
    recipe = change(usual, **before, **values)
    check_recipe(recipe)
    check_changes(recipe, usual)


REFUSED = {
    "pretrain object-transformer-mini --per-class 2 2 2": (
        "per-class: counts only with --layout shapenet and --data shapes"
    ),
    "pretrain object-transformer-mini --max-gap 3": "max-gap: counts only with --layout scannet",
    "pretrain object-transformer-mini --decay .5": "decay: counts only with --schedule step",
    "pretrain object-transformer-mini --background 255 255 255": "background: expected three fractions in 0..1",
    "pretrain object-transformer-mini --ema 2": "ema: expected a decay, at least 0 and below 1, got 2.0",
    "pretrain object-transformer-mini --mixed-precision fp16": (
        'mixed_precision: expected "no" or "bf16" on a processor'
    ),
    "pretrain object-transformer-mini --steps": "unipre3d: Missing value for argument '--run.steps'",
    "pretrain object-transformer-mini --layer-decay 2": "layer_decay: expected above 0 and at most 1, got 2.0",
    "pretrain object-transformer-mini --foreground-weight -1": "foreground_weight: expected at least 0",
    "pretrain object-transformer-mini --head-layers 1": "head_layers: expected at least 2, got 1",
    "pretrain object-transformer-mini --foreground-weight 0 --background-weight 0": (
        "foreground_weight, background_weight: expected"
    ),
    "pretrain object-transformer-mini --embed-width 5": "--embed-width: there is no such option",
    "pretrain object-transformer-mini --min-coverage .5": "min-coverage: counts only with --init",
    "pretrain object-transformer-mini --terms.colour 0 --terms.alpha 1 --foreground-weight 2": (
        "counts only with a colour term"
    ),
    "pretrain scene-sparseunet-mini --background-weight 2": (
        "background-weight: counts only with a colour term and views with masks"
    ),
    "pretrain object-volume-mini --backend dense": "backend: counts only with --scene gaussians",
    "pretrain masked-shapes-mini --layout odd": "layout: counts only with other recipes",
    "finetune cls-furniture-mini --variant OBJ_BG": "variant: counts only with --layout scans or scanobjectnn",
    "finetune cls-furniture-mini --episode 3": "episode: counts only with --ways or --shots",
    "finetune cls-furniture-mini --probe --hidden 3": "hidden: counts only without --probe",
    "finetune sem-rooms-mini --test-area 3": "test-area: counts only with --layout s3dis",
    "finetune sem-rooms-mini --votes 1": "votes: expected 0 (off) or at least 2, got 1",
    "finetune cls-furniture-mini --data /no/such/place": 'data: layout "furniture" is the embedded furniture',
    "finetune cls-shapes-mini --data /no/such/place": 'data: expected "shapes" or "furniture" for scans',
    "finetune part-furniture-mini --data /no/such/place": 'data: layout "furniture" is made here',
    "finetune part-shapes-mini --data /no/such/place": 'data: layout "shapes" is made here',
    "pretrain masked-shapes-mini --data /no/such/place": 'data: expected "shapes" or "furniture"',
    "data furniture --unpack --workers 3": "--deb, --workers: count only without --unpack",
    "data rooms --frames 0": "--frames: expected at least 1, got 0",
    "reproduce mini --shapenet there": "--shapenet: counts only in the full plan",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_command_refuses_what_would_have_no_effect(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    device = ["--device", "cpu"] if words.split()[0] in ("pretrain", "finetune") else []
    assert main([*words.split(), *device]) == 2
    said = capsys.readouterr()
    assert REFUSED[words] in said.err and len(said.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())  # nothing was written


HIDDEN = {
    "object-transformer-mini": "furniture",
    "scene-sparseunet-mini": "rooms",
    "masked-shapes-mini": "shapes",
    "autoencoder-mini": "furniture",
    "cls-furniture-mini": "furniture",
    "cls-shapes-mini": "shapes",
    "part-shapes-mini": "shapes",
    "part-furniture-mini": "furniture",
    "sem-rooms-mini": "rooms",
    "inst-rooms-mini": "rooms",
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_folder_with_the_name_of_embedded_data_is_ambiguous(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(HIDDEN[name]).mkdir()
    wanted = f"data: {HIDDEN[name]} is a folder here and also .* pass --data ./{HIDDEN[name]}"
    with pytest.raises(ValueError, match=wanted):
        EVERY[name].build_task()


def test_a_folder_named_by_its_path_is_read(tmp_path, monkeypatch):
    from unipre3d.data.scannet import write_box_rooms
    from unipre3d.tasks.pretrain import read_views
    from unipre3d.tasks.scenes import read_rooms

    monkeypatch.chdir(tmp_path)
    write_box_rooms("rooms", rooms=dict(a="train", b="val"), n_frames=2, hw=(24, 32), spacing=0.2)
    for read, name in ((read_views, "scene-sparseunet-mini"), (read_rooms, "sem-rooms-mini")):
        reader = read(change(EVERY[name], source="./rooms").data, "train")
        assert [reader.name(i) for i in range(len(reader))] == ["a"]


COMMON = {"n_points", "augment", "min_coverage", "layer_decay", "prefetch", "shard_window"}


def test_a_table_names_only_values_that_its_recipe_has():
    for name, recipe in EVERY.items():
        for table in (recipe.limits, recipe.conditions):
            known = set(groups(recipe)) | {f.name for f in fields(type(recipe))}
            assert set(table) - known <= COMMON, name
