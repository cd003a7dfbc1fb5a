"""Several processes that are started, stopped, killed and started again: as launchers and schedulers do it."""

import csv
import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm import Launch

from unipre3d.data.loading import StepSampler
from unipre3d.data.readers import Store
from unipre3d.data.shapenet import ShapeNetViews, export_objects
from unipre3d.data.shards import write_shards
from unipre3d.processes import launch_line, slurm_script
from unipre3d.runs.checkpoint import load_state, load_tensors

ENV = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
TINY = "--num-groups 8 --group-size 8 --model.backbone-options.depth 1 --encoder-widths 8 16 16 --encoder-dims 16"
WORDS = (
    f"pretrain object-transformer-mini {TINY} --width 16 --num-heads 2 --image rgb --n-points 64"
)
WORDS += " --n-target 1 --resolution 16 --batch-size 4 --workers 0 --device cpu --picture-every 0"
WORDS += " --image-cache-mb 0 --validate-every 0 --warmup 1"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    "A few pieces of furniture in shards."
    home = tmp_path_factory.mktemp("shards")
    everything = ShapeNetViews()
    folder = export_objects(everything, home / "folder", indices=range(0, len(everything), 9))
    return write_shards(Store(folder), home / "shards", 2**18, progress=False)


def launched(words, processes=2, **how):
    "A run under torch's launcher."
    words = launch_line(words, processes).removeprefix("torchrun").split()
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=ENV, **pipes, **how)


def finished(run, timeout=300):
    try:
        texts = run.communicate(timeout=timeout)
    finally:
        run.kill()
    return "".join(text or "" for text in texts)


def course(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def wait_for_rows(run, folder, count):
    "Until a run has made so many steps."
    until = time.monotonic() + 200
    path = folder / "metrics.csv"
    while not (path.is_file() and len(path.read_text().splitlines()) > count):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.05)


def same_weights(a, b):
    weights, others = (load_tensors(run / "checkpoint.safetensors")[0] for run in (a, b))
    return all(torch.equal(value, others[key]) for key, value in weights.items())


def test_two_processes_killed_in_an_epoch_go_on_from_shards_to_the_same_end(shards, tmp_path):
    words = f"{WORDS} --data {shards} --shard-window 2 --steps 30 --save-every 4 --keep 2"
    words += " --validate-every 8 --tracker tensorboard"
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run = Launch(2, *words.split(), "--out", straight)
    said = finished(run)
    assert run.returncode == 0, said[-3000:]
    run = Launch(2, *words.split(), "--out", killed)
    wait_for_rows(run, killed, 9)
    run.kill()
    finished(run)
    assert run.returncode == -signal.SIGKILL
    step = load_state(killed)[1]["step"]
    assert 4 <= step < 30
    again = "pretrain object-transformer-mini --device cpu --tracker tensorboard"
    run = Launch(2, *again.split(), "--out", killed, "--resume")
    said = finished(run)
    assert run.returncode == 0, said[-3000:]
    assert course(killed) == course(straight) and same_weights(killed, straight)

    record = json.loads((killed / "record.json").read_text())
    assert record["processes"] == 2 and record["resumed"] and len(course(killed)) == 30
    kept = sorted(path.name for path in killed.glob("*.safetensors"))
    assert kept == sorted(path.name for path in straight.glob("*.safetensors"))
    assert {"step-28.safetensors", "step-30.safetensors", "best.safetensors"} <= set(kept)
    assert len([name for name in kept if name.startswith("step-")]) == 2
    _, best = load_tensors(killed / "best.safetensors")
    scores = {int(row["step"]): float(row["val_psnr"]) for row in course(killed) if row["val_psnr"]}
    assert scores[best["step"]] == max(scores.values()) == pytest.approx(best["score"])

    for folder in (straight, killed):  # one writer, and no step twice
        read = EventAccumulator(str(folder / "tensorboard")).Reload()
        assert [event.step for event in read.Scalars("loss")] == list(range(1, 31))
    assert len(list((straight / "tensorboard").rglob("events*"))) == 1


def test_ranks_see_disjoint_samples(shards):
    reader = ShapeNetViews(shards, split="train")
    blocks = tuple(reader.store.shards.shard_of(reader.name(i)) for i in range(len(reader)))
    for how in ({}, dict(blocks=blocks, window=2)):
        ranks = [
            StepSampler(len(blocks), 2, stop=9, rank=rank, world_size=4, **how) for rank in range(4)
        ]
        steps = len(blocks) // 8
        seen = [key for rank in ranks for step in range(steps) for key in rank.batch(step)]
        assert len(seen) == len(set(seen)) == 8 * steps


def test_four_processes_start_and_end_cleanly(shards, tmp_path):
    run = launched(f"{WORDS} --data {shards} --steps 3 --workers 1 --out {tmp_path / 'run'}", 4)
    said = finished(run)
    assert run.returncode == 0, said[-3000:]
    for word in ("Traceback", "Error", "destroy_process_group", "leaked", "processes that were"):
        assert word not in said, said
    assert json.loads((tmp_path / "run" / "record.json").read_text())["processes"] == 4
    assert said.count("writing to") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_the_launcher_hands_a_signal_on_and_the_run_is_saved(tmp_path):
    folder = tmp_path / "run"
    run = launched(f"{WORDS} --steps 100000 --save-every 100000 --out {folder}")
    wait_for_rows(run, folder, 3)
    os.kill(run.pid, signal.SIGTERM)
    said = finished(run)
    assert run.returncode != 0 and "go on with: unipre3d pretrain" in said
    assert load_state(folder)[1]["step"] == len(course(folder))


SRUN = """#!/bin/bash
# Two tasks, as SLURM starts them; the larger exit status of the two.
shift
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" &
  pids+=($!)
done
echo "${pids[@]}" > tasks
worst=0
for pid in "${pids[@]}"; do wait $pid; code=$?; [ $code -gt $worst ] && worst=$code; done
exit $worst
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1
[ "$1" = requeue ] && echo "$2" >> queue
exit 0
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a script of bash")
def test_a_job_of_slurm_goes_back_into_the_queue_and_on(tmp_path):
    for name, text in dict(srun=SRUN, scontrol=SCONTROL).items():
        path = tmp_path / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    words = f"{WORDS} --steps 60 --save-every 100000"
    script = slurm_script(words, "a run", nodes=1, gpus=2, cpus=1)
    (tmp_path / "job.sh").write_text(script)
    path = f"{tmp_path}:{os.path.dirname(sys.executable)}:{ENV['PATH']}"
    place = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "here", "PATH": path}

    def job():
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        command = ["bash", "job.sh"]
        return subprocess.Popen(command, cwd=tmp_path, env=ENV | place, **pipes)

    run = job()
    wait_for_rows(run, tmp_path / "a run", 3)
    for pid in (tmp_path / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    said = finished(run)
    assert run.returncode == 130, said[-3000:]
    assert (tmp_path / "queue").read_text() == "4711\n"
    stopped = load_state(tmp_path / "a run")[1]["step"]
    assert 3 <= stopped < 60
    run = job()
    said = finished(run)
    assert run.returncode == 0, said[-3000:]
    record = json.loads((tmp_path / "a run" / "record.json").read_text())
    assert (record["steps"], record["resumed"], record["processes"]) == (60, True, 2)
    assert (tmp_path / "queue").read_text() == "4711\n"  # a finished run is not queued again
