import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from evaluation.engine.device import Host
from evaluation.engine.filled_rows import LARGEST_MATRIX, SIZES, _tried, filled_rows, is_compiled, order_showing
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions

large = pytest.mark.skipif(not is_compiled(torch.bfloat16), reason="takes minutes where torch multiplies by itself")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are filled up on any processor, as on those where it gains."""
    monkeypatch.setattr("evaluation.engine.filled_rows.is_compiled", lambda dtype: dtype.itemsize == 2)


def matrix(inner: int, columns: int, *, transposed: bool = True, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """One that products are multiplied by, in the layout of most checkpoints or in that of gpt-oss."""
    return torch.empty(columns, inner, dtype=dtype).T if transposed else torch.empty(inner, columns, dtype=dtype)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("inner", "columns"), [(64, 96), (33, 48), (512, 128), pytest.param(2048, 1536, marks=large)])
def test_filling_up_keeps_every_bit_of_every_number_of_rows(inner: int, columns: int, transposed: bool) -> None:
    weight_KN = matrix(inner, columns, transposed=transposed)
    sizes = filled_rows(weight_KN)
    assert len(sizes) == SIZES[-1] + 1
    generator = torch.Generator().manual_seed(1)
    weight_KN.copy_(torch.randn(inner, columns, generator=generator))
    rows_MK = torch.randn(SIZES[-1] + 2, inner, generator=generator).bfloat16()
    for count in range(1, len(rows_MK) + 1):
        out = torch.empty(count, columns, dtype=torch.bfloat16)
        assert torch.equal(
            Host().multiply(rows_MK[:count], weight_KN, out=out, sizes=sizes), torch.mm(rows_MK[:count], weight_KN)
        )


def test_a_number_of_rows_that_is_added_up_in_another_order_is_left_alone() -> None:
    def multiply(rows_MK: Tensor, weight_KN: Tensor) -> Tensor:
        all_rows = torch.zeros(SIZES[-1], rows_MK.shape[1], dtype=rows_MK.dtype)
        all_rows[: len(rows_MK)] = rows_MK
        if len(rows_MK) in (5, 40):
            order = torch.arange(len(weight_KN)).flip(0)
            all_rows, weight_KN = all_rows[:, order], weight_KN[order]
        return torch.mm(all_rows, weight_KN)[: len(rows_MK)]

    sizes = _tried(matrix(64, 96), multiply=multiply)
    assert sizes[:10] == (0, 1, 8, 8, 8, 5, 8, 8, 8, 16), "one row is what decoding multiplies: it is not made slower"
    assert sizes[39:42] == (48, 40, 48)
    assert set(sizes) == {0, 5, 40, *SIZES}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", [64, 512])
def test_what_it_is_tried_on_shows_another_order(inner: int, dtype: torch.dtype) -> None:
    weight_KN = matrix(inner, 96, dtype=dtype)
    rows_MK = order_showing(weight_KN, rows=16)
    exact = rows_MK.double() @ weight_KN.double()
    assert exact.abs().max() < 1e-9, "every term has its negative"
    part = inner // 3  # which no kernel is likely to do by itself
    whole = torch.mm(rows_MK.float(), weight_KN.float())
    parts = rows_MK[:, :part].float() @ weight_KN[:part].float() + rows_MK[:, part:].float() @ weight_KN[part:].float()
    assert (whole.to(dtype) != parts.to(dtype)).float().mean() > 0.3


@pytest.mark.usefixtures("compiled")
def test_nothing_is_tried_where_nothing_is_gained() -> None:
    assert filled_rows(matrix(64, 96, dtype=torch.float32)) == ()
    assert filled_rows(matrix(4096, LARGEST_MATRIX // 4096 + 1)) == ()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors have other names for it")
def test_nothing_is_tried_where_torch_multiplies_by_itself() -> None:
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert is_compiled(torch.bfloat16) == has_avx512
    assert (filled_rows(matrix(8, 8)) != ()) == has_avx512


@pytest.mark.usefixtures("compiled")
def test_another_number_of_threads_is_another_question(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("evaluation.engine.filled_rows._FOUND", {})
    monkeypatch.setattr("evaluation.engine.filled_rows._tried", lambda _: (asked.append(1), (0, 1))[1])
    for threads in (1, 1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        filled_rows(matrix(8, 8))
    assert len(asked) == 2


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("threads_change", [False, True])
def test_the_engine_computes_with_filled_up_rows_unless_threads_have_changed(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, threads_change: bool
) -> None:
    counts: set[int] = set()
    multiply = torch.mm

    def counting(rows: Tensor, weight: Tensor, **options: Tensor) -> Tensor:
        counts.add(len(rows))
        return multiply(rows, weight, **options)

    with (
        torch.no_grad(),
        load(checkpoint("olmoe", "bfloat16"), EngineOptions(memory_budget="400MiB")) as (model, engine),
    ):
        if threads_change:
            monkeypatch.setattr(torch, "get_num_threads", lambda: engine._memory.filled_for_threads + 1)
        monkeypatch.setattr(torch, "mm", counting)
        model(torch.arange(2, 60)[None])
    filled = {size for sizes in engine._memory.filled_rows.values() for size in sizes}
    assert (counts <= filled) != threads_change


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v2", "granitemoe", "wide"])
def test_logits_under_a_memory_budget_are_those_of_the_resident_model(
    checkpoint: Callable[..., Path], family: str
) -> None:
    folder, ids_BT = checkpoint(family, "bfloat16"), torch.arange(2, 242).reshape(4, 60)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids_BT).logits
        with load(folder, EngineOptions(memory_budget="400MiB")) as (model, engine):
            assert any(engine._memory.filled_rows.values())
            assert torch.equal(model(ids_BT).logits, expected)


@pytest.mark.usefixtures("compiled")
def test_nothing_is_tried_without_a_memory_budget(checkpoint: Callable[..., Path]) -> None:
    """Every number that is tried leaves a kernel behind, where they are not bounded."""
    with load(checkpoint("olmoe", "bfloat16"), EngineOptions("100%")) as (_, engine):
        assert not any(engine._memory.filled_rows.values())
