#!/usr/bin/env bash
# trimesh 5.2.0: picture coordinates that a glTF file stores as normalised whole numbers are read as they stand.
#
# Guess: glTF 2.0 lets TEXCOORD_0 be unsigned bytes or shorts with `normalized: true`, which mean fractions of 255 or
# 65535; optimisers of files write them so. The same quad with floats and with shorts then gives the same uv.
# Seen: 0.25 comes back as 16384, without a word. The flip of v, 1 - v, is also computed within 16 bits: 0.25 becomes
# 49153. A texture is sampled far outside of its picture, so that its colours look like noise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check trimesh==5.2.0 numpy==2.4.6 pillow==13.0.0
"$folder/env/bin/python" - <<'PY'
import base64
import io
import json

import numpy as np
import trimesh

corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
uv = np.array([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75]])


def read(array, kind, normalized):
    data = corners.tobytes() + array.tobytes()
    views = [dict(buffer=0, byteOffset=0, byteLength=36), dict(buffer=0, byteOffset=36, byteLength=array.nbytes)]
    place = dict(bufferView=0, componentType=5126, count=3, type="VEC3")
    coordinates = dict(bufferView=1, componentType=kind, count=3, type="VEC2", normalized=normalized)
    part = dict(attributes=dict(POSITION=0, TEXCOORD_0=1), material=0)
    uri = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
    tree = dict(
        asset=dict(version="2.0"),
        scene=0,
        scenes=[dict(nodes=[0])],
        nodes=[dict(mesh=0)],
        meshes=[dict(primitives=[part])],
        materials=[dict(name="wood")],
        accessors=[place, coordinates],
        bufferViews=views,
        buffers=[dict(byteLength=len(data), uri=uri)],
    )
    scene = trimesh.load_scene(io.BytesIO(json.dumps(tree).encode()), "gltf", process=False)
    (mesh,) = scene.geometry.values()
    return np.asarray(mesh.visual.uv, float)


floats = read(uv.astype(np.float32), 5126, False)
shorts = read(np.round(uv * 65535).astype(np.uint16), 5123, True)
print(f"trimesh {trimesh.__version__}: floats give {floats[0].tolist()}, shorts give {shorts[0].tolist()}")
assert np.allclose(floats, np.stack([uv[:, 0], 1 - uv[:, 1]], 1))
if np.allclose(floats, shorts, atol=1e-4):
    raise SystemExit("they are read as fractions now")
PY
