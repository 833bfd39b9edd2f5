"""Nothing in a training step waits for an accelerator: no number is read and no shape depends on one between two logging steps.

Counted on the CPU, where what is done only there (parts of experts and of attention, a look at each step's loss) is left out.
"""

import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from configs.load import UserError
from training import step
from training.arguments import TrainArguments
from training.loop import _one_step, train_step
from training.model import frozen_experts
from training.run import Run, build
from training.run_folder.metrics import Tracker
from training.step_metrics import read_steps

ROOT = Path(__file__).parents[2]
Arguments = Callable[..., TrainArguments]

READS = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__bool__, torch.Tensor.__int__,
    torch.Tensor.__float__, torch.Tensor.__index__, torch.Tensor.__contains__, torch.Tensor.__format__, torch.Tensor.__repr__,
    torch.Tensor.nonzero, torch.nonzero, torch.bincount, torch.Tensor.bincount, torch.unique, torch.Tensor.unique,
    torch.masked_select, torch.Tensor.masked_select, torch.equal, torch.Tensor.equal, torch.allclose, torch.argwhere,
    torch.unique_consecutive, torch.Tensor.unique_consecutive, torch.Tensor.is_nonzero, torch.where,
}  # fmt: skip
INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class CountingReads(TorchFunctionMode):
    """Counts what an accelerator would be waited for, by the line of the project (or else of a library) that does it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.is_off = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_off and waits(func, args):
            frames = [f"{Path(frame.filename)}:{frame.lineno}" for frame in inspect.stack()[1:]]
            self.found[next((f for f in frames if f.startswith(str(ROOT)) and ".venv" not in f), frames[0])] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self.is_off = self.is_off, True
        yield
        self.is_off = before


def waits(func: Any, args: Any) -> bool:
    if func in INDEXING:
        indices = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
    return func in READS and not (func is torch.where and len(args) > 1)


def as_on_an_accelerator(patch: pytest.MonkeyPatch, run: Run, counting: CountingReads) -> None:
    def on_host(function: Any) -> Any:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with counting.off():
                return function(*args, **kwargs)

        return called

    patch.setattr(Run, "reads_at_once", False)
    patch.setattr(frozen_experts, "_has_caches", lambda _: False)
    for name in ("micro_batch", "total_counts"):
        patch.setattr(step, name, on_host(getattr(step, name)))
    patch.setattr(run.optimizer, "step", on_host(run.optimizer.step))  # counts its steps in a tensor on the host
    run.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
@pytest.mark.parametrize("objective", ["ce_only", "remoe", "cache", "cache_miss", "melinoe"])
def test_a_step_waits_for_nothing(
    objective: str,
    family: str,
    checkpointing: bool,
    train_args: Arguments,
    model_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beside = {"cache_slots": [6], "logging_steps": 4, "save_steps": 9, "max_steps": 9, "max_grad_norm": 1.0}
    args = train_args(
        model_name_or_path=str(model_dir(family)), objective=objective, gradient_checkpointing=checkpointing, **beside
    )
    run, counting = build(args), CountingReads()
    tracker = Tracker(args, step=0, wandb_id=None, active=True)
    as_on_an_accelerator(monkeypatch, run, counting)
    read = []
    with counting:
        for _ in range(8):
            counting.found.clear()
            _one_step(run, tracker, [], None)
            read.append(dict(counting.found))
    tracker.close()
    assert [bool(one) for one in read] == [True, False, False, True, False, False, False, True], read
    assert all(
        place.startswith(
            (str(ROOT / "training" / "step_metrics.py"), str(ROOT / "training" / "run_folder" / "proof.py"))
        )
        for one in read
        for place in one
    ), read


def test_what_is_counted_is_seen() -> None:
    counting = CountingReads()
    with counting:
        numbers = torch.arange(4.0)
        numbers[numbers > 1]
        float(numbers.sum())
        bool(numbers.isfinite().all())
        numbers.nonzero()
        numbers.where(numbers > 1, 0.0)
        torch.where(numbers > 1, numbers, 0.0)
        numbers[torch.tensor([1, 2])]
    assert sum(counting.found.values()) == 4


@pytest.mark.parametrize("objective", ["remoe", "cache_miss"])
def test_read_later_numbers_are_the_same(
    objective: str, train_args: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = train_args(objective=objective, cache_slots=[6], output_dir=str(tmp_path / "a"))
    run = build(args)
    expected = [train_step(run) for _ in range(3)]
    tokens = run.num_tokens
    run = build(replace(args, output_dir=str(tmp_path / "b")))
    monkeypatch.setattr(Run, "reads_at_once", False)
    run.taken = [step.take_step(run) for _ in range(3)]
    found = read_steps(run)
    assert run.num_tokens == tokens
    assert run.taken == []
    for key, value in expected[-1].items():
        if not key.startswith("time/"):
            assert found[key] == value, key
    assert found["time/tokens_per_second"] > 0


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_noticed_before_it_is_saved(
    what: str, train_args: Arguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At the next reading, with the step at which it was."""
    run = build(train_args(save_steps=3, logging_steps=100, max_steps=9, output_dir=str(tmp_path / "run")))
    tracker = Tracker(run.args, step=0, wandb_id=None, active=True)
    monkeypatch.setattr(Run, "reads_at_once", False)
    _one_step(run, tracker, [], None)
    name = list(run.trained)[1]
    if what == "loss":
        with torch.no_grad():
            run.trained[name].view(-1)[0] = math.nan
    else:
        run.trained[name].register_hook(lambda gradient: gradient * math.inf)
    _one_step(run, tracker, [], None)
    words = {
        "loss": "loss is nan at step 2, process 0, micro-batch 0",
        "gradient": f"gradient of {name} is not finite at step 2",
    }
    with pytest.raises(UserError, match=f"{words[what]}: stopped, and nothing of that step is saved"):
        _one_step(run, tracker, [], None)
    tracker.close()
    assert not list((tmp_path / "run").glob("checkpoint*"))
