"""Reading ahead changes no token and no count of the cache; what it reads, uses and wastes is counted."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from configs.load import UserError
from evaluation.engine import load
from evaluation.engine.accounting import EngineStats, ReadCounts
from evaluation.engine.prefetch import BUFFERS_PER_CHOICE, Prefetch, ReadAhead
from evaluation.engine.reader import Reader, Request, Span
from evaluation.engine.store import ExpertStore

Checkpoint = Callable[..., Path]
PROMPT = torch.arange(3, 15).unsqueeze(0)


def generate(model: Any, tokens: int = 24) -> torch.Tensor:
    tokens_BT: torch.Tensor = model.generate(PROMPT, max_new_tokens=tokens, do_sample=False, pad_token_id=1)
    return tokens_BT


def decoded(folder: Path, *, dtype: str = "auto", **options: Any) -> tuple[torch.Tensor, EngineStats]:
    with load(folder, "30%", dtype=dtype, **options) as (model, engine):
        return generate(model), engine.stats()


@pytest.mark.parametrize("dtype", ["auto", "float32"])  # as stored, and converted after reading
@pytest.mark.parametrize("in_flight", [1, 4])
@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "gpt_oss", "deepseek_v2", "mixtral"])
def test_tokens_and_misses_stay_and_reads_are_counted(
    checkpoint: Checkpoint, family: str, in_flight: int, dtype: str
) -> None:
    folder = checkpoint(family)
    expected = generate(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    tokens, ahead = decoded(folder, dtype=dtype, reads_in_flight=in_flight, prefetch=True)
    plain_tokens, plain = decoded(folder, dtype=dtype, reads_in_flight=in_flight)
    assert torch.equal(tokens, expected)
    assert torch.equal(plain_tokens, expected)
    assert ahead.misses_by_layer == plain.misses_by_layer
    assert plain.prefetched == plain.prefetch_used == 0
    assert 0 < ahead.prefetch_used <= ahead.prefetched
    expert_bytes = ExpertStore(folder).shape.expert_bytes
    wasted = ahead.prefetched - ahead.prefetch_used
    assert ahead.bytes_read == plain.bytes_read + wasted * expert_bytes


class Chooses(nn.Module):
    """A router that always gives the same experts."""

    def __init__(self, *ids: int) -> None:
        super().__init__()
        self.ids = torch.tensor([ids])

    def forward(self, hidden_TH: torch.Tensor) -> tuple[Any, Any, torch.Tensor]:
        return None, None, self.ids


def a_prefetch(folder: Path, reader: Reader, *, resident: Callable[[int], list[int]]) -> tuple[Prefetch, ReadCounts]:
    store, counts = ExpertStore(folder), ReadCounts()
    routers = [Chooses(0, 1), Chooses(2, 3), Chooses(4, 5)]
    return Prefetch(
        routers, store, reader, top_k=2, layer_ids=store.layer_ids, resident=resident, counts=lambda: counts
    ), counts


def test_what_is_resident_or_guessed_already_is_not_read_and_the_last_layer_guesses_nothing(
    checkpoint: Checkpoint,
) -> None:
    folder = checkpoint("olmoe")
    with Reader(ExpertStore(folder).shards) as reader:
        prefetch, counts = a_prefetch(folder, reader, resident=lambda layer: [2] if layer == 1 else [])
        for _ in range(2):
            prefetch.guess(0, torch.zeros(1, 32))
        assert counts.prefetched == 1
        assert prefetch.take((1, 2)) is None
        assert prefetch.take((1, 3)) is not None
        assert prefetch.take((1, 3)) is None, "given once"
        prefetch.guess(2, torch.zeros(1, 32))
        assert (counts.prefetched, counts.prefetch_used) == (1, 1)


def test_memory_of_old_guesses_is_used_again_once_they_are_read_and_is_bounded(checkpoint: Checkpoint) -> None:
    folder = checkpoint("olmoe")
    with Reader(ExpertStore(folder).shards) as reader:
        prefetch, counts = a_prefetch(folder, reader, resident=lambda _: [])
        for round_ in range(10):
            for layer in range(3):
                prefetch.guess(layer, torch.zeros(1, 32))
                kept = [*prefetch._guessed.values(), *(ahead for _, ahead in prefetch._given)]
                assert len(kept) + len(prefetch._free) == BUFFERS_PER_CHOICE * 2
                assert len({id(ahead.buffer.base) + ahead.buffer.ctypes.data for ahead in kept}) == len(kept)
                for ahead in kept:
                    ahead._done.wait(30)
                if layer == 1:
                    prefetch.take((1, 2 + round_ % 2))
        assert counts.prefetched > 20


def test_wrong_guesses_do_not_hold_their_memory_for_ever_where_there_are_two_layers_only(
    checkpoint: Checkpoint,
) -> None:
    folder = checkpoint("mixtral")
    with Reader(ExpertStore(folder).shards) as reader:
        prefetch, counts = a_prefetch(folder, reader, resident=lambda _: [])
        prefetch._routers = [Chooses(0, 1), router := Chooses(2, 3)]
        for token in range(8):
            router.ids = torch.tensor([[token % 6, (token + 1) % 6]])
            for layer in range(2):
                prefetch.guess(layer, torch.zeros(1, 32))
                for ahead in prefetch._guessed.values():
                    ahead._done.wait(30)
                if token % 2 and not layer:
                    prefetch.take((1, token % 6))
        assert counts.prefetched >= 8


def test_a_copy_is_what_the_file_holds_wherever_it_starts(tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    content = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8)
    shard.write_bytes(content.tobytes())
    with Reader([shard], reads_in_flight=1) as reader:
        ahead = ReadAhead(np.zeros(6000, np.uint8))
        ahead.parts = [Span(shard, 9000, ahead.buffer[:4000]), Span(shard, 100, ahead.buffer[4000:])]
        reader.start((0, 0), ahead.parts, ahead, what="it")
        for offset, length in ((9000, 4000), (9500, 3500), (100, 2000), (2099, 1)):
            span = Span(shard, offset, np.zeros(length, np.uint8))
            ahead.copy_to(span)
            assert np.array_equal(span.target, content[offset : offset + length])
    assert ahead.is_done


def test_a_guess_that_cannot_be_read_matters_only_where_it_is_used() -> None:
    ahead, request = ReadAhead(np.zeros(1, np.uint8)), Request((0, 0), "it", 1, landed=ReadAhead(np.zeros(1, np.uint8)))
    request.error = OSError(errno.EIO, os.strerror(errno.EIO))
    ahead.put(request)
    with pytest.raises(OSError, match="Input/output"):
        ahead.copy_to(Span(Path("shard"), 0, np.zeros(1, np.uint8)))


def test_read_errors_end_in_an_error_or_in_the_right_tokens(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("olmoe")
    expected, real, calls = generate(AutoModelForCausalLM.from_pretrained(folder, dtype="auto")), os.preadv, [0]

    def sometimes(*args: Any) -> int:
        calls[0] += 1
        if calls[0] % 97 == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    said: list[str] = []
    with load(folder, "30%", prefetch=True, reads_in_flight=3) as (model, _):
        monkeypatch.setattr(os, "preadv", sometimes)
        for _ in range(6):
            try:
                assert torch.equal(generate(model), expected)
            except UserError as error:
                said.append(str(error))
        monkeypatch.undo()
        assert said
        assert all("Input/output error" in message for message in said)
        assert torch.equal(generate(model), expected)


def test_a_memory_budget_and_reading_ahead_exclude_each_other(checkpoint: Checkpoint) -> None:
    with (
        pytest.raises(UserError, match="takes memory that a memory budget does not count"),
        load(checkpoint("olmoe"), memory_budget="200MiB", prefetch=True),
    ):
        pass
