"""What a training step costs with a volume renderer (NeRF, as in Ponder) and with Gaussians: time and memory.

    python benchmarks/volume.py [--repeats 12] [--only NAME] [--json PATH]

Both kinds have the same backbone, data and views, and one thread. Steps alternate; the ratio of each pair of
neighbouring steps counts, and its interval is Student's over the logarithms. Memory is the growth of the peak of a
process of its own, over a step, three times.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time

import numpy as np
import torch
from common import write_record
from scipy import stats

from unipre3d.recipes import recipes
from unipre3d.runs.recipe import change

OBJECTS = dict(recipe="object-transformer-mini", values=dict(workers=0, n_target=4))
ROOMS = dict(recipe="scene-sparseunet-mini", values=dict(workers=0, n_ref=2, n_target=2))
PONDER = dict(rays=256, ray_samples=96, finer_samples=36)
SETTINGS = {
    "objects, 64 pixels: all pixels of both, 24 + 12 samples": OBJECTS
    | dict(clouds=2, volume=dict(rays=64 * 64, ray_samples=24, finer_samples=12)),
    "objects, 64 pixels: all pixels of both, 96 + 36 samples": OBJECTS
    | dict(clouds=1, volume=dict(rays=64 * 64, ray_samples=96, finer_samples=36)),
    "objects, 64 pixels: whole images beside 256 rays, 96 + 36 samples": OBJECTS
    | dict(clouds=8, volume=PONDER),
    "objects, 64 pixels: whole images beside 64 rays, 24 + 12 samples": OBJECTS
    | dict(clouds=24, volume=dict(rays=64, ray_samples=24, finer_samples=12)),
    "rooms, 80 x 60 pixels: whole images beside 256 rays, 96 + 36 samples": ROOMS
    | dict(clouds=1, volume=PONDER),
    "rooms, 160 x 120 pixels: whole images beside 256 rays, 96 + 36 samples, 64^3 corners": ROOMS
    | dict(clouds=1, volume=PONDER | dict(corners=64, lattice_width=32), resolution=120),
}


class Step:
    "A step of one kind: forward, loss and backward, whole, or of head and renderer alone."

    def __init__(self, setting, kind):
        torch.manual_seed(0)
        given = SETTINGS[setting]
        values = given["values"] | (
            given["volume"] | {"scene": "volume"} if kind == "volume" else {}
        )
        if "resolution" in given:
            values["resolution"] = given["resolution"]
        self.task = change(recipes[given["recipe"]], **values).build_task()
        self.model = self.task.model.train()
        self.batch = self.task.samples.batch([(i, 0) for i in range(given["clouds"])])
        self.features = None
        self.model.head.register_forward_pre_hook(self.keep)

    def keep(self, module, inputs):
        "Features of the points, without what they came from."
        (points,) = inputs
        self.features = points.with_feat(points.feat.detach().requires_grad_())

    def whole(self):
        "A training step but for the optimiser."
        loss, _ = self.task.loss(self.model, self.batch)
        loss.backward()
        self.clear()

    def head(self):
        "The same from the features of the points on, and back to them."
        if self.features is None:
            self.whole()
        features = self.features
        body, self.model.forward = self.model.forward, lambda *inputs: self.model.head(features)
        loss, _ = self.task.loss(self.model, self.batch)
        loss.backward()
        self.model.forward = body
        self.clear()

    def clear(self):
        for p in self.model.parameters():
            p.grad = None


def seconds(act):
    "Processor time of a call; other programs disturb it less than wall time."
    start = time.process_time()
    act()
    return time.process_time() - start


def ratio(first, second):
    "Geometric mean of the ratios of neighbours, and its interval."
    logs = np.log(np.array(first) / np.array(second))
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    return [round(float(np.exp(logs.mean() + k * half)), 2) for k in (0, -1, 1)]


def times(setting, repeats):
    "Medians of a step of both kinds, and their ratios."
    steps = {kind: Step(setting, kind) for kind in ("gaussians", "volume")}
    found = {}
    for part in ("whole", "head"):
        own = {kind: [] for kind in steps}
        for number in range(repeats + 1):
            for kind, step in steps.items():
                taken = seconds(getattr(step, part))
                if number:
                    own[kind].append(taken)
        found[part] = {kind: round(float(np.median(t)), 4) for kind, t in own.items()}
        found[part]["ratio"] = ratio(own["volume"], own["gaussians"])
    return found


def held_mb(name):
    "Memory of this process: VmRSS now, or VmHWM at its peak."
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[name].split()[0]) / 1024


def peak_growth(setting, kind):
    "MB by which a step raises the peak of this process."
    step = Step(setting, kind)
    step.whole()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the first step has freed is no longer held
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is now what is held
    before = held_mb("VmRSS")
    step.whole()
    return held_mb("VmHWM") - before


def memory(setting, rounds=3):
    "Peaks of both kinds, each in processes of its own."
    found = {"gaussians": [], "volume": []}
    for _ in range(rounds):
        for kind, own in found.items():
            words = [sys.executable, __file__, "--peak", setting, kind]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{setting}: {done.stderr.strip().splitlines()[-1]}")
            own.append(float(done.stdout.split()[-1]))
    row = {kind: round(float(np.median(own)), 1) for kind, own in found.items()}
    return row | {"ratio": ratio(found["volume"], found["gaussians"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--json", help="where to write the record")
    parser.add_argument("--peak", nargs=2, help="setting and kind: print the growth in MB")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats: expected at least 2, for an interval, got {args.repeats}")
    torch.set_num_threads(1)
    if args.peak:
        print(peak_growth(*args.peak))
        return
    rows = {}
    for setting in SETTINGS:
        if args.only not in setting:
            continue
        rows[setting] = times(setting, args.repeats) | {"memory_mb": memory(setting)}
        print(setting, json.dumps(rows[setting]), flush=True)
        write_record(args.json, settings=rows, repeats=args.repeats, threads=1)


if __name__ == "__main__":
    main()
