"""What commands write beside runs: whole or not at all, one line where a disk is full, one process in a folder.

`python tests/test_outputs.py NAME FOLDER` kills one of the commands at each write, flush, rename and removal.
"""

import hashlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":  # it forks, so torch has one thread
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    os.environ["NUMBA_THREADING_LAYER"] = "workqueue"

import crash
import numpy as np
import pytest
import torch
import trimesh
from warm import Command, script

from unipre3d.backbones import StandardTransformer
from unipre3d.cli import main
from unipre3d.core import GaussianBatch
from unipre3d.data.objects import map_jobs
from unipre3d.data.shapenet import ShapeNetViews, export_objects
from unipre3d.gaussians import save_ply
from unipre3d.records import used_alone, written_whole
from unipre3d.worlds.prepare import run_jobs

resource = pytest.importorskip("resource", reason="limits of processes are those of Unix")
ENV = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
LARGEST = 2000  # bytes of a file, for a disk that is full


def limit_files():
    "A disk that is full, for files of this process."
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))


def new_python(*words):
    "A command line in a Python that has imported nothing, on a disk that is full."
    program = [sys.executable, "-m", "unipre3d", *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(program, env=ENV, preexec_fn=limit_files, **pipes)


def cloud_of_gaussians(path, n=200):
    g = torch.Generator().manual_seed(0)
    mean, quat = torch.randn(n, 3, generator=g), torch.randn(n, 4, generator=g)
    scale, sh = torch.full((n, 3), 0.1), torch.randn(n, 4, 3, generator=g)
    batch = torch.zeros(n, dtype=torch.long)
    return save_ply(GaussianBatch(mean, scale, quat, torch.full((n,), 0.5), sh, batch, 1), path)


def meshes(folder, count=4):
    for k in range(count):
        path = folder / "box" / f"box{k}.obj"
        path.parent.mkdir(parents=True, exist_ok=True)
        trimesh.creation.box((1, 0.5, 0.3 + 0.1 * k)).export(path)
    return folder


def points(path):
    np.savetxt(path, np.random.default_rng(0).random((300, 3)))
    return path


def two_objects(folder):
    return export_objects(ShapeNetViews(), folder, indices=[0, 1])


SMALL_VIEWS = ("--views", 2, "--size", 16, "--points", 64)
COMMANDS = {
    "convert": lambda home, out: ("convert", cloud_of_gaussians(home / "a.ply"), out / "b.spz"),
    "render": lambda home, out: (
        *("render", cloud_of_gaussians(home / "a.ply")),
        *("--frames", 2, "--size", 48, "--out", out),
    ),
    "features": lambda home, out: ("features", points(home / "a.xyz"), "--out", out / "a.npz"),
    "shard": lambda home, out: ("data", "shard", "furniture", "--size-mb", 1, "--out", out / "s"),
    "few": lambda home, out: ("data", "shard", two_objects(home / "two"), "--out", out / "s"),
    "unpack": lambda home, out: ("data", "furniture", "--unpack", "--out", out / "objects"),
    "prepare": lambda home, out: (
        *("data", "prepare", meshes(home / "meshes"), "--out", out / "m.zip", "--split"),
        *(0.5, 0.25, 0.25, *SMALL_VIEWS, "--workers", 1),
    ),
}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "few"])
def test_a_full_disk_is_one_line_that_names_the_place(tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    words = COMMANDS[name](tmp_path, out)
    run = new_python(*words) if name == "convert" else Command(*words, largest=LARGEST)
    _, said = run.communicate(timeout=300)
    lines = [line for line in said.splitlines() if line.startswith("unipre3d: ")]
    assert run.returncode == 2 and len(lines) == 1 and "Traceback" not in said, said
    assert str(out) in lines[0] and "expected to write it, found" in lines[0]
    assert not list(tmp_path.rglob("*.partial"))


def test_weights_that_find_no_room_are_named(tmp_path):
    small = dict(width=8, depth=1, num_heads=1, encoder_widths=(8, 8, 8), encoder_dims=8)
    net = StandardTransformer(num_groups=4, group_size=4, **small)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, hard))
    try:
        with pytest.raises(OSError, match="model.safetensors: expected to write it") as error:
            net.save_pretrained(tmp_path / "net")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value) and not list((tmp_path / "net").iterdir())
    net.save_pretrained(tmp_path / "net")
    again = StandardTransformer.from_pretrained(tmp_path / "net").state_dict()
    assert all(torch.equal(again[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["shard", "prepare", "unpack"])
def test_a_folder_in_which_another_command_works_is_refused(tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    words = COMMANDS[name](tmp_path, out)
    place = Path(words[words.index("--out") + 1])
    with used_alone(place):
        run = Command(*words)
        _, said = run.communicate(timeout=300)
    assert run.returncode == 2 and f"{place} is in use by another process" in said
    assert not place.exists() and not list(out.iterdir())


WRITER = """
import sys, time
from pathlib import Path
from unipre3d.records import written_whole

path, letter, first, second = Path(sys.argv[1]), sys.argv[2], *map(float, sys.argv[3:])
with written_whole(path) as partial, open(partial, "w") as file:
    for wait in (first, second):
        file.write(1000 * letter)
        file.flush()
        print(letter, flush=True)
        sys.stdin.readline()
"""


def test_of_two_that_write_one_file_at_once_each_is_whole(tmp_path):
    path = tmp_path / "file"
    writers = {}
    for letter in "ab":
        words = [sys.executable, "-c", WRITER, str(path), letter, "0", "0"]
        writers[letter] = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV
        )
        assert writers[letter].stdout.readline() == f"{letter}\n"  # both have written a half
    for letter, writer in writers.items():
        writer.communicate("\n\n", timeout=60)
        assert writer.returncode == 0 and path.read_text() == 2000 * letter
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    path = tmp_path / "file[1]"
    words = [sys.executable, "-c", WRITER, str(path), "a", "0", "0"]
    writer = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENV)
    writer.stdout.readline()
    writer.kill()
    writer.communicate()
    assert [one.name for one in tmp_path.iterdir()] == [f"file[1].{writer.pid}.partial"]
    with written_whole(path) as partial:
        partial.write_text("whole")
    assert [one.name for one in tmp_path.iterdir()] == ["file[1]"]


def children_of(process):
    listing = ["ps", "-o", "pid=", "--ppid", str(process)]
    return [int(pid) for pid in subprocess.run(listing, capture_output=True).stdout.split()]


def below(process):
    "All processes that it or one of these started."
    children = children_of(process)
    return children + [grandchild for child in children for grandchild in below(child)]


def is_helper(process):
    "Whether it does jobs: it watches its parent in a thread."
    listing = subprocess.run(["ps", "-o", "nlwp=", "-p", str(process)], capture_output=True)
    return int(listing.stdout or 0) > 1


def is_running(process):
    "Whether a process is there, and no zombie."
    state = ["ps", "-o", "state=", "-p", str(process)]
    return subprocess.run(state, capture_output=True, text=True).stdout.strip()[:1] not in ("", "Z")


def until(happens, seconds=120):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.1)


