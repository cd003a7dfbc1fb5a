"""What benchmarks share: this checkout and an older commit beside it, and the record that they write."""

import datetime
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from unipre3d.records import code_version, hardware, write_json  # noqa: E402

LOAD = round(os.getloadavg()[0], 2)  # before the benchmark


def unpack(revision, folder):
    "The files of another commit."
    command = ["git", "-C", str(ROOT), "archive", revision]
    archive = subprocess.run(command, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return Path(folder)


def checkouts(against, folder):
    "This checkout, and an older commit in the folder if one is named."
    return {"now": ROOT} | ({against: unpack(against, folder)} if against else {})


def write_record(path, **values):
    "Write what was measured, with the date, the code and the machine; None writes nothing."
    if path is None:
        return
    facts = {"kind": "benchmark", "date": datetime.date.today().isoformat(), "code": code_version()}
    write_json(path, facts | {"load_before": LOAD, "hardware": hardware()} | values)


class NotFinished(SystemExit):
    "A run that did not reach its last step; `ended` says how."

    def __init__(self, name, folder, ended):
        self.ended = ended
        super().__init__(f"{name}: expected a finished run, the one in {folder} is {ended}")


def finished_run(name, recipe, folder, init="none"):
    "The folder of a finished run, which is made, or gone on with, where it is not there. Raises: NotFinished."
    from unipre3d.records import read_record
    from unipre3d.runs.checkpoint import has_state, is_finished
    from unipre3d.runs.run import run_recipe

    if is_finished(folder):
        ended = read_record(folder / "record.json")["ended"]
    else:
        ended = run_recipe(name, recipe, folder, init=init, resume=has_state(folder)).ended
    if ended != "finished":
        raise NotFinished(name, folder, ended)
    return folder
