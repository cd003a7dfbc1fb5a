"Compiled functions, and how they are compiled."

import warnings
from collections.abc import Callable


def cached(
    **rules,  # of `numba.njit`
) -> Callable:
    """`njit` that keeps what it compiled on disk, for the next process.

    Where no folder can be written (a read-only installation without a home), every process compiles anew.
    """
    from numba import njit

    def compile(function):
        try:
            return njit(cache=True, **rules)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
        warnings.warn(
            "numba: no folder for compiled functions can be written, so each process compiles them anew; "
            "set NUMBA_CACHE_DIR to one that can"
        )
        return njit(**rules)(function)

    return compile
