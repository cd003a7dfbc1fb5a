#!/usr/bin/env bash
# trimesh 5.2.0: a PLY of double precision is read as such and written in single precision.
#
# Guess: reading a cloud and writing it again keeps its places; they are float64 in memory, and the file had doubles.
# Seen: the written file has `property float x`. Near an easting of 500 km two points 10 cm apart come back 9.4 cm apart, each
# up to 1.6 cm off, without a word. `encoding="ascii"` writes eight digits behind the point, of the rounded numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check trimesh==5.2.0 numpy==2.4.6
"$folder/env/bin/python" - "$folder" <<'PY'
import sys
from pathlib import Path

import numpy as np
import trimesh

folder = Path(sys.argv[1])
places = [f"property double {name}" for name in "xyz"]
header = ["ply", "format ascii 1.0", "element vertex 2", *places, "end_header"]
rows = ["500000.123456 1 2", "500000.223456 3 4", ""]
(folder / "map.ply").write_text("\n".join([*header, *rows]))
cloud = trimesh.load(folder / "map.ply")
cloud.export(folder / "again.ply")
cloud.export(folder / "text.ply", encoding="ascii")
written = (folder / "again.ply").read_bytes().split(b"end_header")[0]
apart = {name: np.ptp(trimesh.load(folder / f"{name}.ply").vertices[:, 0]) for name in ("map", "again", "text")}
print(f"trimesh {trimesh.__version__}: metres apart, as read, written and read again, written as text:", {k: round(float(v), 5) for k, v in apart.items()})
print([line for line in (folder / "text.ply").read_text().splitlines() if line.startswith(("property", "500"))])
assert cloud.vertices.dtype == np.float64 and abs(apart["map"] - 0.1) < 1e-6
assert b"property float x" in written and apart["again"] == apart["text"] == 0.09375
PY
