"""Two processes with half a batch each are one with the whole batch: every backbone, every task, every score."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import several
import torch
from warm import Launch, script

from unipre3d.runs.checkpoint import load_tensors, with_prefix

HERE = Path(__file__).parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def launched(world, path, *words):
    "What a script in several processes printed."
    run = Launch(world, path, *words, entry=script)
    try:
        said, errors = run.communicate(timeout=600)
    finally:
        run.kill()
    assert run.returncode == 0, errors[-6000:]
    return said


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "What one process and two have left of every case."
    folder = tmp_path_factory.mktemp("processes")
    launched(2, HERE / "several.py", folder / "2")
    launched(1, HERE / "several.py", folder / "1")

    def read(name):
        return [load_tensors(folder / world / f"{name}.safetensors") for world in "12"]

    return read


CASES = list(several.cases())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_the_doubled_batch(both, name):
    (tensors, one), (others, two) = both(name)
    assert (one["processes"], two["processes"]) == (1, 2) and len(one["curve"]) == several.STEPS
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-5)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert one["curve"][0] == pytest.approx(two["curve"][0], rel=2e-4, abs=1e-6)
    first, again = (with_prefix(kept, "gradient/") for kept in (tensors, others))
    whole = torch.cat([value.flatten() for value in first.values()]).norm()
    assert whole > 0 and first.keys() == again.keys()
    for key, value in first.items():
        off = (value - again[key]).norm()  # clouds in another order differ by as much
        assert off <= 1e-3 * whole, key


@pytest.mark.parametrize("name", CASES)
def test_running_averages_and_scores_are_the_same_too(both, name):
    (tensors, one), (others, two) = both(name)
    again = with_prefix(others, "buffer/")
    for key, value in with_prefix(tensors, "buffer/").items():
        assert torch.allclose(value, again[key], rtol=1e-3, atol=1e-5), key
    assert one["scores"] == pytest.approx(two["scores"], rel=5e-3, abs=1e-4, nan_ok=True)
    assert one["scores"]


NORMS = """
import copy, torch
from torch import nn
from unipre3d.processes import SharedBatchNorm, processes, share_norms

torch.distributed.init_process_group("gloo")
rank, _ = processes()
cases = [
    (nn.BatchNorm1d(3), (9, 3)),
    (nn.BatchNorm1d(3, momentum=None), (9, 3)),
    (nn.BatchNorm1d(3, affine=False), (9, 3)),
    (nn.BatchNorm1d(3, track_running_stats=False), (9, 3)),
    (nn.BatchNorm1d(3), (9, 3, 4)),
    (nn.BatchNorm2d(3), (9, 3, 4, 5)),
]
for plain, shape in cases:
    shared = nn.Sequential(copy.deepcopy(plain))
    share_norms(shared)
    assert type(shared[0]) is SharedBatchNorm
    for step, cut in enumerate((4, 1, 0, 9)):
        torch.manual_seed(step)
        x, weight = torch.randn(2, *shape)
        x = (50 + 3 * x).requires_grad_()
        part = slice(0, cut) if rank == 0 else slice(cut, None)
        own = x.detach()[part].clone().requires_grad_()
        y, z = plain(x), shared(own)
        (y * weight).sum().backward()
        (z * weight[part]).sum().backward()
        assert torch.allclose(z, y[part], atol=1e-4)
        assert torch.allclose(own.grad, x.grad[part], atol=1e-4)
        for a, b in zip(plain.buffers(), shared.buffers(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4)
    plain.eval(), shared.eval()
    assert torch.allclose(plain(x[:3]), shared(x[:3]), atol=1e-3)  # each process alone
    half = shared.train()(torch.randn(4, *shape[1:]).bfloat16())
    assert half.dtype == torch.bfloat16
try:
    shared(torch.ones(1 - rank, 3, 1, 1))
except ValueError as error:
    print(rank, error)
torch.distributed.destroy_process_group()
"""


def test_shared_normalisation_is_the_usual_one_over_all_rows(tmp_path):
    path = tmp_path / "norms.py"
    path.write_text(NORMS)
    said = launched(2, path)
    assert said.count("expected at least 2 rows over all processes, got 1") == 2


ANCHORS = """
import torch
from unipre3d.processes import SumOfProcesses, processes, shared_rows
from unipre3d.tasks.contrast import contrast

torch.distributed.init_process_group("gloo")
rank, world = processes()
torch.manual_seed(0)
whole = torch.nn.functional.normalize(torch.randn(2, 9, 5), dim=2)
for cut in (4, 1, 0):
    alone = whole.clone().requires_grad_()
    likeness = alone[0] @ alone[1].T / 0.1
    wanted = -(likeness.log_softmax(1).diagonal() + likeness.log_softmax(0).diagonal()).mean() / 2
    wanted.backward()
    part = slice(0, cut) if rank == 0 else slice(cut, None)
    own = whole[:, part].clone().requires_grad_()
    loss = contrast(own[0], own[1], 0.1)
    loss.backward()
    mean = SumOfProcesses.apply(loss.detach()) / world
    assert torch.allclose(mean, wanted, rtol=1e-5), (mean, wanted)
    assert torch.allclose(own.grad / world, alone.grad[:, part], atol=1e-6)
rows, first = shared_rows(whole[0, part])
assert torch.equal(rows, whole[0]) and first == (0, cut)[rank]
with torch.no_grad():  # a test, in which processes have unlike many batches
    assert torch.equal(shared_rows(own[0])[0], own[0])
print("equal")
torch.distributed.destroy_process_group()
"""


def test_anchors_are_told_from_those_of_all_processes(tmp_path):
    path = tmp_path / "anchors.py"
    path.write_text(ANCHORS)
    assert launched(2, path).count("equal") == 2


def test_batches_are_of_unlike_sizes():
    "Otherwise a mean of means would be a mean: voxels of a cloud, and labelled points of a room."
    from unipre3d.data.loading import StepSampler

    task = several.cases()["semantic"].build_task()
    steps = [StepSampler(len(task.samples), 2, rank=rank, world_size=2) for rank in (0, 1)]
    counts = {int((task.samples.batch(step.batch(0)).label >= 0).sum()) for step in steps}
    assert len(counts) == 2


LAUNCH = """
import sys
from unipre3d.cli import main

words = "finetune cls-furniture-mini --classes bed lamp --n-points 64 --depth 1 --num-groups 8 --group-size 8"
words += " --device cpu --steps 1 --batch-size 4 --validate-every 0 --save-every 0 --out"
sys.exit(main([*words.split(), sys.argv[1]]))
"""


def test_a_launch_that_starts_fewer_processes_says_so(tmp_path):
    path = tmp_path / "launch.py"
    path.write_text(LAUNCH)
    words = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", *words, str(path), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "this run works with 1 of the processes that were wanted (accelerate" in done.stdout
    assert "torchrun --standalone --nproc-per-node N" in done.stdout
    assert json.loads((tmp_path / "run" / "record.json").read_text())["processes"] == 1


def test_a_launch_that_starts_all_says_nothing(both):
    (_, one), (_, two) = both("StandardTransformer")
    assert not any("processes that were wanted" in line for line in one["said"] + two["said"])
