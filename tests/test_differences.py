"""The chapter of differences: every item of its table is written about, shown where it says so, and points to chapters that exist."""

import ast
import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent / "nbs"
NUMBER = re.compile(r"\*\*((?:[DPO]\d+(?:, )?)+)")


@pytest.fixture(scope="module")
def cells():
    found = json.loads((NBS / "81_differences.ipynb").read_text(encoding="utf-8"))["cells"]
    return [(c["cell_type"], "".join(c["source"])) for c in found]


@pytest.fixture(scope="module")
def rows(cells):
    "number -> (what, where, paper, released, ours, shown), from the lists in the notebook."
    lists = [
        node.value
        for kind, text in cells
        if kind == "code"
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign)
        and getattr(node.targets[0], "id", "") in ("DEFECTS", "CHOICES", "OURS")
    ]
    found = [row for part in lists for row in ast.literal_eval(part)]
    assert len({row[0] for row in found}) == len(found), "a number is used twice"
    return {row[0]: row[1:] for row in found}


def written(text):
    return {number for group in NUMBER.findall(text) for number in re.findall(r"[DPO]\d+", group)}


def test_every_item_is_in_the_table_and_in_the_text(cells, rows):
    text = set().union(*(written(text) for kind, text in cells if kind == "markdown"))
    assert text == set(rows), (
        f"only in the text: {sorted(text - set(rows))}; only in the table: {sorted(set(rows) - text)}"
    )


def test_what_is_shown_is_checked(cells, rows):
    for n, (kind, text) in enumerate(cells):
        numbers = (
            [k for k in written(text) if rows[k][-1] in ("here", "ours")]
            if kind == "markdown"
            else []
        )
        if not numbers:
            continue
        upto = next((m for m in range(n + 1, len(cells)) if cells[m][0] == "markdown"), len(cells))
        code = "\n".join(text for _, text in cells[n + 1 : upto])
        assert "assert" in code or "test_" in code, (
            f"{', '.join(numbers)}: no check before the next text"
        )


def test_chapters_that_are_named_exist(cells, rows):
    for number, row in rows.items():
        for name in re.findall(r"\d\d_\w+", row[-1]):
            assert list(NBS.rglob(f"{name}.ipynb")), f"{number}: no chapter {name}"
    for kind, text in cells:
        for link in re.findall(r"\]\(([^)]+\.ipynb)\)", text):
            assert (NBS / link).exists(), f"no chapter {link}"


def test_every_defect_says_where_it_is(rows):
    assert all(row[1] and row[3] and row[4] for number, row in rows.items() if number[0] == "D")
