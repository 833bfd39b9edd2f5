"""A Qwen2-MoE checkpoint as one GGUF file, for llama.cpp: the same weights in its layout, tensor by tensor.

Experts are stacked per layer; routers, norms and biases stay float32, the other matrices have the precision that is
asked for, but for experts in MXFP4, which stay so, with the bytes of a block in llama.cpp's order. Layout and names:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and PyPI's `gguf`. llama.cpp's graph for this family never
renormalises the chosen routing weights, so a checkpoint that does is refused.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from configs.files import writing_aside
from configs.load import UserError
from evaluation.engine.store.experts import ExpertStore
from training.model.lazy_weights import quantisation_of, read_config
from training.model.number_formats.mxfp4 import Mxfp4
from training.model.shards import StoredTensor, read_index

F32 = gguf.GGMLQuantizationType.F32
PRECISIONS = {
    "float32": (F32, gguf.LlamaFileType.ALL_F32, torch.float32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16, torch.float16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16, torch.bfloat16),
}
ALWAYS_FLOAT32 = ("ffn_gate_inp", "ffn_gate_inp_shexp", "_norm", "bias")
EXPERT = re.compile(r"(?P<module>model\.layers\.\d+\.mlp\.experts)\.(?P<number>\d+)\.(?P<part>\w+\.weight)")
MXFP4 = gguf.GGMLQuantizationType.MXFP4
PACKED, SCALE = "_packed", "_scale"
"""How names of the two tensors of a matrix in MXFP4 end."""
Sources = list[StoredTensor]
"""The tensors of the checkpoint that one tensor of the file is made of: all experts of a layer in order, or one."""


def write_gguf(model_dir: str | Path, path: str | Path, *, precision: str = "float16") -> None:
    """Write the checkpoint of `model_dir` to `path`, aside and renamed; one tensor is in memory at a time.

    Raises:
        UserError: the model is of another family, or of a form that llama.cpp computes differently; the precision is
            unknown, or float16 cannot hold a number; the tokenizer is no byte-level BPE.
    """
    if precision not in PRECISIONS:
        raise UserError(f"GGUF precision {precision!r} is not known; write one of {', '.join(PRECISIONS)}")
    config = _config(model_dir)
    tensors, scales = _tensors(model_dir, config)
    kinds = {name: PRECISIONS["float32" if any(p in name for p in ALWAYS_FLOAT32) else precision] for name in tensors}
    with writing_aside(path) as aside, closing(gguf.GGUFWriter(aside, "qwen2moe")) as writer:
        _add_sizes(writer, config, Path(model_dir).name, precision)
        _add_tokenizer(writer, Path(model_dir), config)
        for name, sources in tensors.items():
            if name in scales:
                shape = _mxfp4_shape(sources)
                writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=MXFP4)
                continue
            (kind, _, dtype), shape = kinds[name], _shape(name, sources)
            length_bytes = math.prod(shape) * dtype.itemsize
            writer.add_tensor_info(name, shape, np.dtype(np.uint16), length_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with ExitStack() as opened:
            shards = {source.shard for sources in (*tensors.values(), *scales.values()) for source in sources}
            files = {shard: opened.enter_context(safe_open(shard, framework="pt")) for shard in shards}
            for name, sources in tensors.items():
                if name in scales:
                    writer.write_tensor_data(_mxfp4(sources, scales[name], files))
                else:
                    writer.write_tensor_data(_numbers(name, sources, files, kinds[name][2]))


def _tensors(model_dir: str | Path, config: dict[str, Any]) -> tuple[dict[str, Sources], dict[str, Sources]]:
    """Every tensor of the file by its name, in the order of the checkpoint's index; and the scales of those in MXFP4.

    Raises:
        UserError: see `write_gguf`; experts are quantised otherwise.
    """
    quantised = quantisation_of(read_config(model_dir))[0] is not None
    if quantised and not isinstance(numbers := ExpertStore(model_dir).format.numbers, Mxfp4):
        raise UserError(f"{model_dir} has experts in {numbers.name}, which GGUF has no place for; it has one for MXFP4")
    scales: dict[str, list[tuple[int, StoredTensor]]] = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2MOE, config["num_hidden_layers"])
    numbered: dict[str, list[tuple[int, StoredTensor]]] = {}
    for name, tensor in read_index(model_dir).items():
        match = EXPERT.fullmatch(name.removesuffix(PACKED).removesuffix(SCALE))
        stem = f"{match['module']}.{match['part']}" if match else name
        found = names.get_name(stem, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"GGUF has no place for {name} in a Qwen2-MoE model; give a checkpoint of that family")
        of = scales if match and name.endswith(SCALE) else numbered
        of.setdefault(found, []).append((int(match["number"]) if match else 0, tensor))
    if config.get("tie_word_embeddings"):
        numbered["output.weight"] = numbered["token_embd.weight"]
    return _in_order(numbered), _in_order(scales)


def _in_order(numbered: Mapping[str, list[tuple[int, StoredTensor]]]) -> dict[str, Sources]:
    return {name: [tensor for _, tensor in sorted(of, key=lambda pair: pair[0])] for name, of in numbered.items()}


def _shape(name: str, sources: Sources) -> tuple[int, ...]:
    """Slowest axis first, as numpy has it."""
    one = sources[0].shape
    if "_exps" in name:
        return (len(sources), *one)
    return (one[-1],) if "ffn_gate_inp_shexp" in name else one


def _numbers(name: str, sources: Sources, files: Mapping[Path, Any], dtype: torch.dtype) -> np.ndarray:
    """The tensor's data as raw words of the precision, read from the open shards."""
    stacked = torch.empty((len(sources), *sources[0].shape), dtype=dtype)
    for into, source in zip(stacked, sources, strict=True):
        into.copy_(files[source.shard].get_tensor(source.name))
    if not bool(stacked.isfinite().all()):
        precision = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} holds numbers that {precision} cannot; write the GGUF in bfloat16 or float32")
    raw: np.ndarray = stacked.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
    return raw.reshape(_shape(name, sources))


