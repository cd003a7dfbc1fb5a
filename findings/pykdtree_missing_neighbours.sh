#!/usr/bin/env bash
# pykdtree 1.4.3: neighbours that a tree does not have are marked in two ways, and one of them is neither infinite nor the number of points.
#
# Guess: as in scipy, whose class it follows: a missing neighbour has the distance inf and the index n, however it comes to be missing.
# Seen: so it is beyond `distance_upper_bound`. Where more neighbours are wanted than there are points, the index is
# 4294967295 and the distance the root of the largest float (1.8e19 for 32 bits, 1.3e154 for 64): isfinite() keeps them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check pykdtree==1.4.3 numpy==2.4.6 scipy==1.17.1
"$folder/env/bin/python" - <<'PY'
from importlib.metadata import version

import numpy as np
from pykdtree.kdtree import KDTree
from scipy.spatial import KDTree as Reference

print("pykdtree", version("pykdtree"))
for kind, largest in ((np.float32, 1.8e19), (np.float64, 1.3e154)):
    points = np.arange(6, dtype=kind).reshape(3, 2)
    few, beyond = KDTree(points).query(points[:1], k=5)
    near, bound = KDTree(points).query(points[:1], k=3, distance_upper_bound=1.0)
    known, missing = Reference(points).query(points[:1], k=5)
    print(np.dtype(kind).name, "more than there are:", few[0, 3:], beyond[0, 3:], "beyond a bound:", near[0, 1:], bound[0, 1:])
    assert np.isinf(known[0, 3:]).all() and (missing[0, 3:] == 3).all()
    assert np.isinf(near[0, 1:]).all() and (bound[0, 1:] == 3).all()
    assert np.isfinite(few[0, 3:]).all() and (few[0, 3:] > largest).all() and (beyond[0, 3:] == 2**32 - 1).all()
PY
