"""`remoe make-model --shape`: what is written loads into the model of that config.json, quantised as it says, and is paged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from configs.load import UserError
from evaluation.benchmark.made_model.calibration import reuse_rate
from evaluation.benchmark.made_model.shaped_checkpoint import ShapedModel, shared_part, write_shaped
from evaluation.benchmark.made_model.synthetic import Source
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.store.experts import ExpertStore
from launch.make_model import main
from training.model.loading import load_tokenizer
from training.model.shards import read_index

TOKENIZER = Path(__file__).parents[3] / "data" / "embedded" / "tokenizer"
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2,
    "vocab_size": 4096,
}  # fmt: skip
INTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
MODELS = {
    "qwen3 with tied embeddings": (
        Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=128, head_dim=32, tie_word_embeddings=True), None,
        "bfloat16",
    ),
    "qwen2 with a shared expert": (
        Qwen2MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=64, shared_expert_intermediate_size=64), None, "bfloat16",
    ),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=8, intermediate_size=64), None, "bfloat16"),
    "gpt-oss": (
        GptOssConfig(**SIZES, num_local_experts=8, intermediate_size=128, head_dim=32), {"quant_method": "mxfp4"}, "MXFP4",
    ),
    "deepseek with a dense layer": (
        DeepseekV3Config(
            **SIZES, n_routed_experts=8, n_group=2, topk_group=1, moe_intermediate_size=128, intermediate_size=64,
            first_k_dense_replace=1,
        ), {"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8",
    ),
    "int4": (
        Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=128, head_dim=32),
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"], "weights": INTS}}}, "int4",
    ),
}  # fmt: skip


def config_folder(folder: Path, config: PretrainedConfig, quantised: dict[str, Any] | None = None) -> Path:
    config.save_pretrained(folder)
    if quantised is not None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "quantization_config": quantised}))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_it_whole_and_the_engine_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    config, quantised, numbers = MODELS[name]
    shape, made = config_folder(tmp_path / "shape", config, quantised), tmp_path / "made"
    made.mkdir()
    told = write_shaped(made, ShapedModel.of(shape, None), load_tokenizer(str(TOKENIZER)), eor=0.5, seed=3)
    model, info = AutoModelForCausalLM.from_pretrained(made, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert (model.dtype, ExpertStore(made).format.numbers.name) == (torch.bfloat16, numbers)
    assert told["weight_bytes"] == sum(tensor.length_bytes for tensor in read_index(made).values())
    ids = torch.randint(0, 512, (1, 16), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert len(expected[0, 16:].unique()) > 2, "it writes something"
    with load(made, EngineOptions("50%", warn=False)) as (paged, engine):
        assert torch.equal(paged.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0), expected)
        assert engine.stats().misses > 8
    for key, weight in model.state_dict().items():
        if weight.dim() > 1 and "embed" not in key and "bias" not in key and not config.tie_word_embeddings:
            assert 0.1 < float(weight.float().std()) * weight.shape[-1] ** 0.5 < 3, key


def test_seeds_decide_every_byte(tmp_path: Path) -> None:
    shape, weights = config_folder(tmp_path / "shape", MODELS["mixtral"][0]), []
    for number, seed in enumerate((1, 1, 2)):
        (made := tmp_path / str(number)).mkdir()
        write_shaped(made, ShapedModel.of(shape, None), load_tokenizer(str(TOKENIZER)), eor=0.5, seed=seed)
        weights.append([path.read_bytes() for path in sorted(made.glob("*.safetensors"))])
    assert weights[0] == weights[1]
    assert all(one != other for one, other in zip(weights[0], weights[2], strict=True))


@pytest.mark.parametrize(("experts", "top_k", "eor"), [(64, 8, 0.37), (32, 4, 0.5), (128, 8, 0.3)])
def test_the_shared_part_gives_the_reuse_that_is_asked_for(experts: int, top_k: int, eor: float) -> None:
    shared, reached = shared_part(eor, experts, top_k), []
    for seed in range(40):
        source = Source(seed, 1)
        logits_TE = shared**0.5 * source.normal(experts) + (1 - shared) ** 0.5 * source.normal(500, experts)
        reached.append(reuse_rate(logits_TE, top_k, rows=1))
    assert abs(sum(reached) / len(reached) - eor) < 0.05


def test_the_command_writes_it_and_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = config_folder(tmp_path / "shape", MODELS["qwen3 with tied embeddings"][0])
    made = tmp_path / "made"
    given = ["--shape", str(shape / "config.json"), "--expert-format", "int8"]
    main([*given, "--output", str(made), "--check-tokens", "4"])
    assert "experts in int8" in capsys.readouterr().out
    assert "int8" in (made / "README.md").read_text()
    assert json.loads((made / "made.json").read_text())["measured"]["teacher_forced"]["reuse_rate_mean"] > 0.25
    assert json.loads((shape / "config.json").read_text()).get("quantization_config") is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--shape", "nowhere/config.json"], "neither a config.json nor a folder"),
        (["--shape", "SHAPE", "--layers", "3"], "--shape says all sizes; leave --layers out"),
        (["--expert-format", "int4"], "--expert-format is for --shape"),
        (["--shape", "SHAPE", "--expert-format", "fp8"], "no standard layout for fp8"),
        (["--shape", "DENSE"], "has no routers|no routers|no experts"),
        (["--shape", "GPTQ"], "quantised as gptq"),
        (["--shape", "SMALL"], "has 300 tokens, and the tokenizer that ships .*; put the model's"),
        (["--shape", "NVFP4"], "announces weights of .*; write --expert-format"),
    ],
)
def test_what_cannot_be_made_is_told_and_leaves_nothing(given: list[str], words: str, tmp_path: Path) -> None:
    qwen3 = MODELS["int4"][0]
    folders = {
        "SHAPE": config_folder(tmp_path / "oss", MODELS["gpt-oss"][0]),
        "DENSE": config_folder(tmp_path / "dense", LlamaConfig(hidden_size=64, num_hidden_layers=1, intermediate_size=64)),
        "SMALL": config_folder(tmp_path / "small", MixtralConfig(**{**SIZES, "vocab_size": 300}, intermediate_size=64)),
        "GPTQ": config_folder(tmp_path / "gptq", qwen3, {"quant_method": "gptq"}),
        "NVFP4": config_folder(
            tmp_path / "nvfp4", qwen3,
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"type": "int", "num_bits": 3}}}},
        ),
    }  # fmt: skip
    with pytest.raises(UserError, match=words):
        main(["--output", str(tmp_path / "made"), *(str(folders.get(word, word)) for word in given)])
    assert not (tmp_path / "made").exists()
