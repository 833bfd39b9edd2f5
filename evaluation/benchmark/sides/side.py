"""The process of one side: `python -m evaluation.benchmark.sides.side ORDER.json RESULT.json`.

It is alone in its memory group and counts its own reads. The result is written again after every leg, so that what a
process did before it was killed is not lost. No text ends early: end-of-text tokens are switched off everywhere.
"""

import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from configs.files import write_json
from evaluation.benchmark import page_cache
from evaluation.benchmark.order import WARM, Order
from evaluation.benchmark.sides.serving import Serving
from evaluation.engine.memory.process import peak_rss_bytes


def open_side(order: Order) -> AbstractContextManager[Serving]:
    """Load the order's side, for as long as the context lasts. What other sides need is not imported: it would weigh."""
    module = "llamacpp_side" if order.side == "llamacpp" else "transformers_sides"
    sides: Any = import_module(f"evaluation.benchmark.sides.{module}")
    return getattr(sides, order.side)(order)


def main(order_path: Path, result_path: Path) -> None:
    """Load the side, serve the legs, write the result."""
    order = Order.read(order_path)
    started = time.perf_counter()
    with open_side(order) as serving:
        load_seconds, legs = time.perf_counter() - started, {}
        for leg in order.legs:
            left_bytes = None
            if leg.name != WARM:
                serving.begin_cold()
                page_cache.drop(serving.files)
                left_bytes = page_cache.cached_bytes(serving.files)
            legs[leg.name] = {**asdict(serving.request(leg)), "cached_bytes_at_start": left_bytes}
            result = {"load_seconds": load_seconds, "settings": serving.settings, "legs": legs}
            write_json(result_path, {**result, "peak_rss_bytes": peak_rss_bytes()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
