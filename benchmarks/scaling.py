"""Where the time of a training step goes, and how it grows with points, Gaussians, views and pixels.

    python benchmarks/scaling.py [--repeats 7] [--json data/records/benchmark_scaling.json]

Everything is processor time of one thread, which other programs disturb least; medians count. The clouds are sixteen
embedded objects, or one composed room. Decoded images and maps of the image model are cached; the first two steps,
which fill the caches, are not counted. Growth is a line through the logarithms: a slope of 1 means twice the time for
twice as much.
"""

import argparse
import statistics
import time
from collections import defaultdict

import numpy as np
import torch
from common import write_record
from tqdm import tqdm

from unipre3d import objective
from unipre3d.recipes import recipes
from unipre3d.runs.recipe import change
from unipre3d.tasks import pretrain

CLOUDS = 16
OBJECT = change(
    recipes["object-transformer-mini"], workers=0, batch_size=CLOUDS, n_points=1024, n_target=4
)
ROOM = change(recipes["scene-sparseunet-mini"], workers=0, rooms=3)
WIDTHS = OBJECT.model.backbone_options
AXES = {
    "points": {n: dict(n_points=n) for n in (256, 512, 1024, 2048, 4096)},
    "Gaussians": {
        n: dict(backbone_options=WIDTHS | dict(num_groups=n)) for n in (32, 64, 128, 256)
    },
    "views": {n: dict(n_target=n) for n in (1, 2, 4, 8, 16)},
    "pixels": {n * n: dict(resolution=n) for n in (32, 64, 96, 128)},
}


class Clock:
    "Processor time of named parts; a part inside another is not counted twice."

    def __init__(self):
        self.seconds = defaultdict(float)
        self.open = []

    def timed(self, name, function):
        "The function, its time counted."

        def call(*args, **kwargs):
            start = time.process_time()
            self.open.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.process_time() - start
                inside = self.open.pop()
                self.seconds[name] += taken - inside
                if self.open:
                    self.open[-1] += taken

        return call

    def watch(self, owner, attribute, name):
        "From now on calls of owner.attribute count as a part."
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))


def steps_of(recipe, clock=None):
    "A call that makes one training step on the same clouds."
    torch.manual_seed(0)
    clock = clock or Clock()
    build, draw = pretrain.cached_image_net, objective.draw_scene

    def timed_image_net(model):
        net = build(model)
        call = clock.timed("image model", net)
        call.width = net.width
        return call

    pretrain.cached_image_net = timed_image_net
    try:
        task = recipe.build_task()
    finally:
        pretrain.cached_image_net = build
    model = task.model.train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for part in ("stem", "body"):
        clock.watch(model.backbone, part, part)
    for part in ("early", "late"):
        clock.watch(model.fusion, part, "fusion")
    clock.watch(model.head, "forward", "head")
    clouds = range(min(recipe.run.batch_size, len(task.samples)))
    load = clock.timed("loading", lambda epoch: task.samples.batch([(i, epoch) for i in clouds]))
    score = clock.timed("loss and the rest of the forward pass", task.loss)
    count = 0

    def step():
        nonlocal count
        count += 1
        objective.draw_scene = clock.timed("renderer", draw)
        try:
            loss, _ = score(model, load(count % 2))
        finally:
            objective.draw_scene = draw
        clock.timed("backward", loss.backward)()
        clock.timed("optimiser", adamw.step)()
        adamw.zero_grad()

    return step


def parts(recipe, repeats):
    "Median seconds of each part of a step."
    clock = Clock()
    step = steps_of(recipe, clock)
    step(), step()
    rows = defaultdict(list)
    for _ in range(repeats):
        clock.seconds.clear()
        step()
        for name, seconds in clock.seconds.items():
            rows[name].append(seconds)
    return {name: round(statistics.median(own), 4) for name, own in rows.items()}


def growth(axis, settings, repeats, bar):
    "Median seconds of a step for each size, and the slope of their logarithms."
    steps = {size: steps_of(change(OBJECT, **values)) for size, values in settings.items()}
    taken = {size: [] for size in steps}
    for number in range(repeats + 2):
        for size, step in steps.items():
            start = time.process_time()
            step()
            if number > 1:
                taken[size].append(time.process_time() - start)
            bar.update()
    seconds = {size: round(statistics.median(own), 4) for size, own in taken.items()}
    slope, _ = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)
    return dict(
        seconds={str(size): own for size, own in seconds.items()}, slope=round(float(slope), 2)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="where to write the record")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        name: parts(recipe, args.repeats) for name, recipe in dict(object=OBJECT, room=ROOM).items()
    }
    for name, own in found.items():
        print(
            name, "  ".join(f"{part} {1000 * seconds:.0f}" for part, seconds in own.items()), "ms"
        )
    curves = {}
    with tqdm(total=(args.repeats + 2) * sum(map(len, AXES.values())), desc="steps") as bar:
        for axis, settings in AXES.items():
            curves[axis] = growth(axis, settings, args.repeats, bar)
            bar.write(f"{axis:10} {curves[axis]}")
    write_record(args.json, parts=found, curves=curves, clouds=CLOUDS, repeats=args.repeats)


if __name__ == "__main__":
    main()
