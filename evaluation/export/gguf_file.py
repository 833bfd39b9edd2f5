"""A Qwen2-MoE checkpoint as one GGUF file, for llama.cpp: the same weights in its layout, tensor by tensor.

Experts are stacked per layer; routers, norms and biases stay float32, the other matrices have the precision that is
asked for. Layout and names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and PyPI's `gguf`. llama.cpp's
graph for this family never renormalises the chosen routing weights, so a checkpoint that does is refused.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from configs.files import writing_aside
from configs.load import UserError
from evaluation.engine.store.shards import StoredTensor, read_index

F32 = gguf.GGMLQuantizationType.F32
PRECISIONS = {
    "float32": (F32, gguf.LlamaFileType.ALL_F32, torch.float32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16, torch.float16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16, torch.bfloat16),
}
ALWAYS_FLOAT32 = ("ffn_gate_inp", "ffn_gate_inp_shexp", "_norm", "bias")
EXPERT = re.compile(r"(?P<module>model\.layers\.\d+\.mlp\.experts)\.(?P<number>\d+)\.(?P<part>\w+\.weight)")
Names = gguf.TensorNameMap


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: its name, and the tensors of the checkpoint it is made of (all experts, or one)."""

    name: str
    sources: tuple[StoredTensor, ...]

    @property
    def is_float32(self) -> bool:
        return any(part in self.name for part in ALWAYS_FLOAT32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest axis first, as numpy has it."""
        one = self.sources[0].shape
        if "_exps" in self.name:
            return (len(self.sources), *one)
        return (one[-1],) if "ffn_gate_inp_shexp" in self.name else one


def write_gguf(model_dir: str | Path, path: str | Path, *, precision: str = "float16") -> None:
    """Write the checkpoint of `model_dir` to `path`, aside and renamed; one tensor is in memory at a time.

    Raises:
        UserError: the model is of another family, or of a form that llama.cpp computes differently; the precision is
            unknown, or float16 cannot hold a number; the tokenizer is no byte-level BPE.
    """
    if precision not in PRECISIONS:
        raise UserError(f"GGUF precision {precision!r} is not known; write one of {', '.join(PRECISIONS)}")
    config = _read_config(Path(model_dir))
    planned = plan_tensors(model_dir, config)
    with writing_aside(path) as aside, closing(gguf.GGUFWriter(aside, "qwen2moe")) as writer:
        _add_sizes(writer, config, Path(model_dir).name, precision)
        _add_tokenizer(writer, Path(model_dir), config["vocab_size"])
        for tensor in planned:
            kind, _, dtype = PRECISIONS["float32" if tensor.is_float32 else precision]
            length_bytes = int(np.prod(tensor.shape)) * dtype.itemsize
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.uint16), length_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with ExitStack() as shards:
            files = {shard: shards.enter_context(safe_open(shard, framework="pt")) for shard in _shards(planned)}
            for tensor in planned:
                writer.write_tensor_data(_numbers(tensor, files, "float32" if tensor.is_float32 else precision))


def gguf_name(checkpoint_name: str, names: Names) -> str:
    """The GGUF name of a tensor of the checkpoint; all experts of a layer's matrix have the same.

    Raises:
        UserError: the family's layout has no such tensor.
    """
    match = EXPERT.fullmatch(checkpoint_name)
    stem = f"{match['module']}.{match['part']}" if match else checkpoint_name
    found: str | None = names.get_name(stem, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(
            f"GGUF has no place for {checkpoint_name} in a Qwen2-MoE model; give a checkpoint of that family"
        )
    return found


def tensor_names(layers: int) -> Names:
    """PyPI gguf's table for this family."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2MOE, layers)


def plan_tensors(model_dir: str | Path, config: dict[str, Any]) -> list[Planned]:
    """Every tensor of the file, in the order of the checkpoint's index; experts in the order of their numbers."""
    names = tensor_names(config["num_hidden_layers"])
    sources: dict[str, list[tuple[int, StoredTensor]]] = {}
    for name, tensor in read_index(model_dir).items():
        match = EXPERT.fullmatch(name)
        sources.setdefault(gguf_name(name, names), []).append((int(match["number"]) if match else 0, tensor))
    if config.get("tie_word_embeddings"):
        sources["output.weight"] = sources["token_embd.weight"]
    return [
        Planned(name, tuple(tensor for _, tensor in sorted(numbered, key=lambda pair: pair[0])))
        for name, numbered in sources.items()
    ]


def _shards(planned: Sequence[Planned]) -> set[Path]:
    return {source.shard for tensor in planned for source in tensor.sources}


def _numbers(planned: Planned, files: Mapping[Path, Any], precision: str) -> np.ndarray:
    """The tensor's data as raw words of the precision, read from the open shards."""
    dtype = PRECISIONS[precision][2]
    stacked = torch.empty((len(planned.sources), *planned.sources[0].shape), dtype=dtype)
    for into, source in zip(stacked, planned.sources, strict=True):
        into.copy_(files[source.shard].get_tensor(source.name))
    if not bool(stacked.isfinite().all()):
        raise UserError(f"{planned.name} holds numbers that {precision} cannot; write the GGUF in bfloat16 or float32")
    words = torch.int16 if dtype.itemsize == 2 else torch.int32
    raw: np.ndarray = stacked.view(words).numpy().reshape(planned.shape)
    return raw


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    if not path.is_file():
        raise UserError(f"{model_dir} holds no config.json; give the folder of a saved model")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != "qwen2_moe":
        raise UserError(f"{model_dir} is a {config.get('model_type')} model; only qwen2_moe can be written as GGUF")
    if config.get("norm_topk_prob"):
        raise UserError(f"{model_dir} has norm_topk_prob true, which llama.cpp ignores: its tokens would differ")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise UserError(f"{model_dir} has layers without experts, which llama.cpp's qwen2moe does not know")
    return config


def _add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any], name: str, precision: str) -> None:
    writer.add_name(name)
    writer.add_file_type(PRECISIONS[precision][1])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _add_tokenizer(writer: gguf.GGUFWriter, model_dir: Path, vocabulary: int) -> None:
    """Byte-level BPE as llama.cpp reads it. Ids mean the same; how text is cut before BPE is GPT-2's or Qwen2's."""
    path = model_dir / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if tokenizer.get("model", {}).get("type") != "BPE":
        raise UserError(f"{model_dir} has no tokenizer.json with a byte-level BPE; llama.cpp needs one")
    tokens = [f"[unused {i}]" for i in range(vocabulary)]
    types = [gguf.TokenType.UNUSED] * vocabulary
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], special
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if tokenizer["pre_tokenizer"]["type"] == "ByteLevel" else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)
    _add_special_tokens(writer, model_dir)


def _add_special_tokens(writer: gguf.GGUFWriter, model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    for role in ("bos", "eos", "pad"):
        number = config.get(f"{role}_token_id")
        if isinstance(number, int):
            getattr(writer, f"add_{role}_token_id")(number)
