"""Seconds of a training step of each condition of the second study, alternately, on one thread.

    python benchmarks/arms.py [--repeats 15] [--arms colour outline ...] [--json PATH]

Sixty shapes stand for all. A step is loading, forward and backward of the same 24 shapes, so that decoded images and
maps of the image model are cached for all. Lengths at equal time follow from the medians (`SECONDS` of
unipre3d.reproduce.second).
"""

import argparse
import time

import numpy as np
import torch
from common import write_record

from unipre3d.reproduce.plan import plan_recipe
from unipre3d.reproduce.second import ARMS


def prepared(arm):
    "A call that does one step of a condition."
    torch.manual_seed(0)
    c = ARMS[arm]
    recipe = plan_recipe(c.recipe, c.changes | dict(per_class=(2, 1, 0)), arm)
    task = recipe.build_task()
    task.model.train()
    keys = [(i, 0) for i in range(0, len(task.samples), len(task.samples) // 24)][:24]

    def step():
        start = time.process_time()
        loss, _ = task.loss(task.model, task.samples.batch(keys))
        loss.backward()
        for p in task.model.parameters():
            p.grad = None
        return time.process_time() - start

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--arms", nargs="+", default=[a for a in ARMS if a != "outline.long"])
    parser.add_argument("--json", help="where to write the record")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = {arm: prepared(arm) for arm in args.arms}
    taken = {arm: [] for arm in steps}
    for number in range(args.repeats + 2):
        for arm, step in steps.items():
            seconds = step()
            if number > 1:
                taken[arm].append(seconds)
    medians = {arm: round(float(np.median(own)), 3) for arm, own in taken.items()}
    first = np.array(taken[args.arms[0]])
    ratios = {arm: round(float(np.median(first / own)), 2) for arm, own in taken.items()}
    for arm, seconds in medians.items():
        print(f"{arm:16} {seconds:.3f} s, {args.arms[0]} takes {ratios[arm]} times as long")
    write_record(args.json, seconds=medians, ratio=ratios, repeats=args.repeats, threads=1)


if __name__ == "__main__":
    main()
