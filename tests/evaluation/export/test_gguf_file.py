"""GGUF: every number where llama.cpp looks for it, and llama.cpp computes with it what transformers does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs.load import UserError
from data.corpus import EMBEDDED
from data.pieces import document_beginnings
from evaluation.benchmark.order import COLD, Leg, Order
from evaluation.benchmark.sides.side import open_side
from evaluation.engine.greedy import greedy
from evaluation.export.gguf_file import write_gguf
from evaluation.export.quantised_folder import write_quantised
from training.model.loading import load_tokenizer

ModelDir = Callable[[str], Path]


def read(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


@pytest.fixture
def copy(model_dir: ModelDir, tmp_path: Path) -> Path:
    """A checkpoint that may be written into."""
    return Path(shutil.copytree(model_dir("qwen2_moe"), tmp_path / "copy"))


def change_config(folder: Path, **changed: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))


def test_numbers_names_and_stacking(model_dir: ModelDir, tmp_path: Path) -> None:
    write_gguf(model_dir("qwen2_moe"), tmp_path / "m.gguf", precision="float32")
    stored = {tensor.name: tensor.data for tensor in read(tmp_path / "m.gguf").tensors}
    weights = load_file(model_dir("qwen2_moe") / "model.safetensors")
    for part in ("gate", "up", "down"):
        for expert in range(8):
            name = f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
            np.testing.assert_array_equal(stored[f"blk.1.ffn_{part}_exps.weight"][expert], weights[name].numpy())
    np.testing.assert_array_equal(
        stored["blk.0.ffn_gate_inp.weight"], weights["model.layers.0.mlp.gate.weight"].numpy()
    )
    np.testing.assert_array_equal(
        stored["blk.0.ffn_gate_inp_shexp.weight"], weights["model.layers.0.mlp.shared_expert_gate.weight"].numpy()[0]
    )
    np.testing.assert_array_equal(stored["blk.1.attn_q.bias"], weights["model.layers.1.self_attn.q_proj.bias"].numpy())
    assert (
        len(stored) == 2 * 17 + 3
    )  # two layers; embeddings, norm and the tied output, which llama.cpp wants as its own
    np.testing.assert_array_equal(stored["output.weight"], stored["token_embd.weight"])


@pytest.mark.parametrize(("precision", "kind"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_sixteen_bits_but_for_routers_norms_and_biases(
    model_dir: ModelDir, tmp_path: Path, precision: str, kind: str
) -> None:
    write_gguf(model_dir("qwen2_moe"), tmp_path / "m.gguf", precision=precision)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read(tmp_path / "m.gguf").tensors}
    for name, found in kinds.items():
        small = "norm" in name or "bias" in name or "ffn_gate_inp" in name
        assert found == ("F32" if small else kind), name
    weight = load_file(model_dir("qwen2_moe") / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    stored = next(t for t in read(tmp_path / "m.gguf").tensors if t.name == "blk.0.attn_q.weight")
    words = np.asarray(stored.data).view(np.int16).reshape(weight.shape)
    np.testing.assert_array_equal(words, weight.to(getattr(torch, precision)).view(torch.int16).numpy())


def test_experts_in_mxfp4_stay_so(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The judge is `gguf`'s own reading of that format."""
    folder, plain = tmp_path / "q", checkpoint("qwen2_moe_blocks")
    write_quantised(plain, folder, "mxfp4")
    write_gguf(folder, tmp_path / "m.gguf", precision="float16")
    stored = {tensor.name: tensor for tensor in read(tmp_path / "m.gguf").tensors}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    gate_up, down = (getattr(model.model.layers[1].mlp.experts, name) for name in ("gate_up_proj", "down_proj"))
    gate, up = gate_up.chunk(2, dim=1)
    for name, expected in (("gate", gate), ("up", up), ("down", down)):
        tensor = stored[f"blk.1.ffn_{name}_exps.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found, expected.detach().float().numpy())
    write_gguf(plain, tmp_path / "p.gguf", precision="float16")
    assert set(stored) == {tensor.name for tensor in read(tmp_path / "p.gguf").tensors}
    write_quantised(plain, tmp_path / "i", "int4")
    with pytest.raises(UserError, match="has experts in int4, which GGUF has no place for; it has one for MXFP4"):
        write_gguf(tmp_path / "i", tmp_path / "i.gguf")


def test_sizes_and_tokens(model_dir: ModelDir, tmp_path: Path) -> None:
    write_gguf(model_dir("qwen2_moe"), tmp_path / "m.gguf")
    fields = read(tmp_path / "m.gguf").fields
    values = {name: fields[name].contents() for name in fields}
    assert values["qwen2moe.expert_count"] == 8
    assert values["qwen2moe.expert_used_count"] == 2
    assert values["qwen2moe.block_count"] == 2
    assert values["qwen2moe.rope.freq_base"] == 10000
    assert len(values["tokenizer.ggml.tokens"]) == 264
    assert values["tokenizer.ggml.tokens"][0] == "<|endoftext|>"
    assert values["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL
    assert values["tokenizer.ggml.token_type"][263] == gguf.TokenType.UNUSED
    assert values["tokenizer.ggml.eos_token_id"] == 0


def test_llamacpp_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the bench extra is not installed")
    model_dir = EMBEDDED / "model"
    write_gguf(model_dir, tmp_path / "m.gguf", precision="float32")
    prompts = document_beginnings(load_tokenizer(str(model_dir)), "test", tokens=24, count=4)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    model.generation_config.eos_token_id = None
    legs = [Leg(COLD, prompt, 24) for prompt in prompts]
    order = Order("llamacpp", str(model_dir), legs, threads=1, gguf=str(tmp_path / "m.gguf"))
    with open_side(order) as serving:
        for leg in legs:
            assert serving.request(leg).token_ids == greedy(model, leg.prompt_ids, max_new_tokens=24)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "mixtral"}, "is a mixtral model; only qwen2_moe"),
        ({"norm_topk_prob": True}, "norm_topk_prob true, which llama.cpp ignores"),
        ({"mlp_only_layers": [0]}, "has layers without experts"),
        ({"decoder_sparse_step": 2}, "has layers without experts"),
    ],
)
def test_what_llamacpp_would_compute_differently_is_refused(copy: Path, changed: dict[str, object], words: str) -> None:
    change_config(copy, **changed)
    with pytest.raises(UserError, match=words):
        write_gguf(copy, copy / "m.gguf")
    assert not list(copy.glob("*gguf*"))


def test_a_number_too_large_for_float16_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.experts.3.up_proj.weight"][0, 0] = 1e6
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up_exps\.weight holds numbers that float16 cannot"):
        write_gguf(copy, copy / "m.gguf")
    assert not list(copy.glob("*gguf*"))


def test_a_tensor_without_a_place_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.experts.3.extra.weight"] = torch.zeros(2)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"GGUF has no place for model\.layers\.1\.mlp\.experts\.3\.extra\.weight"):
        write_gguf(copy, copy / "m.gguf")


def test_other_mistakes(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="precision 'q4' is not known; write one of float32"):
        write_gguf(copy, tmp_path / "m.gguf", precision="q4")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        write_gguf(tmp_path, tmp_path / "m.gguf")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json with a byte-level BPE"):
        write_gguf(copy, tmp_path / "m.gguf")
