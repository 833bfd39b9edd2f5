"""Training without a task loss: only what happens inside each router has a gradient, and it is enough to train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import UserError
from training.arguments import TrainArguments
from training.loop import train_step
from training.model.routers import find_routers
from training.objective.objective import total_counts
from training.run import Run, build
from training.step import forward, micro_batch

Arguments = Callable[..., TrainArguments]
LOCAL: dict[str, Any] = {
    "objective": "local",
    "cache_slots": [4],
    "reuse_warmup_steps": 0,
    "max_steps": 30,
    "warmup_steps": 0,
}


def gradients_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.grad.clone() for name, tensor in run.trained.items() if tensor.grad is not None}


def test_routers_learn_to_miss_less_and_trust_holds_them(train_args: Arguments, tmp_path: Path) -> None:
    moved = {}
    for trust in (0.01, 10.0):
        run = build(
            train_args(
                **LOCAL, learning_rate=0.03, miss_coef=0.5, router_kl_coef=trust, output_dir=str(tmp_path / str(trust))
            )
        )
        before = {name: tensor.detach().clone() for name, tensor in run.trained.items()}
        lines = [train_step(run) for _ in range(30)]
        moved[trust] = sum(float((run.trained[name].detach() - before[name]).norm()) for name in before)
        if trust < 1:
            assert lines[-1]["train/miss_loss"] < 0.9 * lines[0]["train/miss_loss"]
            assert lines[-1]["cache/in_the_loop/hit_rate"] > lines[0]["cache/in_the_loop/hit_rate"]
            assert lines[0]["train/loss"] > 1, "the task loss is still told"
        run.observer.close()
    assert moved[10.0] < 0.5 * moved[0.01]


def test_the_gradient_of_a_router_does_not_depend_on_layers_behind_it(train_args: Arguments, tmp_path: Path) -> None:
    """Another last layer changes nothing for the routers before it, and nothing but routers gets a gradient."""
    found = []
    for factor in (1.0, 3.0):
        run = build(train_args(**LOCAL, miss_coef=0.5, learning_rate=0.0, output_dir=str(tmp_path / str(factor))))
        last = next(reversed(list(find_routers(run.model).values())))
        with torch.no_grad():
            last.weight.mul_(factor)  # type: ignore[operator]
        batch = micro_batch(run, 0)
        forward(run, batch, total_counts(run.args, [batch.on_host])).loss.backward()
        found.append(gradients_of(run))
        assert all(p.grad is None for name, p in run.model.named_parameters() if name not in run.trained)
        run.observer.close()
    names = list(found[0])
    assert torch.equal(found[0][names[0]], found[1][names[0]])
    assert found[0][names[0]].abs().sum() > 0
    assert not torch.equal(found[0][names[-1]], found[1][names[-1]])


def test_nothing_that_could_not_train_is_begun(train_args: Arguments) -> None:
    with pytest.raises(UserError, match="objective=local has no term but trust"):
        build(train_args(**LOCAL, miss_coef=0.0))
    with pytest.raises(ValueError, match="objective=local has no task loss; leave it out"):
        train_args(**LOCAL, distill_coef=0.5)
