"What a newcomer meets in a shell: where to write, what comes next, what else lies in a folder, what the shell offers."

import os
from pathlib import Path

import numpy as np
import pytest
from untrained import save_run

from unipre3d.cli import (
    DATA_KINDS,
    ROOM_RECIPE,
    commands,
    completion_words,
    extras,
    install_line,
    main,
    next_commands,
    shipped_start,
)
from unipre3d.core import GaussianBatch
from unipre3d.data.clouds import write_cloud
from unipre3d.gaussians import save_ply
from unipre3d.recipes import finetune_recipes, recipes

RNG = np.random.default_rng(0)
REFUSED = "expected a folder that can be written, found one that cannot; name another with --out"


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder with a cloud and Gaussians, in which the shell stands."
    import torch

    xyz = torch.rand(20, 3, generator=torch.manual_seed(0))
    gaussians = GaussianBatch(
        mean=xyz,
        scale=torch.full((20, 3), 0.1),
        quat=torch.tensor([[1.0, 0, 0, 0]]).repeat(20, 1),
        opacity=torch.full((20,), 0.5),
        sh=torch.zeros(20, 1, 3),
        batch=torch.zeros(20, dtype=torch.long),
        size=1,
    )
    monkeypatch.chdir(tmp_path)
    save_ply(gaussians, tmp_path / "splat.ply")
    write_cloud(tmp_path / "cloud.ply", RNG.normal(size=(300, 3)), normal=np.eye(3)[[0] * 300])
    (tmp_path / "file").write_text("a file where a folder is wanted")
    return tmp_path


WRITE = [
    "features cloud.ply --out file/a.npz",
    "convert splat.ply file/a.spz",
    "render splat.ply --out file",
    "render splat.ply --out file/below",
    "view splat.ply --from none --out file/a.html",
    "pretrain --out file/run --steps 1",
    "finetune cls-furniture-mini --out file/run --steps 1",
    "data furniture --unpack --out file/set",
    "data shard furniture --out file/shards",
    "data rooms --rooms 1 --out file/rooms",
]


@pytest.mark.parametrize("words", WRITE)
def test_every_command_refuses_a_place_that_cannot_be_written_in_the_same_words(
    here, capsys, words
):
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    line = said.strip().splitlines()[-1]
    assert line.startswith("unipre3d: ") and line.endswith(REFUSED), said
    assert "file" in line


@pytest.mark.parametrize("words", ["features cloud.ply --out no/a.npz", "data rooms --out no/a"])
def test_a_folder_without_the_right_to_write_is_refused(here, capsys, words):
    (here / "no").mkdir()
    (here / "no").chmod(0o555)
    if os.access(here / "no", os.W_OK):
        pytest.skip("this user may write everywhere")
    assert main(words.split()) == 2
    assert capsys.readouterr().err.strip().endswith(REFUSED)


def test_a_text_beside_clouds_is_passed_over_and_named(here, capsys):
    folder = here / "clouds"
    folder.mkdir()
    for k in range(2):
        write_cloud(folder / f"{k}.ply", RNG.normal(size=(300, 3)), normal=np.eye(3)[[0] * 300])
    (folder / "notes.txt").write_text("Scanned in May.\nBy me, with 3 friends.\n")
    (folder / "names.csv").write_text("file,class\n0,chair\n1,lamp\n")
    os.chdir(folder)
    for _ in range(2):  # the second time its own archive lies there too
        assert main(["features", ".", "--nearest", "1"]) == 0
        said = capsys.readouterr()
        assert "2 clouds" in said.out
        assert "files, which hold no points: " in said.err
        assert "names.csv" in said.err and "notes.txt" in said.err
    assert "clouds-features.npz" in said.err
    assert main(["features", "notes.txt"]) == 2
    assert "notes.txt: expected text with x, y, z" in capsys.readouterr().err
    (folder / "broken.ply").write_text("ply")  # a cloud that is wrong
    assert main(["features", "."]) == 1
    assert "left out 1 of 3 files" in capsys.readouterr().err


def test_a_folder_of_texts_holds_no_clouds(here, capsys):
    (here / "texts").mkdir()
    (here / "texts" / "notes.txt").write_text("nothing here")
    assert main(["features", "texts"]) == 2
    assert "found none that holds points" in capsys.readouterr().err


