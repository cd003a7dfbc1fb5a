"What tests share that draw their cases at random."

import os
import subprocess
import sys

import torch


class Dice:
    "Random numbers of one case, a function of its seed."

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, share):
        return float(torch.rand((), generator=self.generator)) < share

    def whole(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def between(self, low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def some(self, n, share):
        return torch.rand(n, generator=self.generator) < share

    def pick(self, *options):
        return options[self.whole(0, len(options) - 1)]


def with_checked_indices(file, count, request):
    """Run a file of tests as a script over so many cases, every index of compiled functions checked.

    It has a process of its own; what that compiles is kept for all runs on this machine."""
    if hasattr(request.config, "cache"):
        cache = request.config.cache.mkdir("numba-boundscheck")
    else:
        cache = request.getfixturevalue("tmp_path_factory").mktemp("numba")
    env = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(cache)}
    env.setdefault("NUMBA_OPT", "1")  # compiles faster; the checks are the same
    done = subprocess.run(
        [sys.executable, file, "0", str(count)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-3000:]}"
    print(done.stdout)


def report(summary, wrong):
    "The end of such a script: what was checked, and what was wrong with any case."
    import numba

    checked = "every index checked" if numba.config.BOUNDSCHECK else "indices not checked"
    print(f"{summary}; {checked}", *wrong, sep="\n")
    sys.exit(bool(wrong))
