#!/usr/bin/env bash
# viser 1.1.0: variances of Gaussian splats are sent in half precision, in the unit of the scene and without a word.
#
# Guess: covariances arrive as they are given, in single precision as centres do.
# Seen: centres are single, the six covariances half precision. So a splat of standard deviation 0.0001 arrives with no extent, one of 300 with an
# infinite one, and a disc of 0.05 by 0.05 by 0.0005 with a thickness that is 8 % off or more. A scene in other units fits through `scale`.
# (Point clouds are sent in half precision too unless `precision` says otherwise; that is in its signature.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check viser==1.1.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PY'
import warnings
from importlib.metadata import version

import numpy as np
import viser

warnings.simplefilter("ignore")  # of the conversion
print("viser", version("viser"))
server = viser.ViserServer(host="127.0.0.1", port=0, verbose=False)


def arrives(*sizes, scale=1.0):
    "Standard deviations of a turned splat as a browser gets them, in the unit of the scene."
    turned, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    sent = turned @ np.diag(np.square(np.divide(sizes, scale))) @ turned.T
    one = np.ones((1, 1), dtype=np.float32)
    node = server.scene.add_gaussian_splats(
        "/splat",
        centers=np.zeros((1, 3), dtype=np.float32),
        covariances=sent[None].astype(np.float32),
        rgbs=np.ones((1, 3), dtype=np.float32),
        opacities=one,
        scale=scale,
    )
    upper = node.buffer.copy().view(np.uint8)[0, 16:28].copy().view(np.float16).astype(np.float64)
    whole = upper[[0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(3, 3)
    if not np.isfinite(whole).all():
        return [np.inf]
    return (np.sqrt(np.clip(np.linalg.eigvalsh(whole), 0, None)) * scale).round(6).tolist()


small, large, disc = arrives(1e-4, 1e-4, 1e-4), arrives(300, 300, 300), arrives(0.05, 0.05, 0.0005)
print("0.0001 in every direction:", small)
print("300 in every direction:", large)
print("a disc, 0.0005 thick:", disc)
print("0.0001 in a unit of 2^-20:", arrives(1e-4, 1e-4, 1e-4, scale=2.0**-20))
assert small == [0, 0, 0] and large == [np.inf]
assert abs(disc[0] / 0.0005 - 1) > 0.05
assert np.allclose(arrives(1e-4, 1e-4, 1e-4, scale=2.0**-20), 1e-4, rtol=1e-3)
server.stop()
PY
