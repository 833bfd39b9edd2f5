"""The contenders: our engine at each cache size, and opponents with all that they need prepared."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs.load import UserError
from configs.sizes import parse_size
from evaluation.benchmark.order import COLD, Leg, Order
from evaluation.benchmark.processes import Limits, run_side
from evaluation.engine.memory.process import total_memory_bytes
from evaluation.engine.store.experts import ExpertStore
from evaluation.export.gguf_file import write_gguf

OPPONENTS = ("accelerate", "llamacpp", "resident")
UNLIMITED = ("resident",)  # the reference that has everything in memory; it would only be killed
PROBE = Leg(COLD, [1] * 8, 2)
ACCELERATE_MARGINS = (500 << 20, 700 << 20, 1000 << 20)  # of the limit, for Python, one layer and its copy
GGUF_PRECISION = "float16"  # what llama.cpp computes fastest in of the 16-bit formats, on processors without bfloat16


@dataclass(frozen=True)
class Contender:
    """One side as it takes part; `order` lacks only the legs."""

    name: str
    order: Order
    limits: Limits
    unable: str | None = None  # why it cannot take part


def our_contenders(
    base: Order, limits: Limits, *, caches: Sequence[str], budgets: Sequence[str], prefetches: Sequence[int]
) -> list[Contender]:
    """Our engine, once for each size of the expert cache and each memory budget, with each number to read ahead."""
    orders = {f"remoe {cache}": replace(base, side="remoe", expert_cache=cache) for cache in caches}
    orders |= {f"remoe {size} for all": replace(base, side="remoe", memory_budget=size) for size in budgets}
    return [
        Contender(f"{name}, prefetch {ahead}" if ahead else name, replace(order, prefetch=ahead), limits)
        for name, order in orders.items()
        for ahead in prefetches
    ]


def parse_opponents(text: str) -> list[str]:
    """The names in `accelerate,llamacpp`; an empty text names nobody.

    Raises:
        UserError: a name is unknown.
    """
    named = [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in OPPONENTS:
            raise UserError(f"--against {name!r} is not known; write some of {','.join(OPPONENTS)}")
    return list(dict.fromkeys(named))


def opponent(name: str, base: Order, limits: Limits, *, work_dir: Path, gguf: Path, ours: Order) -> Contender:
    """Prepare one opponent: write its GGUF, or find out how much accelerate can hold under the limit without being killed.

    Without a limit accelerate holds as much as `ours`.
    """
    if name in UNLIMITED:
        return Contender(name, replace(base, side=name), replace(limits, memory_bytes=None))
    if name == "llamacpp":
        return _llamacpp(base, limits, gguf)
    order = replace(base, side=name, offload_dir=str(work_dir / "offload"))
    (work_dir / "offload").mkdir(parents=True, exist_ok=True)
    if limits.memory_bytes is None:
        return Contender(name, replace(order, resident_bytes=_resident_bytes(ours)), limits)
    return _accelerate_that_fits(name, order, limits, limits.memory_bytes)


def _resident_bytes(ours: Order) -> int:
    """Bytes of weights that our engine's memory could hold, for a side that keeps weights and nothing else."""
    if ours.memory_budget is not None:
        return parse_size(ours.memory_budget, whole_bytes=total_memory_bytes())
    store = ExpertStore(ours.model_dir)
    return store.resident_bytes + parse_size(str(ours.expert_cache), whole_bytes=store.all_experts_bytes)


def _llamacpp(base: Order, limits: Limits, gguf: Path) -> Contender:
    order = replace(base, side="llamacpp", gguf=str(gguf), settings={"gguf_precision": GGUF_PRECISION})
    newest = max(path.stat().st_mtime for path in Path(base.model_dir).iterdir())
    try:
        if not gguf.is_file() or gguf.stat().st_mtime < newest:
            gguf.parent.mkdir(parents=True, exist_ok=True)
            write_gguf(base.model_dir, gguf, precision=GGUF_PRECISION)
    except UserError as error:
        return Contender("llamacpp", order, limits, unable=str(error))
    return Contender("llamacpp", order, limits)


def _accelerate_that_fits(name: str, order: Order, limits: Limits, limit_bytes: int) -> Contender:
    """accelerate with as many weights in memory as it can hold and yet survive a few tokens; found by trying."""
    for resident_bytes in dict.fromkeys(max(0, limit_bytes - margin) for margin in (*ACCELERATE_MARGINS, limit_bytes)):
        probed = replace(order, resident_bytes=resident_bytes)
        run = run_side(replace(probed, legs=[PROBE]), limits, contender=name, repeat=-1)
        if run.failure is None:
            return Contender(name, probed, limits)
    return Contender(name, order, limits, unable=f"also with all experts on disk: {run.failure}")
