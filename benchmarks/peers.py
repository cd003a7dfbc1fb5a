"""What the peers of splatting cost, and how they begin: scenes on objects, masked blocks on rooms.

    python benchmarks/peers.py [--repeats 12] [--steps 100] [--only KIND] [--json PATH]

One thread. On objects everything but the kind of scene is equal, the network, the rate and the seed too. Steps of all
kinds alternate, and a time is the median of the processor time of a step without the optimiser. Then each kind of
scene is trained for some steps of a few objects and scored on whole held-out views. The recipe of rooms by pictures
reads one room a step, the masked one two crops: each as it is.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import write_record

from unipre3d.recipes import recipes
from unipre3d.runs.recipe import change, value_of
from unipre3d.runs.run import run_recipe

CLOUDS = 8  # objects of a step
VOLUME = ("rays", "corners", "ray_samples", "finer_samples")
ROOMS = {
    "by pictures": "scene-sparseunet-mini",
    "masked blocks": "masked-rooms-mini",
    "two views": "contrast-rooms-mini",
}


def of_objects():
    "The recipes of objects: three kinds of scenes, all else equal."
    base = change(recipes["object-attention-mini"], workers=0, batch_size=CLOUDS)
    volume = {name: value_of(recipes["object-volume-mini"], name) for name in VOLUME}
    return {
        "gaussians": change(base, scene="gaussians"),
        "volume": change(base, scene="volume", **volume),
        "attention": base,
    }


class Step:
    "A training step of a recipe but for the optimiser."

    def __init__(self, recipe):
        self.task = recipe.build_task()
        self.model = self.task.model.train()
        clouds = range(recipe.run.batch_size)
        self.batch = self.task.samples.batch([(i, 0) for i in clouds])

    def __call__(self):
        "Loss and backward."
        loss, _ = self.task.loss(self.model, self.batch)
        loss.backward()
        for p in self.model.parameters():
            p.grad = None


def seconds(given, repeats):
    "Median processor time of a step of each recipe, in alternation; the first of each does not count."
    steps = {name: Step(recipe) for name, recipe in given.items()}
    taken = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            taken[name].append(time.process_time() - start)
    return {name: round(float(np.median(times[1:])), 4) for name, times in taken.items()}


def scores(recipe, steps):
    "What a short run of a recipe scores on whole held-out views."
    values = dict(steps=steps, warmup=steps // 10, validate_every=0, save_every=0, picture_every=0)
    with tempfile.TemporaryDirectory() as home:
        done = run_recipe("peer", change(recipe, **values), Path(home) / "run", device="cpu")
    names = ("psnr", "psnr_foreground", "ssim", "mean_image_psnr")
    return {name: round(done.record["metrics"][name], 4) for name in names}


def begun(path, facts):
    "What an earlier sitting has measured with the same numbers of steps; nothing where there was none."
    if path is None or not Path(path).exists():
        return {}
    record = json.loads(Path(path).read_text())
    if any(record[name] != value for name, value in facts.items()):
        return {}
    return {part: record[part] for part in ("objects", "rooms")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", default="", help="kinds of scenes to train whose name holds this")
    parser.add_argument(
        "--json", help="where to write the record; what stands there is not repeated"
    )
    args = parser.parse_args()
    if min(args.repeats, args.steps) < 1:
        parser.error(f"--repeats, --steps: expected at least 1, got {args.repeats}, {args.steps}")
    torch.set_num_threads(1)
    objects = of_objects()
    rooms = {name: change(recipes[recipe], workers=0) for name, recipe in ROOMS.items()}
    facts = dict(repeats=args.repeats, steps=args.steps, clouds=CLOUDS, threads=1)
    found = begun(args.json, facts)
    for part, given in (("objects", objects), ("rooms", rooms)):
        if part not in found:
            times = seconds(given, args.repeats)
            found[part] = {name: {"seconds a step": own} for name, own in times.items()}
    for name, recipe in objects.items():
        if args.only in name and "psnr" not in found["objects"][name]:
            found["objects"][name] |= scores(recipe, args.steps)
        print(name, json.dumps(found["objects"][name]), flush=True)
        write_record(args.json, **found, **facts)


if __name__ == "__main__":
    main()
