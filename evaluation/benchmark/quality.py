"""How long the tasks take: our engine beside the model in memory; both in this process, in turns, in batches of their own."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import transformers
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from configs.checks import at_least
from evaluation.benchmark.tables import RATIO, table
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.quality.language_model import BatchedLM
from evaluation.quality.scores import RESIDENT_BATCH, Scores, TextScores, scores_of
from evaluation.quality.tasks import LoadedTasks, QualityArguments, load_tasks
from evaluation.report.numbers import SPACE, Unit
from evaluation.turns import in_turn, paired_ratio
from training.model.loading import load_pretrained, load_tokenizer, local_folder

TENTHS = Unit(digits=1, suffix=f"{SPACE}s")


@dataclass(frozen=True, kw_only=True)
class QualityBenchmark:
    """Time tasks on the engine beside the model in memory.

    example:
      remoe bench quality --model data/embedded/model --expert-cache 1.27MiB
    """

    model: str  # folder or hub name
    expert_cache: str  # of the engine
    tasks: tuple[str, ...] = ("headword", "next_line_prose", "perplexity_prose", "letters")
    include_path: str = "data/embedded/tasks"  # folder of task YAMLs
    limit: int = 50  # items per task
    repeats: int = 5  # turns of all sides
    dtype: str = "auto"  # precision: auto (as stored), float32 or bfloat16

    def __post_init__(self) -> None:
        at_least(self, limit=1, repeats=1)


Side = Callable[[LoadedTasks, QualityArguments], Scores]


def benchmark(options: QualityBenchmark) -> None:
    """Load both sides, let them take turns, and print seconds and ratios of every task."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(local_folder(options.model))
    asked = QualityArguments(include_path=options.include_path, tasks=list(options.tasks), limit=options.limit)
    rows = []
    with ExitStack() as held:
        ours = held.enter_context(_engine(options, tokenizer))
        theirs = _resident(options, tokenizer)
        for name in load_tasks(asked).tasks:
            args = replace(asked, tasks=[name])
            rows.append(_measured(name, load_tasks(args), args, {"engine": ours, "resident": theirs}, options.repeats))
    columns = "task|>engine|>resident|>engine / resident|largest difference"
    caption = "Seconds: medians. Ratio: median of the ratios within a turn, 95 % interval if there are enough turns."
    Console().print(table(f"{options.model}, {options.limit} items a task", columns, rows, caption=caption))


def _measured(
    name: str, tasks: LoadedTasks, args: QualityArguments, sides: dict[str, Side], repeats: int
) -> tuple[str, ...]:
    """One row: both sides at one task; the first turn only warms up."""
    scores = {side: ask(tasks, args) for side, ask in sides.items()}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats):
        for side in in_turn(list(sides), turn):
            gc.collect()
            started = time.perf_counter()
            sides[side](tasks, args)
            seconds[side].append(time.perf_counter() - started)
    ours, theirs = seconds.values()
    ratio = paired_ratio(ours, to=theirs)
    assert ratio is not None, "every turn was measured"
    interval = (
        "" if ratio.low is None or ratio.high is None else f" ({RATIO.text(ratio.low)} to {RATIO.text(ratio.high)})"
    )
    return (
        name, TENTHS.text(median(ours)), TENTHS.text(median(theirs)), f"{RATIO.text(ratio.median)}{interval}",
        _difference(*scores.values()),
    )  # fmt: skip


def _difference(ours: Scores, theirs: Scores) -> str:
    """Of any item's score, in its own unit."""
    largest = max(float(abs(one.values - theirs[key].values).max()) for key, one in ours.items())
    unit = " nats" if any(isinstance(one, TextScores) for one in ours.values()) else ""
    return f"{largest:.2g}{unit}"


@contextmanager
def _engine(options: QualityBenchmark, tokenizer: PreTrainedTokenizerBase) -> Iterator[Side]:
    paged = EngineOptions(options.expert_cache, dtype=options.dtype, warn=False)
    with load(local_folder(options.model), paged) as (model, engine):

        def ask(tasks: LoadedTasks, args: QualityArguments) -> Scores:
            engine.reset_cache()
            return scores_of(BatchedLM(model, tokenizer, engine=engine), tokenizer, args, tasks)

        yield ask


def _resident(options: QualityBenchmark, tokenizer: PreTrainedTokenizerBase) -> Side:
    model = load_pretrained(options.model, dtype=options.dtype)
    lm = partial(BatchedLM, model, tokenizer, batch_size=RESIDENT_BATCH)
    return lambda tasks, args: scores_of(lm(), tokenizer, args, tasks)
