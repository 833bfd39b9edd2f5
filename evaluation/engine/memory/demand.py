"""How many slots a budget buys: sizes as people write them, the smallest that works, and the cliff to warn about."""

import logging
import math
import re
from dataclasses import dataclass

from configs.load import UserError
from configs.sizes import parse_size, readable
from evaluation.engine.memory.process import total_memory_bytes

logger = logging.getLogger(__name__)
SMALLEST = re.compile(r"smallest(?:\s*\+\s*(?P<percent>\d+(?:\.\d+)?)\s*%)?")


@dataclass(frozen=True)
class Demand:
    """What decoding asks of an expert cache."""

    layers: int  # MoE layers
    num_experts: int  # per layer
    top_k: int
    slot_bytes: int  # one expert in compute precision, aligned

    @property
    def token_experts(self) -> int:
        """Experts that one token uses in all layers."""
        return self.layers * self.top_k

    @property
    def all_experts(self) -> int:
        return self.layers * self.num_experts


def budget_bytes(budget: int | str, *, smallest_bytes: int) -> int:
    """Bytes of `8GiB`, `25%` of what there is for this process, or `smallest + 10%`, in parts of the smallest that works."""
    relative = SMALLEST.fullmatch(str(budget).strip())
    if relative is None:
        whole_bytes = total_memory_bytes()
        size_bytes = parse_size(budget, what="memory budget", whole_bytes=whole_bytes)
        if size_bytes > whole_bytes:
            logger.warning("a memory budget of %s is more than the %s there are", budget, readable(whole_bytes))
        return size_bytes
    return math.ceil(smallest_bytes * (100 + float(relative["percent"] or 0)) / 100)


def slots_for(budget_bytes: int, demand: Demand, *, scope: str) -> int:
    """Slots of one pool (`global`) or of each (`per_layer`), at most all experts; `UserError` if a token needs more."""
    pools = 1 if scope == "global" else demand.layers
    slots = min(budget_bytes // demand.slot_bytes // pools, demand.all_experts // pools)
    if slots < demand.top_k:
        smallest_bytes = demand.top_k * pools * demand.slot_bytes
        raise UserError(
            f"an expert cache of {budget_bytes} bytes is too small: a token uses {demand.top_k} experts of a layer at "
            f"once, {demand.slot_bytes} bytes each, and there {'is one pool' if pools == 1 else f'are {pools} pools'}; "
            f"the smallest that works is {smallest_bytes} bytes ({readable(smallest_bytes)})"
        )
    return slots


def warn_below_cliff(slots: int, demand: Demand, *, scope: str, policy: str) -> None:
    """Log, once per load, that a global recency cache below one token's demand is of no use while decoding.

    Between two uses of an expert the other layers bring (layers - 1) x top_k experts: up to that size nothing survives;
    from there to the whole demand only some of the heaviest experts do.
    """
    if scope == "global" and policy in ("lru", "fifo") and slots < demand.token_experts:
        never = slots <= (demand.layers - 1) * demand.top_k
        logger.warning(
            "the expert cache holds %d experts, one token uses %d in all layers: a global %s cache of that size hits "
            "%s while decoding one token at a time; give it at least %s, or another policy or scope",
            slots,
            demand.token_experts,
            policy,
            "nothing" if never else "little",
            readable(demand.token_experts * demand.slot_bytes),
        )
