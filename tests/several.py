"""Train every backbone and every task for a few steps, in as many processes as there are, and keep what came out.

    torchrun --standalone --nproc-per-node 2 tests/several.py FOLDER [CASE ...]

The first process keeps of each case: losses of each step, gradients and buffers of the first, scores at the end. Draws
that depend on the process are off: dropout, drop path, the order of PTv3's curves. So is the Lovász loss, which is no
ratio of sums.
"""

import csv
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}

import torch

import unipre3d.runs.fit as loop
import unipre3d.tasks.pretrain as pretrain
from unipre3d.processes import leave_processes
from unipre3d.recipes import finetune_recipes, recipes
from unipre3d.runs.checkpoint import save_tensors
from unipre3d.runs.recipe import change
from unipre3d.runs.run import run_recipe

STEPS = 3
BUILD_VIEWS = pretrain.build_views
SHORT = dict(steps=STEPS, warmup=20, batch_size=4, workers=0, save_every=0)
OBJECTS = SHORT | dict(n_points=160, resolution=16, n_target=2, image="rgb", picture_every=0)
GROUPS = dict(num_groups=8, group_size=8, depth=2, encoder_widths=(8, 16, 16), width=16)
TRANSFORMER = GROUPS | dict(encoder_dims=16, num_heads=2, drop_path_rate=0.0)
UNET = dict(base_channels=8, channels=(8, 8, 8, 8), layers=(1, 1, 1, 1))
POINTMLP = dict(embed_width=8, decoder_widths=(16, 16, 16, 16))
CURVES = dict(drop_path=0.0, shuffle_orders=False)
BACKBONES = {
    "StandardTransformer": ("transformer", TRANSFORMER),
    "PointNet2": ("pointnet2", dict(centres=(24, 8), radii=(0.3, 0.6), neighbours=(8, 8))),
    "PointMLP": ("pointmlp", POINTMLP),
    "PCM": ("pcm", dict(embed_dim=16, prompt_width=16, out_channels=16, drop_path_rate=0.0)),
    "Mamba3D": ("mamba3d", GROUPS | dict(drop_path_rate=0.0)),
    "SparseUNet": ("sparseunet", UNET | dict(voxel_size=0.15)),
    "PTv3": ("ptv3", dict(voxel_size=0.15, enc_patch_size=16, dec_patch_size=16) | CURVES),
}
LABELS = SHORT | dict(
    batch_size=8, classes=("bed", "lamp"), n_points=128, dropout=0.0, validate_every=0
)
ROOMS = SHORT | dict(rooms=3, n_points=1500)
VOXELS = dict(backbone_options=UNET | dict(voxel_size=0.2))
SCENE_VALUES = dict(terms=dict(colour=1.0, depth=1.0), resolution=24, n_ref=2, n_target=2)
SCENE_VALUES |= dict(image="rgb", batch_size=2, picture_every=0)


def cases():
    "A recipe for each backbone and for each task."
    found = {}
    for name, (recipe, options) in BACKBONES.items():
        recipe = recipes[f"object-{recipe}-mini"]
        found[name] = change(
            recipe, **OBJECTS, backbone_options=recipe.model.backbone_options | options
        )
    rooms = recipes["scene-sparseunet-mini"]
    found["rooms"] = change(rooms, **ROOMS | SCENE_VALUES | VOXELS)
    plain = dict(backbone_options=TRANSFORMER)
    found["classification"] = change(finetune_recipes["cls-furniture-mini"], **LABELS | plain)
    found["parts"] = change(finetune_recipes["part-furniture-mini"], **LABELS | plain)
    for name, recipe in (("semantic", "sem-rooms-mini"), ("instances", "inst-rooms-mini")):
        values = ROOMS | VOXELS | dict(lovasz=0.0, votes=0)
        found[name] = change(finetune_recipes[recipe], **values)
    hidden = SHORT | dict(batch_size=8, source="furniture", classes=("bed", "lamp"), n_points=128)
    found["masked"] = change(recipes["masked-shapes-mini"], **hidden | plain)
    return found


def few_views(recipe, split):
    "The samples of a split; seven held-out clouds are enough, and no even number."
    samples = BUILD_VIEWS(recipe, split)
    if split != "train":
        samples.places = samples.places[:7]
    return samples


def watched(kept):
    "`take_step` that also keeps buffers and gradients of the first step; torch has averaged these over the processes."
    take_step = loop.take_step

    def step(loss, model, optimizer, accelerator, clip):
        usual = accelerator.clip_grad_norm_
        for name, buffer in model.named_buffers():
            kept.setdefault(f"buffer/{name.removeprefix('module.')}", buffer.float().clone())

        def clipped(parameters, largest):
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:  # of the first step
                    name = name.removeprefix("module.")
                    kept.setdefault(f"gradient/{name}", parameter.grad.clone())
            return usual(model.parameters(), largest)

        accelerator.clip_grad_norm_ = clipped
        try:
            return take_step(loss, model, optimizer, accelerator, clip)
        finally:
            accelerator.clip_grad_norm_ = usual

    return step


def curve(path):
    "The rows of a curve without its clock."
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if name not in ("seconds", "lr") and rows[0][name]]
    return [{name: float(row[name]) for name in columns if row[name]} for row in rows]


def train(name, recipe, folder):
    "Run one case; what came out, in the first process."
    usual, tensors = loop.take_step, {}
    build_task = type(recipe).build_task

    def build(self, device="cpu"):
        task = build_task(self, device)
        torch.manual_seed(0)
        for key, parameter in task.model.named_parameters():
            if key.endswith("bias"):  # a constant channel must not lie on the edge of a ReLU
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        return task

    loop.take_step, type(recipe).build_task = watched(tensors), build
    try:
        said = []
        done = run_recipe(name, recipe, folder / name, device="cpu", say=said.append)
    finally:
        loop.take_step, type(recipe).build_task = usual, build_task
    if done.record is None:
        return
    meta = dict(curve=curve(folder / name / "metrics.csv"), said=said)
    meta |= dict(scores=done.record["metrics"], processes=done.record["processes"])
    save_tensors(folder / f"{name}.safetensors", tensors, meta)


def main(folder, names):
    "All cases, or some."
    folder.mkdir(parents=True, exist_ok=True)
    pretrain.build_views = few_views
    for name, recipe in cases().items():
        if not names or name in names:
            train(name, recipe, folder)
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
