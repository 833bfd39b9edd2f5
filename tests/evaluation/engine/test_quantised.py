"""Quantised experts are paged as they are stored, and give the tokens and logits of what transformers makes of the folder."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from configs.load import UserError
from evaluation.engine.device import Host
from evaluation.engine.engine import Engine
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.slot_kind import Rates, possible_kinds
from evaluation.engine.slot_memory import SlotMemory
from evaluation.engine.store.experts import ExpertStore
from evaluation.export.quantised_folder import write_quantised
from training.model.number_formats.fp8 import Fp8

Checkpoint = Callable[..., Path]
Quantised = Callable[[str, str], Path]
CASES = [
    ("gpt_oss_blocks", "mxfp4"),
    ("qwen3_moe_blocks", "fp8"),
    ("deepseek_v3_blocks", "fp8"),
    ("qwen3_moe_blocks", "int4"),
    ("qwen3_moe_blocks", "int8"),
    ("qwen3_moe_blocks", "mxfp4"),
]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def quantised(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """`quantised(family, kind)`: a folder with experts of that kind, made once. Never write into it."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, kind: str) -> Path:
        if (family, kind) not in made:
            made[family, kind] = tmp_path_factory.mktemp("quantised") / f"{family}-{kind}"
            write_quantised(checkpoint(family), made[family, kind], kind)
        return made[family, kind]

    return make