POOL = """
import sys, time
from unipre3d.data.objects import map_jobs

print("ready", flush=True)
list(map_jobs(time.sleep, [(0.2,)] * 1000, 2))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="ps of Linux")
def test_helpers_end_with_a_killed_command(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", POOL], stdout=subprocess.PIPE, env=ENV)
    run.stdout.readline()
    until(lambda: sum(map(is_helper, below(run.pid))) == 2)
    helpers = below(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    until(lambda: not any(map(is_running, helpers)), seconds=20)


ENDS = ("__import__('os')._exit(9)",)


def test_a_helper_that_is_killed_is_named():
    with pytest.raises(ChildProcessError, match="ended from outside.*--workers 1"):
        list(map_jobs(eval, [("1",), ENDS, ("2",)], 2))


def test_a_job_that_ends_its_process_early_costs_no_other():
    done = dict(run_jobs(eval, [ENDS, *((str(k),) for k in range(1, 300))], 6))
    assert done == {0: None} | {k: k for k in range(1, 300)}


def test_several_threads_start_helpers():
    script, made = sys.modules["__main__"], []
    words = [(str(k),) for k in range(4)]
    threads = [
        threading.Thread(target=lambda: made.append(list(map_jobs(eval, words, 2))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [[0, 1, 2, 3]] * 3 and sys.modules["__main__"] is script


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="ps of Linux")
def test_an_interrupt_ends_helpers_at_once(tmp_path):
    words = ("data", "rooms", "--rooms", 8, "--out", tmp_path / "rooms")
    run = Command(*words)
    until(lambda: list((tmp_path / "rooms").glob(".part-*")))  # two rooms are being composed
    helpers = below(run.pid)
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and said.splitlines()[-1] == "unipre3d: interrupted"
    until(lambda: not any(map(is_running, helpers)), seconds=20)
    assert not list((tmp_path / "rooms").glob("*/room*"))


SLOW = """
import sys, time

