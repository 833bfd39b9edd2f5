"""A side that is loaded and ready for requests, whichever it is.

Sides are imported only in the process that runs them (`side.py`): what one needs must not weigh on another. No text ends
early: end-of-text tokens are switched off everywhere.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from evaluation.benchmark.order import Leg, Order
from evaluation.benchmark.sides.meter import LegResult

SIDES = {
    "remoe": "evaluation.benchmark.sides.transformers_sides",
    "accelerate": "evaluation.benchmark.sides.transformers_sides",
    "resident": "evaluation.benchmark.sides.transformers_sides",
    "llamacpp": "evaluation.benchmark.sides.llamacpp_side",
}


@dataclass
class Serving:
    """A loaded side.

    Attributes:
        request: serves one leg.
        begin_cold: forgets what the side itself has cached; the page cache is not its business.
        files: the weights it reads, for the page cache to be dropped.
        settings: in words or numbers, for the report.
    """

    request: Callable[[Leg], LegResult]
    files: list[Path]
    settings: dict[str, Any]
    begin_cold: Callable[[], None] = field(default=lambda: None)


def open_side(order: Order) -> AbstractContextManager[Serving]:
    """Load the order's side, for as long as the context lasts."""
    opened: AbstractContextManager[Serving] = getattr(import_module(SIDES[order.side]), order.side)(order)
    return opened