EVERY = recipes | finetune_recipes


@pytest.mark.parametrize("name", EVERY)
def test_what_a_run_proposes_next_are_commands_that_know_its_options(name, here):
    recipe = EVERY[name]
    found = next_commands(recipe, here / "a run")
    assert bool(found) == (recipe.task != "autoencoder")
    assert all("'" in line for line in found)  # the folder is quoted
    for line in found:
        _, command, *words = line.split()
        assert command in commands
        options = [word for word in words if word.startswith("--")]
        first = [word for word in words[:1] if not word.startswith("-")]
        known = completion_words([command, *first], "--")
        assert set(options) <= set(known), line


def test_info_of_a_finished_run_says_what_next(here, capsys):
    from unipre3d.records import read_record, write_json

    run = save_run(here / "run", "cls-shapes-mini", EVERY["cls-shapes-mini"], ["a", "b"])
    assert main(["info", "run"]) == 0
    assert "next" not in capsys.readouterr().out
    write_json(run / "record.json", read_record("cls-shapes-mini"))
    assert main(["info", "run"]) == 0
    assert "next     unipre3d predict CLOUD --from run" in capsys.readouterr().out


def test_weights_fit_the_fine_tuning_that_is_proposed():
    from unipre3d.runs.recipe import change

    usual = EVERY["object-transformer-mini"]
    coloured = change(usual, features=("xyz", "normal", "color_signed"))
    assert "finetune cls-shapes-mini --init" in next_commands(usual, Path("r"))[-1]
    assert "finetune cls-folder-mini --data FOLDER" in next_commands(coloured, Path("r"))[-1]
    other = change(usual, features=("xyz", "color"))
    for recipe in (other, EVERY["object-transformer"], EVERY["scene-sparseunet"]):
        assert not any("finetune" in line for line in next_commands(recipe, Path("r")))
    rooms = next_commands(EVERY["scene-sparseunet-mini"], Path("r"))
    assert rooms[-2:] == [
        "unipre3d finetune sem-rooms-mini --init r",
        "unipre3d finetune sem-folder-mini --data FOLDER --init r",
    ]


def test_few_clouds_begin_with_weights_that_fit():
    words = shipped_start("objects", "object-transformer-mini").split()
    assert words[:3] == ["--init", "objects", "--features"]
    assert words[3:] == ["xyz", "normal", "color_signed"]
    assert shipped_start("rooms", ROOM_RECIPE) == "--init rooms"  # which read the recipe's columns


def test_the_shell_offers_choices_and_options():
    for words in (
        ["pretrain"],
        ["pretrain", "object-transformer"],
        ["finetune", "cls-shapes-mini"],
    ):
        assert {"tensorboard", "trackio", "wandb", "none"} == {
            *completion_words([*words, "--tracker"])
        }
    for command in ("features", "predict", "render", "view"):
        assert "--out" in completion_words([command], "-")
        assert completion_words([command]) == []  # files
        assert completion_words([command, "a.ply", "--out"]) == []
    assert "--from" in completion_words(["predict", "a.ply"])
    assert completion_words(["features", "a.ply", "--from"]) == ["objects", "rooms"]
    assert completion_words(["reproduce"]) == ["mini", "second", "gpu", "full"]
    for kind in DATA_KINDS:
        assert completion_words(["data", kind], "--"), kind


def test_help_of_data_has_a_line_and_an_example_for_each(capsys):
    assert main(["data", "--help"]) == 0
    said = capsys.readouterr().out
    for kind, (about, example) in DATA_KINDS.items():
        assert f"  {kind} " in said and about in said and f"unipre3d data {example}" in said
        typed = {word for word in example.split() if word.startswith("--")}
        assert typed <= set(completion_words(["data", kind], "--")), example


def test_doctor_names_recipes_and_extras(capsys):
    main(["doctor"])
    said = capsys.readouterr().out
    assert all(name in said for name in EVERY)
    found = extras()
    assert found and not {"dev", "docs"} & set(found)
    for name, missing in found.items():
        line = next(line for line in said.splitlines() if line.startswith(f"extra {name}"))
        assert (install_line(name) in line) == bool(missing)
        assert line.endswith("installed") != bool(missing)