if "forkserver" in " ".join(sys.orig_argv):
    print("importing", flush=True)
    time.sleep(5)


def double(k):
    return 2 * k
"""
STARTS = """
import signal, sys, slow
from unipre3d import cli
from unipre3d.data.objects import map_jobs

signal.signal(signal.SIGINT, signal.default_int_handler)  # or a shell in the background
cli.commands["double"] = lambda args: list(map_jobs(slow.double, [(1,), (2,)], 2))
sys.exit(cli.main(["double"]))
"""


def test_an_interrupt_while_helpers_start_is_one_line(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen(
        [sys.executable, "-c", STARTS], cwd=tmp_path, env=ENV, start_new_session=True, **pipes
    )
    assert run.stdout.readline() == "importing\n"
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=120)
    assert (run.returncode, said) == (130, "unipre3d: interrupted\n")


SCRIPT = """
import torch
from unipre3d.data.objects import map_jobs

print("at work:", torch.get_num_threads(), torch.ones(2_000_000).exp().numel())
large = "__import__('torch').ones(2_000_000).exp().numel()"
print(list(map_jobs(eval, [(large,), (large,)], 2)))
"""


def test_helpers_are_no_copies_of_a_process_with_threads(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)  # without a guard for its name
    words = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env=ENV | {"OMP_NUM_THREADS": "2"}
    )
    assert done.stdout.splitlines() == ["at work: 2 2000000", "[2000000, 2000000]"], done.stderr


def test_helpers_work_where_their_parent_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIPRE3D_CACHE", "nearby")
    assert list(map_jobs(os.path.abspath, [("x",)], 2)) == [str(tmp_path / "x")]
    assert list(map_jobs(os.getenv, [("UNIPRE3D_CACHE",), ("none",)], 2)) == ["nearby", None]
    with pytest.raises(ValueError, match="workers: expected a function of a module"):
        list(map_jobs(eval("lambda: 1", {"__name__": "__main__"}), [(), ()], 2))


def contents(folder):
    "Each file by its name, as a hash."
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).digest() for p in files}


def write_modules(path):
    "The names of all modules that this process has imported."
    known = [name for name, module in sys.modules.items() if getattr(module, "__spec__", None)]
    path.write_text("\n".join(name for name in known if name != "__main__"))


def forked(words, prepare=lambda: None, last=lambda: None):
    "The exit status of a command in a fork of this process; -9 where it was killed."
    child = os.fork()
    if child:
        return crash.wait(child)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    prepare()
    code = main([str(word) for word in words])
    last()
    os._exit(code)


def kill_everywhere(name, home):
    "Kill a command at each write, flush, rename and removal; repeated, it leaves what it leaves undisturbed."
    out = home / "out"
    out.mkdir()
    words = COMMANDS[name](home, out)
    assert forked(words, last=lambda: write_modules(home / "modules")) == 0
    straight = contents(out)
    for module in (home / "modules").read_text().split():  # once, not in each fork
        with suppress(ImportError):  # a name that a library made up
            importlib.import_module(module)
    count, kills, killed = 0, 0, True
    while killed:
        count += 1
        killed = False
        for place in ("before", "half", "after"):
            shutil.rmtree(out)
            out.mkdir()
            killed |= forked(words, lambda: crash.kill_inside(count, place)) == -signal.SIGKILL
            kills += killed
            code = forked(words)
            assert code in (0, 2), (count, place)  # 2: it is there already, whole
            assert contents(out) == straight, (count, place, sorted(contents(out)))
    assert kills >= 3
    print(f"{name}: {kills} kills at {count - 1} places")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("name", ["convert", "few", "prepare"])
def test_a_killed_command_is_repeated_and_nothing_is_left_over(tmp_path, name):
    run = Command(__file__, name, tmp_path, entry=script)
    _, errors = run.communicate()
    assert run.returncode == 0, errors[-3000:]


if __name__ == "__main__":
    kill_everywhere(sys.argv[1], Path(sys.argv[2]))
