"""What kills, signals, flipped bits and full disks leave of a run."""

import csv
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import crash
import numpy as np
import pytest
import torch
from warm import Command, script

import unipre3d.runs.fit as loop
from unipre3d.recipes import finetune_recipes
from unipre3d.records import ArrayFile, cached, read_config, write_config
from unipre3d.runs.checkpoint import (
    STATE,
    STATE_BEFORE,
    MetricsFile,
    has_state,
    is_finished,
    load_state,
    load_tensors,
    save_state,
    save_tensors,
)
from unipre3d.runs.recipe import change
from unipre3d.runs.run import run_recipe

HERE = Path(__file__).parent
RECORD = HERE.parent / "data" / "records" / "outcomes" / "crash.json"
LONG = int(
    os.environ.get("UNIPRE3D_CRASH", 0)
)  # kills of the long run, which writes the record: 300
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
SMALL = dict(
    classes=("bed", "lamp"),
    n_points=64,
    batch_size=4,
    workers=0,
    backbone_options=dict(num_groups=8, group_size=8, depth=1),
)


def outcomes(folder, *words):
    "The rows that crash.py writes."
    path = folder / "outcomes.json"
    run = Command(HERE / "crash.py", folder, "--record", path, *words, entry=script)
    _, errors = run.communicate()
    assert run.returncode == 0, errors[-2000:]
    return json.loads(path.read_text())["rows"]


@FORKS
def test_killed_runs_end_as_undisturbed_ones(tmp_path):
    words = ["--only", "classification", "--kills", str(5 * len(crash.KINDS))]
    (row,) = outcomes(tmp_path, *words)
    assert row["moments"] + row["inside"] >= 5 and crash.accepted(row), row


@FORKS
def test_a_kill_at_the_end_of_a_run_leaves_no_file_over(tmp_path):
    "Before, half way through and after each write, flush, rename and removal of the last save and of the record."
    straight, _ = crash.straight_run("classification", tmp_path)
    last = tmp_path / "last"
    shutil.copytree(straight, last)
    (last / "record.json").unlink()
    names = sorted(path.name for path in straight.iterdir())
    count, finished = 0, 0
    killed = True
    while killed:
        count += 1
        killed = False
        for place in ("before", "half", "after"):
            run = tmp_path / f"{place}-{count}"
            shutil.copytree(last, run)
            child = crash.attempt("classification", run, lambda: crash.kill_inside(count, place))
            killed |= crash.wait(child) == -signal.SIGKILL
            if is_finished(run):
                finished += killed
                assert sorted(path.name for path in run.iterdir()) == names, (place, count)
            crash.finish("classification", run)
            assert crash.same_end(run, straight) == []
    assert count > 10 and finished >= 2


@FORKS
def test_other_disturbances_end_equal_or_in_one_line(tmp_path):
    cases = [f"{part} % of the room it needs" for part in (2, 40, 75)]
    cases += ["config.json", "metrics.csv", "resume.safetensors", "removed", "wanted twice"]
    rows = outcomes(tmp_path, "--only", *cases, "SIGTERM, 1 loaders", "--flips", "2")
    assert len(rows) == len(cases) + 1
    assert all(map(crash.accepted, rows)), [row for row in rows if not crash.accepted(row)]


@FORKS
@pytest.mark.skipif(not LONG, reason="hours; UNIPRE3D_CRASH=300 writes the record")
def test_the_long_run(tmp_path):
    command = [sys.executable, str(HERE / "crash.py"), str(tmp_path), "--kills", str(LONG)]
    subprocess.run([*command, "--record", str(RECORD)], check=True)


def test_the_record_has_every_case_and_no_loss():
    rows = json.loads(RECORD.read_text())["rows"]
    assert [(row["group"], row["case"]) for row in rows] == list(crash.rows())
    assert all(map(crash.accepted, rows)), [row for row in rows if not crash.accepted(row)]
    kills = [row["moments"] + row["inside"] for row in rows if row["group"] == "killed"]
    assert all(row["date"] and row["code"] for row in rows)
    assert sum(kills) >= 300 and sum(row.get("inside", 0) for row in rows) >= 100


