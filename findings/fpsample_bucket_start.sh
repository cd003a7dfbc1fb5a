#!/usr/bin/env bash
# fpsample 1.0.2: the bucket functions take a `start_idx` and do not start there.
#
# Guess: as in `fps_sampling`, the first of the chosen points is the one that `start_idx` names; the docstring promises that it is among them.
# Seen: the plain and the NPDU functions do that. Both bucket functions mostly begin elsewhere, at the same place in equal calls: the number
# seems to count the points in the order of their tree. Of 200 points and 20 chosen ones, the named one is seldom there at all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check fpsample==1.0.2 numpy==2.4.6
"$folder/env/bin/python" - <<'PY'
from importlib.metadata import version

import fpsample
import numpy as np

points = np.random.default_rng(0).random((200, 3)).astype(np.float32)
print("fpsample", version("fpsample"))


def starts(sample, **options):
    "How often the first of 20 points is the one that was named, and how often that one is there."
    chosen = [sample(points, 20, start_idx=start, **options) for start in range(100)]
    first = sum(int(some[0]) == start for start, some in enumerate(chosen))
    return first, sum(start in some for start, some in enumerate(chosen))


for sample in (fpsample.fps_sampling, fpsample.fps_npdu_sampling, fpsample.fps_npdu_kdtree_sampling):
    print(sample.__name__, "first and among the chosen, of 100:", *starts(sample))
    assert starts(sample) == (100, 100)
for sample, options in ((fpsample.bucket_fps_kdtree_sampling, {}), (fpsample.bucket_fps_kdline_sampling, {"h": 3})):
    first, there = starts(sample, **options)
    print(sample.__name__, "first and among the chosen, of 100:", first, there)
    assert first < 30 and there < 50 and starts(sample, **options) == (first, there)
PY
