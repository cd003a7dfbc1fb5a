"""Packaging from settings.ini: names, versions and requirements are written there and nowhere else."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def only_for_the_book(folder, names):
    "Pictures and arrays beside the committed records, and those of the second study: the book is built from a checkout."
    if "records" not in Path(folder).relative_to(root).parts:
        return []
    return [name for name in names if name.endswith((".png", ".npz")) or name == "study2"]


def left_out(folder, names):
    "What of `data/` the wheel does not hold."
    common = shutil.ignore_patterns("__pycache__", ".*")
    return {*common(folder, names), *only_for_the_book(folder, names)}


class BuildWithData(build_py):
    "Carry the top-level `data/` into the wheel as `unipre3d/_data`; an editable install reads the folder where it lies."

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / cfg["lib_name"], ignore_errors=True)
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / cfg["lib_name"] / "_data"
        shutil.copytree(root / "data", target, ignore=left_out)


def requirements(name):
    return cfg.get(f"{name}_requirements" if name else "requirements", "").split()


EXTRAS = (
    *("dev", "docs", "gpu", "spconv-cu120"),
    *("worlds", "prepare", "clouds", "vision", "lpips", "trackers", "view"),
)

statuses = [
    "1 - Planning",
    "2 - Pre-Alpha",
    "3 - Alpha",
    "4 - Beta",
    "5 - Production/Stable",
    "6 - Mature",
    "7 - Inactive",
]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    url=cfg["git_url"],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    include_package_data=False,
    install_requires=requirements(""),
    extras_require={extra: requirements(extra) for extra in EXTRAS},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: " + statuses[int(cfg["status"]) - 1],
        "Intended Audience :: " + cfg["audience"],
        "Natural Language :: " + cfg["language"],
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    cmdclass={"build_py": BuildWithData},
    zip_safe=False,
)
