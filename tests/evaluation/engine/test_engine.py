"""`load`: what it refuses, what it leaves alone, and that its counters are those of the replay."""

import gc
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from configs.load import UserError
from evaluation.engine.cache.counts import DECODE, PREFILL
from evaluation.engine.cache.policies import ONLINE
from evaluation.engine.cache.replay import replay
from evaluation.engine.cache.trace_formats import read_trace, write_trace
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions

Checkpoint = Callable[..., Path]


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def generate(model: Any, seed: int, *, batch: int = 1, new_tokens: int = 12) -> torch.Tensor:
    ids_BT = torch.randint(2, 258, (batch, 11), generator=torch.Generator().manual_seed(seed))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1:, :3] = 0
    output: torch.Tensor = model.generate(
        input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=new_tokens, do_sample=False
    )
    return output


@pytest.mark.parametrize("policy", list(ONLINE))
@pytest.mark.parametrize(
    ("scope", "slots"), [("global", 3), ("global", 8), ("global", 14), ("per_layer", 3), ("per_layer", 5)]
)
def test_live_counters_are_those_of_the_replay(
    checkpoint: Checkpoint, tmp_path: Path, policy: str, scope: str, slots: int
) -> None:
    folder, pools = checkpoint("qwen2_moe"), 1 if scope == "global" else 3
    with load(folder, EngineOptions("100%")) as (_, sized):
        budget = slots * pools * sized.demand.slot_bytes
    with load(folder, EngineOptions(budget, cache_policy=policy, cache_scope=scope, record_trace=True)) as (
        model,
        engine,
    ):
        generate(model, 1)
        generate(model, 2)  # the same request goes on, the cache is warm
        engine.reset_cache()
        generate(model, 3, batch=2)
        stats, counts = engine.stats(), engine.cache.counts
        write_trace(engine.trace(), tmp_path / "t.safetensors")
    trace = read_trace(tmp_path / "t.safetensors")
    result = replay(trace, policy=policy, cache_scope=scope, slots=slots)
    total = counts.total()
    assert (result.accesses, result.misses, result.first_touches) == (total.accesses, total.misses, total.first_touches)
    assert (result.prefill, result.decode) == (counts.total(PREFILL), counts.total(DECODE))
    assert result.by_layer == counts.by_layer()
    assert result.bytes_read_per_token == stats.bytes_read_per_token
    assert stats.bytes_read == result.misses * engine.expert_bytes
    assert (trace.layer_ids, trace.num_experts, trace.top_k) == ((0, 2, 3), 12, 3)
    assert trace.request_id.tolist() == sorted(trace.request_id.tolist())
    assert trace.tokens == sum(stats.tokens.values()) == 2 * (11 + 11) + 2 * (11 + 11)


def test_counters_start_again_on_request_and_the_cache_stays(checkpoint: Checkpoint) -> None:
    with load(checkpoint("olmoe"), EngineOptions("100%")) as (model, engine):
        tokens = generate(model, 1)
        assert engine.stats().misses > 0
        engine.reset_stats()
        assert (engine.stats().accesses, engine.stats().bytes_read) == (0, 0)
        assert torch.equal(generate(model, 1), tokens)
        assert engine.stats().misses == 0
        assert engine.stats().hit_rate == {"prefill": 1, "decode": 1}


def test_a_one_token_prompt_is_prefill_and_what_follows_is_decode(checkpoint: Checkpoint) -> None:
    with load(checkpoint("olmoe"), EngineOptions("100%")) as (model, engine):
        model.generate(torch.tensor([[5]]), attention_mask=torch.ones(1, 1), max_new_tokens=4, do_sample=False)
        assert engine.stats().tokens == {"prefill": 1, "decode": 3}


@pytest.mark.parametrize("loaded_inside", [False, True])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_inference_mode_and_no_grad_may_take_turns(checkpoint: Checkpoint, dtype: str, loaded_inside: bool) -> None:
    options, ids_BT = EngineOptions("50%", dtype=dtype, warn=False), torch.arange(2, 20)[None]
    with torch.inference_mode(loaded_inside), load(checkpoint(), options) as (model, _):
        with torch.inference_mode(False), torch.no_grad():
            before = model(input_ids=ids_BT).logits
        with torch.inference_mode():
            inside = model(input_ids=ids_BT).logits
        with torch.inference_mode(False), torch.no_grad():
            after = model(input_ids=ids_BT).logits
    assert torch.equal(before, inside)
    assert torch.equal(before, after)


