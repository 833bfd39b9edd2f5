"""A memory budget divided: residents, read buffers, KV cache and activations are what they are, experts get the rest.

The KV cache has a floor: the tokens that were announced when the model was loaded. When a request needs more, slots of
the expert cache make room, one call at a time, and come back when the request is over; when no more can, the request is
refused before it computes anything. So the total stays what it was.
"""

from dataclasses import dataclass
from typing import NamedTuple

from configs.load import UserError
from configs.sizes import readable
from evaluation.engine.memory.demand import Demand, budget_bytes
from evaluation.engine.memory.needs import Needs

PASSING_SHARE = 8
"""One slot is added for this many others, for experts that do not stay, so that several of them are read at once."""


class BudgetTooSmall(UserError):
    """A memory budget under which the model does not work; the message ends with the smallest that works."""


class ContextTooLong(UserError):
    """A request needs more memory than a budget leaves."""


class Call(NamedTuple):
    """One forward call of a model: `rows` new tokens in `batch` sequences of `context_tokens` each, the new ones included."""

    batch: int = 1
    rows: int = 1
    context_tokens: int = 1
    keeps: bool = True  # keys and values, for tokens that follow


def passing_slots(slots: int, reads_in_flight: int) -> int:
    """Slots on top of the cache's, for experts that only pass through."""
    return max(1, min(reads_in_flight, slots // PASSING_SHARE))


@dataclass(frozen=True)
class Division:
    """What a budget is divided into, in bytes where nothing else is said."""

    budget_bytes: int
    resident_bytes: int  # everything of the model but experts, and what loading it left behind
    buffer_bytes: int  # of the reading threads, and slots for experts that pass through or are read ahead
    kv_bytes: int  # of `context_tokens`
    activation_bytes: int  # of a prompt, as far as it is computed at once
    context_tokens: int
    slots: int  # of the one pool, or of each layer's
    pools: int
    smallest_slots: int
    slot_bytes: int
    needs: Needs

    @property
    def expert_bytes(self) -> int:
        """The expert cache."""
        return self.slots * self.step_bytes

    @property
    def step_bytes(self) -> int:
        """One slot more, in every pool."""
        return self.slot_bytes * self.pools

    @property
    def shared_bytes(self) -> int:
        """What experts above the fewest slots and kept keys and values share."""
        parts_bytes = self.resident_bytes + self.buffer_bytes + self.kv_bytes + self.activation_bytes
        return self.budget_bytes - parts_bytes - self.smallest_slots * self.step_bytes

    def spare_bytes(self, call: Call) -> int:
        """What a call leaves above the fewest slots; raises `ContextTooLong` if that is negative, before computing."""
        batch, rows, context_tokens, keeps = call
        needed_bytes = self.needs.kv_bytes(batch * context_tokens) if keeps else self.needs.layer_kv_bytes(rows)
        needed_bytes += self.needs.activation_bytes(rows=rows, context_tokens=context_tokens)
        lacking_bytes = max(0, needed_bytes - self.kv_bytes - self.activation_bytes)
        spare_bytes = self.shared_bytes - lacking_bytes
        if spare_bytes < 0:
            missing = -(spare_bytes // self.step_bytes) * self.pools
            more_bytes = (missing + missing // PASSING_SHARE + 1) * self.slot_bytes
            raise ContextTooLong(
                f"{batch} x {context_tokens} tokens need {readable(needed_bytes)} for keys, values and activations, more "
                f"than a memory budget of {readable(self.budget_bytes)} leaves; shorten the request, or give "
                f"{readable(self.budget_bytes + more_bytes)}"
            )
        return spare_bytes

    def slots_beside(self, kept_bytes: int) -> int:
        """Slots of a pool beside this many bytes of kept keys and values, while no call needs more than was planned."""
        return self.slots_with(self.shared_bytes - kept_bytes)

    def slots_with(self, spare_bytes: int) -> int:
        """Slots of a pool that this many bytes above the fewest slots buy."""
        return min(self.slots, self.smallest_slots + spare_bytes // self.step_bytes)


def divide(
    budget: int | str, *, demand: Demand, needs: Needs, resident_bytes: int, reader_bytes: int, reads_in_flight: int,
    context_tokens: int, scope: str, prompt_tokens: int | None = None, ahead_slots: int = 0,
) -> Division:  # fmt: skip
    """Divide a budget; experts get what the rest leaves, at most all of them.

    Args:
        budget: see `budget_bytes`.
        reader_bytes: the buffers of the reading threads.
        prompt_tokens: of a prompt that are computed at once, at most; None: all that the context may have.
        ahead_slots: for experts that are read ahead.

    Raises:
        BudgetTooSmall: the message names the smallest that works.
    """
    pools = 1 if scope == "global" else demand.layers
    reading_bytes = reader_bytes + ahead_slots * demand.slot_bytes
    kv_bytes = needs.kv_bytes(context_tokens)
    rows = min(context_tokens, prompt_tokens or context_tokens)
    activation_bytes = needs.activation_bytes(rows=rows, context_tokens=context_tokens)
    fixed_bytes = resident_bytes + reading_bytes + kv_bytes + activation_bytes

    def total_bytes(slots: int) -> int:
        return fixed_bytes + (slots * pools + passing_slots(slots * pools, reads_in_flight)) * demand.slot_bytes

    whole_bytes = budget_bytes(budget, smallest_bytes=total_bytes(demand.top_k))
    slots = min((whole_bytes - fixed_bytes) // demand.slot_bytes, demand.all_experts) // pools
    while slots >= demand.top_k and total_bytes(slots) > whole_bytes:
        slots -= 1
    if slots < demand.top_k:
        raise BudgetTooSmall(
            f"a memory budget of {readable(whole_bytes)} is too small: the model without its experts takes "
            f"{readable(resident_bytes)}, {context_tokens} tokens of context {readable(kv_bytes + activation_bytes)}, and "
            f"{demand.top_k} experts{' of every layer' if pools > 1 else ''} must fit beside them; the smallest that works "
            f"is {readable(total_bytes(demand.top_k))}"
        )
    return Division(
        budget_bytes=whole_bytes, resident_bytes=resident_bytes,
        buffer_bytes=reading_bytes + passing_slots(slots * pools, reads_in_flight) * demand.slot_bytes,
        kv_bytes=kv_bytes, activation_bytes=activation_bytes, context_tokens=context_tokens, slots=slots, pools=pools,
        smallest_slots=demand.top_k, slot_bytes=demand.slot_bytes, needs=needs,
    )  # fmt: skip
