"""The synthetic model as a Hugging Face folder: written one shard a layer, never with more than one layer in memory, and
measured by the engine: reuse, load, and misses of an LRU cache.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Qwen2MoeConfig, Qwen2MoeForCausalLM

from configs.files import write_json
from configs.load import UserError
from data.corpus import DOMAINS, read_corpus
from data.pieces import document_beginnings
from evaluation.benchmark.made_model import synthetic
from evaluation.benchmark.made_model.calibration import LayerRun, calibrated_router, fused
from evaluation.benchmark.made_model.synthetic import Shape, Source
from evaluation.engine.cache.counts import DECODE
from evaluation.engine.cache.curve import lru_curve
from evaluation.engine.cache.reuse import routing_summary
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.greedy import decode
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.store.packing import pack_shard

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SPLIT = "validation"  # calibrated on this; the result is measured on another
ROWS, ROW_TOKENS = 4, 256  # a row of each domain
LAYER_SPREAD = 0.03  # standard deviation of the layers' reuse around the wanted mean, as trained layers have it
FREQUENCY_DOCUMENTS = 40  # of each domain, whose tokens are counted
UNSEEN = 0.05  # counts of a token that does not occur
CACHE = "30%"  # of the experts, while the checkpoint is measured
PROMPT_TOKENS = 256  # of a prompt that it is measured with
MISS_SHARES = (0.125, 0.25, 0.5, 0.75)  # of a layer's experts, for which LRU misses are given


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights: equal recipes give equal bytes on equal versions of torch."""

    shape: Shape
    eor: float  # wanted mean over the layers, on real text
    seed: int
    dtype: str  # a key of DTYPES


def write_checkpoint(folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Write config, tokenizer and all shards, then their index; returns sizes and the reuse every router was calibrated to.

    A reuse that a layer cannot have and numbers that the precision cannot hold are a `UserError`.
    """
    config = recipe.shape.config(recipe.dtype, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
    config.save_pretrained(folder)
    tokenizer.model_max_length = recipe.shape.context
    tokenizer.save_pretrained(folder)
    shard_of: dict[str, str] = {}
    reached = []
    for number, (weights, eor) in enumerate(_shards(config, recipe, tokenizer), 1):
        shard = f"model-{number:05}-of-{recipe.shape.layers + 1:05}.safetensors"
        # layers share the tensor of their norms, which safetensors refuses
        apart = {name: weight.clone() if weight.dim() == 1 else weight for name, weight in weights.items()}
        save_file(apart, folder / shard, {"format": "pt"})
        pack_shard(folder / shard, folder / shard)
        shard_of |= dict.fromkeys(weights, shard)
        reached.append(eor)
    total_bytes = weight_bytes(recipe.shape, recipe.dtype)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(shard_of.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    return {**asdict(recipe), "weight_bytes": total_bytes, "calibrated_eor_per_layer": reached[:-1]}


def weight_bytes(shape: Shape, dtype: str) -> int:
    """The bytes of all tensors."""
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(shape.config(dtype, bos_token_id=0, pad_token_id=0))
    return model.num_parameters() * DTYPES[dtype].itemsize


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
    first_attention, source = synthetic.attention(Source(recipe.seed, 1), shape), Source(recipe.seed, 1 + shape.layers)
    signature_VH = synthetic.signatures(embeddings_VH.float(), first_attention, shape)
    head_VH = synthetic.output_layer(source, _log_frequencies(tokenizer, shape), signature_VH, sample.normed())
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


def measure(folder: Path, tokenizer: PreTrainedTokenizerBase, *, new_tokens: int) -> dict[str, Any]:
    """Routing on test text (teacher-forced) and while decoding greedily, by the engine, one prompt of each domain.

    `distinct_tokens` is how many of the greedy tokens differ, `distinct_tokens_in_text` how many do in as much real text.
    """
    rows = document_beginnings(tokenizer, "test", tokens=PROMPT_TOKENS, count=len(DOMAINS))
    generated: list[list[int]] = []
    with load(folder, EngineOptions(CACHE, record_trace=True, warn=False)) as (model, engine):
        for row in tqdm(rows, desc="measure", unit="prompt"):
            decoded = decode(model, engine, prompt_ids=row, max_new_tokens=1 + new_tokens)
            generated.append(decoded.token_ids[:new_tokens])
        trace = engine.trace()
    commonest = [Counter(row).most_common(1)[0][1] / len(row) for row in generated if row]
    return {
        "split": "test",
        "teacher_forced": _routing(trace, decoded=False),
        "greedy": _routing(trace, decoded=True) if new_tokens > 1 else None,
        "distinct_tokens": _distinct(generated),
        "distinct_tokens_in_text": _distinct([row[:new_tokens] for row in rows]),
        "most_common_share": float(np.mean(commonest)) if new_tokens else None,
    }


def _routing(trace: RouteTrace, *, decoded: bool) -> dict[str, Any]:
    """EOR, load, and the misses of an LRU cache that holds a share of a layer's experts, cold for every prompt.

    Of the tokens of one phase, each as a call of its own.
    """
    kept_T = (trace.phase == DECODE) == decoded
    trace = replace(trace.where(kept_T), phase=np.full(kept_T.sum(), DECODE), call=np.arange(kept_T.sum()))
    curve = lru_curve(trace, cache_scope="per_layer")
    misses, accesses = curve.misses.sum((0, 1)), int(curve.accesses.sum())
    rates = {str(share): int(misses[round(share * trace.num_experts)]) / accesses for share in MISS_SHARES}
    return {**routing_summary(trace), "lru_miss_rate": rates}


def _distinct(rows: Sequence[Sequence[int]]) -> float:
    return float(np.mean([len(set(row)) for row in rows]))
