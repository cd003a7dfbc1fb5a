"A command that only prints, or that is mistyped, does not wait for torch."

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

EACH = """
import contextlib, io, json, sys
from unipre3d.cli import main

heavy = {"accelerate", "diffusers", "h5py", "matplotlib", "numba", "pandas", "scipy", "torch", "torchmetrics", "trimesh"}
for words in json.loads(sys.argv[1]):
    said, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
        try:
            status = main(words.split())
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, said.getvalue(), error.getvalue(), sorted(heavy & set(sys.modules))]))
"""


def outcomes(words):
    "Of each command: exit status, what was printed, the error, and which of the heavy libraries are imported by then."
    run = [sys.executable, "-c", EACH, json.dumps(words)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    found = dict(zip(words, map(json.loads, done.stdout.splitlines())))
    assert list(found) == words, done.stderr
    return found


def test_the_list_of_options_is_that_of_the_recipes():
    import options

    assert options.FILE.read_text(encoding="utf-8") == options.text(), "run tools/options.py"


HELP = {
    "--help": "object-transformer-mini",
    "pretrain --help": "--run.batch-size INT",
    "pretrain object-transformer-mini --steps 3 -h": "colour behind everything, 0..1",
    "pretrain scene-ptv3-mini --help": "--data.max-gap INT",
    "pretrain object-transformer --backbone PointMLP --help": "--model.backbone-options.embed-width INT",
    "finetune --help": "sem-s3dis",
    "finetune inst-rooms-mini --help": "--model.min-points INT",
    "reproduce --help": "--shapenet TEXT",
    "render --help": "--frames INT",
    "features --help": "--from TEXT",
    "predict --help": "--category TEXT",
    "data shard --help": "--size-mb INT",
    "data check --help": "--views | --no-views",
    "data --help": "prepare | check | rooms",
    "data prepare --help": "--views INT",
    "data rooms --help": "--frames INT",
    "data furniture --help": "--unpack",
    "data autoencoder --help": "--steps",
    "doctor --help": "usage: unipre3d doctor",
}
MISTAKES = {
    "pretrain object-transformer-min": "expected one of object-transformer-mini, ",
    "finetune cls-unicorn": "expected one of cls-furniture-mini, ",
    "finetune": "expected a recipe first",
    "fly": "expected a command",
    "pretrain --stepz 3": "did you mean --steps?",
    "pretrain --no-steps": "there is no such option",
    "pretrain --backbone-options.embed-width 8": "there is no such option",
    "finetune sem-s3dis --data.rooom 3": "did you mean --rooms?",
    "data roomz": "expected one of prepare, check, rooms",
    "data rooms --frame 3": "did you mean --frames?",
}


def test_help_imports_nothing_heavy():
    for words, (status, said, error, heavy) in outcomes(list(HELP)).items():
        assert (status, error, heavy) == (0, "", []), words
        assert HELP[words] in " ".join(said.split()), words


def test_a_mistyped_word_is_named_at_once():
    for words, (status, said, error, heavy) in outcomes(list(MISTAKES)).items():
        assert (status, said, heavy) == (2, "", []), words
        assert MISTAKES[words] in error and len(error.splitlines()) == 1, words


def test_recipes_do_not_import_plotting_and_signal_processing():
    code = (
        "import sys, unipre3d.recipes; "
        "print(*sorted({'diffusers', 'matplotlib', 'scipy', 'torchmetrics', 'trimesh'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [], done.stderr


BEGIN = """
import mmap, os
from unipre3d.cli import main

main(["doctor"])
import torch

print(os.environ.get("GOMP_SPINCOUNT"), torch.empty(2**23, dtype=torch.uint8).data_ptr() % mmap.PAGESIZE)
"""
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE")


@functools.cache
def begun(**given):
    "What a new process with these choices of the user prints: of variables and tensors, and of libgomp."
    env = {k: v for k, v in os.environ.items() if k not in CHOICES}
    env |= given | {"OMP_DISPLAY_ENV": "verbose"}
    run = [sys.executable, "-c", BEGIN]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return *done.stdout.split()[-2:], done.stderr


@pytest.mark.parametrize(
    "given, spins",
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7", "THP_MEM_ALLOC_ENABLE": "0"}, "7"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
    ],
)
def test_waiting_threads_give_way_unless_the_user_says_otherwise(given, spins):
    "What libgomp itself reports when torch loads it."
    variable, _, said = begun(**given)
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("another OpenMP than libgomp")
    assert f"GOMP_SPINCOUNT = '{spins}'" in said, said
    assert variable == str(given.get("GOMP_SPINCOUNT", None if given else "1000"))


@pytest.mark.skipif(sys.platform != "linux", reason="torch has large pages on Linux alone")
@pytest.mark.parametrize(
    "given, large", [({}, True), ({"GOMP_SPINCOUNT": "7", "THP_MEM_ALLOC_ENABLE": "0"}, False)]
)
def test_large_tensors_begin_at_a_page_unless_the_user_says_otherwise(given, large):
    _, place, said = begun(**given)
    assert (place == "0") == large, said


def test_a_run_that_goes_on_takes_no_value_not_even_the_usual_one(tmp_path):
    from unipre3d.cli import refuse_changes

    refuse_changes(["--resume", "--out", str(tmp_path), "--force", "--device=cpu"])
    for typed in (["--steps", "1000"], ["--run.steps=1000"], ["--no-probe"], ["--init", "none"]):
        with pytest.raises(ValueError, match=f"expected no {typed[0].partition('=')[0]} beside it"):
            refuse_changes(["--resume", *typed])
