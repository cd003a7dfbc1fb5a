"""Build the wheel, install it into an empty folder and ask it for its version, its command and its embedded data.

It may weigh 50 MB. Pictures beside the committed records stay in the checkout, as do the records of the second study:
the book shows them.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = 50  # MB of 2^20 bytes
FOR_THE_BOOK = re.compile(r"records/(study2/.*|.*\.(png|npz))")  # as setup.py leaves them out
ASK = "import unipre3d, unipre3d.core as c; print(unipre3d.__version__); print(unipre3d.__file__); print(c.data_dir())"


def call(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(
            f"check_wheel: {' '.join(map(str, command[:5]))} ... failed:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def data_files():
    "What the wheel must carry, as paths below data/."
    found = (p.relative_to(ROOT / "data") for p in (ROOT / "data").rglob("*") if p.is_file())
    return {
        p.as_posix()
        for p in found
        if not any(part.startswith(".") or part == "__pycache__" for part in p.parts)
        and not FOR_THE_BOOK.fullmatch(p.as_posix())
    }


def unwanted(inside):
    "Files of the wheel that only the book shows."
    data = "unipre3d/_data/"
    return sorted(name for name in inside if FOR_THE_BOOK.fullmatch(name.removeprefix(data)))


def copy_sources(folder):
    "What a wheel is made of, away from the checkout: building writes beside it."
    for name in ("unipre3d", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        source = copy_sources(folder / "source")
        call(*pip, "wheel", "--no-deps", "-w", folder, source, cwd=folder)
        (wheel,) = folder.glob("*.whl")
        inside = set(zipfile.ZipFile(wheel).namelist())
        modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "unipre3d").rglob("*.py")}
        missing = sorted(modules - inside) + sorted(
            f"unipre3d/_data/{f}" for f in data_files() if f"unipre3d/_data/{f}" not in inside
        )
        if missing:
            sys.exit(f"check_wheel: {wheel.name} lacks {len(missing)} files, first {missing[0]}")
        if extra := unwanted(inside):
            sys.exit(
                f"check_wheel: {wheel.name} holds {len(extra)} pictures of the book, first {extra[0]}"
            )
        call(
            *pip,
            "install",
            "--no-deps",
            "--no-index",
            "--target",
            folder / "site",
            wheel,
            cwd=folder,
        )
        answer = call(
            sys.executable,
            "-c",
            ASK,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder / "site")},
        ).split()
        if (
            not answer[1].startswith(str(folder))
            or Path(answer[2]) != Path(answer[1]).parent / "_data"
        ):
            sys.exit(
                f"check_wheel: the installed package looked for its data in {answer[2]}; expected its own _data folder"
            )
        size = wheel.stat().st_size / (1 << 20)
        if size > HEAVY:
            sys.exit(f"check_wheel: {wheel.name} weighs {size:.1f} MB; the limit is {HEAVY} MB")
        print(
            f"{wheel.name}: {size:.1f} MB, {len(modules)} modules, {len(data_files())} data files"
        )


if __name__ == "__main__":
    main()