def _mxfp4_shape(sources: Sources) -> tuple[int, ...]:
    """In bytes, slowest axis first: of each block its scale, then its numbers."""
    rows, row_bytes = sources[0].shape
    return (len(sources), rows, row_bytes // 16 * 17)


def _mxfp4(packed: Sources, scales: Sources, files: Mapping[Path, Any]) -> np.ndarray:
    """The blocks of all experts. llama.cpp has in a byte a number of the block's first half and one of its second."""
    found: np.ndarray = np.empty(_mxfp4_shape(packed), dtype=np.uint8)
    for into, codes, scale in zip(found, packed, scales, strict=True):
        blocks_NGB = files[codes.shard].get_tensor(codes.name).numpy().reshape(len(into), -1, 16)
        numbers_NGb = np.stack([blocks_NGB & 15, blocks_NGB >> 4], axis=3).reshape(*blocks_NGB.shape[:2], 32)
        blocks = into.reshape(*blocks_NGB.shape[:2], 17)
        blocks[:, :, 0] = files[scale.shard].get_tensor(scale.name).numpy()
        blocks[:, :, 1:] = numbers_NGb[:, :, :16] | (numbers_NGb[:, :, 16:] << 4)
    return found


def _config(model_dir: str | Path) -> dict[str, Any]:
    config: dict[str, Any] = read_config(model_dir).to_dict()
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


def _add_tokenizer(writer: gguf.GGUFWriter, model_dir: Path, config: dict[str, Any]) -> None:
    """Byte-level BPE as llama.cpp reads it. Ids mean the same; how text is cut before BPE is GPT-2's or Qwen2's."""
    path = model_dir / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if tokenizer.get("model", {}).get("type") != "BPE":
        raise UserError(f"{model_dir} has no tokenizer.json with a byte-level BPE; llama.cpp needs one")
    tokens = [f"[unused {i}]" for i in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
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
    for role in ("bos", "eos", "pad"):
        number = config.get(f"{role}_token_id")
        if isinstance(number, int):
            getattr(writer, f"add_{role}_token_id")(number)
