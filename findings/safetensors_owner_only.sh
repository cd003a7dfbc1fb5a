#!/usr/bin/env bash
# safetensors 0.8.0: save_file writes a file that only its owner may read, whatever the umask.
#
# Guess: as every other writer (numpy.save, open), it makes files under the user's umask, so 0644 with the usual 022. Weights in a
# shared folder of a group would then be readable by the group.
# Seen: save_file gives 0600 with umask 022 and with umask 002, while numpy.save gives 0644 and 0664 beside it. Bytes from
# safetensors.numpy.save that one writes oneself follow the umask.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$folder/env/bin/python" - "$folder" <<'PY'
import os
import sys
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save, save_file

folder = Path(sys.argv[1])
tensors = {"weight": np.zeros(3, np.float32)}


def modes(umask):
    "Permissions of three files written under a umask."
    os.umask(umask)
    here = folder / f"{umask:03o}"
    here.mkdir()
    save_file(tensors, here / "save_file")
    np.save(here / "numpy.npy", tensors["weight"])
    (here / "bytes").write_bytes(save(tensors))
    return {path.name: oct(path.stat().st_mode & 0o777) for path in sorted(here.iterdir())}


usual, group = modes(0o022), modes(0o002)
print(f"safetensors {safetensors.__version__}: umask 022 {usual}, umask 002 {group}")
assert usual["bytes"] == usual["numpy.npy"] == "0o644" and group["bytes"] == group["numpy.npy"] == "0o664"
assert usual["save_file"] == group["save_file"] == "0o600", "save_file now follows the umask: this finding no longer holds"
PY
