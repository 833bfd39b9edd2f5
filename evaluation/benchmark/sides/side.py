"""The process of one side: `python -m evaluation.benchmark.sides.side ORDER.json RESULT.json`.

It is alone in its memory group and counts its own reads. The result is written again after every leg, so that what a
process did before it was killed is not lost.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.files import write_json
from evaluation.benchmark import page_cache
from evaluation.benchmark.order import WARM, Order
from evaluation.benchmark.sides.serving import open_side
from evaluation.engine.memory.process import peak_rss_bytes


def main(order_path: Path, result_path: Path) -> None:
    """Load the side, serve the legs, write the result."""
    order = Order.read(order_path)
    started = time.perf_counter()
    with open_side(order) as serving:
        result: dict[str, Any] = {
            "load_seconds": time.perf_counter() - started,
            "settings": {**serving.settings, **order.settings},
            "legs": {},
        }
        for leg in order.legs:
            left_bytes = None
            if leg.name != WARM:
                serving.begin_cold()
                page_cache.drop(serving.files)
                left_bytes = page_cache.cached_bytes(serving.files)
            measured = asdict(serving.request(leg))
            result["legs"][leg.name] = {**measured, "cached_bytes_at_start": left_bytes}
            result["peak_rss_bytes"] = peak_rss_bytes()
            write_json(result_path, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
