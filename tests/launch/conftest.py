"""What tests of several commands need."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from training.model.loading import load_pretrained
from training.model.routers import router_parameters
from training.objective.terms import ObjectiveArguments
from training.run_folder import router_delta


@pytest.fixture
def moved_delta(tmp_path: Path) -> Path:
    """A router delta of the shipped model, its routers moved a little."""
    routers = router_parameters(load_pretrained("data/embedded/model", dtype=torch.float32))
    moved = {name: weight.detach() + 0.05 * weight.std() * torch.randn_like(weight) for name, weight in routers.items()}
    about = {"objective": "cache", "config": {**asdict(ObjectiveArguments()), "seed": 3}}
    digest = router_delta.checkpoint_sha256("data/embedded/model", moved)
    router_delta.save(tmp_path / "delta", moved, base_model="data/embedded/model", base_sha256=digest, about=about)
    return tmp_path / "delta"
