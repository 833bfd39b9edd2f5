"""The process of one side of `remoe bench quality --memory-limit`: `python -m evaluation.benchmark.sides.quality_side ORDER`.

Loads the model, asks a task for every line that comes in with its name, and says on standard output, as a line of JSON, how
long that took and what every item scored. Before each, what it reads is taken out of the page cache.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from configs.command import run
from evaluation.benchmark import page_cache
from evaluation.benchmark.order import Order
from evaluation.benchmark.sides.transformers_sides import load_offloaded
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.quality.language_model import CONTEXT_TOKENS, BatchedLM
from evaluation.quality.scores import scores_of
from evaluation.quality.tasks import QualityArguments, load_tasks
from training.model.loading import load_tokenizer

READY, ANSWER = "ready for a task", "answer: "


@dataclass(frozen=True)
class TaskOrder:
    """The order of one process: ours with a memory budget, or the harness over accelerate's disk offload."""

    model_dir: str
    include_path: str
    limit: int  # items per task
    threads: int
    dtype: str = "auto"  # ours
    memory_budget: str | None = None  # ours
    prefetch: int = 0  # ours
    resident_bytes: int | None = None  # accelerate: weights to keep in memory
    offload_dir: str | None = None  # accelerate
    batch_size: int = 1  # accelerate; ours finds its own


def main(order: TaskOrder) -> None:
    """Load; ask and say until no line comes any more."""
    torch.set_num_threads(order.threads)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(order.model_dir)
    with (_ours if order.memory_budget else _offloaded)(order, tokenizer) as (language_model, files):
        print(READY, flush=True)
        for line in sys.stdin:
            args = QualityArguments(include_path=order.include_path, tasks=[line.strip()], limit=order.limit)
            tasks = load_tasks(args)
            page_cache.drop(files)
            started = time.perf_counter()
            scores = scores_of(language_model(), tokenizer, args, tasks)
            seconds = time.perf_counter() - started
            values = {name: of_task.values.tolist() for name, of_task in scores.items()}
            print(f"{ANSWER}{json.dumps({'seconds': seconds, 'values': values})}", flush=True)


Opened = tuple[Callable[[], Any], list[Path]]
"""Makes the harness's model, as it begins; and the files that it reads."""


@contextmanager
def _ours(order: TaskOrder, tokenizer: Any) -> Iterator[Opened]:
    options = EngineOptions(
        memory_budget=order.memory_budget, context_tokens=CONTEXT_TOKENS, dtype=order.dtype, prefetch=order.prefetch,
        warn=False,
    )  # fmt: skip
    with load(order.model_dir, options) as (model, engine):

        def begin() -> BatchedLM:
            engine.reset_cache()
            return BatchedLM(model, tokenizer, engine=engine)

        yield begin, sorted(Path(order.model_dir).glob("*.safetensors"))


@contextmanager
def _offloaded(order: TaskOrder, tokenizer: Any) -> Iterator[Opened]:
    """The harness's own class."""
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped, unused-ignore]

    places: dict[str, Any] = {"resident_bytes": order.resident_bytes, "offload_dir": order.offload_dir}
    model, files, _ = load_offloaded(Order("accelerate", order.model_dir, [], order.threads, **places))
    yield partial(HFLM, pretrained=model, tokenizer=tokenizer, batch_size=order.batch_size), files


if __name__ == "__main__":
    sys.exit(run(lambda _: main(TaskOrder(**json.loads(sys.argv[1])))))
