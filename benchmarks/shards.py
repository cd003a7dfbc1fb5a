"""Shards beside the folder that they were written from: files and samples a second, time to the first batch, memory.

    python benchmarks/shards.py [--objects 20000] [--rounds 3] [--steps 60] [--json PATH] [--home FOLDER]

Copies of embedded objects stand in a folder under new names, 49 files and 0.3 MB each. Each measurement has a process
of its own, folder and shards in turn, in the same random order; ratios are of medians. Files are in memory when
`samples_a_second` and `files_a_second` are measured, of processor time, which other programs disturb least. For
`cold_samples_a_second`, of wall-clock time, the system forgets what it read before each process; it takes the right
to write to DROP, and is left out without.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, write_record
from tqdm import tqdm

from unipre3d.data.loading import make_loader
from unipre3d.data.readers import Store
from unipre3d.data.samples import ViewSamples
from unipre3d.data.shapenet import ShapeNetViews, export_objects
from unipre3d.data.shards import write_shards

DROP = Path("/proc/sys/vm/drop_caches")
HOW = dict(size=64, resample="box")
BATCH = 16
DISTINCT = 60  # objects; all others are these under new names


def forget() -> bool:
    "The system forgets what it read of files; False where this process may not tell it."
    if not os.access(DROP, os.W_OK):
        return False
    os.sync()
    DROP.write_text("1")
    return True


def multiply(
    folder: Path,  # objects, as `export_objects` writes them
    count: int,
) -> None:
    "Copies of objects under new names, until there are so many."
    models = sorted(path for path in folder.glob("*/*") if path.is_dir())
    (folder / "objects.csv").unlink()
    for k in tqdm(range(len(models), count), desc="copies", delay=2):
        model = models[k % len(models)]
        place = model.with_name(f"{model.name}x{k}")
        copy = shutil.copytree(model, place, copy_function=shutil.copyfile)
        cloud = next((copy / "pts").iterdir())
        cloud.rename(cloud.with_name(f"{copy.parent.name}-{copy.name}.npy"))


def resident_mb():
    "Memory of this process now."
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(root, steps):
    "What one process finds."
    before = resident_mb()
    began, worked = time.perf_counter(), time.process_time()
    reader = ShapeNetViews(root, **HOW)
    samples = ViewSamples(reader)
    loader = iter(make_loader(samples, 0, steps + 1, batch_size=BATCH))
    next(loader)
    first, first_work = time.perf_counter() - began, time.process_time() - worked
    memory, times, walls = [resident_mb() - before], [], []
    for step in range(steps):
        wall, start = time.perf_counter(), time.process_time()
        next(loader)
        times.append(time.process_time() - start)
        walls.append(time.perf_counter() - wall)
        if step % max(1, steps // 4) == 0:
            memory.append(resident_mb() - before)
    store = Store(root)
    rng = np.random.default_rng(0)
    names = [reader.image_file(i, 0) for i in rng.permutation(len(reader))[:2000]]
    start = time.process_time()
    for name in names:
        store.read(name)
    files = len(names) / (time.process_time() - start)
    how = dict(
        first_batch_s=first,
        first_batch_processor_s=first_work,
        samples_a_second=BATCH / statistics.median(times),
        wall_samples_a_second=BATCH * steps / sum(walls),
    )
    return how | dict(files_a_second=files, memory_mb=memory)


def child(root, steps):
    "The same in a new process."
    words = [sys.executable, __file__, "--child", str(root), "--steps", str(steps)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def summary(rows):
    "Medians, and the memory of the last row."
    names = [name for name in rows[0] if name != "memory_mb"]
    found = {name: round(statistics.median(row[name] for row in rows), 3) for name in names}
    return found | {"memory_mb": [round(value, 1) for value in rows[-1]["memory_mb"]]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="batches that are timed")
    parser.add_argument("--home", help="a folder for the data, on the disk that counts")
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(Path(given.child), given.steps)))
        return
    with tempfile.TemporaryDirectory(dir=given.home) as home:
        folder = Path(home) / "folder"
        everything = ShapeNetViews()
        indices = range(0, len(everything), max(1, len(everything) // DISTINCT))
        export_objects(everything, folder, indices=indices)
        multiply(folder, given.objects)
        began = time.perf_counter()
        shards = write_shards(Store(folder), Path(home) / "shards", 2**26, progress=False)
        seconds = time.perf_counter() - began
        roots = dict(folder=folder, shards=shards)
        rows = {kind: [] for kind in roots}
        for _ in range(given.rounds):
            for kind, root in roots.items():
                cold = child(root, given.steps) if forget() else {}
                row = child(root, given.steps)
                if cold:
                    row["cold_samples_a_second"] = cold["wall_samples_a_second"]
                    row["cold_first_batch_s"] = cold["first_batch_s"]
                rows[kind].append(row)
        archives = [path.stat().st_size for path in shards.glob("*.tar")]
        lists = sum(path.stat().st_size for path in shards.glob("*.jsonl"))
        found = {kind: summary(own) for kind, own in rows.items()}
        rates = [name for name in found["folder"] if name.endswith("_a_second")]
        ratios = {n: round(found["shards"][n] / found["folder"][n], 3) for n in rates}
        record = dict(
            objects=given.objects,
            count=len(archives),
            bytes_an_object=round(sum(archives) / given.objects),
            list_bytes_an_object=round(lists / given.objects),
            index_bytes_an_object=round((shards / "index.json").stat().st_size / given.objects),
            write_mb_a_second=round(sum(archives) / 2**20 / seconds, 1),
            rounds=given.rounds,
            **found,
            ratios=ratios,
        )
    write_record(given.json, **record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
