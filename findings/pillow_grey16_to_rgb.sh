#!/usr/bin/env bash
# Pillow 13.0.0: a grey picture of 16 bits that is converted to RGB or RGBA is cut at 255 instead of scaled.
#
# Guess: convert("RGB") keeps what a picture shows, as it does for palettes, CMYK and one bit; a grey of 30000 of 65535
# becomes 117 of 255.
# Seen: it becomes 255, like everything but the darkest 0.4 % of the levels: a mid-grey texture is white. A colour picture
# of 16 bits a channel is opened with 8 bits and keeps its look.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 pillow==13.0.0
"$folder/env/bin/python" - <<'PY'
import io
import struct
import zlib

import numpy as np
import PIL
from PIL import Image


def png(values, kind):
    "A PNG of one row with 16 bits a channel; kind 0 is grey, 2 is RGB."
    row = b"\0" + values.astype(">u2").tobytes()
    chunks = {b"IHDR": struct.pack(">IIBBBBB", len(values), 1, 16, kind, 0, 0, 0), b"IDAT": zlib.compress(row), b"IEND": b""}
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks.items():
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return Image.open(io.BytesIO(data))


grey = png(np.array([0, 200, 30000, 65535]), 0)
color = png(np.repeat([[0], [200], [30000], [65535]], 3, 1), 2)
cut = np.asarray(grey.convert("RGB"))[0, :, 0].tolist()
kept = np.asarray(color)[0, :, 0].tolist()
print(f"Pillow {PIL.__version__}: grey, mode {grey.mode}, becomes {cut}; RGB, opened as {color.mode}, is {kept}")
assert kept[2] in (116, 117) and kept[1] <= 1
if cut[2] != 255:
    raise SystemExit("it is scaled now")
PY
