"""Each command once on small things, with the package that is installed; for systems on which the tests do not run.

python tools/try_commands.py
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = "--steps 3 --batch-size 4 --workers 0 --picture-every 0 --n-points 128".split()
RUN = "runs/object-transformer-mini"
COMMANDS = (
    ["--version"],
    ["doctor"],
    ["pretrain", *SMALL],
    ["info", RUN],
    ["render", RUN, "--frames", "3", "--size", "64"],
    ["convert", f"{RUN}/gaussians-val-0.ply", "small.spz"],
    ["features", "chair.ply"],
    ["features", "chair.ply", "--from", RUN],
    ["finetune", "cls-furniture-mini", "--init", RUN, *SMALL],
    ["predict", "chair.ply", "--from", "runs/cls-furniture-mini"],
    ["view", RUN, "--out", "run.html"],
    ["data", "shard", "furniture"],
    ["reproduce", "mini", "--list", "--only", "a"],
    ["completion", "bash"],
)
CLOUD = """
from unipre3d.data.clouds import write_cloud
from unipre3d.data.shapenet import ShapeNetViews
rows = ShapeNetViews(split="val", classes=["chair"]).rows(0)
write_cloud("chair.ply", rows["xyz"], rows["color"], normal=rows["normal"])
"""


def main():
    with tempfile.TemporaryDirectory() as home:
        made = {"cwd": home, "env": os.environ | {"UNIPRE3D_CACHE": str(Path(home) / "cache")}}
        subprocess.run([sys.executable, "-c", CLOUD], check=True, **made)
        for command in COMMANDS:
            print("unipre3d", *command, flush=True)
            done = subprocess.run([sys.executable, "-m", "unipre3d", *command], **made)
            if done.returncode:
                sys.exit(
                    f"try_commands: unipre3d {' '.join(command)}: exit status {done.returncode}"
                )
    print(f"{len(COMMANDS)} commands ended well")


if __name__ == "__main__":
    main()
