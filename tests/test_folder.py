"""Clouds of a user in folders, from the files to a run and its predictions, by the commands of a shell."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from unipre3d.cli import main
from unipre3d.data import folder
from unipre3d.data.check import find_readers
from unipre3d.data.clouds import read_cloud, write_cloud
from unipre3d.data.folder import SPLITS, FolderClouds, FolderScenes

SMALL = "--steps 2 --batch-size 4 --validate-every 1 --workers 0 --device cpu".split()


def draw(kind, rng, n=160):
    xyz = rng.normal(size=(n, 3))
    if kind == "ball":
        return xyz / np.linalg.norm(xyz, axis=1, keepdims=True)
    return xyz * [0.2, 0.2, 1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIPRE3D_CACHE", str(tmp_path / "cache"))


def write_classes(home):
    "Two classes of ten clouds."
    rng = np.random.default_rng(0)
    root = home / "mine"
    for kind in ("ball", "rod"):
        (root / kind).mkdir(parents=True)
        for k in range(10):
            xyz = draw(kind, rng)
            if k % 2:
                np.savez(root / kind / f"{k}.npz", xyz=xyz)
            else:
                write_cloud(root / kind / f"{k}.ply", xyz, rng.uniform(size=(160, 3)))
    return root


@pytest.fixture
def classes(tmp_path):
    return write_classes(tmp_path)


@pytest.fixture
def scenes(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "rooms"
    for split in SPLITS:
        (root / split).mkdir(parents=True)
        for k in range(2):
            xyz = rng.uniform(size=(900, 3)) * [2, 2, 1]
            label = (xyz[:, 2] > 0.3).astype(np.int32)
            write_cloud(root / split / f"{k}.ply", xyz, scalars={"segment": label})
    (root / "classes.txt").write_text("low\nhigh\n")
    return root


def test_one_command_from_a_folder_of_classes_to_a_run_that_predicts(classes, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["finetune", "cls-folder-mini", "--data", str(classes), "--init", "objects"]
    assert main([*words, *SMALL, "--out", str(out)]) == 0
    record = json.loads((out / "record.json").read_text())
    assert record["classes"] == ["ball", "rod"] and record["start"]["coverage"] == 1
    assert {k: record["data"][k] for k in SPLITS} == {"train": 14, "val": 2, "test": 4}
    capsys.readouterr()
    said = ["--from", str(out), "--out", str(tmp_path / "said")]
    assert main(["predict", str(classes / "rod" / "0.ply"), *said]) == 0
    size, head, *lines = capsys.readouterr().out.splitlines()
    assert "read as one object" in size and "probability" in head
    rows = [line.split() for line in lines[:2]]
    likely = {name: float(share) for _, name, share in rows}
    assert likely.keys() == {"ball", "rod"} and abs(sum(likely.values()) - 1) < 1e-3


def test_any_recipe_of_classes_takes_the_layout(classes, tmp_path):
    words = ["finetune", "cls-shapes-mini", "--layout", "folder", "--data", str(classes)]
    assert main([*words, *SMALL, "--n-points", "64", "--out", str(tmp_path / "run")]) == 0


def test_splits_of_ones_own_and_a_class_that_training_does_not_know(classes, tmp_path):
    root = tmp_path / "own"
    for split in ("train", "test"):
        for kind in ("ball", "rod"):
            (root / split / kind).mkdir(parents=True)
            for k in range(3):
                write_cloud(root / split / kind / f"{k}.ply", draw(kind, np.random.default_rng(k)))
    assert len(FolderClouds(root, split="test")) == 6
    with pytest.raises(FileNotFoundError, match="--validation share"):
        FolderClouds(root, split="val")
    (root / "test" / "cube").mkdir()
    write_cloud(root / "test" / "cube" / "0.ply", draw("rod", np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"expected classes of training \(ball, rod\), found cube"):
        FolderClouds(root, split="test")


def test_folders_that_would_train_on_something_else_are_refused(classes):
    "Without training, with one file in two places; what macOS adds is passed over."
    (classes / "__MACOSX" / "ball").mkdir(parents=True)
    (classes / "__MACOSX" / "ball" / "._0.ply").write_bytes(b"\0")
    assert FolderClouds(classes, split="train").classes == ["ball", "rod"]
    (classes / "copy").symlink_to(classes / "ball")
    with pytest.raises(ValueError, match="expected each file in one class of one split, found"):
        FolderClouds(classes, split="train")
    (classes / "copy").unlink()
    only = classes.parent / "only"
    for split in ("test", "val"):
        (only / split).mkdir(parents=True)
        for kind in ("ball", "rod"):
            (only / split / kind).symlink_to(classes / kind)
    with pytest.raises(ValueError, match="two or more classes, found a folder with test, val"):
        FolderClouds(only, split="test")
    (only / "train").symlink_to(classes)
    with pytest.raises(ValueError, match="expected each file in one class of one split, found"):
        FolderClouds(only, split="train")


def test_classes_without_a_name_and_scenes_in_two_splits_are_refused(scenes):
    for names in ("", "low\nlow\n"):
        (scenes / "classes.txt").write_text(names)
        with pytest.raises(ValueError, match=r"classes\.txt: expected a name of its own"):
            FolderScenes(scenes, split="train")
    (scenes / "classes.txt").write_text("low\nhigh\n")
    (scenes / "val" / "again.ply").symlink_to(scenes / "train" / "0.ply")
    with pytest.raises(ValueError, match="val: expected each file in one split, found"):
        FolderScenes(scenes, split="train")


@pytest.mark.parametrize("kind", ("classes", "own splits", "scenes"))
def test_the_command_checks_labelled_folders(kind, classes, scenes, tmp_path, capsys):
    "All that is there is counted; one bad file is named, and does not end it."
    root = scenes if kind == "scenes" else classes
    if kind == "own splits":
        root = tmp_path / "own"
        for name, reader in {s: FolderClouds(classes, split=s) for s in SPLITS}.items():
            for _, label, path in reader.items:
                home = root / name / reader.classes[label]
                home.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, home)
    count = sum(map(len, find_readers(root).values()))
    assert count == (6 if kind == "scenes" else 20)
    assert main(["data", "check", str(root)]) == 0
    capsys.readouterr()
    bad = next(root.rglob("0.ply"))
    bad.write_bytes(bad.read_bytes()[:300])
    assert main(["data", "check", str(root)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("refused: ") == 1 and f"refused: {bad}: expected" in printed


def test_one_command_from_labelled_points_to_a_run(scenes, tmp_path):
    out = tmp_path / "run"
    words = ["finetune", "sem-folder-mini", "--data", str(scenes), "--init", "rooms"]
    small = "--steps 2 --batch-size 2 --validate-every 1 --workers 0 --device cpu --votes 0".split()
    assert main([*words, *small, "--out", str(out)]) == 0
    record = json.loads((out / "record.json").read_text())
    assert record["classes"] == ["low", "high"] and record["start"]["coverage"] == 1


def cut(path):
    "Half of a file, as a copy that was stopped leaves it."
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_bad_cloud_does_not_end_a_run_and_is_named(classes, tmp_path):
    "One of training and one of test: found before the first step, by a run of several epochs."
    spoilt = [FolderClouds(classes, split=split).items[0][2] for split in ("train", "test")]
    for path in spoilt:
        cut(path)
    out = tmp_path / "run"
    words = ["finetune", "cls-folder-mini", "--data", str(classes), *SMALL, "--steps", "6"]
    with pytest.warns(UserWarning, match="left out 1 of 14 clouds") as said:
        assert main([*words, "--n-points", "64", "--out", str(out)]) == 0
    text = "\n".join(str(one.message) for one in said)
    assert all(f"  {path}: expected" in text for path in spoilt)
    record = json.loads((out / "record.json").read_text())
    assert {k: record["data"][k] for k in SPLITS} == {"train": 13, "val": 2, "test": 3}


def test_a_bad_room_does_not_end_a_run_and_is_named(scenes, tmp_path):
    write_cloud(scenes / "train" / "1.ply", np.random.default_rng(0).uniform(size=(50, 3)))
    cut(scenes / "val" / "0.ply")
    words = ["finetune", "sem-folder-mini", "--data", str(scenes), *SMALL, "--votes", "0"]
    with pytest.warns(UserWarning) as said:
        assert main([*words, "--batch-size", "1", "--out", str(tmp_path / "run")]) == 0
    text = "\n".join(str(one.message) for one in said)
    assert "left out 1 of 2 clouds" in text and "0.ply: expected" in text
    assert "1.ply: expected a column of labels" in text
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert {k: record["data"][k] for k in SPLITS} == {"train": 1, "val": 1, "test": 2}


def test_a_class_or_a_folder_of_which_nothing_is_left_is_refused(classes):
    for path in (classes / "rod").iterdir():
        cut(path)
    with pytest.raises(ValueError, match="clouds of rod that can be read, found none; .*expected"):
        FolderClouds(classes, split="train")
    for path in (classes / "ball").iterdir():
        cut(path)
    with pytest.raises(ValueError, match="none of 4 files can be read"):
        FolderClouds(classes, split="test")


def test_files_are_tried_once_until_one_changes(classes, monkeypatch):
    first, second = (FolderClouds(classes, split="train").items[k][2] for k in (0, 1))
    read = []

    def counted(path):
        read.append(path)
        return read_cloud(path)

    monkeypatch.setattr(folder, "read_cloud", counted)
    assert len(FolderClouds(classes, split="train")) == 14 and not read
    cut(first)
    for tries in (15, 1):  # all of them and the bad one again; then the bad one alone
        read.clear()
        with pytest.warns(UserWarning, match="left out 1 of 14 clouds"):
            kept = FolderClouds(classes, split="train")
        assert len(read) == tries and kept.items[0][2] == second


def test_labels_beyond_the_list_of_classes_are_named(scenes):
    (scenes / "classes.txt").write_text("low\n")
    with pytest.raises(ValueError, match=r"segment: expected labels in -1\.\.0, found 1"):
        FolderScenes(scenes, split="train").rows(0)


LIGHT = """
import contextlib, io, json, sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("embreex", "laspy", "pye57", "fast_simplification"):
            raise ImportError(name)


sys.meta_path.insert(0, Missing())
from unipre3d.cli import main

for words in sys.argv[1:]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(words.split())
    print(json.dumps([words, status, said.getvalue()]))
"""
WITHOUT = {
    "pretrain --steps 1 --batch-size 4 --workers 0 --n-points 128 --picture-every 0": (0, ""),
    "features mine/ball/0.ply": (0, "features each"),
    "data rooms --rooms 15 --frames 2 --workers 1": (2, "embreex"),
}


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory):
    "Of each command, its exit status and what it said, one after the other in a process that lacks the extras."
    home = tmp_path_factory.mktemp("light")
    write_classes(home)
    env = os.environ | {"UNIPRE3D_CACHE": str(home / "cache")}
    command = [sys.executable, "-c", LIGHT, *WITHOUT]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    return {words: found for words, *found in map(json.loads, lines)}, done.stderr


@pytest.mark.parametrize("words", WITHOUT)
def test_without_extras_what_does_not_need_them_works(words, without_extras):
    found, errors = without_extras
    status, said = found.get(words, (None, errors))
    assert status == WITHOUT[words][0], said
    assert WITHOUT[words][1] in said
