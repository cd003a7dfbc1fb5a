#!/usr/bin/env bash
# numba 0.68.1: inside compiled code, float() of a float32 stays a float32.
#
# Guess: as in Python, where float() of a numpy.float32 is a float, that is 64 bits wide. A kernel that writes
# `x = float(array[i])` before it squares x would then compute in double precision.
# Seen: the square of 1e30 is inf, so float() changed nothing; numpy.float64(x) does widen. The interpreter
# gives 1e60 for the same line.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check numba==0.68.1 numpy==2.4.6
"$folder/env/bin/python" - <<'PY'
import numba
import numpy as np


def with_float(array):
    x = float(array[0])
    return x * x


def with_float64(array):
    x = np.float64(array[0])
    return x * x


values = np.array([1e30], dtype=np.float32)
interpreted = with_float(values)
compiled = numba.njit(with_float)
widened = numba.njit(with_float64)(values)
square = compiled(values)
kind = compiled.nopython_signatures[0].return_type
print(f"numba {numba.__version__}: interpreted {interpreted:.3g}, float() compiled {square} ({kind}), numpy.float64 {widened:.3g}")
assert np.isfinite(interpreted) and np.isfinite(widened)
assert square == np.inf and str(kind) == "float32", "numba's float() now widens: this finding no longer holds"
PY
