"""A made model of 1.5 MB, made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.corpus import EMBEDDED
from evaluation.benchmark.made_model.made_checkpoint import Recipe, write_checkpoint
from evaluation.benchmark.made_model.synthetic import Shape
from training.model.loading import load_tokenizer

TINY = Shape(
    hidden=128, layers=2, num_experts=8, top_k=2, intermediate=16, shared_intermediate=16, vocabulary=4096, context=512
)


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """`make(seed=, eor=, ...)`: a new folder with a checkpoint of TINY, and what `write_checkpoint` says of it."""

    def made(**changed: Any) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("made")
        recipe = Recipe(**{"shape": TINY, "eor": 0.5, "seed": 0, "dtype": "bfloat16", **changed})
        return folder, write_checkpoint(folder, recipe, load_tokenizer(str(EMBEDDED / "tokenizer")))

    return made


@pytest.fixture(scope="session")
def made_model(make: Callable[..., tuple[Path, dict[str, Any]]]) -> tuple[Path, dict[str, Any]]:
    """One of them. Never write into it."""
    return make()
