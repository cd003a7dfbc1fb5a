"""The training loop as a user meets it: stopped with Ctrl-C, resumed, run by several processes, refused."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from unipre3d.cli import main
from unipre3d.pretrain import load_tensors
from unipre3d.recipes import load_run, pretraining_device, recipes

SMALL = [
    "--steps",
    "10",
    "--batch-size",
    "4",
    "--picture-every",
    "5",
    "--eval-every",
    "5",
    "--save-every",
    "4",
    "--n-points",
    "256",
    "--resolution",
    "32",
    "--backbone-options.depth",
    "1",
    "--backbone-options.num-groups",
    "16",
]


def command(*args):
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from unipre3d.cli import main; sys.exit(main())",
            *map(str, args),
        ],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    return out


def column(folder, name):
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted run."
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finish(command("pretrain", *SMALL, "--out", folder))
    return folder


def test_a_run_leaves_what_it_promises(whole):
    assert {p.name for p in whole.iterdir()} == {
        "config.json",
        "metrics.csv",
        "checkpoint.safetensors",
        "resume.safetensors",
        "views.png",
        "record.json",
    }
    record = json.loads((whole / "record.json").read_text())
    assert (
        record["metrics"]["images"] == record["data"]["val"] * record["values"]["n_target"]
    )  # the whole split, not a part
    assert (
        record["steps"] == 10
        and record["values"]["batch_size"] == 4
        and len(record["data"]["sha256"]) == 64
    )
    assert (
        column(whole, "step") == [str(s) for s in range(1, 11)]
        and column(whole, "val_psnr")[4]
        and not column(whole, "val_psnr")[0]
    )


def test_interrupted_and_resumed_equals_uninterrupted(whole, tmp_path):
    folder = tmp_path / "parts"
    process = command("pretrain", *SMALL, "--out", folder)
    for _ in range(1200):
        time.sleep(0.1)
        if process.poll() is not None:
            break
        if (folder / "metrics.csv").exists() and len(column(folder, "step")) >= 3:
            os.killpg(process.pid, signal.SIGINT)
            break  # a terminal sends it to the loader workers too
    out = finish(process, 130)
    assert f"--resume --out {folder}" in out  # it says how to go on
    done = len(column(folder, "step"))
    assert 3 <= done < 10 and not (folder / "record.json").exists()
    finish(command("pretrain", "--resume", "--out", folder))
    for name in ("loss", "grad_norm", "psnr", "lr", "val_psnr"):
        assert column(folder, name) == column(whole, name), name
    ours, full = (
        load_tensors(folder / "checkpoint.safetensors")[0],
        load_tensors(whole / "checkpoint.safetensors")[0],
    )
    assert all(torch.equal(ours[k], full[k]) for k in full)


def test_another_seed_is_another_run(whole, tmp_path):  # the same seed is the same run: see above
    finish(command("pretrain", *SMALL, "--steps", "3", "--seed", "1", "--out", tmp_path / "other"))
    assert column(tmp_path / "other", "loss")[0] != column(whole, "loss")[0]


TWO = """
import os, signal, sys, torch
from dataclasses import replace
from pathlib import Path
import unipre3d.pretrain, unipre3d.recipes as r

folder, again = Path(sys.argv[1]), sys.argv[2:] == ["again"]
recipe = replace(r.recipes["object-transformer-mini"], steps=4, batch_size=4, n_points=256, resolution=32, workers=0, picture_every=9, eval_every=9)
seen, calls, train, take_step = {}, [], r.train, unipre3d.pretrain.take_step

