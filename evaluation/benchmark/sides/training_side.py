"""The process of one side of `remoe bench training`: `python -m evaluation.benchmark.sides.training_side SIDE CONFIG THREADS`.

Loads the model, takes each step when it is told to, and says on standard output how long each took, how much memory they
needed above the model, and what the machine's matrix rate is. All sides see the same rows and train the same tensors.
"""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils.benchmark import Timer
from torch.utils.data import IterableDataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from configs.command import run as run_command
from configs.load import UserError, load
from data.batches import Batch, PackedRows
from evaluation.engine.memory.process import peak_rss_bytes
from training.arguments import TrainArguments
from training.loop import train_step
from training.model import frozen_experts, packed_attention
from training.model.host_memory import give_back_memory
from training.model.quantising import KINDS
from training.run import Run, build
from training.step import take_step
from training.step_metrics import read_steps

OURS, OURS_CE_ONLY, OURS_STOCK_EXPERTS, STOCK_OUR_EXPERTS = "remoe", "ce_only", "stock_experts", "our_experts"
OF_OURS: Mapping[str, str] = {
    OURS_CE_ONLY: "remoe, cross entropy alone",
    OURS_STOCK_EXPERTS: "remoe, transformers' grouped_mm experts",
    **{kind: f"remoe, experts in {kind}" for kind in KINDS},
}
"""Sides that our loop takes the steps of, beside `OURS`; `STOCK_OUR_EXPERTS` are Trainer's with our experts function."""
OVERRIDES: Mapping[str, Sequence[str]] = {
    OURS_CE_ONLY: ["objective=ce_only"],
    **{kind: [f"experts={kind}"] for kind in KINDS},
}
"""What such a side changes in the config."""
READY, FIGURES = "ready for a step", "measured: "
"""A process prints the first before each step, which it takes when a line comes in, and its figures as JSON at its end."""
PROFILE_ROWS = 30
RATE_SIZE, ACCELERATOR_RATE_SIZE, RATE_SECONDS = 1024, 8192, 0.5
"""The square matrices with which the machine's rate is measured (on an accelerator starting a small product takes longer
than the product), and how long."""


@dataclass
class Measured:
    """The figures that one process prints; the first step warms up."""

    step_seconds: list[float]
    losses: list[float]  # the task loss of each step, in nats per token
    tokens_per_step: int
    weights_bytes: int  # of the model's tensors
    model_bytes: int  # held before the first step, libraries included
    peak_bytes: int  # above that
    forward_flop_per_step: int  # of the model's matrix products
    matrix_flop_per_second: float
    attn_implementation: str  # transformers' name
    waits_per_step: int | None = None  # how often the processor waited for a CUDA device, by torch's own count
    profile: str | None = None  # where one more step spent its time, as torch.profiler has it


def main(side: str, config: str, threads: int, profiles: bool) -> None:
    """Load, train, print the figures as one line of JSON.

    `side` is one of ours (`OURS`, `OF_OURS`), or a stock experts_implementation or `STOCK_OUR_EXPERTS`, trained by
    transformers' Trainer; max_steps are all steps.
    """
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    args = load(TrainArguments, config, OVERRIDES.get(side, ()))
    run, is_ours = build(args), side == OURS or side in OF_OURS
    if side == OURS_STOCK_EXPERTS:
        run.model.set_experts_implementation("grouped_mm")
    if not is_ours:
        run.observer.close()
        run.model.set_experts_implementation(frozen_experts.IMPLEMENTATION if side == STOCK_OUR_EXPERTS else side)
        if _attention(run) == packed_attention.IMPLEMENTATION:
            run.model.set_attn_implementation("sdpa")
    batch = run.rows.batch(range(run.args.per_device_train_batch_size)).to(run.accelerator.device)
    flop = _forward_flop(run, batch) * run.rows_per_step // len(batch.input_ids_BS)
    model_bytes = _begin_counting(run.accelerator.device)
    seconds, losses = (_our_steps if is_ours else _stock_steps)(run)
    measured = Measured(
        seconds, losses, run.rows_per_step * run.args.max_length, _weights_bytes(run), model_bytes,
        peak_bytes=_peak_bytes(run.accelerator.device) - model_bytes, forward_flop_per_step=flop,
        matrix_flop_per_second=_matrix_rate(run), attn_implementation=_attention(run),
        waits_per_step=_waits(run) if is_ours else None, profile=_profile(run) if is_ours and profiles else None,
    )  # fmt: skip
    print(f"{FIGURES}{json.dumps(asdict(measured))}", flush=True)


