"""Loops that numba compiles at their first call; what is compiled is kept beside the file, or in the user's cache folder."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

inlined = numba.njit(inline="always")
"""For a few lines of a compiled loop that have a name: they become part of it before it is compiled."""
P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function, compiled; where nothing can be kept, as in a container that may write nowhere, by every process anew."""
    try:
        return cast(Callable[P, T], numba.njit(cache=True, nogil=True, error_model="python")(function))
    except RuntimeError as error:
        if "cache" not in str(error):
            raise
        return cast(Callable[P, T], numba.njit(nogil=True)(function))
