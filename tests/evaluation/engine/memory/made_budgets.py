"""A memory budget that holds so many experts and nothing beside them; no test in here."""

from pathlib import Path

import pytest

from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions


def budget_for(folder: Path, monkeypatch: pytest.MonkeyPatch, *, experts: int, context_tokens: int = 64) -> int:
    """Bytes; what is resident counts as nothing from now on, because it is measured and never twice the same."""
    monkeypatch.setattr("evaluation.engine.loading.private_bytes", lambda: 0)
    with load(folder, EngineOptions(memory_budget="400MiB", context_tokens=context_tokens)) as (_, engine):
        division = engine.division
        assert division is not None
        assert division.slots >= experts
        return division.budget_bytes - division.shared_bytes + (experts - division.smallest_slots) * division.step_bytes
