#!/usr/bin/env bash
# trimesh 5.2.0: a binary PLY file whose faces have different numbers of corners is refused; the same mesh as text is read.
#
# Guess: each face of a PLY file states its own number of corners, so a triangle beside a quad is ordinary, in text and
# in bytes, and modelling programs write both. trimesh gives three triangles for either.
# Seen: the text gives three triangles. The bytes end in "PLY is unexpected length!", since the number of corners of the
# first face is taken for all. A binary file of quads alone is read.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check trimesh==5.2.0 plyfile==1.1.4 numpy==2.4.6
"$folder/env/bin/python" - <<'PY'
import io

import numpy as np
import plyfile
import trimesh

CORNERS = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 0, 1)]
QUAD, TRIANGLE, OTHER_QUAD = [0, 1, 2, 3], [0, 1, 4], [0, 3, 2, 1]


def triangles(faces, text):
    vertex = np.array(CORNERS, [(k, "f4") for k in "xyz"])
    face = np.empty(len(faces), [("vertex_indices", object)])
    face["vertex_indices"] = [np.array(one, "i4") for one in faces]
    elements = [plyfile.PlyElement.describe(vertex, "vertex"), plyfile.PlyElement.describe(face, "face")]
    with io.BytesIO() as out:
        plyfile.PlyData(elements, text=text, byte_order="=" if text else "<").write(out)
        data = out.getvalue()
    again = plyfile.PlyData.read(io.BytesIO(data))["face"]["vertex_indices"]
    assert [list(one) for one in again] == faces  # the file is valid
    try:
        return len(trimesh.load_mesh(io.BytesIO(data), "ply", process=False).faces)
    except ValueError as problem:
        return str(problem)


found = {
    "text, quad and triangle": triangles([QUAD, TRIANGLE], text=True),
    "bytes, quad and triangle": triangles([QUAD, TRIANGLE], text=False),
    "bytes, quads": triangles([QUAD, OTHER_QUAD], text=False),
}
print(f"trimesh {trimesh.__version__}:", found)
assert list(found.values()) == [3, "PLY is unexpected length!", 4]
PY
