"""What a checkpoint lacks, or holds in vain, is refused by every way of loading; transformers would draw it at random."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.load import UserError
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from training.model.lazy_weights import LayerwiseCheckpoint
from training.model.loading import load_pretrained

Tensors = dict[str, torch.Tensor]
Q_PROJ, ROUTER = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.gate.weight"


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def with_(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **more}


def unmerged(tensors: Tensors) -> Tensors:
    """As peft saves a model whose adapter was not merged."""
    part = Q_PROJ.removesuffix(".weight")
    named = {name.replace(part, f"{part}.base_layer"): tensor for name, tensor in tensors.items()}
    return {**named, f"{part}.lora_A.default.weight": torch.zeros(2, 16)}


def shorter(tensors: Tensors) -> Tensors:
    return {**tensors, Q_PROJ: tensors[Q_PROJ][:-1].contiguous()}


def by_transformers(folder: Path) -> None:
    load_pretrained(str(folder))


def by_layers(folder: Path) -> None:
    LayerwiseCheckpoint(str(folder), dtype=torch.float32).skeleton()


def by_the_engine(folder: Path) -> None:
    with load(folder, EngineOptions("100%")):
        pass


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "wrapper": (prefixed("module."), {}, r"every name begins with 'module\.': save the model without its wrapper"),
    "peft_wrapper": (prefixed("base_model.model."), {}, r"every name begins with 'base_model\.model\.'"),
    "unmerged_adapter": (unmerged, {}, r"q_proj\.lora_A\.default\.weight, an adapter's; merge it"),
    "no_router": (without(ROUTER), {}, rf"lacks {ROUTER}; copy the model again"),
    "no_attention": (without("layers.0.self_attn"), {}, r"lacks model\.layers\.0\.self_attn\.\S+ and \d others"),
    "no_head": (without("lm_head"), {}, r"lacks lm_head\.weight"),
    "no_embeddings": (without("embed_tokens"), {}, r"lacks model\.embed_tokens\.weight"),
    "more_layers": (lambda tensors: tensors, {"num_hidden_layers": 3}, r"lacks model\.layers\.2\."),
    "scales": (with_(**{f"{Q_PROJ}_scale_inv": torch.ones(1)}), {}, r"q_proj\.weight_scale_inv, which .* quantised"),
    "bias": (with_(**{Q_PROJ.replace("weight", "bias"): torch.ones(16)}), {}, r"q_proj\.bias, which the model"),
    "shape": (shorter, {}, r"the weights do not fit config\.json"),
}
WAYS = {"transformers": by_transformers, "layers": by_layers, "engine": by_the_engine}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_the_models_are_refused(
    fault: str, way: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    spoil, config, words = FAULTS[fault]
    folder = Path(shutil.copytree(model_dir("olmoe"), tmp_path / "model"))
    tensors = spoil(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    with pytest.raises(UserError, match=words):
        WAYS[way](folder)


@pytest.mark.parametrize("way", WAYS)
def test_what_belongs_to_no_layer_of_the_model_is_left_alone(
    way: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_dir("olmoe"), tmp_path / "model"))
    more = {"model.layers.2.eh_proj.weight": torch.ones(2), "model.visual.blocks.0.norm.weight": torch.ones(2)}
    tensors = {**load_file(folder / "model.safetensors"), **more}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    WAYS[way](folder)
