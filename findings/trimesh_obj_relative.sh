#!/usr/bin/env bash
# trimesh 5.2.0: a face of an OBJ file that counts backwards is counted from the end of the file, not from its own line.
#
# Guess: in OBJ, index -1 is the vertex that was read last before the face; tools that write part after part, each
# with its vertices and then its faces, use it so. Two triangles written so are two different triangles.
# Seen: both faces get the three vertices of the second part, and the vertices of the first are gone, without a word.
# The same file with all vertices before all faces is read as meant.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check trimesh==5.2.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PY'
import io

import trimesh

LOW = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"
HIGH = "v 0 0 5\nv 1 0 5\nv 0 1 5\n"


def heights(text):
    mesh = trimesh.load_mesh(io.BytesIO(text.encode()), "obj", process=False)
    return mesh.triangles[:, :, 2].tolist()


by_parts = heights(LOW + "f -3 -2 -1\n" + HIGH + "f -3 -2 -1\n")
at_the_end = heights(LOW + HIGH + "f -6 -5 -4\nf -3 -2 -1\n")
print(f"trimesh {trimesh.__version__}: part after part {by_parts}, all vertices first {at_the_end}")
assert by_parts == [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]
assert at_the_end == [[0.0, 0.0, 0.0], [5.0, 5.0, 5.0]]
PY