def test_a_loss_is_no_accepted_outcome():
    for outcome in ("different: metrics.csv", "ended with 1: KeyError: 3", "not noticed"):
        assert not crash.accepted({"group": "full disk", "case": "2 %", "outcome": outcome})
    flipped = {"group": "flipped bit", "outcome": "1 of 2: equal; 1 of 2: not noticed"}
    assert crash.accepted(flipped | {"case": "record.json"})
    assert not crash.accepted(flipped | {"case": "config.json"})


def small_run(folder, **values):
    recipe = change(finetune_recipes["cls-furniture-mini"], **SMALL | dict(steps=6) | values)
    return run_recipe("cls-furniture-mini", recipe, folder, device="cpu", say=lambda text: None)


def started(folder, *options):
    "A fine-tuning in a process group of its own that has made a few steps."
    names = ["--classes", "bed", "lamp", "--n-points", "64", "--batch-size", "4"]
    small = ["--num-groups", "8", "--group-size", "8", "--depth", "1", "--save-every", "100000"]
    words = ["--steps", "100000", "--device", "cpu", "--out", folder, *options]
    command = ["finetune", "cls-furniture-mini", *names, *small, *words]
    run = Command(*command)
    metrics = folder / "metrics.csv"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 4):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.1)
    return run


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups")
@pytest.mark.parametrize(
    "workers, number", [(0, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGHUP)]
)
def test_a_signal_to_the_whole_group_saves_the_run(tmp_path, workers, number):
    run = started(tmp_path / "run", "--workers", str(workers))
    os.killpg(run.pid, number)
    try:
        text = "".join(run.communicate(timeout=120))
    finally:
        run.kill()
    assert run.returncode == 130 and "go on with: unipre3d finetune" in text
    assert "Traceback" not in text
    state, meta = load_state(tmp_path / "run")
    assert meta["step"] >= 4 and any(name.startswith("optimizer/") for name in state)


def test_a_loader_that_the_system_killed_is_started_again(tmp_path):
    run = started(tmp_path / "run", "--workers", "1")
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True
    )
    for child in listing.stdout.split():
        os.kill(int(child), signal.SIGKILL)
    rows = len((tmp_path / "run" / "metrics.csv").read_text().splitlines())
    deadline = time.monotonic() + 120
    while len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) < rows + 20:
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.1)
    os.kill(run.pid, signal.SIGTERM)
    text = "".join(run.communicate(timeout=120))
    assert "reading goes on with step" in text and run.returncode == 130


def test_killed_before_the_first_save_the_same_command_starts_again(tmp_path):
    run = started(tmp_path / "run")
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not has_state(tmp_path / "run")
    done = small_run(tmp_path / "run")
    assert done.ended == "finished" and is_finished(tmp_path / "run")


def test_a_folder_in_use_is_refused(tmp_path):
    run = started(tmp_path / "run")
    with pytest.raises(ValueError, match="in use by another process"):
        small_run(tmp_path / "run")
    os.kill(run.pid, signal.SIGKILL)
    run.wait()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "A run that was interrupted after step 4 of 6, with two saves."
    folder = tmp_path_factory.mktemp("stopped") / "run"
    recipe = change(
        finetune_recipes["cls-furniture-mini"],
        **SMALL | dict(steps=6, save_every=2, validate_every=2),
    )

    def stop_at_four(text):
        pass

    import unipre3d.runs.fit as fit

    real = fit.take_step
    steps = []

    def counted(*args):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    fit.take_step = counted
    try:
        done = run_recipe("cls-furniture-mini", recipe, folder, device="cpu", say=stop_at_four)
    finally:
        fit.take_step = real
    assert done.ended == "interrupted"
    return recipe, folder


def copied(stopped, tmp_path):
    import shutil

    recipe, folder = stopped
    shutil.copytree(folder, tmp_path / "run")
    return recipe, tmp_path / "run"


