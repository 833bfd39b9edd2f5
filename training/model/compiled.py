"""Loops that numba compiles at their first call; what is compiled is kept beside the file, or in the user's cache folder."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function, compiled; where nothing can be kept, as in a container that may write nowhere, by every process anew."""
    try:
        return cast(Callable[P, T], numba.njit(cache=True)(function))
    except RuntimeError as error:
        if "cache" not in str(error):
            raise
        return cast(Callable[P, T], numba.njit(function))
