"""Runs are compared bit by bit, so they train on the processor also where there is a GPU; tests of a GPU move their tensors themselves."""

import os

os.environ["ACCELERATE_USE_CPU"] = "1"
