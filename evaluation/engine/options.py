"""What the user decides about an engine: one checked set of choices, which flags, server and benchmarks all fill in.

Only what needs no model is checked here; `load` checks the rest.
"""

from dataclasses import dataclass
from typing import Literal

from configs.checks import at_least
from configs.load import UserError
from configs.sizes import parse_size
from evaluation.engine.cache.policies import DEFAULT, ONLINE
from evaluation.engine.cache.pool import SCOPES
from evaluation.engine.levers.drop import Drop
from evaluation.engine.levers.spec import levers_of
from evaluation.engine.memory.demand import budget_bytes

SLOTS = ("auto", "stored", "ready")
EXACT, PACKED = "exact", "packed"
AUTO: Literal["auto"] = "auto"
CONTEXT_TOKENS = 2048
"""Tokens of prompt and answer that have memory of their own unless told otherwise."""


@dataclass(frozen=True)
class EngineOptions:
    """How much memory an engine gets, and how it uses it.

    Raises:
        UserError: a value that no model could run with, or not exactly one of `expert_cache` and `memory_budget`.
    """

    # memory for experts alone: 512KiB, 2MiB, 25% of all experts, or bytes; room for some that do not stay comes on top
    expert_cache: int | str | None = None
    # memory for everything instead: weights, experts, KV cache, activations, buffers; 512MiB, 8GiB,
    # 25% of the machine, or `smallest + 10%`, which is in parts of the smallest that works
    memory_budget: int | str | None = None
    # under a memory budget: tokens with room for keys and values of their own, over all sequences of a batch; a longer
    # context takes slots from the experts, and is refused when they have none left to give
    context_tokens: int = CONTEXT_TOKENS
    # under a memory budget: how many tokens of a prompt are computed at once at most, if the caller sees to that
    # (prefill_chunk_size, Conversations); none: the whole prompt
    prompt_tokens: int | None = None
    # which expert leaves the cache: lru, fifo, lfu, lfru or decayed
    cache_policy: str = DEFAULT
    # global (one pool for all layers) or per_layer (equal pools)
    cache_scope: str = "global"
    # how many experts of the next layer to read ahead, those that its router is likely to choose; same tokens, more reads.
    # auto: as long as what is missed takes longer to read than asking routers takes, by what both took lately
    prefetch: int | Literal["auto"] = 0
    # what the slots of quantised experts hold: stored (their bytes, two to four times as many experts, decoded at every use),
    # ready (matrices to multiply by) or auto
    slots: str = "auto"
    # packed CHANGES THE LAST BITS: one or two rows are multiplied by quantised experts as they are stored, which decodes no
    # matrix; exact decodes and gives the resident model's bits
    products: str = EXACT
    # the precision to compute in: auto (as stored), bfloat16, float16 or float32
    dtype: str = "auto"
    # where to compute: cpu, cuda (slots in its memory; with an expert cache only), or auto (cuda if there is one)
    device: str = "cpu"
    # how many reads may be under way at once; none: what suits the disk
    reads_in_flight: int | None = None
    # keep the routing of every token
    record_trace: bool = False
    # CHANGES THE TEXT: while decoding, routers take account of what is in the cache. prior:delta=0.04 prefers residents by that
    # much mixing weight; also space=logits (arXiv 2412.00099), keep, regret, swaps, prefill; drop:below=0.02 leaves missing
    # experts of little weight out; several with a + between them
    lever: str | None = None
    # say so if the expert cache is too small to be of use while decoding
    warn: bool = True

    def __post_init__(self) -> None:
        if self.cache_policy not in ONLINE:
            raise UserError(f"unknown cache policy {self.cache_policy!r}; known: {', '.join(ONLINE)}")
        if self.cache_scope not in SCOPES:
            raise UserError(f"unknown cache scope {self.cache_scope!r}; known: {', '.join(SCOPES)}")
        if self.slots not in SLOTS:
            raise UserError(f"unknown slots {self.slots!r}; known: {', '.join(SLOTS)}")
        if self.products not in (EXACT, PACKED):
            raise UserError(f"unknown products {self.products!r}; known: {EXACT}, {PACKED}")
        if self.products == PACKED and self.slots == "ready":
            raise UserError(
                "products=packed multiplies by what is stored, and slots=ready holds what is decoded; leave one out"
            )
        at_least(self, context_tokens=1, reads_in_flight=1, **({} if self.prefetch == AUTO else {"prefetch": 0}))
        if (self.expert_cache is None) == (self.memory_budget is None):
            raise UserError(
                "give exactly one of expert_cache (memory for experts) and memory_budget (memory for everything)"
            )
        if self.expert_cache is not None:
            parse_size(self.expert_cache, what="expert cache", whole_bytes=1)
        if self.memory_budget is not None:
            budget_bytes(self.memory_budget, smallest_bytes=1)
        levers = () if self.lever is None else levers_of(self.lever)
        if self.record_trace and any(isinstance(one, Drop) for one in levers):
            raise UserError(
                "a trace holds as many experts for every token, and a lever that drops some leaves fewer; do without one"
            )

    @property
    def changes(self) -> str | None:
        """What makes outputs others than the resident model's, as it is named beside them; None: nothing."""
        packed = "products=packed" if self.products == PACKED else None
        return ", ".join(filter(None, (self.lever, packed))) or None