def generated(model: Any, *, batch: int = 1) -> list[Tensor]:
    """Sequences, and the logits of every step."""
    ids = torch.randint(2, 258, (batch, 20), generator=torch.Generator().manual_seed(3))
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=1,
    )  # fmt: skip
    return [out.sequences, torch.stack(out.logits)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@contextmanager
def paged(folder: Path, slots: int, kind: str, **options: Any) -> Iterator[tuple[Any, Engine]]:
    """The model with so many slots for experts."""
    store = ExpertStore(folder)
    slot_bytes = (store.stored_record() if kind == "stored" else store.record(2)).total_bytes
    with load(folder, EngineOptions(slots * slot_bytes, slots=kind, warn=False, **options)) as loaded:
        yield loaded


@pytest.mark.parametrize("slots", ["stored", "ready"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_tokens_and_logits_are_the_resident_models_at_five_budgets(
    quantised: Quantised, family: str, kind: str, slots: str
) -> None:
    folder = quantised(family, kind)
    expected = generated(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    for count in (3, 4, 6, 11, 16):
        with paged(folder, count, slots) as (model, engine):
            assert same(generated(model), expected), f"{count} slots"
            assert engine.cache.total_slots == count
            stats = engine.stats()
            assert stats.misses > 16 or count == 16, "experts were evicted and read again"
            assert stats.bytes_read == stats.misses * ExpertStore(folder).format.expert_bytes


@pytest.mark.parametrize("slots", ["stored", "ready"])
@pytest.mark.parametrize("options", [{"prefetch": 2}, {"cache_scope": "per_layer", "cache_policy": "lru"}], ids=str)
@pytest.mark.parametrize(("family", "kind"), [CASES[0], CASES[3]])
def test_batches_prefetch_and_other_caches(
    quantised: Quantised, family: str, kind: str, options: dict[str, Any], slots: str
) -> None:
    folder = quantised(family, kind)
    expected = generated(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), batch=3)
    with paged(folder, 6 if "prefetch" in options else 12, slots, **options) as (model, _):
        assert same(generated(model, batch=3), expected)


def test_slots_that_hold_what_is_stored_take_more_experts_in_the_same_memory(quantised: Quantised) -> None:
    folder, counts, misses = quantised("gpt_oss_blocks", "mxfp4"), {}, {}
    budget = 5 * ExpertStore(folder).record(2).total_bytes
    for slots in ("stored", "ready"):
        with load(folder, EngineOptions(budget, slots=slots)) as (model, engine):
            generated(model)
            counts[slots], misses[slots] = engine.cache.total_slots, engine.stats().misses
    assert counts["ready"] == 5
    assert counts["stored"] == 16, "all of them, at 4.25 bits a number"
    assert misses["stored"] < misses["ready"]


@pytest.mark.parametrize(
    ("budget", "rates", "kind"),
    [
        (0.3, Rates(read=1.0, decode=0.1), "stored"),
        (0.3, Rates(read=0.1, decode=1.0), "ready"),
        (1.0, Rates(read=1.0, decode=0.1), "ready"),  # nothing is read any more, and nothing decoded
        (0.1, Rates(read=0.1, decode=1.0), "stored"),  # there is room for a token's experts as they are stored alone
    ],
)
def test_what_slots_hold_is_decided_by_what_a_token_takes(
    quantised: Quantised, monkeypatch: pytest.MonkeyPatch, budget: float, rates: Rates, kind: str
) -> None:
    monkeypatch.setattr(Rates, "measured", lambda *_: rates)
    store = ExpertStore(quantised("gpt_oss_blocks", "mxfp4"))
    cache_bytes = int(budget * 16 * store.record(2).total_bytes)
    with load(store.model_dir, EngineOptions(cache_bytes)) as (_, engine):
        assert engine.slot_kind == kind


def test_rates_are_measured(quantised: Quantised) -> None:
    """Of every format: decoding must not fail on what stands for an expert's bytes."""
    for family, numbers in CASES:
        rates = Rates.measured(ExpertStore(quantised(family, numbers)), torch.bfloat16)
        assert rates.read > 0 < rates.decode


def test_a_budget_too_small_for_either_names_the_smaller_one(quantised: Quantised) -> None:
    store = ExpertStore(quantised("gpt_oss_blocks", "mxfp4"))
    smallest = 3 * store.stored_record().total_bytes
    with (
        pytest.raises(UserError, match=f"the smallest that works is {smallest} bytes"),
        load(store.model_dir, EngineOptions(99)),
    ):
        pass


class Beside(Host):
    """What an accelerator is to slots: experts are decoded in the processor's memory and copied."""

    reads_into_slots = False


@pytest.mark.parametrize(("family", "kind"), [CASES[0], CASES[1], CASES[3]])
def test_slots_of_an_accelerator_are_filled_with_decoded_matrices(quantised: Quantised, family: str, kind: str) -> None:
    store = ExpertStore(quantised(family, kind))
    memories = [SlotMemory(store, 3, torch.bfloat16, passing=2, device=device) for device in (Host(), Beside())]
    for slot, expert in ((2, 5), (0, 1), (2, 4)):
        for memory in memories:
            assert memory.converts
            for span in memory.spans(memory.passing_slots[-1], 1, expert):
                span.target[:] = np.fromfile(span.shard, dtype=np.uint8, count=len(span.target), offset=span.offset)
            memory.convert(memory.passing_slots[-1], slot)
    here, beside = memories
    for slot in (0, 2):
        assert torch.equal(here.gate_up_HJ(slot), beside.gate_up_HJ(slot))
        assert torch.equal(here.down_IH(slot), beside.down_IH(slot))
        assert here.down_IH(slot).any()
    assert beside.passing_bytes > here.passing_bytes
    with pytest.raises(UserError, match="they are decoded on the processor; write slots=ready"):
        possible_kinds(EngineOptions("30%", slots="stored"), store, Beside())
    with pytest.raises(UserError, match="they are decoded on the processor; write slots=ready, products=exact"):
        possible_kinds(EngineOptions("30%", products="packed"), store, Beside())
    assert possible_kinds(EngineOptions("30%"), store, Beside()) == ("ready",)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_packed_products_change_no_more_than_last_bits_and_need_no_decoded_matrix(
    quantised: Quantised, family: str, kind: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantised(family, kind)
    with paged(folder, 8, "stored") as (model, engine):
        assert engine.is_exact
        exact = generated(model, batch=batch)
    decodes: list[int] = []
    decode = SlotMemory._decode
    monkeypatch.setattr(SlotMemory, "_decode", lambda self, *given: decodes.append(1) or decode(self, *given))
    with load(folder, EngineOptions("30%", products="packed")) as (model, engine):
        assert (engine.is_exact, engine.slot_kind, engine.options.changes) == (False, "stored", "products=packed")
        packed = generated(model, batch=batch)
        with torch.inference_mode():
            decodes.clear()
            cache = model(torch.randint(2, 258, (batch, 20)), use_cache=True).past_key_values
            assert decodes, "a prompt has many rows"
            decodes.clear()
            model(torch.arange(5, 5 + batch)[:, None], past_key_values=cache, use_cache=True)
            assert not decodes
    assert torch.equal(packed[0][:, 20], exact[0][:, 20])
    assert (packed[1][:2] - exact[1][:2]).abs().max() < 0.02 * exact[1][:2].abs().max()


def test_packed_products_need_packed_numbers(checkpoint: Checkpoint) -> None:
    with (
        pytest.raises(UserError, match="experts are not quantised; write slots=ready, products=exact"),
        load(checkpoint("olmoe"), EngineOptions("30%", products="packed")),
    ):
        pass
    with pytest.raises(UserError, match="products=packed multiplies by what is stored, and slots=ready"):
        EngineOptions("30%", products="packed", slots="ready")
    with pytest.raises(UserError, match="unknown products 'fast'; known: exact, packed"):
        EngineOptions("30%", products="fast")


@pytest.mark.parametrize("slots", ["stored", "ready"])
def test_under_a_memory_budget_too(quantised: Quantised, slots: str) -> None:
    folder = quantised("qwen3_moe_blocks", "int8")
    with load(folder, EngineOptions(memory_budget="smallest + 1%", context_tokens=64, slots=slots)) as (model, engine):
        assert engine.division is not None
        assert engine.buffer_bytes <= engine.division.buffer_bytes
        assert same(generated(model), generated(AutoModelForCausalLM.from_pretrained(folder, dtype="auto")))


def test_what_lies_beside_the_slots_is_counted(quantised: Quantised) -> None:
    store = ExpertStore(quantised("qwen3_moe_blocks", "int8"))
    stored_bytes, ready_bytes = store.stored_record().total_bytes, store.record(2).total_bytes
    with paged(store.model_dir, 8, "stored") as (_, engine):
        assert engine.buffer_bytes == stored_bytes + ready_bytes, "one that passes, and the matrices in use"
    with paged(store.model_dir, 8, "ready") as (_, engine):
        assert engine.buffer_bytes == stored_bytes + ready_bytes, "one as it is read, and one that passes"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("family", "kind"), [CASES[0], CASES[1], CASES[3]])
def test_other_precisions(quantised: Quantised, family: str, kind: str, dtype: str) -> None:
    """transformers (5.23) leaves some weights beside FP8 as stored, and cannot compute then; casting them is what it lacks."""
    folder = quantised(family, kind)
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    for parameter in resident.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    with paged(folder, 6, "stored", dtype=dtype) as (model, engine):
        assert engine.dtype == getattr(torch, dtype)
        assert same(generated(model), generated(resident))


def test_residents_that_are_quantised_too(quantised: Quantised, tmp_path: Path) -> None:
    """As DeepSeek-V3 and Qwen3's FP8 checkpoints are: attention in blocks like the experts."""
    folder = tmp_path / "m"
    shutil.copytree(quantised("qwen3_moe_blocks", "fp8"), folder)
    numbers, tensors = Fp8("_scale_inv", "F32", (32, 32)), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "o_proj.weight")):
            tensors |= {name + ending: part for ending, part in numbers.encode(tensor).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    left = [
        name
        for name in config["quantization_config"]["modules_to_not_convert"]
        if not name.endswith(("q_proj", "o_proj"))
    ]
    config["quantization_config"]["modules_to_not_convert"] = left
    (folder / "config.json").write_text(json.dumps(config))
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert resident.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    with paged(folder, 5, "stored") as (model, _):
        assert same(generated(model), generated(resident))


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> Path:
    """A copy of a folder, its tensors and its config.json changed."""
    shutil.copytree(folder, target)
    tensors, config = load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
FUSED = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("fp8", lambda t, _: t.pop(f"{EXPERT}_scale_inv"), r"expert 3: beside .*up_proj.weight there is nothing .*_scale_inv"),
        (
            "fp8",
            lambda t, _: t.update({f"{EXPERT}_scale_inv": torch.ones(3, 1)}),
            r"up_proj.weight_scale_inv is F32 \[3, 1\] in 12 bytes, not F32 \[3, 2\]",
        ),
        ("fp8", lambda t, _: t.update({EXPERT: torch.ones(96, 64, dtype=torch.bfloat16)}), "is BF16 .* not F8_E4M3"),
        ("fp8", lambda _, c: c.pop("quantization_config"), "stored as FP8, which config.json announces .* and it has None"),
        (
            "fp8",
            lambda _, c: c.update(quantization_config={"quant_method": "mxfp4"}),
            "stored as FP8, .* quant_method 'fp8', and it has 'mxfp4'",
        ),
        (
            "fp8",
            lambda _, c: c.update(quantization_config={"quant_method": "awq"}),
            "quantised as awq .*, which is not supported; supported are mxfp4, fp8, compressed-tensors",
        ),
        ("int4", lambda t, _: t.update({f"{EXPERT}_zero_point": torch.ones(12, 2).int()}), "_zero_point, which the others"),
        ("int4", lambda t, _: t.pop(f"{EXPERT}_packed"), "expert 3: beside .*up_proj.weight_scale there is nothing"),
        ("mxfp4", lambda t, _: t.pop(f"{FUSED}_scales"), "expert 0: beside .*down_proj_blocks.0. there is nothing"),
    ],
)  # fmt: skip
def test_damage_is_told_before_anything_is_loaded(
    quantised: Quantised, tmp_path: Path, kind: str, change: Callable[..., Any], words: str
) -> None:
    folder = quantised("gpt_oss_blocks" if kind == "mxfp4" else "qwen3_moe_blocks", kind)
    with pytest.raises(UserError, match=words), load(changed(folder, tmp_path / "m", change), EngineOptions("100%")):
        pass


