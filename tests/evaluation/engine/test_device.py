"""What is done differently on an accelerator: the order of copies beside products, and the device itself where there is one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.load import UserError
from evaluation.engine.device import CPU, Accelerator, Host, device_at, find_device
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from tests.conftest import needs_gpu

Checkpoint = Callable[..., Path]


class Recorded:
    """A stream that writes down what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def __enter__(self) -> None:
        self.log.append(f"on {self.name}")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"off {self.name}")

    def record_event(self) -> Any:
        self.events += 1
        return Mark(f"{self.name} {self.events}", self.log)

    def wait_event(self, event: Any) -> None:
        self.log.append(f"{self.name} waits for {event.name}")


class Mark:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


def test_copies_products_and_reads_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    copies, products = Recorded("copies", log), Recorded("products", log)
    monkeypatch.setattr(torch, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: products)
    device = Accelerator(CPU)  # whose memory stands in for an accelerator's
    assert log == []
    block = device.allocate(64)
    assert (block.raw.dtype, block.raw.shape) == (torch.uint8, (64,))
    assert log == ["copies waits for products 1"], "before that the slots' memory may be in use"
    log.clear()
    into, source = torch.zeros(2), torch.ones(2)

    device.wait(7)
    assert log == [], "nothing was copied out of it yet"
    device.copy_in([(into, source)], passing_slot=7, slot=3)
    assert torch.equal(into, source)
    assert log == ["on copies", "off copies", "products waits for copies 1"]
    device.used(3)
    log.clear()
    device.copy_in([(into, source)], passing_slot=8, slot=3)
    assert log == ["on copies", "copies waits for products 2", "off copies", "products waits for copies 2"]
    log.clear()
    device.wait(7)
    device.wait(8)
    device.wait(8)
    assert log == ["host waits for copies 1", "host waits for copies 2"], "each once"


def test_only_the_processor_is_the_host() -> None:
    assert isinstance(device_at(torch.device("cpu:0")), Host)
    assert not isinstance(Host(), Accelerator)


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_both_multiply(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    draw = torch.Generator().manual_seed(rows)
    rows_MK, weight_KN = (torch.randn(shape, generator=draw).bfloat16() for shape in ((rows, 32), (32, 16)))
    expected = torch.mm(rows_MK, weight_KN)
    monkeypatch.setattr(torch, "Stream", lambda device: None)
    for device in (Host(), Accelerator(CPU)):
        out = torch.empty(rows, 16, dtype=torch.bfloat16)
        assert device.multiply(rows_MK, weight_KN, out=out, sizes=()) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("columns", "counts", "independent"), [(64, {1, 5}, True), (48, {4}, False), (48, {1, 4}, False)]
)
def test_rows_stand_alone_where_vectors_leave_no_rest(columns: int, counts: set[int], independent: bool) -> None:
    assert Host().rows_are_independent(counts, columns) == independent


@needs_gpu
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", [3, 7, 24])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_on_cuda_logits_and_tokens_are_those_of_the_resident_model(
    checkpoint: Checkpoint, family: str, dtype: str, slots: int, prefetch: int
) -> None:
    folder = checkpoint(family)
    ids_BT = torch.randint(2, 258, (2, 20), generator=torch.Generator().manual_seed(1)).cuda()
    options: Any = {
        "attention_mask": torch.ones_like(ids_BT), "max_new_tokens": 40, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda().eval()
    expected = resident.generate(ids_BT, **options)
    with load(folder, EngineOptions("100%", dtype=dtype)) as (_, sized):
        budget = min(slots * sized.demand.slot_bytes, sized.pool_bytes)
    with load(folder, EngineOptions(budget, dtype=dtype, device="auto", prefetch=prefetch)) as (model, engine):
        found = model.generate(ids_BT, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(map(torch.equal, found.logits, expected.logits))
        stats = engine.stats()
        assert stats.misses > 0
        if slots < 24:  # where nothing is missing there is nothing to read ahead
            assert (stats.prefetch_used > 0) == (prefetch > 0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_without_an_accelerator_auto_is_the_processor(checkpoint: Checkpoint) -> None:
    with load(checkpoint(), EngineOptions("100%", device="auto")) as (model, _):
        assert model.device.type == "cpu"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_a_device_that_is_not_there_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"device is 'cuda', and torch finds no such accelerator here; write cpu"):
        load(checkpoint(), EngineOptions("100%", device="cuda")).__enter__()


def test_a_device_that_does_not_exist_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="device 'gpu' is not known to torch; write cpu, cuda or auto"):
        load(checkpoint(), EngineOptions("100%", device="gpu")).__enter__()


def test_a_memory_budget_is_for_the_processors_memory(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    with pytest.raises(UserError, match="a memory budget counts the processor's memory, and device is cuda"):
        load(checkpoint(), EngineOptions(memory_budget="1GiB", device="cuda")).__enter__()


@pytest.mark.parametrize(("local_rank", "expected"), [(None, "cuda"), ("1", "cuda:1"), ("5", "cuda:1")])
def test_each_process_of_a_machine_has_an_accelerator_of_its_own(
    local_rank: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert find_device("auto") == find_device("cuda") == torch.device(expected)
    assert find_device("cuda:0") == torch.device("cuda:0"), "a number is kept"
    assert find_device("cpu") == CPU
