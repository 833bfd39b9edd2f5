"""A memory budget that holds a number of experts and nothing beside them; no test in here."""

from pathlib import Path

from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions


def budget_for(folder: Path, *, experts: int, context_tokens: int = 64) -> int:
    """Bytes that leave room for this many experts of the checkpoint in `folder`."""
    with load(folder, EngineOptions(memory_budget="400MiB", context_tokens=context_tokens)) as (_, engine):
        division = engine.division
        assert division is not None
        assert division.slots >= experts
        return division.budget_bytes - division.shared_bytes + (experts - division.smallest_slots) * division.step_bytes
