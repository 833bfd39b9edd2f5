"""Router angles that give the wanted reuse: a bisection in every layer, on a few rows of real text.

Layers are made in the order they run: each one's real inputs, computed in the model's own precision by transformers'
own modules, are what its router is fitted to. So never more than one layer of weights exists.

Letters: B batch, S sequence, T = B S tokens, H hidden, E experts, K experts chosen.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeDecoderLayer, Qwen2MoeRotaryEmbedding

from configs.load import UserError
from evaluation.benchmark.made_model.synthetic import CONSTANT, POPULARITY_STD, Projection, Shape, Source, router

BISECTIONS = 12
TOLERANCE = 0.02  # of the reuse a layer's router reaches on the sample


def reuse_rate(logits_TE: Tensor, top_k: int, *, rows: int) -> float:
    """EOR: the mean share of a token's top K experts that the token before it in the same row chose too."""
    chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, logits_TE.topk(top_k).indices, True)
    chosen_BSE = chosen_TE.view(rows, -1, logits_TE.shape[1])
    return float((chosen_BSE[:, 1:] & chosen_BSE[:, :-1]).sum(-1).float().mean()) / top_k


def angle_for(wanted: float, measure: Callable[[float], float]) -> float:
    """The angle in [0, pi / 2] whose reuse, which rises with it, is nearest to `wanted`."""
    low, high = 0.0, math.pi / 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) < wanted else (low, middle)
    return (low + high) / 2


def calibrated_router(
    source: Source, inputs_TH: Tensor, shape: Shape, *, rows: int, eor: float, layer: int
) -> tuple[Tensor, float]:
    """[E, H] for the inputs of `rows` equally long rows of text, and its reuse on them: `eor`, or a `UserError`."""
    projection = Projection.on(source, shape.num_experts, inputs_TH)
    popularity_E = POPULARITY_STD * source.normal(shape.num_experts) / inputs_TH[:, CONSTANT].mean()

    def measured(angle: float) -> float:
        return reuse_rate(inputs_TH @ router(projection, angle, popularity_E).T, shape.top_k, rows=rows)

    angle = angle_for(eor, measured)
    if abs(measured(angle) - eor) > TOLERANCE:
        raise UserError(
            f"layer {layer} cannot have an expert reuse of {eor:.3f}, only {measured(0):.3f} to "
            f"{measured(math.pi / 2):.3f}; write an --eor well inside (layers differ a little from it)"
        )
    return router(projection, angle, popularity_E), measured(angle)


class LayerRun:
    """Carries the sample through the layers as they are made; `hidden_BSH` is what the next one is given."""

    def __init__(self, config: Qwen2MoeConfig, embeddings_VH: Tensor, ids_BS: Tensor) -> None:
        config = copy.deepcopy(config)
        config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
        self._layer = Qwen2MoeDecoderLayer(config, 0).to(embeddings_VH.dtype).eval()
        self.hidden_BSH = embeddings_VH[ids_BS]
        positions_1S = torch.arange(ids_BS.shape[1])[None]
        self._rotary = Qwen2MoeRotaryEmbedding(config)(self.hidden_BSH, positions_1S)

    @torch.no_grad()
    def router_inputs(self, attention: Mapping[str, Tensor]) -> Tensor:
        """Run the attention of a layer; [T, H] in float32 is what its router and experts see."""
        layer = self._layer
        layer.self_attn.load_state_dict(attention)
        normed_BSH = layer.input_layernorm(self.hidden_BSH)
        out_BSH, _ = layer.self_attn(normed_BSH, position_embeddings=self._rotary, attention_mask=None)
        self.hidden_BSH = self.hidden_BSH + out_BSH
        return self.normed()

    @torch.no_grad()
    def run_experts(self, mlp: Mapping[str, Tensor]) -> None:
        """Run the rest of the layer; `mlp` has transformers' names, the experts in two tensors."""
        self._layer.mlp.load_state_dict(mlp, assign=True)
        self.hidden_BSH = self.hidden_BSH + self._layer.mlp(self._layer.post_attention_layernorm(self.hidden_BSH))

    @torch.no_grad()
    def normed(self) -> Tensor:
        """[T, H] in float32: the hidden state as a norm with weights of one passes it on."""
        return self._layer.post_attention_layernorm(self.hidden_BSH).flatten(0, 1).float()


def fused(experts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Per-expert matrices as transformers holds them in memory, by name below `mlp.`."""
    gate_up = [torch.cat([e["gate_proj.weight"], e["up_proj.weight"]]) for e in experts]
    return {
        "experts.gate_up_proj": torch.stack(gate_up),
        "experts.down_proj": torch.stack([e["down_proj.weight"] for e in experts]),
    }
