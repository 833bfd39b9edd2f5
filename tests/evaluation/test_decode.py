"""Decoding for an evaluation: exact rows per model and budget, times taken in turns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.load import UserError, load
from evaluation import decode as budgets
from evaluation.decode import DecodeArguments, decode_in_turns

CPU = torch.device("cpu")
PROMPTS = [np.arange(5, 25), np.arange(40, 60)]


@pytest.fixture
def folder(checkpoint: Callable[..., Path]) -> str:
    return str(checkpoint("qwen2_moe"))


def other_routers(folder: str) -> dict[str, torch.Tensor]:
    """Every token's experts in another order."""
    weights = load_file(Path(folder) / "model.safetensors")
    return {name: weight.flip(0) for name, weight in weights.items() if name.endswith("mlp.gate.weight")}


def test_models_take_turns_and_every_second_repeat_goes_backwards(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[int, str]] = []
    really_load = budgets.load

    def noting(*args: Any, **options: Any) -> Any:
        if "router_delta" in options:
            turns.append((options["expert_cache"], "base" if options["router_delta"] is None else "tuned"))
        return really_load(*args, **options)

    monkeypatch.setattr(budgets, "load", noting)
    args = DecodeArguments(demands=[1.0, 2.0], max_new_tokens=4, repeats=2)
    base, tuned = decode_in_turns(folder, [None, other_routers(folder)], PROMPTS, args, device=CPU)
    small, large = sorted({size for size, _ in turns})
    assert turns == [(size, side) for size in (small, large) for side in ("base", "tuned", "tuned", "base")]
    assert [row["demands"] for row in base] == [row["demands"] for row in tuned] == [1.0, 2.0]


def test_repeats_change_no_count_and_tokens_are_the_resident_models(folder: str) -> None:
    sides = [None, other_routers(folder)]
    rows = {}
    for repeats in (1, 3):
        args = DecodeArguments(demands=[1.0], max_new_tokens=8, repeats=repeats)
        rows[repeats] = [row for (row,) in decode_in_turns(folder, sides, PROMPTS, args, device=CPU)]
    for once, thrice in zip(rows[1], rows[3], strict=True):
        assert once["tokens_equal_resident"]
        assert thrice["tokens_equal_resident"]
        assert (once["repeats"], thrice["repeats"]) == (1, 3)
        for key in ("hit_rate", "bytes_read_per_token", "n_prompts", "n_tokens", "expert_cache_bytes"):
            assert once[key] == thrice[key], key
        assert (once["n_prompts"], once["n_tokens"]) == (2, 16)
    assert rows[1][0]["hit_rate"] != rows[1][1]["hit_rate"], "the second side did not decode with its own routers"


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
    ((row,),) = decode_in_turns(folder, [None], PROMPTS, args, device=CPU)
    assert not row["tokens_equal_resident"]


def test_no_repeat_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="repeats is 0; write 1 or more"):
        load(DecodeArguments, None, ["repeats=0"])
