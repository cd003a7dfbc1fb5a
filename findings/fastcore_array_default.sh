#!/usr/bin/env bash
# fastcore 1.14.5: a function whose parameter has a numpy array as its default cannot be documented.
#
# Guess: the signature is shown with the array's repr, as for any other default; inspect.signature and help() do so.
# Seen: the renderer asks the default whether it is true, and an array of more than one number refuses to say: ValueError.
# In a book that nbdev builds the page then lacks the function.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check fastcore==1.14.5 numpy==2.4.6
cat > "$folder/example.py" <<'PY'
import inspect

import fastcore
import numpy as np
from fastcore.docments import MarkdownRenderer


def move(points: list, rotation: np.ndarray = np.eye(2)):
    "Rotate points."


def scale(points: list, factor: float = 2.0):
    "Scale points."


print("inspect shows it:", "array" in str(inspect.signature(move)))
assert "factor" in str(MarkdownRenderer(scale))
try:
    text = str(MarkdownRenderer(move))
except ValueError as error:
    print(f"fastcore {fastcore.__version__}: {error}")
else:
    raise SystemExit(f"it is documented now: {text}")
PY
"$folder/env/bin/python" "$folder/example.py"