def test_the_checkpoint_is_not_touched_and_no_expert_is_resident(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen2_moe", "float32")
    before = digest(folder)
    gates = {f"model.layers.{layer}.mlp.gate.weight": torch.randn(12, 32) for layer in (0, 2, 3)}
    with load(folder, EngineOptions("50%"), router_delta=gates) as (model, engine):
        generate(model, 1)
        experts = [p for name, p in model.named_parameters() if ".experts." in name]
        assert len(experts) == 6
        assert all(parameter.is_meta for parameter in experts)
        assert not any(p.is_meta for name, p in model.named_parameters() if ".experts." not in name)
        assert engine.pool_bytes <= 0.5 * 36 * engine.demand.slot_bytes
    assert digest(folder) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_router_delta_changes_the_gates_as_in_the_resident_model(checkpoint: Checkpoint, dtype: str) -> None:
    folder = checkpoint("olmoe", dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    delta = {f"model.layers.{layer}.mlp.gate.weight": torch.randn(8, 32) for layer in range(3)}
    before = generate(plain, 1)
    with torch.no_grad():
        for name, weight in delta.items():
            plain.get_parameter(name).copy_(weight)
    expected = generate(plain, 1)
    assert not torch.equal(expected, before)
    with load(folder, EngineOptions("30%"), router_delta=delta) as (model, _):
        assert torch.equal(generate(model, 1), expected)


def test_a_router_delta_for_another_model_is_refused(checkpoint: Checkpoint) -> None:
    folder = checkpoint("olmoe")
    for name in ("model.layers.9.mlp.gate.weight", "model.layers.0.mlp.experts.down_proj"):
        with (
            pytest.raises(UserError, match=f"the model has no router weight {name}"),
            load(folder, EngineOptions("100%"), router_delta={name: torch.ones(8, 32)}),
        ):
            pass
    with (
        pytest.raises(UserError, match=r"gate\.weight has shape \[7, 32\], the model's is \[8, 32\]"),
        load(folder, EngineOptions("100%"), router_delta={"model.layers.0.mlp.gate.weight": torch.ones(7, 32)}),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_policy": "belady"}, "unknown cache policy 'belady'; known: lru, fifo, lfu, lfru, decayed"),
        ({"cache_scope": "both"}, "unknown cache scope 'both'; known: global, per_layer"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported; write auto, bfloat16, float16, float32"),
        ({"dtype": "float64"}, "dtype 'float64' is not supported"),
        ({"expert_cache": "auto"}, "expert cache 'auto' is not understood"),
        ({"reads_in_flight": 0}, "--reads-in-flight is 0; write at least 1"),
        (
            {"expert_cache": 100},
            r"an expert cache of 100 bytes is too small: .* the smallest that works is 15360 bytes \(15KiB\)",
        ),
        (
            {"expert_cache": 15360, "cache_scope": "per_layer"},
            "there are 3 pools; the smallest that works is 46080 bytes",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(checkpoint: Checkpoint, options: dict[str, Any], words: str) -> None:
    with (
        pytest.raises(UserError, match=words),
        load(checkpoint("olmoe"), EngineOptions(**{"expert_cache": "100%", **options})),
    ):
        pass


def test_the_smallest_cache_named_works(checkpoint: Checkpoint) -> None:
    with load(checkpoint("olmoe"), EngineOptions(15360)) as (model, engine):
        assert engine.cache.total_slots == 2
        assert generate(model, 1).shape == (1, 23)


def test_below_one_tokens_demand_one_warning_is_logged(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        load(checkpoint("olmoe"), EngineOptions(15360, cache_policy="lru")) as (model, engine),
    ):
        generate(model, 1)
        assert engine.token_demand_bytes == 6 * 7680
        assert engine.stats().hit_rate["decode"] == 0
    assert len([message for message in caplog.messages if "hits nothing" in message]) == 1


def changed(folder: Path, into: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other values in its config.json; None removes a key."""
    copy = Path(shutil.copytree(folder, into))
    content = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return copy


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "no_such_model"}, "config.json is not understood"),
        ({"model_type": "t5"}, "model type 't5' is no causal language model"),
        ({"num_experts_per_tok": "two"}, "config.json is not understood: .*num_experts_per_tok"),
        ({"num_experts_per_tok": None, "model_type": "llama"}, "has no routers"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "is quantised as gptq .*which is not supported; supported are mxfp4",
        ),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "config.json is not understood"),
        ({"num_hidden_layers": 0}, "config.json has 0 layers, none with experts"),
        ({"vocab_size": 17}, "the weights do not fit config.json"),
        ({"num_hidden_layers": 4}, "the checkpoint lacks model.layers.3.input_layernorm.weight"),
        ({"model_type": "llama"}, "the checkpoint lacks model.layers.0.mlp.down_proj.weight"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    folder = changed(checkpoint("olmoe"), tmp_path / "m", **config)
    with pytest.raises(UserError, match=words), load(folder, EngineOptions("100%")):
        pass


@pytest.mark.parametrize("first", ["bfloat16", "float32"])
def test_without_a_precision_in_the_config_the_first_tensor_decides_as_in_transformers(
    checkpoint: Checkpoint, tmp_path: Path, first: str
) -> None:
    """Of a checkpoint whose tensors differ."""
    folder = changed(checkpoint("olmoe", "float32"), tmp_path / "m", dtype=None, torch_dtype=None)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    tensors |= {names[0]: tensors[names[0]].to(getattr(torch, first)), names[1]: tensors[names[1]].bfloat16()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with load(folder, EngineOptions("100%")) as (model, engine):
        assert engine.dtype == plain.dtype
        ids = torch.arange(1, 9)[None]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain.eval()(ids).logits)


def test_settings_that_stand_in_the_config_alone_are_those_of_transformers(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = changed(checkpoint("olmoe"), tmp_path / "m", eos_token_id=[5, 6], repetition_penalty=1.7)
    (folder / "generation_config.json").unlink(missing_ok=True)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with load(folder, EngineOptions("100%")) as (model, _):
        assert model.generation_config.to_dict() == plain.generation_config.to_dict()
        assert model.generation_config.repetition_penalty == 1.7


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"), load(tmp_path, EngineOptions("1MiB")):
        pass


def test_layers_beyond_the_model_are_left_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Some checkpoints carry a further layer that predicts tokens ahead; transformers does not load it."""
    folder = changed(checkpoint("olmoe"), tmp_path / "m", num_hidden_layers=2)
    with load(folder, EngineOptions("100%")) as (model, engine):
        generate(model, 1)
        assert (engine.demand.layers, engine.cache.total_slots) == (2, 16)


def test_generation_settings_of_the_checkpoint_are_kept(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = changed(checkpoint("olmoe"), tmp_path / "m")
    GenerationConfig(eos_token_id=77, max_new_tokens=5, pad_token_id=1).save_pretrained(folder)
    with load(folder, EngineOptions("100%")) as (model, _):
        assert model.generation_config.eos_token_id == 77
        assert not model.training
        assert model.config.name_or_path == str(folder)


def test_a_trace_must_have_been_asked_for(checkpoint: Checkpoint) -> None:
    with (
        load(checkpoint("olmoe"), EngineOptions("100%")) as (_, engine),
        pytest.raises(UserError, match="load the model with record_trace=True"),
    ):
        engine.trace()


def test_two_engines_at_once_do_not_disturb_each_other(checkpoint: Checkpoint) -> None:
    with (
        load(checkpoint("olmoe"), EngineOptions(15360)) as (a, _),
        load(checkpoint("mixtral"), EngineOptions("50%")) as (b, _),
    ):
        first = generate(a, 1), generate(b, 1)
        assert torch.equal(generate(a, 1), first[0])
        assert torch.equal(generate(b, 1), first[1])


def test_files_are_closed_and_memory_is_released_at_the_end(checkpoint: Checkpoint) -> None:
    before = open_shards()
    with load(checkpoint("olmoe"), EngineOptions(4 * 7680)) as (model, engine):
        generate(model, 1)
        assert open_shards() == before + 1
        assert "expert-reader" in thread_names()
    assert open_shards() == before
    assert "expert-reader" not in thread_names()
    with pytest.raises(UserError, match="use the model inside the `with load"):
        generate(model, 1)
    del model, engine
    gc.collect()


def open_shards() -> int:
    """How often this process has a shard open; mapped files are not counted."""
    links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return sum(link.endswith(".safetensors") for link in links)


def thread_names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_traces_and_options_need_no_torch() -> None:
    code = "import sys, evaluation.engine.options, evaluation.engine.cache.replay; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
