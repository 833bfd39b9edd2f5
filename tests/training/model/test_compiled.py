"""Compiled loops work where nothing may be written, and other mistakes are not hidden."""

import subprocess
import sys
from pathlib import Path

import numba
import pytest

from training.model.compiled import compiled

SCRIPT = """
from training.model.compiled import compiled
from numba.core import caching
caching.CompileResultCacheImpl._locator_classes = []  # as where neither the checkout nor a home can be written to

@compiled
def twice(x):
    return 2 * x

print(twice(21))
"""


def test_where_nothing_can_be_kept_it_is_compiled_anew() -> None:
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "42"


def test_another_mistake_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> object:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(numba, "njit", broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        compiled(len)
