"""The made model is a proper checkpoint, the same for a seed, with the reuse that was asked for, and it uses its experts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.load import UserError
from data.corpus import EMBEDDED
from data.pieces import document_beginnings
from evaluation.benchmark.made_model.made_checkpoint import Recipe, measure, weight_bytes, write_checkpoint
from evaluation.engine.greedy import greedy
from tests.evaluation.benchmark.conftest import TINY
from training.model.loading import load_tokenizer
from training.model.shards import read_index

Made = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(EMBEDDED / "tokenizer"))


@pytest.fixture(scope="module")
def prompt(tokenizer: Any) -> list[int]:
    return document_beginnings(tokenizer, "test", tokens=48, count=1)[0]


def test_transformers_loads_it_completely(made_model: Made) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(made_model[0], dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_the_matrices_of_an_expert_are_adjacent(made_model: Made) -> None:
    tensors = read_index(made_model[0])
    for layer in range(TINY.layers):
        for expert in range(TINY.num_experts):
            down, gate, up = (
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"]
                for part in ("down", "gate", "up")
            )
            assert down.shard == gate.shard == up.shard
            assert (down.offset + down.length_bytes, gate.offset + gate.length_bytes) == (gate.offset, up.offset)


def test_sizes_are_what_was_computed_before_writing(made_model: Made) -> None:
    folder, made = made_model
    stored = sum(tensor.length_bytes for tensor in read_index(folder).values())
    assert stored == made["weight_bytes"] == weight_bytes(TINY, "bfloat16")


def test_equal_seeds_give_equal_bytes(make: Callable[..., Made], made_model: Made) -> None:
    again, other = make()[0], make(seed=1)[0]
    for shard in sorted(made_model[0].glob("*.safetensors")):
        assert (again / shard.name).read_bytes() == shard.read_bytes()
        assert (other / shard.name).read_bytes() != shard.read_bytes()


@pytest.mark.parametrize("eor", [0.42, 0.55])
def test_reuse_is_what_was_asked_for(make: Callable[..., Made], tokenizer: Any, eor: float) -> None:
    folder, made = make(eor=eor)
    reached = made["calibrated_eor_per_layer"]
    assert sum(reached) / len(reached) == pytest.approx(eor, abs=0.01)
    measured = measure(folder, tokenizer, new_tokens=0)
    assert measured["teacher_forced"]["reuse_rate_mean"] == pytest.approx(eor, abs=0.04)
    assert measured["teacher_forced"]["dead_experts_per_layer"] == [0, 0]
    assert measured["greedy"] is None
    rates = list(measured["teacher_forced"]["lru_miss_rate"].values())
    assert rates == sorted(rates, reverse=True)
    assert rates[1] == pytest.approx(1 - measured["teacher_forced"]["reuse_rate_mean"], abs=0.01)  # a quarter: K of 8


@pytest.mark.parametrize("eor", [0.05, 0.97])
def test_a_reuse_out_of_reach_is_refused(make: Callable[..., Made], eor: float) -> None:
    with pytest.raises(UserError, match=r"layer 0 cannot have an expert reuse of 0\.\d+, only .* write an --eor"):
        make(eor=eor)


def test_greedy_text_does_not_repeat_itself(made_model: Made, tokenizer: Any) -> None:
    measured = measure(made_model[0], tokenizer, new_tokens=64)
    assert measured["distinct_tokens"] > 24
    assert measured["most_common_share"] < 0.3
    assert measured["greedy"]["n_tokens"] == 4 * 64
    assert measured["greedy"]["reuse_rate_mean"] == pytest.approx(0.5, abs=0.12)


@torch.no_grad()
def test_tokens_depend_on_the_experts(made_model: Made, prompt: list[int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(made_model[0], dtype="auto")
    before = greedy(model, prompt, max_new_tokens=16)
    layer = model.model.layers[1].mlp.experts
    layer.down_proj.copy_(layer.down_proj.roll(1, 0))  # every expert has its neighbour's output matrix
    assert greedy(model, prompt, max_new_tokens=16) != before


@torch.no_grad()
def test_activations_keep_their_size(made_model: Made, prompt: list[int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(made_model[0], dtype="auto")
    hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    rms = [float(h.float().pow(2).mean().sqrt()) for h in hidden]
    assert all(0.3 < value < 10 for value in rms), rms


def test_an_unfinished_set_of_shards_gets_no_index(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="cannot have an expert reuse"):
        write_checkpoint(tmp_path, Recipe(TINY, 0.97, 0, "bfloat16"), tokenizer)
    assert (tmp_path / "config.json").exists()
    assert not (tmp_path / "model.safetensors.index.json").exists()