def flip_a_bit(path):
    "In the middle of a file."
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, says",
    [
        (STATE, "going on from resume-before.safetensors, step 2"),
        (STATE_BEFORE, ""),
        ("checkpoint.safetensors", ""),
        ("metrics.csv", ""),
    ],
)
def test_a_flipped_bit_changes_no_result(stopped, tmp_path, name, says):
    recipe, folder = copied(stopped, tmp_path)
    straight = run_recipe(
        "cls-furniture-mini", recipe, tmp_path / "straight", device="cpu", say=lambda text: None
    )
    flip_a_bit(folder / name)
    said = []
    done = run_recipe(
        "cls-furniture-mini", recipe, folder, resume=True, device="cpu", say=said.append
    )
    assert says in "\n".join(said)
    assert done.record["metrics"] == straight.record["metrics"]
    a, b = (load_tensors(path / "checkpoint.safetensors")[0] for path in (folder, straight.folder))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_damaged_states_end_in_one_line(stopped, tmp_path):
    recipe, folder = copied(stopped, tmp_path)
    flip_a_bit(folder / STATE)
    flip_a_bit(folder / STATE_BEFORE)
    with pytest.raises(ValueError, match="resume.safetensors: expected") as error:
        run_recipe("cls-furniture-mini", recipe, folder, resume=True, device="cpu", say=print)
    assert "\n" not in str(error.value)


def test_a_curve_that_is_gone_costs_no_weights(stopped, tmp_path):
    recipe, folder = copied(stopped, tmp_path)
    (folder / "metrics.csv").unlink()
    said = []
    done = run_recipe(
        "cls-furniture-mini", recipe, folder, resume=True, device="cpu", say=said.append
    )
    assert done.ended == "finished" and any("the curve has a gap" in line for line in said)


def test_half_a_record_is_no_record(stopped, tmp_path):
    recipe, folder = copied(stopped, tmp_path)
    for text in ('{"kind": "finetu', "[]", "3", "null", '{"kind": []}', ""):
        (folder / "record.json").write_text(text)
        assert not is_finished(folder)
    done = run_recipe("cls-furniture-mini", recipe, folder, resume=True, device="cpu", say=print)
    assert is_finished(folder) and done.record["resumed"]


