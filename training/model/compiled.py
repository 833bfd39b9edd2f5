"""Loops that numba compiles at their first call; what is compiled is kept beside the file, or in the user's cache folder."""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar, cast

import numba

inlined = numba.njit(inline="always")
"""For a few lines of a compiled loop that have a name: they become part of it before it is compiled."""
P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T], **how: Any) -> Callable[P, T]:
    """The function, compiled; where nothing can be kept, as in a container that may write nowhere, by every process anew."""
    try:
        return cast(Callable[P, T], numba.njit(cache=True, nogil=True, error_model="python", **how)(function))
    except RuntimeError as error:
        if "cache" not in str(error):
            raise
        return cast(Callable[P, T], numba.njit(nogil=True, **how)(function))


def compiled_in_any_order(function: Callable[P, T]) -> Callable[P, T]:
    """The same; what is added up is added in an order that suits vectors, so the last bits differ between processors."""
    return compiled(function, fastmath={"reassoc", "contract", "nsz"})


def compiled_in_parts(function: Callable[P, T]) -> Callable[P, T]:
    """The same; what its `numba.prange` ranges over is shared out among threads, after `threads_to_share`."""
    return compiled(function, parallel=True)


def threads_to_share() -> int:
    """How many threads share out the next loop: as many as torch has, and the same ones, so that none waits spinning for
    another's turn. 1 where they cannot be the same.
    """
    torch = importlib.import_module("torch")  # of which what replays a trace needs nothing
    threads = min(torch.get_num_threads(), int(cast(Any, numba.config).NUMBA_NUM_THREADS)) if _shares_threads() else 1
    if threads > 1 and numba.get_num_threads() != threads:
        numba.set_num_threads(threads)
    return threads


@cache
def _shares_threads() -> bool:
    """Whether numba can use OpenMP: torch's own library of it is found by whoever comes later in the process."""
    try:
        found = importlib.util.find_spec("numba.np.ufunc.omppool") is not None
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        return False
    cast(Any, numba.config).THREADING_LAYER = "omp"
    return found
