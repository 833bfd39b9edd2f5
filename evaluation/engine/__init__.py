"""Exact decoding of a mixture-of-experts checkpoint whose experts stay on disk; `load` is the door.

`load` is resolved when it is first asked for, so that the parts that need no torch (replay, traces) import without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.engine.loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from evaluation.engine.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
