"""Tiny random mixture-of-experts checkpoints of several families, made once per test session."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

COMMON: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 320,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
BLOCKS = COMMON | {"hidden_size": 64}


def tiny_config(family: str) -> PretrainedConfig:
    """Four layers or fewer, 6 to 12 experts of which 2 or 3; widths that are no powers of two."""
    if family == "qwen2_moe":  # shared expert, and a layer without experts
        return Qwen2MoeConfig(
            **COMMON, num_hidden_layers=4, mlp_only_layers=[1], intermediate_size=48, moe_intermediate_size=24,
            shared_expert_intermediate_size=40, num_experts=12, num_experts_per_tok=3, decoder_sparse_step=1,
        )  # fmt: skip
    if family == "olmoe":
        return OlmoeConfig(
            **COMMON, num_hidden_layers=3, intermediate_size=40, num_experts=8, num_experts_per_tok=2,
            norm_topk_prob=True, tie_word_embeddings=True,
        )  # fmt: skip
    if family == "wide":  # rows of experts that end in the middle of a vector register
        return OlmoeConfig(**COMMON, num_hidden_layers=2, intermediate_size=1000, num_experts=8, num_experts_per_tok=2)
    if family == "pages":  # matrices of whole pages
        return OlmoeConfig(**COMMON, num_hidden_layers=2, intermediate_size=64, num_experts=8, num_experts_per_tok=2)
    if family == "fused_pages":
        return GraniteMoeConfig(
            **COMMON, num_hidden_layers=2, intermediate_size=64, num_local_experts=6, num_experts_per_tok=2
        )
    if family == "mixtral":
        return MixtralConfig(
            **COMMON, num_hidden_layers=2, intermediate_size=56, num_local_experts=6, num_experts_per_tok=2
        )
    if family == "phimoe":
        return PhimoeConfig(
            **COMMON, num_hidden_layers=2, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2
        )
    if family == "qwen3_moe":
        return Qwen3MoeConfig(
            **COMMON, num_hidden_layers=2, intermediate_size=48, moe_intermediate_size=24, num_experts=8,
            num_experts_per_tok=2, head_dim=16,
        )  # fmt: skip
    if family == "gpt_oss":  # fused on disk, transposed, gate and up interleaved, biases
        return GptOssConfig(
            **COMMON, num_hidden_layers=2, intermediate_size=24, num_local_experts=8, num_experts_per_tok=3, head_dim=16,
        )  # fmt: skip
    if family == "gpt_oss_blocks":  # of sizes that the number formats have whole blocks of, as the next ones are
        return GptOssConfig(
            **BLOCKS, num_hidden_layers=2, intermediate_size=96, num_local_experts=8, num_experts_per_tok=3, head_dim=16,
        )  # fmt: skip
    if family == "qwen3_moe_blocks":
        return Qwen3MoeConfig(
            **BLOCKS, num_hidden_layers=2, intermediate_size=48, moe_intermediate_size=96, num_experts=8,
            num_experts_per_tok=2, head_dim=16,
        )  # fmt: skip
    if family == "qwen2_moe_blocks":
        return Qwen2MoeConfig(
            **BLOCKS, num_hidden_layers=2, intermediate_size=64, moe_intermediate_size=32, num_experts=8,
            shared_expert_intermediate_size=32, num_experts_per_tok=2, decoder_sparse_step=1,
        )  # fmt: skip
    if family == "deepseek_v3_blocks":
        return DeepseekV3Config(
            **{**BLOCKS, "num_key_value_heads": 2}, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=48,
            moe_intermediate_size=96, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, kv_lora_rank=16,
            q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_group=2, topk_group=1,
        )  # fmt: skip
    if family == "granitemoe":  # fused on disk
        return GraniteMoeConfig(
            **COMMON, num_hidden_layers=2, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2
        )
    assert family == "deepseek_v2"
    return DeepseekV2Config(
        **{**COMMON, "num_key_value_heads": 2}, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=48,
        moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, kv_lora_rank=16,
        q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_group=1, topk_group=1,
    )  # fmt: skip


MakeCheckpoint = Callable[..., Path]


@pytest.fixture(autouse=True)
def engine_warnings() -> Iterator[None]:
    """Commands that explain small caches themselves switch the engine's warning off; the next test has it again."""
    yield
    logging.getLogger("evaluation.engine.memory.demand").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """`checkpoint(family, dtype, shard_size)`: the folder of a saved model, made once. Never write into it."""
    made: dict[tuple[str, str, str], Path] = {}

    def make(family: str = "qwen2_moe", dtype: str = "bfloat16", shard_size: str = "1GB") -> Path:
        key = (family, dtype, shard_size)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-{dtype}")
            torch.manual_seed(20240607)
            config = tiny_config(family)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # zeros otherwise, which no test would miss
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(made[key], max_shard_size=shard_size)
            byte_tokenizer().save_pretrained(made[key])
        return made[key]

    return make


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "<pad>": 1, **{character: 2 + i for i, character in enumerate(characters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>")