@pytest.mark.parametrize("words", [["finetune", "cls-shapes-mini"], ["pretrain"]])
def test_a_run_does_not_go_on_under_another_recipe(stopped, capsys, words):
    from unipre3d.cli import main

    _, folder = stopped
    assert main([*words, "--resume", "--out", str(folder), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "found one of cls-furniture-mini; go on with: unipre3d finetune" in said
    assert said.endswith(f"finetune cls-furniture-mini --resume --out {folder}\n")


def test_an_interrupt_in_the_test_says_how_to_go_on(tmp_path):
    usual = finetune_recipes["cls-furniture-mini"]

    class Interrupted(type(usual)):
        def build_task(self, device="cpu"):
            return replace(super().build_task(device), test=interrupt)

    def interrupt(model, folder):
        raise KeyboardInterrupt

    groups = {group.name: getattr(usual, group.name) for group in fields(usual)}
    recipe = change(Interrupted(**groups), **SMALL | dict(steps=1))
    folder = tmp_path / "a run"
    said = []
    with pytest.raises(KeyboardInterrupt):
        run_recipe("cls-furniture-mini", recipe, folder, device="cpu", say=said.append)
    assert said[-1].endswith(f"finetune cls-furniture-mini --resume --out '{folder}'")
    assert has_state(folder) and not is_finished(folder)


@pytest.mark.parametrize("saves, says", [(2, "go on from the last save"), (0, "nothing was saved")])
def test_a_second_interrupt_stops_at_once_and_says_how_to_go_on(tmp_path, monkeypatch, saves, says):
    values = SMALL | dict(steps=6, save_every=saves, validate_every=2)
    recipe = change(finetune_recipes["cls-furniture-mini"], **values)
    take_step, steps, said = loop.take_step, [], []

    def counted(*args):
        steps.append(1)
        for _ in range(2 * (len(steps) == 4)):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return take_step(*args)

    folder = tmp_path / "run"
    monkeypatch.setattr(loop, "take_step", counted)
    with pytest.raises(KeyboardInterrupt):
        run_recipe("cls-furniture-mini", recipe, folder, device="cpu", say=said.append)
    monkeypatch.undo()
    assert said[-1].startswith("stopped at once; ") and says in said[-1]
    assert has_state(folder) == (saves > 0) and not is_finished(folder)
    assert run_recipe("cls-furniture-mini", recipe, folder, resume=saves > 0, device="cpu").record


def test_what_changed_since_a_run_began_is_said(stopped, tmp_path):
    recipe, folder = copied(stopped, tmp_path)
    config = read_config(folder)
    threads = config["conditions"]["threads"]
    config["conditions"] |= {"code": "0.0.1", "threads": threads + 1}
    write_config(folder, config)
    how = dict(resume=True, device="cpu", say=lambda text: None)
    with pytest.raises(ValueError, match="began with code 0.0.1, now .*threads.*--force"):
        run_recipe("cls-furniture-mini", recipe, folder, **how)
    done = run_recipe("cls-furniture-mini", recipe, folder, force=True, **how)
    assert len(done.record["changed"]) == 2


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    save_state(tmp_path, {"weight": torch.ones(3)}, {"step": 1})

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match="resume-new.safetensors: expected to write it, found No space"
    ):
        save_state(tmp_path, {"weight": torch.zeros(3)}, {"step": 2})
    monkeypatch.undo()
    assert load_state(tmp_path)[1] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == [STATE]


def test_a_picture_that_finds_no_room_is_named(tmp_path, monkeypatch):
    from unipre3d.recipes import find_recipe
    from unipre3d.tasks.pretrain import build_views, save_views

    sample = build_views(change(find_recipe("object-transformer-mini"), image_cache_mb=0), "val")[0]

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="views.png: expected to write it, found No space"):
        save_views(sample, sample.target.rgb, tmp_path / "views.png")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    assert save_views(sample, sample.target.rgb, tmp_path / "views.png").stat().st_size > 1000


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_row_that_finds_no_room_is_named(tmp_path):
    log = MetricsFile(tmp_path / "metrics.csv", ("step", "loss"))
    log.close()
    log.file = open("/dev/full", "w")
    log.writer = csv.DictWriter(log.file, ("step", "loss"))
    with pytest.raises(OSError, match="metrics.csv: expected to write it, found No space"):
        log.write(step=1, loss=0.5)
    with suppress(OSError):
        log.file.close()


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="expected a folder to keep toys-.*set UNIPRE3D_CACHE"):
        cached("toys.txt", 1, lambda path: path.write_text("made"), tmp_path / "file" / "cache")
    assert cached("toys.txt", 1, lambda path: path.write_text("made"), tmp_path).is_file()


def test_kept_arrays_survive_a_disk_that_fails(tmp_path):
    "A file that is gone, and a folder in its place: the run goes on without it."
    key = bytes(range(16))
    arrays = ArrayFile(tmp_path / "arrays.bin", (2, 3), limit=1000)
    arrays.put(key, np.ones((2, 3)))
    other = pickle.loads(pickle.dumps(arrays))  # as in a process that reads data
    (tmp_path / "arrays.bin").unlink()
    (tmp_path / "arrays.bin").mkdir()
    with pytest.warns(UserWarning, match="arrays.bin: nothing more is cached"):
        assert other.get(key) is None
    other.put(key, np.ones((2, 3)))
    assert other.get(key) is None and arrays.get(key) is not None


def test_files_are_as_readable_as_the_user_wants(tmp_path):
    before = os.umask(0o022)
    try:
        path = save_tensors(tmp_path / "checkpoint.safetensors", {"weight": torch.ones(3)}, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
