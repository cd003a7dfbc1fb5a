#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors with the same metadata give files of different bytes.
#
# Guess: a format made for checkpoints writes equal input as equal bytes, so that the hash of a file tells whether two
# runs ended alike; tensors do come out in a fixed order.
# Seen: the entries of `metadata` are written in a new order each time, also within one process. With one entry all
# files are equal, with two there are two kinds, with three up to six. Values and tensors are always right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PY'
import safetensors
import numpy as np
from safetensors.numpy import save

weight = {"weight": np.zeros(2, np.float32)}


def kinds(count):
    remarks = {f"remark {number}": "x" for number in range(count)}
    return len({save(weight, remarks) for _ in range(200)})


print(f"safetensors {safetensors.__version__}: kinds of files with one, two and three entries: {kinds(1)}, {kinds(2)}, {kinds(3)}")
assert kinds(1) == 1 and kinds(2) == 2 and 2 < kinds(3) <= 6
PY