def interrupt(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2 and not again: os.kill(os.getpid(), signal.SIGINT)      # one of the two, before its second step ends
    return take_step(*args)

def spy(model, *args, **kw):
    done = train(model, *args, **kw)
    seen.update({k: v.clone() for k, v in model.state_dict().items()})
    return done

unipre3d.pretrain.take_step, r.train = interrupt, spy
r.pretrain("object-transformer-mini", recipe, folder, resume=again, device="cpu")
flat = torch.cat([v.flatten().float() for k, v in sorted(seen.items()) if "running" not in k and "num_batches" not in k])
both = [torch.empty_like(flat) for _ in range(2)]
torch.distributed.all_gather(both, flat)
assert torch.equal(*both), "the processes drifted apart"
print(f"process {os.environ['RANK']}: {len(calls)} steps, equal weights")
"""


def test_several_processes_stop_together_go_on_and_hold_the_same_weights(tmp_path):
    script, folder = tmp_path / "two.py", tmp_path / "run"
    script.write_text(TWO)

    def launch(*more):
        words = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(script),
            str(folder),
            *more,
        ]
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-6000:]
        for rank in (0, 1):
            assert f"process {rank}: 2 steps, equal weights" in done.stdout
        return done.stdout

    assert "stopped after step 2 of 4" in launch()
    assert column(folder, "step") == ["1", "2"] and not (folder / "record.json").exists()
    launch("again")
    assert column(folder, "step") == ["1", "2", "3", "4"]
    record = json.loads((folder / "record.json").read_text())
    assert record["processes"] == 2 and record["resumed"]


def test_a_run_can_be_loaded_and_rendered(whole, capsys):
    recipe, model, image_net = load_run(whole)
    assert recipe.steps == 10 and not model.training
    assert main(["render", str(whole), "--frames", "3", "--size", "48"]) == 0
    from PIL import Image
    from unipre3d.gaussians import load_ply

    assert Image.open(whole / "film-val-0.gif").n_frames == 3
    assert len(load_ply(whole / "gaussians-val-0.ply")) == 16


def mistakes(folder):
    "Command lines that are wrong, and what the one line must name."
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("x")
    (folder / "broken").mkdir()
    (folder / "broken" / "checkpoint.safetensors").write_bytes(b"not tensors")
    return [
        (["fly"], "fly"),
        (["pretrain", "object-unicorn"], "object-unicorn"),
        (["pretrain", "--stepz", "3"], "--stepz"),
        (["pretrain", "--steps", "many"], "many"),
        (["pretrain", "--out", folder / "full"], "full"),
        (["pretrain", "--resume", "--out", folder / "nowhere"], "nowhere"),
        (["pretrain", "--data", folder / "nowhere"], "nowhere"),
        (["pretrain", "--backbone", "Unicorn", "--out", folder / "a"], "Unicorn"),
        (["pretrain", "--fusion", "Unicorn", "--out", folder / "a"], "Unicorn"),
        (["pretrain", "object-transformer", "--out", folder / "a"], "--data"),
        (["render"], "checkpoint"),
        (["render", folder / "nowhere"], "nowhere"),
        (["render", folder / "broken"], "broken"),
        (["data", "wardrobe"], "wardrobe"),
        (["data", "furniture", "--deb", folder / "nowhere.deb"], "nowhere.deb"),
        (["doctor", "--loud"], "--loud"),
        (["pretrain", "--image", "none", "--out", folder / "a"], "--fusion NoFusion"),
        (["pretrain", "--n-ref", "0", "--out", folder / "a"], "n_ref"),
        (["pretrain", "--n-target", "0", "--out", folder / "a"], "n_target"),
        (["pretrain", "--batch-size", "0", "--out", folder / "a"], "batch_size"),
        (["pretrain", "--n-points", "-3", "--out", folder / "a"], "n_points"),
        (["pretrain", "--steps", "0", "--out", folder / "a"], "steps"),
        (["pretrain", "--eval-every", "-1", "--out", folder / "a"], "eval_every"),
        (["pretrain", "--schedule", "odd", "--out", folder / "a"], "schedule"),
        (["render", folder / "a", "--frames", "0"], "--frames"),
        (["finetune", "cls-furniture-mini", "--steps", "0", "--out", folder / "a"], "steps"),
        (["finetune", "cls-furniture-mini", "--n-points", "-3", "--out", folder / "a"], "n_points"),
        (["pretrain", "--device", "cuda", "--out", folder / "a"], "device"),
    ]


def test_a_mistake_is_one_line_that_names_it(tmp_path, capsys):
    for args, name in mistakes(tmp_path):
        status = main([str(a) for a in args])
        said = capsys.readouterr().err.strip()
        assert status == 2, (args, said)
        assert len(said.splitlines()) == 1 and name in said and said.startswith("unipre3d: "), (
            args,
            said,
        )
    assert not (tmp_path / "a").exists()  # nothing was begun


@pytest.mark.parametrize(
    "device, gpu, gsplat, where",
    [
        ("auto", True, False, "cpu"),
        ("auto", True, True, "auto"),
        ("auto", False, False, "auto"),
        ("cpu", True, True, "cpu"),
    ],
)
def test_a_gpu_without_its_renderer_is_left_aside_and_this_is_said(
    monkeypatch, device, gpu, gsplat, where
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: gsplat or None)
    found, because = pretraining_device(device)
    assert found == where and ("pip install" in because) == (where != device)


def test_help_names_every_command_and_recipe(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("pretrain", "render", "data", "doctor", *recipes))
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "--help"])
    assert end.value.code == 0 and "--batch-size" in capsys.readouterr().out
