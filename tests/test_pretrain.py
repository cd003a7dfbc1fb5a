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
from warm import Command, Launch, script

from unipre3d.cli import main
from unipre3d.recipes import load_run, recipes
from unipre3d.runs.checkpoint import load_tensors
from unipre3d.runs.recipe import change
from unipre3d.tasks.pretrain import PretrainRecipe

SMALL = [
    "--steps",
    "10",
    "--batch-size",
    "4",
    "--picture-every",
    "5",
    "--validate-every",
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


def finish(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    return out


def launched(world, path, *words):
    "What a script in several processes printed."
    run = Launch(world, path, *words, entry=script)
    try:
        said, errors = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 0, errors[-6000:]
    return said


def column(folder, name):
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def run_here(*args):
    "The command in this process, with one thread as in `Command`, where no other process is needed."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([str(a) for a in args]) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted run."
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_here("pretrain", *SMALL, "--out", folder)
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
    process = Command("pretrain", *SMALL, "--out", folder)
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
    run_here("pretrain", "--resume", "--out", folder)
    for name in ("loss", "grad_norm", "psnr", "lr", "val_psnr"):
        assert column(folder, name) == column(whole, name), name
    ours, full = (
        load_tensors(folder / "checkpoint.safetensors")[0],
        load_tensors(whole / "checkpoint.safetensors")[0],
    )
    assert all(torch.equal(ours[k], full[k]) for k in full)


def test_another_seed_is_another_run(whole, tmp_path):  # the same seed is the same run: see above
    run_here("pretrain", *SMALL, "--steps", "3", "--seed", "1", "--out", tmp_path / "other")
    assert column(tmp_path / "other", "loss")[0] != column(whole, "loss")[0]


TWO = """
import os, signal, sys, torch
from pathlib import Path
import unipre3d.runs.fit as loop, unipre3d.runs.run as runner
from unipre3d.processes import leave_processes
from unipre3d.recipes import recipes
from unipre3d.runs.recipe import change

folder, again = Path(sys.argv[1]), sys.argv[2:] == ["again"]
small = dict(steps=4, batch_size=4, n_points=256, resolution=32, workers=0, image="rgb")
small |= dict(picture_every=9, validate_every=9)
recipe = change(recipes["object-transformer-mini"], **small)
seen, calls, train, take_step = {}, [], runner.fit, loop.take_step

def interrupt(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2 and not again:
        os.kill(os.getpid(), signal.SIGINT)  # one of the two, before its second step ends
    return take_step(*args)

def spy(task, *args, **kw):
    done = train(task, *args, **kw)
    seen.update({k: v.clone() for k, v in task.model.state_dict().items()})
    return done

loop.take_step, runner.fit = interrupt, spy
runner.run_recipe("object-transformer-mini", recipe, folder, resume=again, device="cpu")
kept = [k for k in sorted(seen) if "running" not in k and "num_batches" not in k]
flat = torch.cat([seen[k].flatten().float() for k in kept])
both = [torch.empty_like(flat) for _ in range(2)]
torch.distributed.all_gather(both, flat)
assert torch.equal(*both), "the processes drifted apart"
print(f"process {os.environ['RANK']}: {len(calls)} steps, equal weights")
leave_processes()
"""


def test_several_processes_stop_together_go_on_and_hold_the_same_weights(tmp_path):
    path, folder = tmp_path / "two.py", tmp_path / "run"
    path.write_text(TWO)

    def launch(*more):
        said = launched(2, path, folder, *more)
        for rank in (0, 1):
            assert f"process {rank}: 2 steps, equal weights" in said
        return said

    assert "stopped after step 2 of 4" in launch()
    assert column(folder, "step") == ["1", "2"] and not (folder / "record.json").exists()
    launch("again")
    assert column(folder, "step") == ["1", "2", "3", "4"]
    record = json.loads((folder / "record.json").read_text())
    assert record["processes"] == 2 and record["resumed"]


def test_a_run_can_be_loaded_and_rendered(whole, capsys):
    recipe, model, classes = load_run(whole)
    assert recipe.run.steps == 10 and not model.training and classes == []
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
        (["pretrain", "--validate-every", "-1", "--out", folder / "a"], "validate_every"),
        (["pretrain", "--schedule", "odd", "--out", folder / "a"], "schedule"),
        (["render", folder / "a", "--frames", "0"], "--frames"),
        (["finetune", "cls-furniture-mini", "--steps", "0", "--out", folder / "a"], "steps"),
        (["finetune", "cls-furniture-mini", "--n-points", "-3", "--out", folder / "a"], "n_points"),
        (["pretrain", "--device", "cuda", "--out", folder / "a"], "device"),
        (["pretrain", "--background", "255", "255", "255", "--out", folder / "a"], "background"),
        (["pretrain", "--ema", "2", "--out", folder / "a"], "ema"),
        (["pretrain", "--colour", "0", "--out", folder / "a"], "terms"),
        (["pretrain", "--ssim", "-1", "--out", folder / "a"], "terms.ssim"),
        (["pretrain", "--model.backbone-options.deep", "3"], "--model.backbone-options.deep"),
        (["finetune", "cls-furniture-mini", "--ema", "1", "--out", folder / "a"], "ema"),
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
    "device, gpu, gsplat, where, scene",
    [
        ("auto", True, False, "cpu", "gaussians"),
        ("auto", True, False, "auto", "volume"),  # which gsplat does not render
        ("auto", True, True, "auto", "gaussians"),
        ("auto", False, False, "auto", "gaussians"),
        ("cpu", True, True, "cpu", "gaussians"),
    ],
)
def test_a_gpu_without_its_renderer_is_left_aside_and_this_is_said(
    monkeypatch, device, gpu, gsplat, where, scene
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: gsplat or None)
    found, because = change(PretrainRecipe(), scene=scene).choose_device(device)
    assert found == where and ("pip install" in because) == (where != device)


def test_help_names_every_command_and_recipe(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("pretrain", "render", "data", "doctor", *recipes))
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "--help"])
    assert end.value.code == 0 and "--run.batch-size" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["unipre3d", "unipre3d.cli"])
