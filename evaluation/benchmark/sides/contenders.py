"""The contenders: our engine at each cache size, and opponents with all that they need prepared."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs.load import UserError
from configs.sizes import parse_size
from evaluation.benchmark.order import COLD, Leg, Order
from evaluation.benchmark.processes import Limits, run_side
from evaluation.benchmark.sides.llamacpp_side import GGUF_PRECISION
from evaluation.engine.memory.process import total_memory_bytes
from evaluation.engine.store.experts import ExpertStore
from evaluation.export.gguf_file import write_gguf

OPPONENTS = ("accelerate", "llamacpp", "resident")
PROBE = Leg(COLD, [1] * 8, 2)
ACCELERATE_MARGINS = (500 << 20, 700 << 20, 1000 << 20)  # of the limit, for Python, one layer and its copy

REPACKED = 1.25
"""Memory that llama.cpp takes to copy quantised weights, in sizes of the GGUF; with less it uses them as they are mapped."""


@dataclass(frozen=True)
class Contender:
    """One side as it takes part; `order` lacks only the legs."""

    name: str
    order: Order
    limits: Limits
    unable: str | None = None  # why it cannot take part


def our_contenders(
    base: Order, limits: Limits, *, caches: Sequence[str], budgets: Sequence[str], prefetches: Sequence[int],
    levers: Sequence[str | None] = (None,),
) -> list[Contender]:  # fmt: skip
    """Our engine, once for each size of the expert cache and each memory budget, each number to read ahead and each lever."""
    orders = {f"remoe {cache}": replace(base, side="remoe", expert_cache=cache) for cache in caches}
    orders |= {f"remoe {size} for all": replace(base, side="remoe", memory_budget=size) for size in budgets}
    return [
        Contender(
            ", ".join([name, *([f"prefetch {ahead}"] if ahead else []), *([lever] if lever else [])]),
            replace(order, prefetch=ahead, lever=lever),
            limits,
        )
        for name, order in orders.items()
        for ahead in prefetches
        for lever in levers
    ]


def opponent(name: str, base: Order, limits: Limits, *, work_dir: Path, gguf: Path, ours: Order) -> Contender:
    """Prepare one opponent: write its GGUF, or find out how much accelerate can hold under the limit without being killed.

    Without a limit accelerate holds as much as `ours`.
    """
    order = replace(base, side=name)
    if name == "resident":  # the reference that has everything in memory; it would only be killed
        return Contender(name, order, replace(limits, memory_bytes=None))
    if name == "llamacpp":
        unable, limit_bytes = _write_gguf(base.model_dir, gguf), limits.memory_bytes
        repacks = bool(unable) or limit_bytes is None or gguf.stat().st_size * REPACKED <= limit_bytes
        return Contender(name, replace(order, gguf=str(gguf), repacks=repacks), limits, unable=unable)
    (work_dir / "offload").mkdir(parents=True, exist_ok=True)
    order = replace(order, offload_dir=str(work_dir / "offload"))
    if limits.memory_bytes is None:
        return Contender(name, replace(order, resident_bytes=_resident_bytes(ours)), limits)
    return _accelerate_that_fits(order, limits, limits.memory_bytes)


def _resident_bytes(ours: Order) -> int:
    """Bytes of weights that our engine's memory could hold, for a side that keeps weights and nothing else."""
    if ours.memory_budget is not None:
        return parse_size(ours.memory_budget, whole_bytes=total_memory_bytes())
    store = ExpertStore(ours.model_dir)
    return store.resident_bytes + parse_size(str(ours.expert_cache), whole_bytes=store.all_experts_bytes)


def _write_gguf(model_dir: str, gguf: Path) -> str | None:
    """Write the model as GGUF unless that was done since it last changed; returns why it cannot be written."""
    newest = max(path.stat().st_mtime for path in Path(model_dir).iterdir())
    try:
        if not gguf.is_file() or gguf.stat().st_mtime < newest:
            gguf.parent.mkdir(parents=True, exist_ok=True)
            write_gguf(model_dir, gguf, precision=GGUF_PRECISION)
    except UserError as error:
        return str(error)
    return None


def _accelerate_that_fits(order: Order, limits: Limits, limit_bytes: int) -> Contender:
    """accelerate with as many weights in memory as it can hold and yet survive a few tokens; found by trying."""
    for resident_bytes in dict.fromkeys(max(0, limit_bytes - margin) for margin in (*ACCELERATE_MARGINS, limit_bytes)):
        order = replace(order, resident_bytes=resident_bytes)
        run = run_side(replace(order, legs=[PROBE]), limits, contender=order.side, repeat=-1)
        if run.failure is None:
            return Contender(order.side, order, limits)
    return Contender(order.side, order, limits, unable=f"also with all experts on disk: {run.failure}")
