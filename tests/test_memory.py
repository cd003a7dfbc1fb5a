"""What a run holds does not grow with its steps: memory and open files."""

import json
import os
import statistics
import subprocess
import sys

import pytest

LONG = int(os.environ.get("UNIPRE3D_MEMORY", 0))  # steps of the long run, such as 2000
GROWTH = 16.0  # MB between the beginning and the end, beside the caches that a recipe allows

PROGRAM = """
import json, os, resource, sys
import unipre3d.runs.fit as loop
from unipre3d.recipes import finetune_recipes, recipes
from unipre3d.runs.recipe import change
from unipre3d.runs.run import run_recipe

name, steps, values, folder = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
page = resource.getpagesize()
held = []
take_step = loop.take_step


def watched(*args):
    if len(held) < steps:
        with open("/proc/self/statm") as file:
            held.append((int(file.read().split()[1]) * page / 2**20, len(os.listdir("/proc/self/fd"))))
    return take_step(*args)


loop.take_step = watched
recipe = (recipes | finetune_recipes)[name]
options = recipe.model.backbone_options | values.pop("backbone_options", {})
recipe = change(recipe, steps=steps, backbone_options=options, **values)
run_recipe(name, recipe, folder, device="cpu", say=lambda text: None)
print(json.dumps(held))
"""
SMALL = dict(num_groups=8, group_size=8, depth=1, width=16, num_heads=2)
TINY = dict(n_points=64, batch_size=2, save_every=20, backbone_options=SMALL)
RECIPES = {
    "object-transformer-mini": TINY
    | dict(image="rgb", resolution=16, cache_mb=0, validate_every=0, picture_every=10),
    "cls-furniture-mini": TINY | dict(classes=("bed", "lamp"), workers=1, validate_every=20),
}


def held_by(name, steps, values, folder):
    "Megabytes and open files at each step of a run."
    words = [sys.executable, "-c", PROGRAM, name, str(steps), json.dumps(values), str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def growth(held, warm):
    "Megabytes, and open files, that a run has more at its end than once it was warm."
    memory, files = zip(*held[warm:])
    few = max(1, len(memory) // 10)
    first, last = (statistics.median(part) for part in (memory[:few], memory[-few:]))
    return last - first, max(files[-few:]) - max(files[:few])


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux counts pages there")
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_holds_no_more_at_its_end(name, tmp_path):
    steps = LONG or 80
    held = held_by(name, steps, RECIPES[name], tmp_path / "run")
    megabytes, files = growth(held, warm=min(200, steps // 2))
    print(
        f"{name}, {steps} steps: {megabytes:+.1f} MB, {files:+d} files, {held[-1][0]:.0f} MB in all"
    )
    assert megabytes <= GROWTH and files <= 0


def test_growth_is_found():
    "A run that keeps half a megabyte a step, or a file every tenth."
    flat = [(100.0, 9)] * 80
    assert growth(flat, 40) == (0, 0)
    leaks = [(100.0 + k / 2, 9 + k // 10) for k in range(80)]
    megabytes, files = growth(leaks, 40)
    assert megabytes > GROWTH and files > 0
