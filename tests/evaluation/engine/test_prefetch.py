"""Reading ahead changes no token and no count of the cache; what it reads, uses and wastes is counted."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from configs.load import UserError
from evaluation.benchmark.families import make_tiny, tiny_config
from evaluation.engine.cache.counts import DECODE
from evaluation.engine.flight import Flight
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.prefetch import CALLS, SLOTS_PER_GUESS, WORTH, Prefetch, experts_ahead
from evaluation.engine.slot_memory import SlotMemory
from evaluation.engine.stats import EngineStats, ReadCounts
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.reader import Reader, Request

Checkpoint = Callable[..., Path]
PROMPT = torch.arange(3, 15).unsqueeze(0)


def generate(model: Any, tokens: int = 24) -> torch.Tensor:
    tokens_BT: torch.Tensor = model.generate(PROMPT, max_new_tokens=tokens, do_sample=False, pad_token_id=1)
    return tokens_BT


def decoded(folder: Path, *, dtype: str = "auto", **options: Any) -> tuple[torch.Tensor, EngineStats]:
    with load(folder, EngineOptions("30%", dtype=dtype, **options)) as (model, engine):
        return generate(model), engine.stats()


@pytest.mark.parametrize("config", ["MiniMaxM2Config", "AfmoeConfig", "Lfm2MoeConfig"])
def test_routers_that_are_given_a_bias_of_their_block_are_asked_as_it_asks_them(config: str, tmp_path: Path) -> None:
    make_tiny(tiny_config(getattr(transformers, config)), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    bias = [buffer for name, buffer in model.named_buffers() if "bias" in name]
    bias += [weight for name, weight in model.named_parameters() if "expert_bias" in name]
    assert bias
    for tensor in bias:  # so strong that whoever asks without it hears of other experts
        tensor.data.copy_(torch.linspace(0, 3, tensor.numel()).view_as(tensor))
    model.save_pretrained(tmp_path)
    (tokens, ahead), (plain_tokens, plain) = decoded(tmp_path, prefetch=2), decoded(tmp_path)
    assert torch.equal(tokens, plain_tokens)
    assert ahead.misses_by_layer == plain.misses_by_layer
    assert 0.7 * ahead.prefetched < ahead.prefetch_used, "the bias decides, and guesses know it"


@pytest.mark.parametrize("dtype", ["auto", "float32"])  # as stored, and converted after reading
@pytest.mark.parametrize("in_flight", [1, 4])
@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "gpt_oss", "deepseek_v2", "mixtral"])
def test_tokens_and_misses_stay_and_reads_are_counted(
    checkpoint: Checkpoint, family: str, in_flight: int, dtype: str
) -> None:
    folder = checkpoint(family)
    expected = generate(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    tokens, ahead = decoded(folder, dtype=dtype, reads_in_flight=in_flight, prefetch=2)
    plain_tokens, plain = decoded(folder, dtype=dtype, reads_in_flight=in_flight)
    assert torch.equal(tokens, expected)
    assert torch.equal(plain_tokens, expected)
    assert ahead.misses_by_layer == plain.misses_by_layer
    assert plain.prefetched == plain.prefetch_used == 0
    assert 0 < ahead.prefetch_used <= ahead.prefetched
    expert_bytes = ExpertStore(folder).format.expert_bytes
    assert 0 < ahead.reading_seconds["decode"] <= ahead.seconds["decode"]
    wasted = ahead.prefetched - ahead.prefetch_used
    assert plain.bytes_read <= ahead.bytes_read <= plain.bytes_read + wasted * expert_bytes


class Chooses:
    """A router that always gives the same experts."""

    def __init__(self, *ids: int) -> None:
        self.ids = torch.tensor([ids])
        self.weights: torch.Tensor | None = None

    def ask(self, hidden_TH: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
        falling = torch.arange(self.ids.shape[1], 0, -1.0)[None]
        return None, falling if self.weights is None else self.weights, self.ids


EXPERTS = 2


def a_prefetch(
    folder: Path, reader: Reader, *, resident: Callable[[int], list[int]], dtype: torch.dtype = torch.bfloat16
) -> tuple[Prefetch, ReadCounts, SlotMemory]:
    store, counts = ExpertStore(folder), ReadCounts()
    memory = SlotMemory(store, 3, dtype, passing=1, ahead=SLOTS_PER_GUESS * EXPERTS)
    routers = [Chooses(0, 1, 7, 6), Chooses(2, 3, 7, 6, 5), Chooses(4, 5, 7, 6)]
    prefetch = Prefetch(
        routers, memory, reader, experts=EXPERTS, layer_ids=store.layer_ids, resident=resident, counts=counts
    )
    return prefetch, counts, memory


def wait_for_guesses(prefetch: Prefetch) -> None:
    landed: SimpleQueue[Request] = SimpleQueue()
    for ahead in [*prefetch._guessed.values(), *prefetch._dropped]:
        prefetch._reader.wait_for(ahead.request, landed)
        landed.get(timeout=30)


def test_the_heaviest_that_are_neither_resident_nor_guessed_are_read_and_the_last_layer_guesses_nothing(
    checkpoint: Checkpoint,
) -> None:
    folder = checkpoint("olmoe")
    with Reader(ExpertStore(folder).shards) as reader:
        prefetch, counts, _ = a_prefetch(folder, reader, resident=lambda layer: [2] if layer == 1 else [])
        for _ in range(2):
            prefetch.guess(0, torch.zeros(1, 32))
        assert len(prefetch._guessed) == 2
        assert prefetch.take((1, 2)) is None
        assert prefetch.take((1, 3)) is not None
        assert prefetch.take((1, 3)) is None, "given once"
        assert prefetch.take((1, 7)) is not None
        prefetch.guess(2, torch.zeros(1, 32))
        assert (counts.prefetched, counts.prefetch_used) == (2, 2)


def test_the_lighter_third_of_what_a_router_names_is_not_guessed(checkpoint: Checkpoint) -> None:
    folder = checkpoint("olmoe")
    with Reader(ExpertStore(folder).shards) as reader:
        prefetch, _, _ = a_prefetch(folder, reader, resident=lambda _: [2, 3])
        prefetch.guess(0, torch.zeros(1, 32))
        assert list(prefetch._guessed) == [(1, 7)], "not 6 and 5, though one slot more is free"
        prefetch._routers = [Chooses(0), Chooses(4)]
        prefetch.guess(0, torch.zeros(1, 32))
        assert list(prefetch._guessed) == [(1, 4)], "the only one is"


def test_of_a_wrong_guess_no_more_is_read_and_what_was_read_is_counted(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("olmoe")
    real, began, go_on = os.preadv, threading.Event(), threading.Event()

    def waits(*args: Any) -> int:
        began.set()
        assert go_on.wait(timeout=30)
        return real(*args)

    with Reader(ExpertStore(folder).shards, reads_in_flight=1) as reader:
        prefetch, counts, memory = a_prefetch(folder, reader, resident=lambda _: [])
        monkeypatch.setattr(os, "preadv", waits)
        prefetch.guess(0, torch.zeros(1, 32))  # one of two is being read
        assert began.wait(timeout=30)
        prefetch.guess(2, torch.zeros(1, 32))
        assert (counts.prefetched, len(prefetch._free)) == (0, len(memory.ahead_slots) - 1)
        go_on.set()
        wait_for_guesses(prefetch)
        prefetch.guess(2, torch.zeros(1, 32))
        assert sorted(prefetch._free) == list(memory.ahead_slots)
        assert counts.prefetched == 1
        assert counts.bytes_read[DECODE] == ExpertStore(folder).format.expert_bytes
        assert counts.prefetch_used == 0


def test_of_a_batch_the_heaviest_of_all_rows_are_guessed(checkpoint: Checkpoint) -> None:
    folder = checkpoint("olmoe")
    with Reader(ExpertStore(folder).shards) as reader:
        prefetch, _, _ = a_prefetch(folder, reader, resident=lambda _: [])
        prefetch._routers = [Chooses(0, 1), router := Chooses()]
        router.ids, router.weights = torch.tensor([[1, 2], [3, 2]]), torch.tensor([[0.6, 0.4], [0.9, 0.1]])
        prefetch.guess(0, torch.zeros(2, 32))
        assert list(prefetch._guessed) == [(1, 3), (1, 1)]


def test_what_was_guessed_lies_in_the_slot_that_is_swapped_in(checkpoint: Checkpoint) -> None:
    folder = checkpoint("olmoe")
    store = ExpertStore(folder)
    with Reader(store.shards) as reader:
        prefetch, _, memory = a_prefetch(folder, reader, resident=lambda _: [])
        prefetch.guess(0, torch.zeros(1, 32))
        with Flight(memory, reader, layer_id=1, prefetch=prefetch) as flight:
            flight.start({(1, 2): 0, (1, 3): None, (1, 5): 1})
            for (_, expert), slot in (pair for landed in flight.landings() for pair in landed.items()):
                for span in memory.spans(slot, 1, expert):
                    held = np.fromfile(span.shard, np.uint8, len(span.target), offset=span.offset)
                    assert np.array_equal(span.target, held), expert
        assert flight.bytes_read == store.format.expert_bytes, "the third; the others were read before"
        assert sorted(prefetch._free) == list(memory.ahead_slots)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reads_that_fail_or_are_left_under_way_lose_no_slot(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    folder = checkpoint("olmoe")

    def fails(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Reader(ExpertStore(folder).shards) as reader:
        prefetch, _, memory = a_prefetch(folder, reader, resident=lambda _: [], dtype=dtype)
        monkeypatch.setattr(os, "preadv", fails)
        prefetch.guess(0, torch.zeros(1, 32))
        with Flight(memory, reader, layer_id=1, prefetch=prefetch) as flight:
            flight.start({(1, 2): None, (1, 3): None})
            with pytest.raises(UserError, match="Input/output error"):
                next(flight.landings())
        assert sorted(prefetch._free) == list(memory.ahead_slots)


def test_slots_of_old_guesses_are_used_again_once_they_are_read_and_none_is_lost(checkpoint: Checkpoint) -> None:
    folder = checkpoint("olmoe")
    with Reader(ExpertStore(folder).shards) as reader:
        prefetch, counts, memory = a_prefetch(folder, reader, resident=lambda _: [])
        for round_ in range(10):
            for layer in range(3):
                prefetch.guess(layer, torch.zeros(1, 32))
                held = [ahead.slot for ahead in [*prefetch._guessed.values(), *prefetch._dropped]]
                assert sorted([*held, *prefetch._free]) == list(memory.ahead_slots)
                wait_for_guesses(prefetch)
                if layer == 0 and (taken := prefetch.take((1, 2 + round_ % 2))):
                    prefetch.give_back(taken.slot)
        assert counts.prefetched > 20
        assert counts.device_bytes_read[DECODE] > 0, "of what was read in vain"


def test_wrong_guesses_do_not_hold_their_slots_for_ever_where_there_are_two_layers_only(checkpoint: Checkpoint) -> None:
    folder = checkpoint("mixtral")
    with Reader(ExpertStore(folder).shards) as reader:
        prefetch, counts, _ = a_prefetch(folder, reader, resident=lambda _: [])
        prefetch._routers = [Chooses(0, 1), router := Chooses(2, 3)]
        for token in range(8):
            router.ids = torch.tensor([[token % 6, (token + 1) % 6]])
            for layer in range(2):
                prefetch.guess(layer, torch.zeros(1, 32))
                wait_for_guesses(prefetch)
        assert counts.prefetched >= 8


@pytest.mark.parametrize("dtype", ["auto", "float32"])  # as stored, and converted after reading
def test_read_errors_end_in_an_error_or_in_the_right_tokens(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    folder = checkpoint("olmoe")
    expected, real, calls = generate(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)), os.preadv, [0]

    def sometimes(*args: Any) -> int:
        calls[0] += 1
        if calls[0] % 97 == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    said: list[str] = []
    with load(folder, EngineOptions("30%", dtype=dtype, prefetch=2, reads_in_flight=3)) as (model, engine):
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
        prefetch = engine._pager.prefetch
        assert prefetch is not None
        held = [ahead.slot for ahead in [*prefetch._guessed.values(), *prefetch._dropped]]
        assert sorted([*held, *prefetch._free]) == list(prefetch._memory.ahead_slots), "no slot was lost"


def test_a_memory_budget_counts_the_slots(checkpoint: Checkpoint) -> None:
    with load(checkpoint("olmoe"), EngineOptions(memory_budget="200MiB")) as (_, engine):
        plain = engine.division
    with load(checkpoint("olmoe"), EngineOptions(memory_budget="200MiB", prefetch=2)) as (_, engine):
        ahead = engine.division
    assert plain is not None
    assert ahead is not None
    assert ahead.buffer_bytes - plain.buffer_bytes == SLOTS_PER_GUESS * 2 * engine.demand.slot_bytes


def test_fewer_than_none_is_refused(checkpoint: Checkpoint) -> None:
    with (
        pytest.raises(UserError, match="--prefetch is -1; write at least 0"),
        load(checkpoint("olmoe"), EngineOptions("30%", prefetch=-1)),
    ):
        pass


def test_auto_guesses_as_many_as_the_cache_has_room_for() -> None:
    for slots, expected in {0: 0, 31: 0, 32: 1, 64: 2, 96: 3, 1000: 3}.items():
        assert experts_ahead("auto", slots, pools=1, top_k=2) == expected
    assert [experts_ahead("auto", 64, pools=8, top_k=top_k) for top_k in (4, 5)] == [2, 0]
    assert [experts_ahead(asked, 9, pools=1, top_k=8) for asked in (5, 0)] == [5, 0]


def test_auto_guesses_while_what_is_missed_takes_longer_to_read_than_asking(checkpoint: Checkpoint) -> None:
    folder = checkpoint("olmoe")
    with Reader(ExpertStore(folder).shards) as reader:
        prefetch, counts, memory = a_prefetch(folder, reader, resident=lambda _: [])
        misses, asks = [0], 0.001  # seconds of a call
        prefetch._misses = lambda: misses[0]

        def calls(missed: int, read: int, reading_seconds: float) -> bool:
            for _ in range(CALLS):
                if prefetch.is_on:
                    prefetch._asking_seconds += asks
                prefetch.call_done()
                if prefetch._calls % CALLS == CALLS - 1:  # what is counted before the next one decides
                    misses[0] += missed
                    counts.bytes_read[DECODE] += read * memory.expert_bytes
                    counts.reading_seconds[DECODE] += reading_seconds
            return prefetch.is_on

        enough = int(WORTH * CALLS * asks / 0.002)  # experts that take two milliseconds each
        assert calls(missed=enough + 1, read=2 * enough, reading_seconds=4e-3 * enough), "half were read in vain"
        assert not calls(missed=enough - 1, read=2 * enough, reading_seconds=4e-3 * enough)
        assert counts.ahead_calls == 2 * CALLS
        assert not calls(missed=0, read=0, reading_seconds=0)
        assert counts.ahead_calls == 2 * CALLS
        assert calls(missed=enough + 1, read=enough + 1, reading_seconds=2e-3 * (enough + 1)), (
            "it is known how long asking took"
        )
        counts.clear()
        misses[0] = 0
        assert calls(missed=0, read=0, reading_seconds=0), "counts were reset: nothing is decided"
        prefetch.guess(0, torch.zeros(1, 32))
        assert prefetch._guessed
        prefetch.is_on = False
        prefetch.guess(0, torch.zeros(1, 32))
        assert not prefetch._guessed


@pytest.mark.parametrize(
    "memory", [{"expert_cache": "100%"}, {"expert_cache": "40%"}, {"memory_budget": "smallest + 1%"}]
)
def test_auto_changes_no_token(checkpoint: Checkpoint, memory: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "expert_cache" in memory:  # few experts are all that there are
        monkeypatch.setattr("evaluation.engine.prefetch.SLOTS_PER_EXPERT_AHEAD", 2)
    monkeypatch.setattr("evaluation.engine.prefetch.CALLS", 4)
    folder = checkpoint("olmoe")
    with load(folder, EngineOptions(**memory, context_tokens=64, prefetch="auto", warn=False)) as (model, engine):
        expected = generate(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
        assert torch.equal(generate(model), expected)
        assert (engine.experts_ahead > 0) == ("expert_cache" in memory), "a budget's smallest is not more with it"
        if memory.get("expert_cache") == "100%":
            generate(model)
            assert not engine._pager.prefetch.is_on, "nothing is missing"


def test_auto_is_left_out_where_routers_are_not_known(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.engine.engine.find_routers", lambda _: {})
    with load(checkpoint("olmoe"), EngineOptions("100%", prefetch="auto")) as (_, engine):
        assert engine.experts_ahead == 0
