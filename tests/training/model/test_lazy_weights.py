"""A model loaded layer by layer is the one `from_pretrained` loads, and never whole before its last layer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.load import UserError
from training.model.layerwise_checkpoint import LayerwiseCheckpoint
from training.model.lazy_weights import decoder_layers, empty_model, stored_tensors
from training.model.loading import load_pretrained
from training.model.routers import find_routers

FAMILIES = ["qwen2_moe", "olmoe", "mixtral", "qwen3_moe", "deepseek_v2"]
ModelDir = Callable[[str], Path]


def on_meta(module: torch.nn.Module) -> set[str]:
    return {name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_filled_are_the_model(family: str, dtype: torch.dtype, model_dir: ModelDir) -> None:
    weights = LayerwiseCheckpoint(str(model_dir(family)), dtype=dtype)
    model = weights.skeleton()
    for layer in decoder_layers(model):
        weights.fill(model, layer)
    expected = load_pretrained(str(model_dir(family)), dtype=dtype)
    found = model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    ids = torch.arange(9)[None]
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_what_is_not_filled_is_not_there(model_dir: ModelDir) -> None:
    weights = LayerwiseCheckpoint(str(model_dir("qwen2_moe")), dtype=torch.float32)
    model = weights.skeleton()
    first, second = decoder_layers(model).values()
    routers = {name.split(".", 3)[3] for name in find_routers(model)}
    for layer in (first, second):
        assert {name for name, _ in layer.named_parameters()} - on_meta(layer) == {f"{name}.weight" for name in routers}
    assert not on_meta(model.model.embed_tokens) | on_meta(model.model.norm) | on_meta(model.lm_head)
    router_before = first.mlp.gate.weight
    weights.fill(model, next(iter(decoder_layers(model))))
    assert not on_meta(first)
    assert on_meta(second)
    assert first.mlp.gate.weight is router_before, "routers may have begun to train"
    assert router_before.requires_grad
    assert {p.requires_grad for name, p in first.named_parameters() if name != "mlp.gate.weight"} == {False}


def test_an_empty_model_has_no_weights_and_knows_their_sizes(model_dir: ModelDir) -> None:
    model = empty_model(str(model_dir("olmoe")), dtype=torch.bfloat16)
    assert on_meta(model) >= {name for name, _ in model.named_parameters()}
    whole = load_pretrained(str(model_dir("olmoe")), dtype=torch.bfloat16)
    assert sum(p.nbytes for p in model.parameters()) == sum(p.nbytes for p in whole.parameters())


@pytest.fixture
def copy(model_dir: ModelDir, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir("qwen2_moe"), tmp_path / "copy"))


def change(folder: Path, changed: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tensor_that_is_missing_is_named(copy: Path) -> None:
    change(copy, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(UserError, match=r"lacks model\.layers\.1\.self_attn\.q_proj\.weight; copy the model again"):
        LayerwiseCheckpoint(str(copy), dtype=torch.float32).skeleton()


@pytest.mark.parametrize("router", ["model.layers.0.mlp.gate.weight", "model.layers.0.mlp.nobody.weight"])
def test_a_router_that_is_stored_otherwise_is_refused(router: str, copy: Path) -> None:
    with pytest.raises(UserError, match=rf"holds no tensor of shape \[8, 9\] that becomes the router {router} when"):
        stored_tensors(copy, {router: torch.zeros(8, 9)})
    found = stored_tensors(copy, {"model.layers.0.mlp.gate.weight": torch.zeros(8, 16)})
    assert [place.name for place in found.values()] == ["model.layers.0.mlp.gate.weight"]


def test_routers_in_several_lists_of_layers_cannot_be_sharded_by(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    assert list(decoder_layers(model)) == ["model.layers.0", "model.layers.1"]
    model.other = torch.nn.Module()
    model.other.layers = tiny_model().model.layers
    with pytest.raises(UserError, match=r"routers are in \['model.layers', 'other.layers'\]; one is needed"):
        decoder_layers(model)


def test_an_expert_that_is_missing_is_noticed(copy: Path) -> None:
    change(copy, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    weights = LayerwiseCheckpoint(str(copy), dtype=torch.float32)
    with pytest.raises(UserError, match=r"the weights do not fit config\.json: "):
        weights.skeleton()


@pytest.mark.parametrize("missing", ["safetensors", "config"])
def test_a_folder_that_cannot_be_read_so_is_refused(missing: str, copy: Path) -> None:
    (copy / {"safetensors": "model.safetensors", "config": "config.json"}[missing]).unlink()
    words = {"safetensors": r"holds neither model\.safetensors nor", "config": r"holds no config\.json"}[missing]
    with pytest.raises(UserError, match=words):
        LayerwiseCheckpoint(str(copy), dtype=torch.float32)


def test_a_truncated_shard_is_refused(copy: Path) -> None:
    shard = copy / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"copy the model again"):
        LayerwiseCheckpoint(str(copy), dtype=torch.float32)


def test_a_model_without_routers_is_refused(model_dir: ModelDir) -> None:
    with pytest.raises(UserError, match="has no routers"):
        empty_model(str(model_dir("llama")), dtype=torch.float32)


def test_another_kind_of_model_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(UserError, match="'vit' is no causal language model of transformers"):
        empty_model(str(copy), dtype=torch.float32)