@pytest.mark.parametrize("slots", ["stored", "ready"])
@pytest.mark.parametrize(
    ("kind", "scale", "value"), [("fp8", f"{EXPERT}_scale_inv", torch.nan), ("mxfp4", f"{FUSED}_scales", 255)]
)
def test_a_scale_that_is_no_number_is_named_with_its_expert(
    quantised: Quantised, tmp_path: Path, kind: str, scale: str, value: float, slots: str
) -> None:
    folder = quantised("gpt_oss_blocks" if kind == "mxfp4" else "qwen3_moe_blocks", kind)
    folder = changed(folder, tmp_path / "m", lambda t, _: t[scale].view(-1).__setitem__(-1, value))
    with (
        paged(folder, 4, slots) as (model, _),
        pytest.raises(UserError, match=r"layer 1 expert [37]: a scale of .* no"),
    ):
        generated(model, batch=4)


@pytest.mark.parametrize(
    ("kind", "scale", "value", "bad"),
    [("fp8", f"{EXPERT}_scale_inv", torch.nan, 3), ("mxfp4", f"{FUSED}_scales", 255, 7)],
)
def test_packed_products_of_several_name_the_expert_whose_scale_is_no_number(
    quantised: Quantised, tmp_path: Path, kind: str, scale: str, value: float, bad: int
) -> None:
    folder = quantised("gpt_oss_blocks" if kind == "mxfp4" else "qwen3_moe_blocks", kind)
    folder = changed(folder, tmp_path / "m", lambda t, _: t[scale].view(-1).__setitem__(-1, value))
    store, experts = ExpertStore(folder), [2, bad, 5]
    memory = SlotMemory(store, 3, torch.bfloat16, as_stored=True, multiplies_packed=True)
    for slot, expert in enumerate(experts):
        for span in memory.spans(slot, 1, expert):
            span.target[:] = np.fromfile(span.shard, np.uint8, count=len(span.target), offset=span.offset)
    matrix, columns = ("gate_up", store.format.hidden) if kind == "fp8" else ("down", store.format.intermediate)
    with pytest.raises(UserError, match=f"layer 1 expert {bad}: a scale of .* no"):
        memory.multiply(range(3), matrix, np.ones((3, columns), dtype=np.float32))


def test_slots_that_cannot_hold_what_is_stored(checkpoint: Checkpoint) -> None:
    with (
        pytest.raises(UserError, match="its experts are not quantised; write slots=ready"),
        load(checkpoint("olmoe"), EngineOptions("100%", slots="stored")),
    ):
        pass
    with pytest.raises(UserError, match="unknown slots 'raw'; known: auto, stored, ready"):
        EngineOptions("100%", slots="raw")
