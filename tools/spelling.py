"""Spelling of what a reader reads: the notebooks, comments and docstrings, README, tools and tests.

    python tools/spelling.py          name each doubtful word with its place, and exit 1 if there is one

codespell knows the common misspellings of English. The prose is British; its dictionary of differences, read
backwards, finds the rest.
"""

import json
import re
import sys
from pathlib import Path

import codespell_lib

ROOT = Path(__file__).resolve().parent.parent
RIGHT = {
    "olt",
    "nd",
    "ot",
    "coo",
    "widht",
    "transfromer",
    "donot",
    "fo",
    "lod",
    "parm",
}  # names of workloads and layouts; words of OBJ files; parts of patterns; what is misspelt on purpose
BOTH = {
    "serialization",
    "serialized",
    "gray",
    "program",
    "programs",
    "draft",
    "check",
    "checks",
    "checked",
    "story",
    "license",
    "licensed",
    "practice",
    "disk",
    "disks",
    "tire",
    "curb",
    "inquiry",
}  # Gray's code; terms
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
CODE = re.compile(r"```.*?```|`[^`]*`|\$[^$]*\$|\]\([^)]*\)|\{[^}]*\}|<[^>]*>", re.S)


def dictionary(name):
    "Misspelt words and what they should be."
    lines = (
        (Path(codespell_lib.__file__).parent / "data" / name)
        .read_text(encoding="utf-8")
        .splitlines()
    )
    return {
        wrong.lower(): right.rstrip(", ")
        for wrong, _, right in (line.partition("->") for line in lines)
        if right
    }


def american():
    "Words as Americans write them, and as this book does."
    pairs = dictionary("dictionary_en-GB_to_en-US.txt")
    return {
        us.split(",")[0].lower(): gb
        for gb, us in pairs.items()
        if us.split(",")[0].lower() not in BOTH | set(pairs)
    }


def texts():
    "Every text as (where, text, whether all of it is prose)."
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        for n, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            yield (
                f"{path.relative_to(ROOT)}, cell {n}",
                "".join(cell["source"]),
                cell["cell_type"] == "markdown",
            )
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "data").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
        *(ROOT / "tests").rglob("*.md"),
    ]
    code = [
        *(ROOT / "tools").glob("*.py"),
        *(ROOT / "tests").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "unipre3d" / "kernels").glob("*.py"),
    ]
    for path in sorted(pages + code):
        if path.resolve() != Path(__file__).resolve():
            yield (
                str(path.relative_to(ROOT)),
                path.read_text(encoding="utf-8"),
                path.suffix == ".md",
            )


def doubts(found=None):
    "Each doubtful word, one line with its place and what it should be."
    wrong, foreign = (
        {
            w: r
            for w, r in (dictionary("dictionary.txt") | dictionary("dictionary_rare.txt")).items()
            if w not in RIGHT
        },
        american(),
    )
    for where, text, prose in texts() if found is None else found:
        for word in sorted({w.lower() for w in WORD.findall(text)} & wrong.keys()):
            yield f"{where}: {word}, perhaps {wrong[word]}"
        if not prose or where.endswith("CREDITS.md"):
            continue  # titles there are as their authors wrote them
        for word in sorted({w.lower() for w in WORD.findall(CODE.sub(" ", text))} & foreign.keys()):
            yield f"{where}: {word}; this book writes {foreign[word]}"


if __name__ == "__main__":
    found = list(doubts())
    print("\n".join(found) or "no doubtful word")
    sys.exit(bool(found))
