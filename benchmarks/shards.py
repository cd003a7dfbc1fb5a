"""Shards beside the folder that they were written from: files and samples a second, time to the first batch, memory.

    python benchmarks/shards.py [--objects 2000] [--rounds 3]

The embedded objects are copied under new names. Both kinds are read in turn, in the same random order; ratios are of the best rounds.
"""

import argparse
import json
import platform
import resource
import shutil
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

from unipre3d.data.loading import make_loader
from unipre3d.data.readers import Store
from unipre3d.data.samples import ViewSamples
from unipre3d.data.shapenet import ShapeNetViews, export_objects
from unipre3d.data.shards import file_names, write_shards

HOW = dict(size=64, resample="box")


def multiply(
    folder: Path,  # objects, as `export_objects` writes them
    count: int,
) -> None:
    "Objects under new names, until there are so many."
    models = sorted(path for path in folder.glob("*/*") if path.is_dir())
    (folder / "objects.csv").unlink()
    for k in range(len(models), count):
        model = models[k % len(models)]
        copy = shutil.copytree(model, model.with_name(f"{model.name}x{k}"))
        cloud = next((copy / "pts").iterdir())
        cloud.rename(cloud.with_name(f"{copy.parent.name}-{copy.name}.npy"))


def read_all(root, names):
    "Files a second, opened anew."
    store = Store(root)
    began = time.perf_counter()
    for name in names:
        store.read(name)
    return len(names) / (time.perf_counter() - began)


def batches(root, steps=12, size=16):
    "Seconds to the first batch, the reader's start among them, and samples a second after it."
    began = time.perf_counter()
    loader = iter(make_loader(ViewSamples(ShapeNetViews(root, **HOW)), 0, steps, batch_size=size))
    next(loader)
    first = time.perf_counter()
    count = sum(batch.points.size for batch in loader)
    return first - began, count / (time.perf_counter() - first)


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--objects", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "folder"
        export_objects(ShapeNetViews(), folder)
        multiply(folder, given.objects)
        began = time.perf_counter()
        shards = write_shards(Store(folder), Path(home) / "shards", 2**25, progress=False)
        seconds = time.perf_counter() - began
        names = list(file_names(Store(folder)))
        names = [names[k] for k in np.random.default_rng(0).permutation(len(names))]
        roots = dict(folder=folder, shards=shards)
        files, first, samples = ({kind: [] for kind in roots} for _ in range(3))
        peaks = []
        for _ in range(given.rounds):
            for kind, root in roots.items():
                files[kind].append(read_all(root, names))
                start, rate = batches(root)
                first[kind].append(start)
                samples[kind].append(rate)
            peaks.append(round(memory()))
        megabytes = sum(path.stat().st_size for path in shards.glob("*.tar")) / 2**20
        record = dict(
            date=str(date.today()),
            machine=platform.machine(),
            objects=given.objects,
            files=len(names),
            megabytes=round(megabytes),
            index_bytes_a_file=round((shards / "index.json").stat().st_size / len(names), 1),
            write_mb_a_second=round(megabytes / seconds, 1),
            files_a_second={k: round(max(v)) for k, v in files.items()},
            first_batch_seconds={k: round(min(v), 3) for k, v in first.items()},
            samples_a_second={k: round(max(v), 1) for k, v in samples.items()},
            files_ratio=round(max(files["shards"]) / max(files["folder"]), 2),
            samples_ratio=round(max(samples["shards"]) / max(samples["folder"]), 2),
            peak_memory_mb_by_round=peaks,
        )
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
