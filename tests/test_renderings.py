"Thousands of extreme scenes, finite input: no crash, no error, no gradient that is not finite."

import json
import os
from pathlib import Path

import pytest
import renderings
from warm import Command, script

HERE = Path(__file__).parent
RECORD = HERE.parent / "data" / "records" / "outcomes" / "renderings.json"
LONG = int(os.environ.get("UNIPRE3D_RENDERINGS", 0))  # scenes of the long run: 20000


def written(path, scenes, checked):
    "The rows that renderings.py writes."
    words = [path, "--scenes", scenes, "--checked", checked]
    run = Command(HERE / "renderings.py", *words, entry=script)
    _, errors = run.communicate()
    assert run.returncode == 0, errors[-3000:]
    return json.loads(path.read_text())["rows"]


def test_no_scene_goes_wrong(tmp_path):
    rows = written(tmp_path / "renderings.json", 150, 0)
    for row in rows[: len(renderings.DRAW)]:
        assert row["scenes"] == 150 and renderings.accepted(row), row
    again = written(tmp_path / "renderings.json", 155, 0)
    assert [row["scenes"] for row in again[: len(renderings.DRAW)]] == [155] * len(renderings.DRAW)


@pytest.mark.skipif(not LONG, reason="an hour; UNIPRE3D_RENDERINGS=20000 writes the record")
def test_the_long_run():
    rows = written(RECORD, LONG, LONG // 2)
    assert all(map(renderings.accepted, rows))


@pytest.mark.skipif(not RECORD.exists(), reason="UNIPRE3D_RENDERINGS=20000 writes the record")
def test_the_record_has_every_scene_and_nothing_went_wrong():
    rows = json.loads(RECORD.read_text())["rows"]
    wanted = list(renderings.rows(20_000, 10_000))
    assert len(rows) == len(wanted)
    for row, (drawn, count, every_index) in zip(rows, wanted):
        assert (row["drawn"], row["every_index"]) == (drawn, every_index)
        assert row["scenes"] >= count and renderings.accepted(row), row
        assert row["date"] and row["code"]


def test_a_crash_is_counted_and_the_next_scene_goes_on():
    row = dict(drawn="render", seed=3, every_index=False, problems=[])
    row |= dict.fromkeys(renderings.COUNTS, 0)
    renderings.tally(row, "3 1 0 0\n4 error ValueError: no\n5 1 1 0\n6 ", -11)
    counts = dict(scenes=4, finite=2, wrong_gradients=1, errors=1, crashes=1, unlike=0)
    assert counts.items() <= row.items() and not renderings.accepted(row)
    assert [line.split(":")[0] for line in row["problems"]] == ["seed 4", "seed 5", "seed 6"]
    assert row["problems"][-1] == "seed 6: ended with -11"


@pytest.mark.parametrize("seed", [11421, 15328])
def test_colours_near_the_largest_number_have_finite_gradients(seed):
    "Of 20,000 settings the two that had others."
    finite, wrong, _ = renderings.by_settings(seed)
    assert finite and not wrong
