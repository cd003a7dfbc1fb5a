"""What one core does of each part of a run, for the plan of a larger one; and how long a loader is waited for.

    python benchmarks/scale.py [--samples 60] [--json data/records/benchmark_scale.json]

Nothing is cached: a data set of a million objects is read once an epoch. The loader is the package's own; its samples
sleep for as long as a far disk would take, and the step sleeps for as long as a GPU would compute.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from common import write_record

from unipre3d.core import data_dir
from unipre3d.data.loading import make_loader
from unipre3d.recipes import recipes
from unipre3d.runs.recipe import change
from unipre3d.tasks.pretrain import build_image_net
from unipre3d.worlds.rooms.disk import embedded_rooms

FRESH = dict(workers=0, cache_mb=0, image_cache_mb=0, feature_cache_mb=0)
KINDS = {"object": "object-transformer-mini", "room": "scene-sparseunet-mini"}
ROOMS = 3
BATCHES, STEP_S, BATCH = 24, 0.06, 4
WORKERS, LATENCIES = (1, 2, 4, 8), (0.01, 0.04, 0.16)


class Far:
    "Samples that take a while."

    def __init__(self, latency):
        self.latency = latency

    def __len__(self):
        return 1000

    def __getitems__(self, keys):
        time.sleep(self.latency * len(keys))
        return torch.zeros(1)


def waiting_share(workers, latency):
    "The share of a run in which the next batch was not there."
    loader = iter(make_loader(Far(latency), 0, BATCHES, batch_size=BATCH, num_workers=workers))
    next(loader)  # the processes have started
    began = time.perf_counter()
    waited = 0.0
    for _ in range(BATCHES - 1):
        time.sleep(STEP_S)
        start = time.perf_counter()
        next(loader)
        waited += time.perf_counter() - start
    return waited / (time.perf_counter() - began)


def median_s(work, count):
    "Median seconds of processor time of a call."
    times = []
    for k in range(count):
        start = time.process_time()
        work(k)
        times.append(time.process_time() - start)
    return statistics.median(times)


def parts(name, samples):
    "Seconds of one core for a sample: to read it, for its image features, and for the whole step."
    rooms = dict(rooms=ROOMS) if name.startswith("scene") else {}
    recipe = change(recipes[name], **FRESH, **rooms)
    task = recipe.build_task()
    net = build_image_net(recipe.model)
    size = recipe.run.batch_size
    batches = [task.samples.batch([(i, 1)]) for i in range(min(size, 8))]
    whole = task.samples.batch([(i % len(task.samples), 2) for i in range(size)])

    def read(k):
        task.samples.batch([(k * 7 % len(task.samples), k)])

    @torch.no_grad()
    def images(k):
        net(batches[k % len(batches)].ref.rgb)

    def step(k):
        task.model.zero_grad()
        task.loss(task.model, whole)[0].backward()

    read(0), images(0), step(0)
    numbers = sum(p.numel() for p in task.model.parameters())
    return dict(
        read_s=median_s(read, samples),
        image_s=median_s(images, samples),
        step_s=median_s(step, max(4, samples // 10)) / size,
        batch_bytes=tensor_bytes(whole) // size,
        state_bytes=4 * numbers * (4 if recipe.optimiser.ema else 3),
        parameters=numbers,
    )


def tensor_bytes(x):
    "Bytes of all tensors of a batch, which go to the device."
    if isinstance(x, torch.Tensor):
        return x.nbytes
    return sum(map(tensor_bytes, vars(x).values())) if hasattr(x, "__dict__") else 0


def folder_bytes(root, count):
    files = (path for path in Path(root).rglob("*") if path.is_file())
    return round(sum(path.stat().st_size for path in files) / count)


def gflops():
    "Of a matrix product of one core, in a second."
    a = torch.randn(1024, 1024)
    return 2 * 1.024**3 / median_s(lambda k: a @ a, 10)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=60, help="calls that are timed of each part")
    parser.add_argument("--json", type=Path, help="write the record here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {kind: parts(name, given.samples) for kind, name in KINDS.items()}
    objects = len((data_dir() / "furniture.csv").read_text().splitlines()) - 1
    found["object"]["bytes"] = round((data_dir() / "furniture.zip").stat().st_size / objects)
    found["room"]["bytes"] = folder_bytes(embedded_rooms(rooms=ROOMS), ROOMS)
    loader = [
        dict(workers=workers, latency_s=latency, share=round(waiting_share(workers, latency), 3))
        for latency in LATENCIES
        for workers in WORKERS
    ]
    how = dict(step_s=STEP_S, batch_size=BATCH, batches=BATCHES - 1)
    write_record(given.json, gflops=round(gflops(), 1), **found, loader=loader, loader_how=how)
    for kind, row in found.items():
        print(kind, {name: round(value, 6) for name, value in row.items()})
    print(*loader, sep="\n")


if __name__ == "__main__":
    main()