def _weights_bytes(run: Run) -> int:
    return sum(tensor.nbytes for tensor in chain(run.model.parameters(), run.model.buffers()))


def _attention(run: Run) -> str:
    return str(run.model.config.get_text_config()._attn_implementation)


def _wait_for_turn() -> float:
    """Wait until the step may begin; returns the time of that moment."""
    print(READY, flush=True)
    if not sys.stdin.readline():
        raise UserError("whoever gives the turns has ended")
    return time.perf_counter()


def _our_steps(run: Run) -> tuple[list[float], list[float]]:
    """Take all steps with our own loop; returns the seconds of each and its loss."""
    seconds, losses = [], []
    while run.step < run.args.max_steps:
        began = _wait_for_turn()
        losses.append(train_step(run)["train/loss"])
        seconds.append(_finished(run.accelerator.device) - began)
    return seconds, losses


def _waits(run: Run) -> int | None:
    """How often a step that is not read waits for a CUDA device; None on others, which do not tell."""
    if run.accelerator.device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run.taken.append(take_step(run))
        torch.cuda.set_sync_debug_mode("default")
    read_steps(run)
    return sum("synchron" in str(one.message) for one in caught)


def _profile(run: Run) -> str:
    """Of one more step, what took the most time on the device."""
    device = run.accelerator.device.type
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiled:
        train_step(run)
        _finished(run.accelerator.device)
    table = profiled.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=PROFILE_ROWS)
    return str(table)


def _stock_steps(run: Run) -> tuple[list[float], list[float]]:
    """Take all steps with transformers' Trainer: same rows in the same order, same optimizer; the task loss alone."""
    same = (
        "max_steps", "seed", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
        "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "bf16",
    )  # fmt: skip
    options: dict[str, Any] = {name: getattr(run.args, name) for name in same}
    options |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    clock = _StepClock()
    run.model.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(folder, use_cpu=run.accelerator.device.type == "cpu", **options)
        trainer = Trainer(run.model, settings, train_dataset=_StockRows(run.rows), callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds, [log["loss"] for log in trainer.state.log_history if "loss" in log]


class _StepClock(TrainerCallback):
    def __init__(self) -> None:
        self.began, self.seconds = 0.0, list[float]()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = _wait_for_turn()

    def on_step_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        self.seconds.append(_finished(args.device) - self.began)


class _StockRows(IterableDataset[dict[str, Tensor]]):
    """Our packed rows as transformers takes them: its labels stand at their own positions, ours one position earlier."""

    def __init__(self, rows: PackedRows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for row in count():
            batch = self.rows.batch([row])
            labels_S = torch.cat([batch.labels_BS.new_full((1,), -100), batch.labels_BS[0, :-1]])
            yield {"input_ids": batch.input_ids_BS[0], "position_ids": batch.position_ids_BS[0], "labels": labels_S}


@torch.no_grad()
def _forward_flop(run: Run, batch: Batch) -> int:
    """Floating-point operations of the matrix products of one micro-batch's forward pass."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_mm_flop})
    with counter, run.accelerator.autocast():
        run.model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False)
    return counter.get_total_flops()


def _grouped_mm_flop(rows: torch.Size, weights: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * rows[1] * weights[-1]


def _matrix_rate(run: Run) -> float:
    """Floating-point operations per second of large matrix products in the precision that the model computes in."""
    device, dtype = run.accelerator.device, torch.bfloat16 if run.args.bf16 else next(run.model.parameters()).dtype
    size = RATE_SIZE if device.type == "cpu" else ACCELERATOR_RATE_SIZE
    a = torch.randn(size, size, dtype=dtype, device=device)
    waited = "(a @ a)[0, 0].item()"  # for the device too
    product = Timer(waited, globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * size**3 / product.blocked_autorange(min_run_time=RATE_SECONDS).median


def _finished(device: torch.device) -> float:
    """Wait for what an accelerator still has to do; returns the time then."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _begin_counting(device: torch.device) -> int:
    """Bytes held now; `_peak_bytes` will tell the most that was held since."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated()
    give_back_memory()  # what loading has freed must not hide what steps allocate
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # peak := now
    return int(psutil.Process().memory_info().rss)


def _peak_bytes(device: torch.device) -> int:
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    peak_bytes = peak_rss_bytes()
    assert peak_bytes is not None, "where the peak can be set anew, it is told"
    return peak_bytes


if __name__ == "__main__":
    sys.exit(run_command(lambda _: main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True")))
