"""Kill a run again and again, go on each time, and compare what it leaves with a run that nobody disturbed.

`python tests/crash.py KIND KILLS SEED FOLDER` prints one JSON object. Kills come at random moments, or inside a save, a resume or
the writing of a record: before, half way through or after a write, a flush or a rename. It forks, so torch has one thread.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}

import torch

from unipre3d.recipes import finetune_recipes, recipes
from unipre3d.runs.checkpoint import has_state, is_finished, load_tensors
from unipre3d.runs.recipe import change
from unipre3d.runs.run import run_recipe

TINY = dict(num_groups=8, group_size=8, depth=1, encoder_widths=(8, 16, 16), encoder_dims=16)
TINY_BACKBONE = TINY | dict(width=16, num_heads=2)
SHORT = dict(steps=9, save_every=2, batch_size=2, warmup=1, workers=0)
OBJECTS = SHORT | dict(n_points=64, backbone_options=TINY_BACKBONE)
TWO_CLASSES = OBJECTS | dict(classes=("bed", "lamp"), validate_every=3)
UNET = dict(base_channels=4, channels=(4, 8, 8, 4), layers=(1, 1, 1, 1), voxel_size=0.2)
ROOMS = SHORT | dict(rooms=3, validate_every=3, backbone_options=UNET)

KINDS = {
    "pre-training": ("object-transformer-mini", OBJECTS | dict(image="rgb", n_target=1)),
    "classification": ("cls-furniture-mini", TWO_CLASSES),
    "parts": ("part-furniture-mini", TWO_CLASSES),
    "semantic": ("sem-rooms-mini", ROOMS),
    "instances": ("inst-rooms-mini", ROOMS),
}


def recipe_of(kind):
    "The name of a recipe, and a small version of it."
    name, values = KINDS[kind]
    return name, change((recipes | finetune_recipes)[name], **values)


def die():
    "As the system kills: at once, without a word."
    os.kill(os.getpid(), signal.SIGKILL)


def kill_inside(count, place):
    "Die at the count-th write, flush or rename from now: before it, half way through a write, or after it."
    left = [count]

    def counted(function, half=None):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and place == "before":
                die()
            if left[0] == 0 and place == "half" and half is not None:
                half(*args)
                die()
            result = function(*args, **kwargs)
            if left[0] == 0:
                die()
            return result

        return call

    write_bytes = Path.write_bytes
    write_text = Path.write_text
    Path.write_bytes = counted(
        write_bytes, lambda path, data: write_bytes(path, data[: len(data) // 2])
    )
    Path.write_text = counted(
        write_text, lambda path, text: write_text(path, text[: len(text) // 2])
    )
    os.replace = counted(os.replace)
    os.fsync = counted(os.fsync)


def attempt(kind, folder, prepare=None):
    "Run, or go on, in a process of its own; its process id."
    child = os.fork()
    if child:
        return child
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        name, recipe = recipe_of(kind)
        if prepare is not None:
            prepare()
        how = dict(resume=has_state(folder), device="cpu", say=lambda text: None)
        run_recipe(name, recipe, folder, **how)
        os._exit(0)
    except BaseException as error:
        (folder.parent / "error.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)


def wait(child):
    "0 where it ended by itself, -9 where it was killed; an error of the run is raised."
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def course(folder):
    "The curve of a run, without its clock."
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    clock = rows[0].index("seconds")
    return [row[:clock] + row[clock + 1 :] for row in rows]


def same_end(folder, other):
    "What differs between two finished runs."
    found = []
    for name in ("checkpoint.safetensors", "resume.safetensors"):
        a, b = (load_tensors(path / name)[0] for path in (folder, other))
        if a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a):
            found.append(name)
    if course(folder) != course(other):
        found.append("metrics.csv")
    metrics = [
        json.loads((path / "record.json").read_text())["metrics"] for path in (folder, other)
    ]
    if metrics[0] != metrics[1]:
        found.append("record.json")
    extra = {path.name for path in folder.iterdir()} - {path.name for path in other.iterdir()}
    return found + sorted(extra)


def main(kind, kills, seed, folder):
    "Runs until so many kills have hit; each run is compared."
    random_ = random.Random(f"{kind} {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    straight = folder / "straight"
    recipe_of(kind)[1].build_task()  # imports what it needs, so that children need not
    wait(attempt(kind, folder / "warm"))  # compiles and fills caches
    began = time.perf_counter()
    assert wait(attempt(kind, straight)) == 0, (folder / "error.txt").read_text()
    seconds = time.perf_counter() - began
    table = {"kind": kind, "seed": seed, "seconds": round(seconds, 2)}
    table |= {"moments": 0, "inside": 0, "runs": 0, "different": []}
    hits = 0
    while hits < kills:
        run = folder / f"run-{table['runs']}"
        while not is_finished(run) and hits < kills:
            if random_.random() < 1 / 3:
                child = attempt(kind, run)
                time.sleep(random_.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
                where = "moments"
            else:
                count, place = random_.randint(1, 40), random_.choice(["before", "half", "after"])
                child = attempt(kind, run, lambda: kill_inside(count, place))
                where = "inside"
            code = wait(child)
            if code == 1:
                raise SystemExit(f"{kind} {run.name}: {(folder / 'error.txt').read_text()}")
            if code == -9:
                hits += 1
                table[where] += 1
        while not is_finished(run):
            if wait(attempt(kind, run)) == 1:
                raise SystemExit(f"{kind} {run.name}: {(folder / 'error.txt').read_text()}")
        table["runs"] += 1
        table["different"] += [f"{run.name} {name}" for name in same_end(run, straight)]
    print(json.dumps(table))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
