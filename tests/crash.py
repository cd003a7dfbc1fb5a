"""Kill, starve and damage runs, go on, and compare what they leave with a run that nobody disturbed.

    python tests/crash.py FOLDER [--kills 300] [--seed 0] [--only GROUP ...] [--record PATH]

Kills come at random moments, or inside a save, a resume or the writing of a record: before, half way through or after a write, a
flush, a rename or a removal. Beside them: signals to the whole group, full disks, flipped bits, a folder that is removed, two terminals.
Each case is one row of the record, written as soon as it is known; rows that are there are not made again, and a kind of run that
was stopped goes on with its next run. It forks, so torch has one thread.
"""

import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    os.environ |= one_thread | {"NUMBA_THREADING_LAYER": "workqueue"}  # which survives a fork

import torch

import unipre3d.records as records
import unipre3d.runs.fit as loop
from unipre3d.recipes import finetune_recipes, recipes
from unipre3d.records import code_version, hardware, write_json
from unipre3d.runs.checkpoint import has_state, is_finished, load_tensors
from unipre3d.runs.recipe import change
from unipre3d.runs.run import run_recipe

TINY = dict(num_groups=8, group_size=8, depth=1, encoder_widths=(8, 16, 16), encoder_dims=16)
TINY_BACKBONE = TINY | dict(width=16, num_heads=2)
SHORT = dict(steps=9, save_every=2, batch_size=2, warmup=1, workers=0)
OBJECTS = SHORT | dict(n_points=64, backbone_options=TINY_BACKBONE)
TWO_CLASSES = OBJECTS | dict(classes=("bed", "lamp"), validate_every=3)
UNET = dict(base_channels=4, channels=(4, 8, 8, 4), layers=(1, 1, 1, 1), voxel_size=0.2)
ROOMS = SHORT | dict(rooms=3, validate_every=3, n_points=2000, votes=0, backbone_options=UNET)

KINDS = {
    "pre-training": (
        "object-transformer-mini",
        OBJECTS | dict(image="rgb", n_target=1, resolution=16),
    ),
    "classification": ("cls-furniture-mini", TWO_CLASSES),
    "parts": ("part-furniture-mini", TWO_CLASSES),
    "semantic": ("sem-rooms-mini", ROOMS),
    "instances": ("inst-rooms-mini", ROOMS),
}
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
FILLED = (2, 10, 20, 30, 40, 50, 60, 75, 90, 130)  # % of what a run needs at most
FILES = ("config.json", "metrics.csv", "checkpoint.safetensors", "resume.safetensors")
FILES += ("resume-before.safetensors", "record.json")
EQUAL = "equal"
REFUSED = "one line"  # that names the file; a run from what was saved ends equal
CURVE = "weights and scores equal, a row of the curve not"
ACCEPTED = {
    "killed": {EQUAL},
    "signal": {f"saved, {EQUAL}"},
    "full disk": {EQUAL, REFUSED},
    "flipped bit": {EQUAL, REFUSED, CURVE, "not noticed"},
    "folder": {
        REFUSED,
        f"the second is refused in one line, the first is {EQUAL}",
        f"two folders, both {EQUAL}",
    },
}  # what may come out, by group


def rows():
    "The cases of the record, as (group, case)."
    yield from (("killed", kind) for kind in KINDS)
    yield from (("signal", f"{name}, {k} loaders") for name in SIGNALS for k in (0, 1, 2))
    yield from (("full disk", f"{part} % of the room it needs") for part in FILLED)
    yield from (("flipped bit", name) for name in FILES)
    yield from (("folder", case) for case in ("removed", "claimed twice", "wanted twice"))


def accepted(row):
    "Whether a row of the record says what may be; only in record.json may a flipped bit go unnoticed."
    words = [row["outcome"]]
    if row["group"] == "flipped bit":
        words = [part.partition(": ")[2] for part in row["outcome"].split("; ")]
    unnoticed = "not noticed" in words and row["case"] != "record.json"
    curve = CURVE in words and row["case"] != "metrics.csv"
    return set(words) <= ACCEPTED[row["group"]] and not unnoticed and not curve


