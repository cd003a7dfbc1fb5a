"""Runs are compared bit by bit, so they train on the processor also where there is a GPU; tests of a GPU move their
tensors themselves.

Where several processes share the tests (`make test`), each computes with one thread, and each test file stays in one
process.
"""

import os

os.environ["ACCELERATE_USE_CPU"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, "1")

SLOWEST = (
    "test_crash",
    "test_outputs",
    "test_pretrain",
    "test_processes",
    "test_launch",
    "test_rooms",
    "test_objective",
    "test_render_fuzz",
    "test_data",
    "test_results",
    "test_browser",
    "test_study",
)


def pytest_collection_modifyitems(items):
    "The slowest files first, so that no process is left alone with one at the end."

    def place(item):
        return SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST)

    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=place)
