"""Quantised experts beside the same experts in 16 bits, within one memory budget, in one process, in turns.

And how fast their numbers are decoded, and multiplied by one row as they are stored, on so many cores.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from configs.checks import at_least
from configs.files import prepare, write_json
from configs.load import UserError
from data.pieces import document_beginnings
from evaluation.benchmark.sides.serving import process_io
from evaluation.benchmark.tables import table
from evaluation.engine.engine import Engine
from evaluation.engine.greedy import decode
from evaluation.engine.loading import load
from evaluation.engine.memory.division import BudgetTooSmall
from evaluation.engine.options import EXACT, PACKED, EngineOptions
from evaluation.engine.slot_kind import READY, STORED
from evaluation.engine.slot_memory import SlotMemory
from evaluation.engine.store.experts import ExpertStore
from evaluation.report.numbers import bytes_text
from evaluation.turns import in_turn
from training.model.expert_format import MATRICES
from training.model.loading import load_tokenizer, local_folder

TRIES, TOGETHER = 50, 8
"""Of decoding so many experts and of multiplying by them at once; the median counts."""


@dataclass(frozen=True, kw_only=True)
class FormatsBenchmark:
    """Measure how fast a token is with experts in several formats, within the same memory budget.

    The models are folders of the same weights. Each with quantised experts is decoded with every kind of slots, and with products
    on packed numbers.

    example:
      remoe make-model --output runs/models/mid
      remoe pack --model runs/models/mid --output runs/models/mid-mxfp4 --experts mxfp4
      remoe bench formats --models runs/models/mid,runs/models/mid-mxfp4 --memory-budget 900MiB
    """

    models: str  # folders with a comma between; all sides are compared with the first
    memory_budget: str  # of every side
    prompt_tokens: int = 64  # of the test text
    max_new_tokens: int = 64  # greedy tokens
    prefetch: int = 0  # experts of the next layer that are read ahead
    repeats: int = 3  # turns of every side, after one that is not counted
    output: str | None = None  # JSON file to write everything that was measured to

    def __post_init__(self) -> None:
        at_least(self, prompt_tokens=1, max_new_tokens=2, prefetch=0, repeats=1)


@dataclass(frozen=True)
class _Side:
    model_dir: str
    slots: str
    products: str

    @property
    def name(self) -> str:
        numbers = ExpertStore(self.model_dir).format.numbers.name
        return f"{numbers}, {'packed products' if self.products == PACKED else self.slots}"


def benchmark(options: FormatsBenchmark) -> None:
    """Load all sides, let them take turns, print and write."""
    output = prepare(options.output) if options.output else None
    transformers.utils.logging.disable_progress_bar()
    folders = [local_folder(name) for name in options.models.split(",")]
    (prompt_ids,) = document_beginnings(load_tokenizer(folders[0]), "test", tokens=options.prompt_tokens, count=1)
    with ExitStack() as stack:
        loaded: dict[str, tuple[PreTrainedModel, Engine]] = {}
        for side in _sides(folders):
            how: dict[str, Any] = {
                "slots": side.slots,
                "products": side.products,
                "prefetch": options.prefetch,
                "warn": False,
            }
            tokens = options.prompt_tokens + options.max_new_tokens
            try:
                engine_options = EngineOptions(None, options.memory_budget, tokens, **how)
                loaded[side.name] = stack.enter_context(load(side.model_dir, engine_options))
            except BudgetTooSmall as error:
                print(f"{side.name}: {error}")
        if not loaded:
            raise UserError(f"--memory-budget {options.memory_budget} is too small for every side; see above")
        found = _measured(loaded, prompt_ids, options)
        Console().print(_table(found))
    rates = {ExpertStore(folder).format.numbers.name: _rates(folder) for folder in folders}
    rates = {name: each for name, each in rates.items() if each}
    if rates:
        Console().print(_rates_table(rates))
    if output:
        write_json(output, {"config": asdict(options), "sides": found, "rates": rates})


def _sides(folders: Sequence[str]) -> list[_Side]:
    sides = []
    for folder in folders:
        if ExpertStore(folder).format.is_quantised:
            sides += [_Side(folder, READY, EXACT), _Side(folder, STORED, EXACT), _Side(folder, STORED, PACKED)]
        else:
            sides.append(_Side(folder, "auto", EXACT))
    return sides


def _measured(
    loaded: Mapping[str, tuple[PreTrainedModel, Engine]], prompt_ids: Sequence[int], options: FormatsBenchmark
) -> dict[str, Any]:
    """Milliseconds and bytes of a decoded token of every side, turn by turn.

    `kernel_share`: what the kernel says it fetched from the device for the whole request, beside what the engine counted.
    """
    found: dict[str, Any] = {
        name: {
            "slots": engine.cache.total_slots,
            "experts": engine.demand.all_experts,
            "is_exact": engine.is_exact,
            "tpot_ms": [],
            "bytes_per_token": [],
            "kernel_share": [],
        }
        for name, (_, engine) in loaded.items()
    }
    for turn in range(1 + options.repeats):
        for name in in_turn(list(loaded), turn):
            model, engine = loaded[name]
            before = process_io()["read_bytes"]
            done = decode(model, engine, prompt_ids=prompt_ids, max_new_tokens=options.max_new_tokens)
            fetched = process_io()["read_bytes"] - before
            if turn:
                found[name]["tpot_ms"].append(done.timing.tpot_ms)
                found[name]["bytes_per_token"].append(done.stats.bytes_read_per_token)
                found[name]["kernel_share"].append(fetched / done.stats.device_bytes_read)
    return found


def _table(found: Mapping[str, Any]) -> Table:
    first, rows = next(iter(found.values()))["tpot_ms"], []
    for name, side in found.items():
        times = side["tpot_ms"]
        ratios = sorted(one / other for one, other in zip(times, first, strict=True))
        rows.append(
            (
                name if side["is_exact"] else f"{name} *",
                f"{side['slots']} of {side['experts']}",
                bytes_text(median(side["bytes_per_token"])),
                f"{median(side['kernel_share']):.2f} x",
                f"{median(times):.1f} ms ({min(times):.1f} to {max(times):.1f})",
                f"{median(ratios):.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            )
        )
    columns = "experts, slots|>held|>read a token|>by the kernel|>a token|>time beside the first"
    caption = (
        "* gives other last bits than the resident model\n"
        "by the kernel: bytes that it fetched from the device, beside those that the engine counted; 0 if all were cached"
    )
    return table("formats", columns, rows, caption=caption)


def _rates(model_dir: str) -> dict[str, float]:
    """Numbers a second of an expert that lies packed in a slot; empty where none would."""
    store = ExpertStore(model_dir)
    if not store.format.is_quantised:
        return {}
    keys = list(store.keys)[:TOGETHER]
    slots = range(len(keys))
    memory = SlotMemory(store, len(keys), torch.bfloat16, as_stored=True, multiplies_packed=True)
    for slot, key in enumerate(keys):
        for span in memory.spans(slot, *key):
            span.target[:] = np.fromfile(span.shard, np.uint8, count=len(span.target), offset=span.offset)
    numbers = 3 * store.format.hidden * store.format.intermediate * len(keys)
    columns = {"gate_up": store.format.hidden, "down": store.format.intermediate}
    rows = {matrix: torch.randn(len(keys), count).bfloat16().float().numpy() for matrix, count in columns.items()}

    def decode_all() -> None:
        for slot in slots:
            for matrix in MATRICES:
                memory.matrix(slot, matrix)

    def multiply_all() -> None:
        for matrix in MATRICES:
            memory.multiply(slots, matrix, rows[matrix])

    before, found = torch.get_num_threads(), {}
    for threads in sorted({1, before}):
        torch.set_num_threads(threads)
        for what, work in (("decoded", decode_all), ("multiplied", multiply_all)):
            work()  # which compiles
            seconds = []
            for _ in range(TRIES):
                started = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - started)
            found[f"{what}, {threads} thread{'s' if threads > 1 else ''}"] = numbers / median(seconds)
    torch.set_num_threads(before)
    return found


def _rates_table(rates: Mapping[str, Mapping[str, float]]) -> Table:
    columns = list(next(iter(rates.values())))
    rows = [(name, *(f"{each[column] / 1e9:.1f} G" for column in columns)) for name, each in rates.items()]
    return table(f"{TOGETHER} experts again and again", "|>".join(("numbers a second", *columns)), rows)
