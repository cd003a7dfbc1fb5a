"""Runs are compared bit by bit, so they train on the processor also where there is a GPU; tests of a GPU move their tensors themselves.

Where several processes share the tests (`make test`), each computes with one thread, and each test file stays in one process.
"""

import os

os.environ["ACCELERATE_USE_CPU"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, "1")
