#!/usr/bin/env bash
# trimesh 5.2.0: colours of a point cloud are scaled to 0..255 from floats in a PLY, and from nothing else.
#
# Guess: a colour means the same however a file holds it. Half of red is 0.5 as a float, 128 as a byte and 32768 as 16 bits, as
# scanners' exports have it; trimesh reads the floats of a PLY that way (0.5 becomes 128).
# Seen: of 16 bits in a PLY the lower byte is kept, so 32768 becomes 0 and 25607 becomes 7; floats in an XYZ are cut to whole
# numbers, so 0.5 becomes 0. Nothing is said, and the cloud is nearly black or speckled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check trimesh==5.2.0 numpy==2.4.6
"$folder/env/bin/python" - "$folder" <<'PY'
import sys
from pathlib import Path

import trimesh

folder = Path(sys.argv[1])


def red(kind, value):
    "What the red of a point becomes, from a PLY with such a property."
    colours = [f"property {kind} {name}" for name in ("red", "green", "blue")]
    place = [f"property float {name}" for name in "xyz"]
    header = ["ply", "format ascii 1.0", "element vertex 1", *place, *colours, "end_header"]
    (folder / "cloud.ply").write_text("\n".join([*header, f"0 0 0 {value} 0 0", ""]))
    return int(trimesh.load(folder / "cloud.ply").colors[0, 0])


(folder / "cloud.xyz").write_text("0 0 0 0.5 0 0\n1 1 1 1.0 0 0\n")
floats = trimesh.load(folder / "cloud.xyz").colors[:, 0].tolist()
bits = [red("ushort", value) for value in (32768, 25607, 65535)]
print(f"trimesh {trimesh.__version__}: float PLY {red('float', 0.5)}, byte PLY {red('uchar', 128)}, 16 bits {bits}, floats in XYZ {floats}")
assert red("float", 0.5) == red("uchar", 128) == 128
assert bits == [0, 7, 255] and floats == [0, 1]
PY
