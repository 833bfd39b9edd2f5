"""Decoding for an evaluation: exact rows per model and budget, times taken in turns."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.load import UserError, load
from evaluation import decode as budgets
from evaluation.decode import DecodeArguments, decode_in_turns
from evaluation.engine.options import EngineOptions
from evaluation.engine.stats import Timing
from evaluation.results import Decode

CPU = torch.device("cpu")
PROMPTS = [np.arange(5, 25), np.arange(40, 60)]


@pytest.fixture
def folder(checkpoint: Callable[..., Path]) -> str:
    return str(checkpoint("qwen2_moe"))


def other_routers(folder: str) -> dict[str, torch.Tensor]:
    """Every token's experts in another order."""
    weights = load_file(Path(folder) / "model.safetensors")
    return {name: weight.flip(0) for name, weight in weights.items() if name.endswith("mlp.gate.weight")}


def decoded(folder: str, sides: list[Any], args: DecodeArguments) -> list[list[Decode]]:
    rows = decode_in_turns(folder, sides, {"text": PROMPTS}, args, token_demand_bytes=demand_bytes(folder), device=CPU)
    return [list(of_side) for of_side in zip(*rows, strict=True)]


def demand_bytes(folder: str) -> int:
    with budgets.load(folder, EngineOptions(expert_cache="100%")) as (_, engine):
        return engine.token_demand_bytes


def test_models_take_turns_at_every_prompt_and_every_second_time_backwards(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[int, int, str]] = []
    name, base_gate = next(
        item for item in load_file(Path(folder) / "model.safetensors").items() if "mlp.gate." in item[0]
    )
    really_decode = budgets.decode

    def noting(model: Any, engine: Any, *, prompt_ids: list[int], **options: Any) -> Any:
        is_base = torch.equal(model.get_parameter(name), base_gate)
        turns.append((engine.pool_bytes, prompt_ids[0], "base" if is_base else "tuned"))
        return really_decode(model, engine, prompt_ids=prompt_ids, **options)

    monkeypatch.setattr(budgets, "decode", noting)
    args = DecodeArguments(demands=[1.0, 2.0], max_new_tokens=4, repeats=2)
    base, tuned = decoded(folder, [{}, other_routers(folder)], args)
    small, large = sorted({size for size, *_ in turns})
    forwards, backwards = ("base", "tuned"), ("tuned", "base")
    orders = [(5, forwards), (40, backwards), (5, backwards), (40, forwards)]
    assert turns == [(size, first, side) for size in (small, large) for first, order in orders for side in order]
    assert [row.demands for row in base] == [row.demands for row in tuned] == [1.0, 2.0]


def test_the_times_of_every_turn_are_kept_repeat_by_repeat(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    really_decode = budgets.decode
    clock = iter(range(1, 9))

    def timed(*args: Any, **options: Any) -> Any:
        start = next(clock)
        return replace(really_decode(*args, **options), timing=Timing([start, start + 1, start + 3]))

    monkeypatch.setattr(budgets, "decode", timed)
    args = DecodeArguments(demands=[1.0], max_new_tokens=3, repeats=2)
    (base,), (tuned,) = decoded(folder, [{}, other_routers(folder)], args)
    assert base.ttft_ms == [1000, 4000, 6000, 7000]
    assert tuned.ttft_ms == [2000, 3000, 5000, 8000]
    assert base.tpot_ms == tuned.tpot_ms == [1500] * 4
    assert (base.mean_ttft_ms, tuned.mean_tpot_ms) == (4500, 1500)
    assert (base.cache_policy, base.cache_scope) == ("decayed", "global")


def test_repeats_change_no_count_and_tokens_are_the_resident_models(folder: str) -> None:
    sides = [{}, other_routers(folder)]
    rows = {}
    for repeats in (1, 3):
        args = DecodeArguments(demands=[1.0], max_new_tokens=8, repeats=repeats)
        rows[repeats] = [row for (row,) in decoded(folder, sides, args)]
    for once, thrice in zip(rows[1], rows[3], strict=True):
        assert once.tokens_equal_resident
        assert thrice.tokens_equal_resident
        assert (once.repeats, thrice.repeats) == (1, 3)
        for key in ("hit_rate", "bytes_read_per_token", "n_prompts", "n_tokens", "expert_cache_bytes"):
            assert getattr(once, key) == getattr(thrice, key), key
        assert (once.n_prompts, once.n_tokens) == (2, 16)
    assert rows[1][0].hit_rate != rows[1][1].hit_rate, "the second side did not decode with its own routers"


def test_one_repeat_with_other_tokens_is_told(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    really_decode = budgets.decode

    def wrong_in_the_last(*args: Any, **options: Any) -> Any:
        calls.append(None)
        result = really_decode(*args, **options)
        if len(calls) == 2 * len(PROMPTS):
            result.token_ids[-1] += 1
        return result

    monkeypatch.setattr(budgets, "decode", wrong_in_the_last)
    args = DecodeArguments(demands=[1.0], max_new_tokens=4, repeats=2)
    ((row,),) = decoded(folder, [{}], args)
    assert not row.tokens_equal_resident


def test_no_repeat_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="repeats is 0; write 1 or more"):
        load(DecodeArguments, None, ["repeats=0"])
