"""The site's table of contents, nbs/sidebar.yml, from the notebooks' numbers: the tens say which part a chapter belongs to;
tutorials follow the start, and the data that come with the package stand before the readers of yours. Each page's "Next" leads to the
page below it, and the landing page's table has the same order (tests/test_structure.py).

    python tools/sidebar.py            write nbs/sidebar.yml
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    0: "Start here",
    "tutorials": "Tutorials",
    1: "Geometry",
    2: "Data",
    3: "Image features",
    4: "Backbones",
    5: "Gaussians, fusion, renderer, losses",
    6: "Pre-training",
    7: "Downstream",
    8: "Results and differences",
    9: "Command line and API",
}

FIRST = [
    "index",
    "idea",
    "meshes",
    "labels",
    "backbone",  # pages without a number, in this order
    "17_objects",
    "18_mesh",
    "19_sensor",
    "20_furniture",
    "31_rooms_models",
    "32_rooms_build",
    "33_rooms_furnish",
    "34_rooms_light",
    "35_rooms_film",
    "36_rooms_cloud",
    "37_rooms_disk",
    "27_shapes",
    "28_scans",
]  # and pages that stand before the others of their part


def part_of(path):
    """The part of a notebook; the landing page stands before all others, every backbone is a backbone, all in data and worlds is data,
    and tutorials have no numbers."""
    if path.parent.name == "tutorials":
        return "tutorials"
    if path.parent.name == "backbones":
        return 4
    if path.parent.name in ("data", "worlds"):
        return 2
    found = re.match(r"(\d)\d", path.name)
    return int(found[1]) if found else 0


def sidebar():
    "The text of nbs/sidebar.yml."
    nbs = ROOT / "nbs"
    found = [
        p.relative_to(nbs)
        for p in nbs.rglob("*.ipynb")
        if not any(part.startswith((".", "_")) for part in p.relative_to(nbs).parts)
    ]
    lines = ["# Written by tools/sidebar.py", "website:", "  sidebar:", "    contents:"]
    for number, title in PARTS.items():
        chapters = sorted(
            (p for p in found if part_of(p) == number),
            key=lambda p: (p.stem not in FIRST, FIRST.index(p.stem) if p.stem in FIRST else p.name),
        )
        if chapters:
            lines += [
                f"      - section: {title}",
                "        contents:",
                *(f"          - {p.as_posix()}" for p in chapters),
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "nbs" / "sidebar.yml").write_text(sidebar(), encoding="utf-8")