# ---------------------------------------------------------------- one run


def recipe_of(kind, **values):
    "The name of a recipe, and a small version of it."
    name, small = KINDS[kind]
    return name, change((recipes | finetune_recipes)[name], **small | values)


def attempt(kind, folder, prepare=lambda: None, **values):
    "Run, or go on, in a process of its own; its process id. What it says goes into a file beside the folder."
    warm(kind)
    child = os.fork()
    if child:
        return child
    said = folder.parent / f"{folder.name}.txt"
    try:
        with open(os.devnull, "w") as nowhere, open(said, "w") as file:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            name, recipe = recipe_of(kind, **values)
            task = warm(kind)
            type(recipe).build_task = lambda self, device="cpu": task
            prepare()
            how = dict(resume=has_state(folder), device="cpu")
            done = run_recipe(name, recipe, folder, say=lambda text: print(text, file=file), **how)
        os._exit(0 if done.ended == "finished" else 130)
    except BaseException as error:
        known = isinstance(error, (ValueError, OSError))
        said.write_text(str(error) if known else f"{type(error).__name__}: {error}\n")
        os._exit(2 if known else 1)


def said_by(folder):
    "The last words of an attempt."
    path = folder.parent / f"{folder.name}.txt"
    return path.read_text() if path.exists() else ""


def wait(child):
    "Its exit status; -9 where it was killed."
    return wait_and_time(child)[0]


def wait_and_time(child):
    "Its exit status, and the seconds that it has computed."
    _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def finish(kind, folder, **values):
    "Go on until the run is finished; an error of the run is raised."
    while not is_finished(folder):
        if code := wait(attempt(kind, folder, **values)):
            raise SystemExit(f"{kind} {folder.name} ended with {code}: {said_by(folder)}")


def course(folder):
    "The curve of a run, without its clock."
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    clock = lines[0].index("seconds")
    return [line[:clock] + line[clock + 1 :] for line in lines]


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
    names = [{path.name for path in run.iterdir()} for run in (folder, other)]
    return found + sorted(names[0] ^ names[1])


def ended(folder, straight):
    "In words: how a finished run compares with the undisturbed one."
    different = same_end(folder, straight)
    return f"different: {', '.join(different)}" if different else EQUAL


@functools.cache
def warm(kind):
    "A run in this process: what it imports and compiles, its children need not. A task for them, as it is when it is built."
    name, recipe = recipe_of(kind)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stderr(nowhere):
            run_recipe(name, recipe, Path(folder) / "run", device="cpu", say=lambda text: None)
    return recipe.build_task()


def straight_run(kind, folder):
    "An undisturbed run of a kind, and the seconds that one computes."
    straight, clock = folder / f"{kind}-straight", folder / f"{kind}-seconds.json"
    if not clock.exists():
        again = folder / f"{kind}-again"
        for run in (straight, again):
            shutil.rmtree(run, ignore_errors=True)
            code, seconds = wait_and_time(attempt(kind, run))
            if code:
                raise SystemExit(f"{kind} ended with {code}: {said_by(run)}")
        if different := same_end(again, straight):
            raise SystemExit(f"{kind}: two undisturbed runs differ in {', '.join(different)}")
        shutil.rmtree(again)
        clock.write_text(json.dumps(seconds))
    return straight, json.loads(clock.read_text())


# ---------------------------------------------------------------- kills


def die():
    "As the system kills: at once, without a word."
    os.kill(os.getpid(), signal.SIGKILL)


