"""How long the tasks take: our engine beside the model in memory, or beside the harness on accelerate's disk offload.

The first two are in this process and take turns, in batches of their own. The offload is compared at equal memory: each side
is a process in a memory group of its own, which counts the page cache, and begins every task with nothing in it.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from configs.checks import at_least
from configs.load import UserError
from configs.sizes import parse_size, readable
from evaluation.benchmark.memory_group import NO_CONTROLLER, MemoryGroup, find_hierarchy
from evaluation.benchmark.processes import Child
from evaluation.benchmark.sides.contenders import ACCELERATE_MARGINS
from evaluation.benchmark.sides.quality_side import ANSWER, READY, TaskOrder
from evaluation.benchmark.tables import RATIO, table
from evaluation.engine.loading import load
from evaluation.engine.memory.process import total_memory_bytes
from evaluation.engine.options import EngineOptions
from evaluation.quality.language_model import BatchedLM
from evaluation.quality.scores import RESIDENT_BATCH, Scores, scores_of
from evaluation.quality.tasks import LoadedTasks, QualityArguments, load_tasks
from evaluation.report.numbers import SPACE, Unit
from evaluation.turns import in_turn, paired_ratio
from training.model.loading import load_pretrained, load_tokenizer, local_folder

MODULE = "evaluation.benchmark.sides.quality_side"
OFFLOAD_BATCHES = (64, 16, 4, 1)
"""Every forward call of the offload reads all that lies on disk: the larger, the quicker, while memory holds it."""
TENTHS = Unit(digits=1, suffix=f"{SPACE}s")


@dataclass(frozen=True, kw_only=True)
class QualityBenchmark:
    """Time tasks on the engine beside the model in memory.

    examples:
      remoe bench quality --model data/embedded/model --expert-cache 1.27MiB
      remoe bench quality --model DIR --memory-budget 380MiB --memory-limit 900MiB --limit 8 --repeats 1
    """

    model: str  # folder or hub name
    expert_cache: str | None = None  # of the engine, beside the model in memory; or
    memory_budget: str | None = None  # of the engine, beside accelerate's disk offload
    memory_limit: str | None = None  # with memory_budget: for each process, page cache included
    prefetch: int = 0  # with memory_budget: experts of the next layer that the engine reads ahead
    work_dir: str = "runs/bench"  # with memory_budget: where accelerate's offload folder is made
    tasks: tuple[str, ...] = ("headword", "next_line_prose", "perplexity_prose", "letters")
    include_path: str = "data/embedded/tasks"  # folder of task YAMLs
    limit: int = 50  # items per task
    repeats: int = 5  # turns of all sides
    dtype: str = "auto"  # precision: auto (as stored), float32 or bfloat16

    def __post_init__(self) -> None:
        at_least(self, limit=1, repeats=1, prefetch=0)
        if (self.expert_cache is None) == (self.memory_budget is None):
            raise UserError("write --expert-cache (beside the model in memory) or --memory-budget with --memory-limit")
        if (self.memory_budget is None) != (self.memory_limit is None):
            raise UserError(
                "--memory-budget and --memory-limit go together: the engine's, and that of its whole process"
            )


Side = Callable[[LoadedTasks, QualityArguments], Scores]
Values = Mapping[str, np.ndarray]
Timed = tuple[float, Values]
"""Seconds, and what every item of a task scored by every metric."""
Row = tuple[str, ...]


def benchmark(options: QualityBenchmark) -> None:
    """Load both sides, let them take turns, and print seconds and ratios of every task."""
    transformers.utils.logging.disable_progress_bar()
    asked = QualityArguments(include_path=options.include_path, tasks=list(options.tasks), limit=options.limit)
    names = list(load_tasks(asked).tasks)
    if options.memory_limit is None:
        peer, rows = "resident", _beside_resident(options, asked, names)
    else:
        rows, batch_size = _beside_offload(options, options.memory_limit, names)
        peer = f"offload, batches of {batch_size}"
    columns = f"task|>engine|>{peer}|>engine / {peer.split(',')[0]}|largest difference"
    caption = "Seconds: medians. Ratio: median of the ratios within a turn, 95 % interval if there are enough turns."
    Console().print(table(f"{options.model}, {options.limit} items a task", columns, rows, caption=caption))


def _beside_resident(options: QualityBenchmark, asked: QualityArguments, names: Sequence[str]) -> list[Row]:
    tokenizer, rows = load_tokenizer(local_folder(options.model)), []
    with ExitStack() as held:
        ours = held.enter_context(_engine(options, tokenizer))
        theirs = _resident(options, tokenizer)
        for name in names:
            args = replace(asked, tasks=[name])
            tasks = load_tasks(args)
            sides = {side: partial(_asked, ask, tasks, args) for side, ask in (("ours", ours), ("theirs", theirs))}
            for warm_up in sides.values():
                warm_up()
            rows.append(_measured(name, sides, options.repeats))
    return rows


def _asked(ask: Side, tasks: LoadedTasks, args: QualityArguments) -> Timed:
    gc.collect()
    started = time.perf_counter()
    scores = ask(tasks, args)
    seconds = time.perf_counter() - started
    return seconds, {name: of_task.values for name, of_task in scores.items()}


def _beside_offload(options: QualityBenchmark, memory_limit: str, names: Sequence[str]) -> tuple[list[Row], int]:
    """The rows, and the batch size with which the offload is quickest: the largest that it survives."""
    hierarchy = find_hierarchy()
    if hierarchy is None:
        raise UserError(f"--memory-limit {NO_CONTROLLER}")
    limit_bytes = parse_size(memory_limit, whole_bytes=total_memory_bytes())
    model_dir, tasks_dir = (str(Path(path).resolve()) for path in (local_folder(options.model), options.include_path))
    order = TaskOrder(model_dir, tasks_dir, options.limit, torch.get_num_threads())
    work_dir = Path(options.work_dir) / "offload"
    work_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held, TemporaryDirectory(dir=work_dir) as offload_dir:

        def start(given: TaskOrder) -> Child:
            group = held.enter_context(MemoryGroup(hierarchy, limit_bytes))
            child = held.enter_context(Child(MODULE, json.dumps(asdict(given)), group=group))
            _heard(child, READY)
            return child

        try:
            ours = start(
                replace(order, memory_budget=options.memory_budget, dtype=options.dtype, prefetch=options.prefetch)
            )
            first_of_ours = {name: _told(ours, name) for name in names}
        except UserError as error:
            raise UserError(f"our engine, in a memory group of {memory_limit}: {error}") from error
        tried = [
            replace(order, resident_bytes=max(0, limit_bytes - margin), offload_dir=offload_dir, batch_size=size)
            for size in OFFLOAD_BATCHES
            for margin in (*ACCELERATE_MARGINS, limit_bytes)
        ]
        for given in tried:
            try:
                theirs = start(given)
                first = {name: [first_of_ours[name], _told(theirs, name)] for name in names}
                break
            except UserError as error:
                print(
                    f"offload with batches of {given.batch_size}, {readable(given.resident_bytes or 0)} held: {error}"
                )
        else:
            raise UserError(f"accelerate's offload does not survive {memory_limit}; give more")
        rows = []
        for name in names:
            sides = {"ours": partial(_told, ours, name), "theirs": partial(_told, theirs, name)}
            rows.append(_measured(name, sides, options.repeats - 1, turns=[first[name]]))
        return rows, given.batch_size


def _told(child: Child, name: str) -> Timed:
    """What the process found of a task."""
    try:
        child.nudge(name)
    except OSError as error:
        raise UserError(f"it has ended: {child.last_words}") from error
    found = json.loads(_heard(child, ANSWER).removeprefix(ANSWER))
    return found["seconds"], {key: np.array(values) for key, values in found["values"].items()}


def _heard(child: Child, beginning: str) -> str:
    while line := child.line():
        if line.startswith(beginning):
            return line
    raise UserError(f"a side ended with exit code {child.wait()}: {child.last_words}")


def _measured(
    name: str, sides: Mapping[str, Callable[[], Timed]], repeats: int, *, turns: Sequence[Sequence[Timed]] = ()
) -> Row:
    """One row: both sides at one task, so often and in the `turns` that were taken before."""
    found = {side: [turn[place] for turn in turns] for place, side in enumerate(sides)}
    for turn in range(repeats):
        for side in in_turn(list(sides), turn):
            found[side].append(sides[side]())
    seconds = {side: [taken for taken, _ in of_side] for side, of_side in found.items()}
    values = [of_side[0][1] for of_side in found.values()]
    ours, theirs = seconds.values()
    ratio = paired_ratio(ours, to=theirs)
    assert ratio is not None, "every turn was measured"
    interval = (
        "" if ratio.low is None or ratio.high is None else f" ({RATIO.text(ratio.low)} to {RATIO.text(ratio.high)})"
    )
    return (
        name, TENTHS.text(median(ours)), TENTHS.text(median(theirs)), f"{RATIO.text(ratio.median)}{interval}",
        _difference(*values),
    )  # fmt: skip


def _difference(ours: Values, theirs: Values) -> str:
    """The largest of any item, in its own unit: nats of a text, otherwise of a score."""
    return f"{max(float(abs(values - theirs[key]).max()) for key, values in ours.items()):.2g}"


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
