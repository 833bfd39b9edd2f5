"""Writes the synthetic model as a Hugging Face folder: one shard a layer, never more than one layer in memory."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Qwen2MoeConfig

from configs.files import write_json
from configs.load import UserError
from data.corpus import DOMAINS, read_corpus
from data.pieces import document_beginnings
from evaluation.benchmark.made_model import synthetic
from evaluation.benchmark.made_model.calibration import LayerRun, calibrated_router, fused
from evaluation.benchmark.made_model.synthetic import Shape, Source
from evaluation.engine.store.packing import pack_shard

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SPLIT = "validation"  # calibrated on this; the result is measured on another
ROWS, ROW_TOKENS = 4, 256  # a row of each domain
LAYER_SPREAD = 0.03  # standard deviation of the layers' reuse around the wanted mean, as trained layers have it
FREQUENCY_DOCUMENTS = 40  # of each domain, whose tokens are counted
UNSEEN = 0.05  # counts of a token that does not occur


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights: equal recipes give equal bytes on equal versions of torch."""

    shape: Shape
    eor: float  # wanted mean over the layers, on real text
    seed: int
    dtype: str  # a key of DTYPES


def write_checkpoint(folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Write config, tokenizer and all shards; returns sizes and the reuse that every router was calibrated to.

    Raises:
        UserError: a reuse that a layer cannot have; numbers that the precision cannot hold.
    """
    config = recipe.shape.config(recipe.dtype, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
    config.save_pretrained(folder)
    tokenizer.model_max_length = recipe.shape.context
    tokenizer.save_pretrained(folder)
    shards = ShardWriter(folder, recipe.shape.layers + 1)
    reached = []
    for weights, eor in _shards(config, recipe, tokenizer):
        shards.write(weights)
        reached.append(eor)
    shards.finish()
    return {**asdict(recipe), "weight_bytes": shards.total_bytes, "calibrated_eor_per_layer": reached[:-1]}


def weight_bytes(shape: Shape, dtype: str) -> int:
    """The bytes of all tensors."""
    each = shape.attention_weights + shape.num_experts * (3 * shape.hidden * shape.intermediate)
    each += shape.hidden * (shape.num_experts + 3 * shape.shared_intermediate + 1 + 2)  # router, shared expert, norms
    whole = shape.layers * each + shape.hidden * (2 * shape.vocabulary + 1)
    return whole * torch.empty((), dtype=DTYPES[dtype]).element_size()


def _shards(
    config: Qwen2MoeConfig, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[dict[str, Tensor], float | None]]:
    """The tensors of one layer after the other with its calibrated reuse, then those outside the layers."""
    shape, dtype = recipe.shape, DTYPES[recipe.dtype]
    embeddings_VH = synthetic.embeddings(Source(recipe.seed, 0), shape).to(dtype)
    rows = document_beginnings(tokenizer, SPLIT, tokens=ROW_TOKENS, count=ROWS)
    sample = LayerRun(config, embeddings_VH, torch.tensor(rows))
    norm_H = torch.ones(shape.hidden, dtype=dtype)
    norms = {"input_layernorm.weight": norm_H, "post_attention_layernorm.weight": norm_H}
    with tqdm(_wanted_per_layer(recipe), desc="layers", unit="layer") as progress:
        for layer, wanted in enumerate(progress):
            weights, eor = _layer(sample, recipe, layer=layer, wanted=wanted)
            progress.set_postfix_str(f"EOR {eor:.3f}")
            yield synthetic.named({**weights, **norms}, f"model.layers.{layer}"), eor
    signature_VH = synthetic.signatures(
        embeddings_VH.float(), synthetic.attention(Source(recipe.seed, 1), shape), shape
    )
    head_VH = synthetic.output_layer(
        Source(recipe.seed, 1 + shape.layers), _log_frequencies(tokenizer, shape), signature_VH, sample.normed()
    )
    outside = {"model.embed_tokens.weight": embeddings_VH, "model.norm.weight": norm_H, "lm_head.weight": head_VH}
    yield _cast(outside, dtype), None


def _layer(sample: LayerRun, recipe: Recipe, *, layer: int, wanted: float) -> tuple[dict[str, Tensor], float]:
    """One layer's tensors but its norms, and the reuse of its router on the sample, which is carried through it."""
    shape, dtype = recipe.shape, DTYPES[recipe.dtype]
    source = Source(recipe.seed, 1 + layer)
    attention = _cast(synthetic.attention(source, shape), dtype)
    gate_EH, eor = calibrated_router(source, sample.router_inputs(attention), shape, rows=ROWS, eor=wanted, layer=layer)
    experts = [_cast(synthetic.expert(source, shape), dtype) for _ in range(shape.num_experts)]
    others = _cast({"gate.weight": gate_EH, **synthetic.shared_expert(source, shape)}, dtype)
    sample.run_experts({**fused(experts), **others})
    if not bool(sample.hidden_BSH.isfinite().all()):
        raise UserError(f"layer {layer} gives numbers that {recipe.dtype} cannot hold; write --dtype bfloat16")
    each = {f"mlp.experts.{n}.{name}": weight for n, expert in enumerate(experts) for name, weight in expert.items()}
    return {**synthetic.named(attention, "self_attn"), **synthetic.named(others, "mlp"), **each}, eor


def _wanted_per_layer(recipe: Recipe) -> list[float]:
    """The reuse wanted of each layer: random, with the wanted mean."""
    spread_L = LAYER_SPREAD * Source(recipe.seed, recipe.shape.layers + 2).normal(recipe.shape.layers)
    return [float(eor) for eor in recipe.eor + spread_L - spread_L.mean()]


def _log_frequencies(tokenizer: PreTrainedTokenizerBase, shape: Shape) -> Tensor:
    """[V]: the logarithms of how often each token occurs in the corpus."""
    count_V = torch.full((shape.vocabulary,), UNSEEN)
    documents = [d for domain in DOMAINS for d in islice(read_corpus(SPLIT, [domain]), FREQUENCY_DOCUMENTS)]
    for document in documents:
        ids = tokenizer(document.text, verbose=False)["input_ids"]
        count_V += torch.bincount(torch.tensor(ids), minlength=shape.vocabulary)
    return (count_V / count_V.sum()).log()


def _cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: weight.to(dtype) for name, weight in weights.items()}


class ShardWriter:
    """Writes a checkpoint as transformers would, but packed, one shard at a time, and the index at the end."""

    def __init__(self, folder: Path, shards: int) -> None:
        self._folder, self._shards = folder, shards
        self._weight_map: dict[str, str] = {}
        self._written = 0
        self.total_bytes = 0

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next shard."""
        self._written += 1
        name = f"model-{self._written:05}-of-{self._shards:05}.safetensors"
        apart = {key: tensor.clone() if tensor.dim() == 1 else tensor for key, tensor in tensors.items()}  # no aliases
        save_file(apart, self._folder / name, {"format": "pt"})
        pack_shard(self._folder / name, self._folder / name)
        self._weight_map.update(dict.fromkeys(tensors, name))
        self.total_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        """Write the index.

        Raises:
            AssertionError: fewer or more shards than were announced.
        """
        assert self._written == self._shards, f"{self._written} shards of {self._shards}"
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(self._weight_map.items()))}
        write_json(self._folder / "model.safetensors.index.json", index)
