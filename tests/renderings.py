"""Draw thousands of extreme scenes of finite numbers, forward and backward, and count what goes wrong.

    python tests/renderings.py RECORD [--scenes 20000] [--checked 10000] [--seed 0]

`render` draws the scenes of test_render_fuzz.py; `rasterization` the same scenes, and settings of all its arguments
(test_rasterization.py). Then every index of the compiled functions is checked while the first scenes are drawn again.
Processes draw pieces of them: a signal that ends one is a crash, and the next begins behind that scene. The record is
written after each piece, and a call that was stopped goes on with the next.
"""

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # it forks, so there is one thread
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    os.environ["NUMBA_THREADING_LAYER"] = "workqueue"

import torch

from unipre3d.records import cache_dir, code_version, hardware, write_json

PIECE = 500  # scenes of a process
COUNTS = ("scenes", "crashes", "errors", "finite", "wrong_gradients", "unlike")


def rows(scenes, checked):
    "What is drawn: by which function, how many, whether every index is checked."
    for count, every_index in ((scenes, False), (checked, True)):
        for drawn in DRAW:
            yield drawn, count, every_index


# ------------------------------------------------------------------------ one scene


def valid_scene(seed):
    "A scene that `render` accepts: without quaternions of zeros, or deviations that rounding made zero."
    from test_render_fuzz import NAMES, scene

    _, g, cameras, options = scene(seed)
    kept = (g.scale > 0).all(1) & (g.quat != 0).any(1)
    fields = {name: getattr(g, name)[kept] for name in NAMES}
    return replace(g, **fields, batch=g.batch[kept]), cameras, options


def wrong_of(images, grads):
    "Whether all images are finite, and then whether a gradient is not."
    finite = all(bool(image.isfinite().all()) for image in images)
    grads = [grad for grad in grads if grad is not None]
    return finite, finite and not all(bool(grad.isfinite().all()) for grad in grads)


def by_render(seed):
    "A scene drawn by `render`."
    from test_render_fuzz import outputs

    from unipre3d.render import render

    gaussians, cameras, options = valid_scene(seed)
    images, grads = outputs(render, gaussians, cameras, **options)
    return *wrong_of(images.values(), grads.values()), False


def rasterized(gaussians, cameras, background, *, antialiased, near, far):
    "As `render`, by one call of `rasterization` for each cloud."
    from unipre3d.gaussians import select_cloud
    from unipre3d.rasterization import rasterization
    from unipre3d.render import Render

    parts = []
    for b in cameras.batch.unique().tolist():
        own, at = select_cloud(gaussians, b), cameras.batch == b
        colour, alpha, _ = rasterization(
            *(own.mean, own.quat, own.scale, own.opacity, own.sh),
            *(cameras.world_to_cam[at], cameras.K[at], cameras.hw[1], cameras.hw[0]),
            near_plane=near,
            far_plane=far,
            sh_degree=math.isqrt(own.sh.shape[1]) - 1,
            backgrounds=background[at],
            render_mode="RGB+ED",
            rasterize_mode="antialiased" if antialiased else "classic",
        )
        parts.append(torch.cat([colour, alpha], -1))
    seen = torch.cat(parts).permute(0, 3, 1, 2)
    return Render(seen[:, :3], seen[:, 4], seen[:, 3])


def by_rasterization(seed):
    "The same scene drawn by `rasterization`; also whether its colours are others."
    from test_render_fuzz import outputs

    from unipre3d.render import render

    gaussians, cameras, options = valid_scene(seed)
    images, grads = outputs(rasterized, gaussians, cameras, **options)
    background = torch.full((len(cameras), 3), 0.3)
    same = render(gaussians, cameras, background, **options)
    finite, wrong = wrong_of(images.values(), grads.values())
    return finite, wrong, finite and not torch.equal(images["rgb"], same.rgb)


