"""Export the notebooks with the installed nbdev, away from the checkout, and compare the modules.

    python tools/check_nbdev.py            in an environment with nbdev 2, or with nbdev 3

Versions 2 and 3 cannot be installed together; the hosted workflow has an environment for each. nbdev 2 reads
settings.ini, nbdev 3 the table [tool.nbdev] of pyproject.toml. This says so, if one of them is changed alone. nbdev 3
also writes the first lines of unipre3d/__init__.py, from the docstrings of plain modules; nbdev 2 leaves them.
"""

import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPORT = "from nbdev.doclinks import nbdev_export; nbdev_export()"
READ = ("settings.ini", "pyproject.toml", "README.md", "_quarto.yml")


def copy_sources(folder):
    "What the export reads, with the modules that it writes over."
    skipped = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_*.ipynb")
    for name in ("nbs", "unipre3d"):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped, symlinks=True)
    for name in READ:
        shutil.copy(ROOT / name, folder)


def modules(folder):
    "Text of every exported module, by its path."
    found = {}
    for path in sorted((folder / "unipre3d").rglob("*.py")):
        if path.name != "_modidx.py":  # an index that each version writes in its own way
            found[path.relative_to(folder).as_posix()] = path.read_text(encoding="utf-8")
    return found


def differences():
    "Names of the modules that this nbdev would write in another way."
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        copy_sources(folder)
        done = subprocess.run(
            [sys.executable, "-c", EXPORT], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"check_nbdev: the export failed:\n{done.stdout}{done.stderr}")
        exported = modules(folder)
    committed = modules(ROOT)
    names = sorted(exported.keys() | committed.keys())
    return [name for name in names if exported.get(name) != committed.get(name)]


def main():
    version = metadata.version("nbdev")
    found = differences()
    if found:
        sys.exit(
            f"check_nbdev: nbdev {version} writes {len(found)} modules in another way, first {found[0]}"
        )
    print(f"nbdev {version} exports the committed modules")


if __name__ == "__main__":
    main()
