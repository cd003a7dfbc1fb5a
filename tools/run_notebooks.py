"""Run every notebook by nbdev's own test rules and keep the outputs, so that the site is built from the same run.

    python tools/run_notebooks.py [name ...] [--flags "slow gpu"] [--workers N] [--fresh]

Executed copies go to `_executed/`. A copy is reused while its notebook, the package and the embedded data are unchanged
(`--fresh` runs all). Cells with a flag of `tst_flags` are skipped unless the flag is given, as `nbdev_test` does.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "_executed"
# Imported once, before the processes fork, as is the package itself: a notebook then finds them in memory.
PRELOAD = [
    "numpy",
    "matplotlib.pyplot",
    "pandas",
    "torch",
    "torch._dynamo",  # by each optimiser
    "nbdev.process",
    "nbdev.frontmatter",
    "execnb.shell",
    "numba",
    "scipy.optimize",
    "scipy.spatial",
    "scipy.stats",
    "torchmetrics.functional.image",
    "accelerate",
    "diffusers.models.autoencoders.autoencoder_kl",
    "h5py",
    "plyfile",
    "trimesh",
]
# Started first, so that no process is left alone with a long one at the end.
LONG = (
    "60_pretrain",
    "80_results_runs",
    "78_reproduce",
    "67_autoencoder",
    "idea",
    "90_cli",
    "62_compare",
)


def notebooks(names=()):
    "Every notebook in reading order, or those whose path contains one of `names`."
    found = [p.relative_to(ROOT / "nbs") for p in (ROOT / "nbs").rglob("*.ipynb")]
    found = [p for p in found if not any(part.startswith((".", "_")) for part in p.parts)]
    picked = [p for p in found if not names or any(n in str(p) for n in names)]
    return sorted(picked, key=lambda p: (p.name != "00_core.ipynb", p.name))


def longest_first(paths):
    "The same notebooks in the order in which they are started."
    return sorted(paths, key=lambda p: LONG.index(p.stem) if p.stem in LONG else len(LONG))


def modules():
    "The names of the package's modules."
    paths = (p.relative_to(ROOT).with_suffix("") for p in (ROOT / "unipre3d").rglob("*.py"))
    names = (".".join(p.parts) for p in sorted(paths) if not p.stem.startswith("_"))
    return ["unipre3d", *names]


def package_key():
    "One hash of all that a notebook may read beside itself: the package, the embedded data, the pinned set."
    digest = hashlib.sha256()
    files = sorted(
        p
        for f in ("unipre3d", "data")
        for p in (ROOT / f).rglob("*")
        if p.is_file() and p.suffix not in (".pyc", ".nbi", ".nbc")
    )
    for path in [*files, ROOT / "constraints.txt"]:
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(
            path.read_bytes()
            if path.suffix in (".py", ".txt")
            else str(path.stat().st_size).encode()
        )
    return digest.hexdigest()


def key_of(path, base, flags):
    "The hash that an executed copy carries."
    return hashlib.sha256(
        f"{base} {flags}".encode() + (ROOT / "nbs" / path).read_bytes()
    ).hexdigest()


def is_current(path, key):
    mark = (OUT / path).with_suffix(".key")
    return mark.exists() and (OUT / path).exists() and mark.read_text() == key


def with_outputs(source, ran):
    "The notebook as written, with the outputs of the run."
    notebook = json.loads(source.read_text(encoding="utf-8"))
    pairs = zip(
        (c for c in notebook["cells"] if c["cell_type"] == "code"),
        (c for c in ran.cells if c.cell_type == "code"),
        strict=True,
    )
    for written, done in pairs:
        written["outputs"] = done.get("outputs", [])
    return notebook


def execute(path, flags, key, limit):
    "Run one notebook in this process; return its seconds, those of processors, and what went wrong."
    import torch
    import unipre3d
    from execnb.shell import CaptureShell
    from fastcore.ansi import strip_ansi
    from fastcore.basics import str2bool
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    assert Path(unipre3d.__file__).parent == ROOT / "unipre3d", "another copy of the package"
    source, skipped = (
        ROOT / "nbs" / path,
        set(get_config(path=ROOT).tst_flags.split()) - set(flags.split()),
    )
    notebook = NBProcessor(source, procs=FrontmatterProc, process=True).nb

    written = [""]

    def skip(cell):
        if cell.cell_type != "code" or "nbdev_export(" in cell.source:
            return True
        directives = getattr(cell, "directives_", {}) or {}
        if directives.get("eval:", [""])[0].lower() == "false" or skipped & directives.keys():
            return True
        cell.outputs, written[0] = [], cell.source
        if cell.source.rstrip().endswith(";"):
            cell.source = (
                cell.source.rstrip() + "None"
            )  # hide the value as Jupyter does, keep what was printed

    def restore(cell):
        cell.source = written[0]

    def overrun(*_):
        raise TimeoutError(f"ran for more than {limit} s")

    multiprocessing.set_start_method(
        None, force=True
    )  # a notebook's own workers start as on this platform
    start, error, shell = time.time(), "", CaptureShell(source, mpl_format="png")
    signal.signal(signal.SIGALRM, overrun)
    signal.alarm(limit)
    sys.path.insert(0, str(ROOT))
    os.chdir(source.parent)
    try:
        if not str2bool(getattr(notebook, "frontmatter_", {}).get("skip_exec", False)):
            shell.run_all(notebook, exc_stop=True, preproc=skip, postproc=restore)
    except BaseException:
        error = strip_ansi(shell.prettytb(fname=path))
    finally:
        signal.alarm(0)
    copy = OUT / path
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.with_suffix(".key").unlink(missing_ok=True)
    copy.write_text(
        json.dumps(with_outputs(source, notebook), indent=1, ensure_ascii=False), encoding="utf-8"
    )
    if not error:
        copy.with_suffix(".key").write_text(key)
    computed = sum(os.times()[:4])  # of this process and those that it started
    return time.time() - start, computed, error


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", help="run only notebooks whose path contains one of these"
    )
    parser.add_argument(
        "--flags", default="", help="flags of cells to run as well, e.g. 'slow gpu'"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, min(os.cpu_count() or 1, 8)),
        help="processes (default: one for each core)",
    )
    parser.add_argument(
        "--limit", type=int, default=600, help="seconds that one notebook may take (default: 600)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="run notebooks whose executed copy is current, too"
    )
    args = parser.parse_args()
    paths, base = notebooks(args.names), package_key()
    if not paths:
        sys.exit(f"run_notebooks: no notebook's path contains {' or '.join(args.names)}")
    keys = {p: key_of(p, base, args.flags) for p in paths}
    todo = longest_first(p for p in paths if args.fresh or not is_current(p, keys[p]))
    for path in sorted(set(paths) - set(todo)):
        print(f"  kept   {path} (unchanged)")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.workers)))
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    os.environ.setdefault("MPLBACKEND", "agg")
    os.environ |= {
        "IN_TEST": "1",
        "ACCELERATE_USE_CPU": "1",
    }  # runs are compared bit by bit, which a GPU's sums do not allow
    os.chdir(ROOT)  # where the server that forks finds the package
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *modules()])
    failed, total = [], 0.0
    with ProcessPoolExecutor(args.workers, mp_context=context, max_tasks_per_child=1) as pool:
        jobs = {pool.submit(execute, p, args.flags, keys[p], args.limit): p for p in todo}
        for job in as_completed(jobs):
            try:
                seconds, computed, error = job.result()
            except Exception as fault:
                seconds, computed, error = 0.0, 0.0, f"{type(fault).__name__}: {fault}"
            print(
                f"  {'FAILED' if error else 'passed'} {jobs[job]} in {seconds:.1f} s"
                f" (processors: {computed:.1f} s)",
                flush=True,
            )
            total += computed
            if error:
                failed.append(str(jobs[job]))
                print(error, file=sys.stderr, flush=True)
    print(
        f"notebooks: {len(paths) - len(failed)} passed, {len(failed)} "
        f"failed{': ' + ', '.join(failed) if failed else ''}"
        f" ({total:.0f} s of processor time)"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
