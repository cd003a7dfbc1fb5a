"""What a run holds does not grow with its steps: memory and open files.

UNIPRE3D_MEMORY=2000 runs so many steps of each, and of the default run, whose curve it records.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from unipre3d.records import code_version, hardware, write_json

RECORD = Path(__file__).parent.parent / "data" / "records" / "outcomes" / "memory.json"
LONG = int(os.environ.get("UNIPRE3D_MEMORY", 0))  # steps of the long run, such as 2000
GROWTH = 16.0  # MB between the beginning and the end, beside the caches that a recipe allows
WARM = 200  # steps after which nothing grows: kernels are compiled, caches and pools are filled
VALIDATED = (
    500  # the default run validates there first: each process opens the cache of those images
)

PROGRAM = """
import json, multiprocessing, os, resource, sys
import unipre3d.runs.fit as loop
from unipre3d.recipes import finetune_recipes, recipes
from unipre3d.runs.recipe import change
from unipre3d.runs.run import run_recipe

name, steps, values, folder = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
page = resource.getpagesize()
held = []
take_step = loop.take_step


def watched(*args):
    memory, files = 0, 0
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        with open(f"/proc/{process}/statm") as file:
            memory += int(file.read().split()[1]) * page / 2**20
        files += len(os.listdir(f"/proc/{process}/fd"))
    held.append((memory, files))
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
    "Megabytes and open files at each step of a run, over all its processes."
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
    megabytes, files = growth(held, warm=min(WARM, steps // 2))
    print(
        f"{name}, {steps} steps: {megabytes:+.1f} MB, {files:+d} files, {held[-1][0]:.0f} MB in all"
    )
    assert megabytes <= GROWTH and files <= 0


@pytest.mark.skipif(not LONG, reason="half an hour; UNIPRE3D_MEMORY=2000 writes the record")
def test_the_default_run_holds_no_more_at_its_end(tmp_path):
    recipe = "object-transformer-mini"
    held = held_by(recipe, LONG, {}, tmp_path / "run")
    when = {"date": datetime.date.today().isoformat(), "code": code_version()}
    chosen = [0, *range(99, LONG, 100)]
    rows = [{"step": k + 1, "mb": round(held[k][0], 1), "files": held[k][1]} for k in chosen]
    found = {"hardware": hardware(), "recipe": recipe, "steps": LONG, "warm": VALIDATED}
    write_json(RECORD, when | found | {"bound_mb": GROWTH, "rows": rows})
    check_course(rows)


def check_course(rows):
    "Memory and open files of a recorded run after its first validation, between and at its end."
    after = [(row["mb"], row["files"]) for row in rows if row["step"] > VALIDATED]
    megabytes, files = growth(after, 0)
    assert megabytes <= GROWTH and files <= 0
    assert max(mb for mb, _ in after) - after[0][0] <= GROWTH
    assert max(files for _, files in after) <= after[0][1]


@pytest.mark.skipif(not RECORD.exists(), reason="UNIPRE3D_MEMORY=2000 writes the record")
def test_the_recorded_default_run_was_flat():
    record = json.loads(RECORD.read_text())
    assert record["steps"] >= 2000 and record["rows"][-1]["step"] == record["steps"]
    assert record["bound_mb"] == GROWTH and record["warm"] == VALIDATED
    check_course(record["rows"])
    assert record["date"] and record["code"]


def test_growth_is_found():
    "A run that keeps half a megabyte a step, or a file every tenth."
    flat = [(100.0, 9)] * 80
    assert growth(flat, 40) == (0, 0)
    leaks = [(100.0 + k / 2, 9 + k // 10) for k in range(80)]
    megabytes, files = growth(leaks, 40)
    assert megabytes > GROWTH and files > 0