def test_the_package_and_its_module_are_the_command(module):
    words = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("unipre3d 0."), done.stderr


def test_options_of_a_backbone_are_typed_and_have_help(capsys):
    with pytest.raises(SystemExit) as end:
        main("pretrain object-transformer --model.backbone-options.depth 12 --help".split())
    said = capsys.readouterr().out
    assert end.value.code == 0 and "--model.backbone-options.depth INT" in said
    assert main("pretrain object-transformer --depth twelve".split()) == 2
    said = capsys.readouterr().err
    assert "backbone-options.depth" in said and len(said.splitlines()) == 1


def test_a_step_schedule_changes_the_rate_of_a_fine_tuning(tmp_path):
    words = "finetune cls-furniture-mini --classes bed lamp --n-points 64 --device cpu".split()
    words += "--steps 4 --batch-size 4 --lr .008 --warmup 0 --validate-every 0".split()
    words += "--schedule step --decay-every 2 --decay .5 --depth 1 --num-groups 8".split()
    assert main([*words, "--group-size", "8", "--out", str(tmp_path / "run")]) == 0
    rates = [float(value) for value in column(tmp_path / "run", "lr")]
    assert rates == pytest.approx([0.008, 0.008, 0.004, 0.004])


EVALUATION = """
import json, sys, torch
from unipre3d.data.loading import eval_loader
from unipre3d.data.readers import Subset
from unipre3d.data.samples import CloudSamples, ViewSamples
from unipre3d.data.shapenet import ShapeNetViews
from unipre3d.backbones import PointNet2
from unipre3d.image import rgb_features
from unipre3d.recipes import recipes
from unipre3d.runs.fit import new_accelerator, processes
from unipre3d.runs.recipe import change
from unipre3d.tasks.classification import ClassificationModel, class_probabilities, evaluate_classes
from unipre3d.tasks.pretrain import constant_baselines, evaluate

new_accelerator(device="cpu")
rank, world = processes()
recipe = change(recipes["object-transformer-mini"], image="rgb")
options = recipe.model.backbone_options | dict(num_groups=16, depth=1)
model = change(recipe, backbone_options=options).build_predictor(3)
reader = Subset(ShapeNetViews(split="val", size=32), range(7))
views = ViewSamples(reader, n_points=128, n_ref=1, n_target=2)
batches = lambda: eval_loader(views, batch_size=2, rank=rank, world_size=world)
scores = evaluate(model, rgb_features, batches()) | constant_baselines(batches)
torch.manual_seed(0)
net2 = dict(centres=(16, 8), radii=(0.3, 0.6), neighbours=(8, 8), widths=((8, 16), (16, 16), (16, 32)))
classifier = ClassificationModel(PointNet2(**net2, decoder_widths=((16,), (16,), (16,))), len(reader.classes))
clouds = CloudSamples(reader, n_points=64)
probabilities, labels = class_probabilities(classifier, clouds, batch_size=3)
found = evaluate_classes(classifier, clouds, batch_size=3)
found["confusion"] = found["confusion"].tolist()
found = dict(world=world, scores=scores, classes=found, probabilities=probabilities.tolist(), labels=labels.tolist())
with open(f"{sys.argv[1]}/{world}-{rank}.json", "w") as file:
    json.dump(found, file)
"""


def test_scores_of_two_processes_are_those_of_one(tmp_path):
    path = tmp_path / "evaluation.py"
    path.write_text(EVALUATION)
    for world in (1, 2):
        launched(world, path, tmp_path)
    one, first, second = (
        json.loads((tmp_path / f"{k}.json").read_text()) for k in ("1-0", "2-0", "2-1")
    )
    assert (one.pop("world"), first.pop("world"), second.pop("world")) == (1, 2, 2)
    assert first == second  # every process has the scores of all
    assert one["labels"] == first["labels"] and len(one["labels"]) == 7
    assert one["scores"]["clouds"] == 7 and one["scores"]["images"] == 14
    assert one["scores"] == pytest.approx(first["scores"], rel=1e-5)
    assert one["classes"]["confusion"] == first["classes"]["confusion"]
    assert one["classes"]["oa"] == pytest.approx(first["classes"]["oa"])
    assert one["classes"]["macc"] == pytest.approx(first["classes"]["macc"])
    close = torch.allclose
    assert close(
        torch.tensor(one["probabilities"]), torch.tensor(first["probabilities"]), atol=1e-5
    )