def by_settings(seed):
    "A setting of all arguments, some numbers of it extreme."
    from test_rasterization import extreme_setting, leaves

    from unipre3d.rasterization import rasterization

    tensors, options = extreme_setting(seed)
    inputs = leaves(tensors)
    image, alpha, _ = rasterization(**inputs, **options)
    noise = torch.Generator().manual_seed(seed)
    draw = torch.randn(image.shape, generator=noise, dtype=torch.float64)
    ((image * draw).sum() + alpha.sum()).backward()
    finite, wrong = wrong_of((image, alpha), [tensor.grad for tensor in inputs.values()])
    return finite, wrong, False


DRAW = {
    "render": by_render,
    "rasterization, the same scenes": by_rasterization,
    "rasterization, all arguments drawn": by_settings,
}


def draw_piece(drawn, first, count):
    "Say of each scene, in a line, what came of it."
    torch.set_num_threads(1)
    for seed in range(first, first + count):
        print(seed, end=" ", flush=True)
        try:
            print(*map(int, DRAW[drawn](seed)), flush=True)
        except (ValueError, RuntimeError, IndexError, ArithmeticError) as error:
            print(f"error {type(error).__name__}: {error}".splitlines()[0], flush=True)


# ------------------------------------------------------------------------ the record


def tally(row, text, code):
    "Add what a process said of its scenes to a row; a code other than 0 is a crash in the last of them."
    for line in text.splitlines():
        seed, *words = line.split()
        row["scenes"] += 1
        problem = ""
        if not words:
            row["crashes"] += 1
            problem = f"ended with {code}"
        elif words[0] == "error":
            row["errors"] += 1
            problem = " ".join(words[1:])
        else:
            for name, word in zip(("finite", "wrong_gradients", "unlike"), words):
                row[name] += int(word)
            problem = "a gradient is not finite" if words[1] == "1" else ""
        if problem:
            row["problems"].append(f"seed {seed}: {problem}")


def forked(drawn, first, count):
    "What a copy of this process says of scenes, and its exit status: what is imported here, it need not import."
    import test_rasterization  # noqa: F401
    import test_render_fuzz  # noqa: F401

    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(writer, 1)
            draw_piece(drawn, first, count)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader) as said:
        text = said.read()
    return text, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_piece(row, count, cache):
    "Draw the next scenes of a row in a process of its own."
    first = row["seed"] + row["scenes"]
    words = [sys.executable, __file__, "--piece", row["drawn"], str(first), str(count)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    if row["every_index"]:  # numba does not see that others were compiled without checks
        env |= {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(cache), "NUMBA_OPT": "1"}
    before = row["scenes"]
    if row["every_index"] or not hasattr(os, "fork"):
        done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True)
        said, code = done.stdout, done.returncode
    else:
        said, code = forked(row["drawn"], first, count)
    tally(row, said, code)
    if row["scenes"] == before:
        raise SystemExit(f"{row['drawn']}: a process ended with {code} at once")


def accepted(row):
    "Whether nothing went wrong, and most scenes were of use."
    wrong = [row[name] for name in ("crashes", "errors", "wrong_gradients")]
    return wrong == [0, 0, 0] and not row["problems"] and 2 * row["finite"] > row["scenes"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--checked", type=int, default=10_000, help="with every index checked")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene")
    args = parser.parse_args()
    record = {"hardware": hardware(), "rows": []}
    if args.record.exists():
        record = json.loads(args.record.read_text())
    cache = cache_dir() / "numba-boundscheck"
    for drawn, count, every_index in rows(args.scenes, args.checked):
        about = {"drawn": drawn, "every_index": every_index, "seed": args.seed}
        known = [row for row in record["rows"] if about.items() <= row.items()]
        row = known[0] if known else about | dict.fromkeys(COUNTS, 0) | {"problems": []}
        if not known:
            row |= {"date": datetime.date.today().isoformat(), "code": code_version()}
            record["rows"].append(row)
        while row["scenes"] < count:
            run_piece(row, min(PIECE, count - row["scenes"]), cache)
            write_json(args.record, record)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--piece"]:
        draw_piece(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