def kill_inside(count, place):
    "Die at the count-th write, flush, rename or removal from now: before it, half way through a write, or after it."
    left = [count]

    def counted(function, half=None):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and place == "before":
                die()
            if left[0] == 0 and place == "half" and half is not None:
                half(*args, **kwargs)
                die()
            result = function(*args, **kwargs)
            if left[0] == 0:
                die()
            return result

        return call

    write_bytes, write_text = Path.write_bytes, Path.write_text

    def half_bytes(path, data):
        write_bytes(path, data[: len(data) // 2])

    def half_text(path, text):
        write_text(path, text[: len(text) // 2])

    save_file = records.save_file

    def half_file(tensors, path, **how):
        save_file(tensors, path, **how)
        os.truncate(path, path.stat().st_size // 2)

    records.save_file = counted(save_file, half_file)
    Path.write_bytes = counted(write_bytes, half_bytes)
    Path.write_text = counted(write_text, half_text)
    os.replace = counted(os.replace)
    os.fsync = counted(os.fsync)
    Path.unlink = counted(Path.unlink)


def computed(child):
    "Seconds that a process has computed, whatever else the machine does; infinite once it has ended."
    if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        return math.inf
    times = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


def wait_computing(child, seconds):
    "Wait until a process has computed for so long; without /proc until so much time is over."
    if not Path("/proc/self/stat").exists():
        time.sleep(seconds)
        return
    while computed(child) < seconds:
        time.sleep(0.003)


def kill_once(kind, run, rng, seconds):
    "One attempt with a kill somewhere; where it came, or None where the attempt ended before."
    if rng.random() < 2 / 3:
        child = attempt(kind, run)
        wait_computing(child, rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        where = "moments"
    else:
        count, place = rng.randint(1, 40), rng.choice(["before", "half", "after"])
        child = attempt(kind, run, lambda: kill_inside(count, place))
        where = "inside"
    code = wait(child)
    if code not in (0, -9):
        raise SystemExit(f"{kind} {run.name} ended with {code}: {said_by(run)}")
    return where if code == -9 else None


def killed(kind, kills, seed, folder):
    "Runs that are killed until so many kills have hit; each is compared. A table that is there goes on."
    folder.mkdir(parents=True, exist_ok=True)
    straight, seconds = straight_run(kind, folder)
    path = folder / f"{kind}-{seed}.json"
    table = {"kind": kind, "seed": seed, "seconds": round(seconds, 2), "moments": 0, "inside": 0}
    table |= {"runs": 0, "different": []}
    if path.exists():
        table = json.loads(path.read_text())
    while table["moments"] + table["inside"] < kills:
        rng = random.Random(f"{kind} {seed} {table['runs']}")
        run = folder / f"{kind}-{seed}-{table['runs']}"
        shutil.rmtree(run, ignore_errors=True)
        hits = Counter()
        while not is_finished(run) and table["moments"] + table["inside"] + hits.total() < kills:
            hits.update(filter(None, [kill_once(kind, run, rng, seconds)]))
        finish(kind, run)
        table["different"] += [f"{run.name} {name}" for name in same_end(run, straight)]
        table |= {where: table[where] + hits[where] for where in ("moments", "inside")}
        table["runs"] += 1
        shutil.rmtree(run)
        write_json(path, table)
    return table


# ---------------------------------------------------------------- signals, disks, bits, folders


def slowly(seconds=0.15):
    "Make steps slow enough to be met."
    take_step = loop.take_step

    def slow(*args):
        time.sleep(seconds)
        return take_step(*args)

    loop.take_step = slow


def stop_after(steps):
    "Interrupt the run after so many steps of this part."
    take_step, left = loop.take_step, [steps]

    def counted(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(*args)

    loop.take_step = counted


def until(happens, seconds=120):
    "Wait for it."
    deadline = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > deadline:
            raise SystemExit("crash.py: waited too long")
        time.sleep(0.02)


def has_rows(folder, count):
    "Whether a curve has so many rows."
    path = folder / "metrics.csv"
    return path.is_file() and len(path.read_text().splitlines()) > count


def signalled(name, loaders, folder, kind="classification"):
    "A signal to the whole group of a run, which goes on afterwards."
    straight, _ = straight_run(kind, folder)
    run = folder / f"{name}-{loaders}"

    def prepare():
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started us
        slowly()

    child = attempt(kind, run, prepare, workers=loaders)
    until(lambda: has_rows(run, 3))
    os.killpg(child, getattr(signal, name))
    code = wait(child)
    if code != 130 or not has_state(run) or "go on with" not in said_by(run):
        return f"ended with {code}: {said_by(run)}"
    finish(kind, run, workers=loaders)
    return f"saved, {ended(run, straight)}"


def own_disk(folder, size):
    "A file system of so many bytes at a folder; False where mounting is not allowed."
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return shutil.which("mount") and not subprocess.run(command, capture_output=True).returncode


def little_room(folder, size):
    "Let what is written whole into a folder fail as on a disk of that size."

    def limited(write, cut):
        def call(path, data):
            used = sum(p.stat().st_size for p in folder.rglob("*") if p != path and p.is_file())
            if folder not in path.parents or used + len(data) <= size:
                return write(path, data)
            write(path, cut(data, max(0, size - used)))
            raise OSError(28, "No space left on device", str(path))

        return call

    save_file = records.save_file

    def limited_file(tensors, path, **how):
        save_file(tensors, path, **how)
        used = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        if folder in path.parents and used > size:
            os.truncate(path, max(0, path.stat().st_size - used + size))
            raise OSError(28, "No space left on device", str(path))

    records.save_file = limited_file
    Path.write_bytes = limited(Path.write_bytes, lambda data, room: data[:room])
    Path.write_text = limited(Path.write_text, lambda text, room: text[:room])


def filled(part, folder, kind="classification"):
    "A run on a disk with a part (%) of the room that it needs; then it goes on where there is room. A row of the record."
    straight, _ = straight_run(kind, folder)
    sizes = {path.name: path.stat().st_size for path in straight.iterdir()}
    most = sum(sizes.values()) + 2 * sizes["resume.safetensors"]  # the one before, and a new one
    size = most * part // 100
    run, rescued = folder / f"disk-{part}", folder / f"rescued-{part}"
    mounted = own_disk(run, size)
    try:
        code = wait(attempt(kind, run, lambda: None if mounted else little_room(run, size)))
        text = said_by(run)
        shutil.copytree(run, rescued)
    finally:
        if mounted:
            subprocess.run(["umount", str(run)], check=True)
    found = {"bytes": size, "disk": "tmpfs" if mounted else "stand-in"}
    if code == 0:
        return found | {"outcome": ended(rescued, straight)}
    if code != 2 or len(text.splitlines()) != 1 or str(run) not in text:
        return found | {"outcome": f"ended with {code}: {text}"}
    finish(kind, rescued)
    equal = same_end(rescued, straight) == []
    return found | {"outcome": REFUSED if equal else ended(rescued, straight)}


def flip_a_bit(path, rng):
    "Somewhere in a file."
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flipped(name, folder, times, kind="classification"):
    "Flip a bit in a file of a stopped run, or of a finished one; then go on. How often it ended how."
    straight, _ = straight_run(kind, folder)
    stopped = folder / "stopped"
    if not stopped.exists():
        assert wait(attempt(kind, stopped, lambda: stop_after(5))) == 130, said_by(stopped)
    found = Counter()
    for k in range(times):
        run = folder / f"flipped-{name}-{k}"
        shutil.copytree(straight if name == "record.json" else stopped, run)
        flip_a_bit(run / name, random.Random(f"{name} {k}"))
        if name == "record.json" and is_finished(run):
            found["not noticed"] += 1
            continue
        code = wait(attempt(kind, run))
        text = said_by(run)
        if code == 2 and len(text.splitlines()) == 1 and str(run) in text:
            found[REFUSED] += 1
        elif code:
            found[f"ended with {code}: {text}"] += 1
        elif same_end(run, straight) == ["metrics.csv"]:
            found[CURVE] += 1
        else:
            found[ended(run, straight)] += 1
        shutil.rmtree(run)
    return "; ".join(f"{count} of {times}: {words}" for words, count in sorted(found.items()))


def removed(folder, kind="classification"):
    "The folder of a run is removed while it works."
    run = folder / "removed"
    child = attempt(kind, run, slowly)
    until(lambda: has_rows(run, 3))
    until(lambda: not run.exists() or shutil.rmtree(run, ignore_errors=True))
    code, text = wait(child), said_by(run)
    named = code == 2 and len(text.splitlines()) == 1 and str(run) in text
    return REFUSED if named else f"ended with {code}: {text}"


def claimed_twice(folder, kind="classification"):
    "Two runs want one folder by name, one after the other."
    straight, _ = straight_run(kind, folder)
    run = folder / "claimed"
    child = attempt(kind, run, functools.partial(slowly, 0.6))  # until the second has begun
    until(lambda: has_rows(run, 2))
    code, text = wait(attempt(kind, run)), said_by(run)
    refused = code == 2 and len(text.splitlines()) == 1 and "in use by another process" in text
    if not refused:
        return f"the second ended with {code}: {text}"
    if code := wait(child):
        return f"the first ended with {code}"
    return f"the second is refused in one line, the first is {ended(run, straight)}"


def wanted_twice(folder, kind="classification"):
    "The same command in two terminals, without a folder's name."
    straight, _ = straight_run(kind, folder)
    home = folder / "terminals"
    home.mkdir()
    name, recipe = recipe_of(kind)
    task, children = warm(kind), []
    type(recipe).build_task = lambda self, device="cpu": task
    for _ in range(2):
        child = os.fork()
        if not child:
            try:
                os.chdir(home)
                os.dup2(os.open(os.devnull, os.O_RDWR), 2)
                done = run_recipe(name, recipe, device="cpu", say=lambda text: None)
                os._exit(0 if done.ended == "finished" else 130)
            except BaseException:
                os._exit(1)
        children.append(child)
    codes = [wait(child) for child in children]
    runs = sorted((home / "runs").iterdir())
    if codes != [0, 0] or len(runs) != 2:
        return f"ended with {codes} in {len(runs)} folders"
    return f"two folders, both {' and '.join({ended(run, straight) for run in runs})}"


# ---------------------------------------------------------------- the record


def outcome(group, case, folder, args):
    "One row of the record."
    if group == "killed":
        table = killed(case, -(-args.kills // len(KINDS)), args.seed, folder)
        table["outcome"] = f"different: {table['different'][:3]}" if table["different"] else EQUAL
        return table
    if group == "signal":
        name, loaders = case.split(", ")
        return {"outcome": signalled(name, int(loaders.split()[0]), folder)}
    if group == "full disk":
        return filled(int(case.split()[0]), folder)
    if group == "flipped bit":
        return {"outcome": flipped(case, folder, args.flips)}
    scenes = {"removed": removed, "claimed twice": claimed_twice, "wanted twice": wanted_twice}
    return {"outcome": scenes[case](folder)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=300, help="over all kinds of runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flips", type=int, default=8, help="bits of a file, one at a time")
    parser.add_argument("--only", nargs="+", help="groups or cases")
    parser.add_argument("--record", type=Path, help="default: outcomes.json in the folder")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    folder = args.folder.resolve()
    path = args.record or folder / "outcomes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"seed": args.seed, "hardware": hardware(), "rows": []}
    when = {"date": datetime.date.today().isoformat(), "code": code_version()}
    if path.exists():
        record = json.loads(path.read_text())
    for group, case in rows():
        known = any((row["group"], row["case"]) == (group, case) for row in record["rows"])
        if known or (args.only and group not in args.only and case not in args.only):
            continue
        found = outcome(group, case, folder, args)
        record["rows"].append({"group": group, "case": case} | when | found)
        write_json(path, record)
        print(json.dumps(record["rows"][-1]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
