"""Weights of a Qwen2-MoE that nobody trained, whose routing nevertheless looks like that of trained models.

Not a language model: its text is noise with the word frequencies of the corpus. What it has is what a benchmark of
expert paging needs: experts chosen again soon after (how soon is set), popular and unpopular experts, activations that
stay finite in 16 bit, and outputs that depend on every expert that was used. How:

- The hidden state has four parts: one constant coordinate, the token, its context, and a memory. Embeddings write the
  token, attention the context, experts the memory; everything reads everything (small entries fill the rest).
- Queries and keys are almost only biases, so what a head looks at depends on distance alone: with rotary embeddings,
  equal biases in all frequencies give weights that fall as distance^-power. Heads have different powers, so the
  context holds windows of many lengths, which is what makes reuse distances as long-tailed as they are in text.
- A router is a random projection. How much of it reads the slow context and how much the fast rest is one number a
  layer, the angle; `calibration.py` finds the angle that gives the wanted reuse. The constant coordinate carries the
  expert's popularity.
- The output layer adds random numbers that depend on memory and context to the log frequencies of the tokens: greedy
  decoding then draws about as if it sampled from those frequencies, and does not repeat itself.

Letters: V vocabulary, H hidden, I intermediate, E experts, F rotary frequencies of a head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2MoeConfig

CONSTANT = 0  # the coordinate that is the same for every token
FILL = 0.1  # size of the entries outside the part a matrix is meant for
CONTEXT_GAIN = 0.5  # RMS that one layer's attention adds to the context part
MEMORY_GAIN = 0.5  # RMS that one layer's experts add to the memory part, about
ROUTER_STD = 1.4  # of the router logits: the chosen 8 of 64 then hold a little over half of the probability
POPULARITY_STD = 0.5  # of the experts' biases, in logits
VOCABULARY_STD = 2.8  # of the random part of the output logits; near sqrt(6), where maxima look like draws
REPETITION = 8.0  # logits that a token loses when the context holds nothing else
POWERS = (0.6, 2.0)  # heads weigh the past as distance^-power, with powers between these
CONTENT = 0.3  # of the random part of queries and keys


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. Heads are 64 wide and four queries share a key; sizes that do not fit are a `ValueError`."""

    hidden: int
    layers: int
    num_experts: int
    top_k: int
    intermediate: int
    shared_intermediate: int
    vocabulary: int
    context: int

    def __post_init__(self) -> None:
        if self.hidden % 128:
            raise ValueError(f"hidden size {self.hidden} is no multiple of 128; write for example 1024")
        if not 0 < self.top_k < self.num_experts:
            raise ValueError(f"top_k is {self.top_k} of {self.num_experts} experts; it must be at least 1 and fewer")
        if self.layers < 1:
            raise ValueError(f"{self.layers} layers; write at least 1")

    @property
    def heads(self) -> int:
        return self.hidden // 64

    @property
    def key_heads(self) -> int:
        return max(1, self.heads // 4)

    def config(self, dtype: str, *, bos_token_id: int, pad_token_id: int) -> Qwen2MoeConfig:
        """The configuration of transformers. No token ends a text: a benchmark decides how long it is."""
        return Qwen2MoeConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.key_heads,
            max_position_embeddings=self.context, tie_word_embeddings=False, decoder_sparse_step=1,
            moe_intermediate_size=self.intermediate, shared_expert_intermediate_size=self.shared_intermediate,
            num_experts=self.num_experts, num_experts_per_tok=self.top_k, norm_topk_prob=False, dtype=dtype,
            architectures=["Qwen2MoeForCausalLM"],
            bos_token_id=bos_token_id, pad_token_id=pad_token_id, eos_token_id=None,
        )  # fmt: skip


class Parts(NamedTuple):
    """The coordinates of the hidden state that hold token, context and memory."""

    token: slice
    context: slice
    memory: slice

    @classmethod
    def of(cls, hidden: int) -> "Parts":
        first, second = 3 * hidden // 8, 6 * hidden // 8
        return cls(slice(1, first), slice(first, second), slice(second, hidden))


class Source:
    """Random matrices of one seed and one place in the model: equal for equal seeds, whatever is made before."""

    def __init__(self, seed: int, place: int) -> None:
        self._generator = torch.Generator().manual_seed((seed << 20) + place)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def bytes(self, count: int) -> Tensor:
        """So many, all values equally likely."""
        words = torch.randint(-(2**63), 2**63 - 1, (-(-count // 8),), generator=self._generator)
        return words.view(torch.uint8)[:count]


def embeddings(source: Source, shape: Shape) -> Tensor:
    """[V, H]: a random vector in the token part, and the constant."""
    weight_VH = source.normal(shape.vocabulary, shape.hidden)
    parts = Parts.of(shape.hidden)
    weight_VH[:, parts.context] *= FILL
    weight_VH[:, parts.memory] *= FILL
    weight_VH[:, CONSTANT] = math.sqrt(shape.hidden) / 2
    return weight_VH


def attention(source: Source, shape: Shape) -> dict[str, Tensor]:
    """The attention of one layer, by parameter name below `self_attn.`: windows of several lengths into the context."""
    hidden, parts, head = shape.hidden, Parts.of(shape.hidden), 64
    powers = np.linspace(*POWERS, shape.heads)
    query_HH, key_KH = source.normal(hidden, hidden), source.normal(shape.key_heads * head, hidden)
    value_KH = source.normal(shape.key_heads * head, hidden) / math.sqrt(hidden)
    value_KH[:, CONSTANT] = 0  # the constant is no news
    value_KH[:, parts.context] *= FILL
    output_HH = source.normal(hidden, hidden) / math.sqrt(hidden)
    output_HH *= FILL
    output_HH[parts.context] *= CONTEXT_GAIN / FILL
    output_HH[CONSTANT] = 0
    for number, power in enumerate(powers):  # long windows average much away
        output_HH[:, number * head : (number + 1) * head] *= math.sqrt(window_tokens(power))
    content = CONTENT / math.sqrt(hidden)
    return {
        "q_proj.weight": query_HH * content,
        "q_proj.bias": torch.from_numpy(np.repeat(powers * _bias_per_power(head), head)).float(),
        "k_proj.weight": key_KH * content,
        "k_proj.bias": torch.ones(shape.key_heads * head),
        "v_proj.weight": value_KH,
        "v_proj.bias": torch.zeros(shape.key_heads * head),
        "o_proj.weight": output_HH,
    }


def _bias_per_power(head: int) -> float:
    """The query bias (key bias 1) whose scores fall with the logarithm of the distance at slope -1.

    Equal halves b of a frequency's pair give the score 2 b cos(frequency x distance) / sqrt(head). Frequencies are
    geometric, so about F / ln(theta) of them pass their first quarter turn when the distance grows by a factor e.
    """
    return math.sqrt(head) * math.log(10_000) / head


def window_tokens(power: float, tokens: int = 256) -> float:
    """The number of equal weights that average as much away as weights of distance^-power do."""
    weights = np.arange(1, tokens + 1) ** -power
    return float(weights.sum() ** 2 / (weights**2).sum())


def expert(source: Source, shape: Shape) -> dict[str, Tensor]:
    """One expert, by parameter name below `experts.N.`."""
    return _feed_forward(source, shape, shape.intermediate, gain=MEMORY_GAIN * _expert_gain(shape))


def shared_expert(source: Source, shape: Shape) -> dict[str, Tensor]:
    """The shared expert and its gate, by parameter name below `mlp.`."""
    parts = _feed_forward(source, shape, shape.shared_intermediate, gain=MEMORY_GAIN)
    gate_1H = source.normal(1, shape.hidden) / math.sqrt(shape.hidden)
    return {**{f"shared_expert.{name}": weight for name, weight in parts.items()}, "shared_expert_gate.weight": gate_1H}


def _expert_gain(shape: Shape) -> float:
    """Makes up for the routing weights: K independent outputs, each weighted about .6 / K, and silu(g) u of RMS .6."""
    return 1 / (0.6 * 0.6 / math.sqrt(shape.top_k))


def _feed_forward(source: Source, shape: Shape, intermediate: int, *, gain: float) -> dict[str, Tensor]:
    down_HI = source.normal(shape.hidden, intermediate) * (gain / math.sqrt(intermediate))
    parts = Parts.of(shape.hidden)
    down_HI[parts.token] *= FILL
    down_HI[parts.context] *= FILL
    down_HI[CONSTANT] = 0
    return {
        "down_proj.weight": down_HI,
        "gate_proj.weight": source.normal(intermediate, shape.hidden) / math.sqrt(shape.hidden),
        "up_proj.weight": source.normal(intermediate, shape.hidden) / math.sqrt(shape.hidden),
    }


@dataclass(frozen=True)
class Projection:
    """A random reading of the hidden state, standardised on a sample of it: mean 0 and deviation 1 for every output.

    `slow` reads the context part, `fast` the token and memory parts; the constant coordinate takes the mean away.
    """

    slow_EH: Tensor
    fast_EH: Tensor

    @classmethod
    def on(cls, source: Source, outputs: int, sample_TH: Tensor, *, token_gain: float = 1.0) -> "Projection":
        weight_EH = source.normal(outputs, sample_TH.shape[1])
        parts = Parts.of(sample_TH.shape[1])
        weight_EH[:, parts.token] *= token_gain
        weight_EH[:, CONSTANT] = 0
        context = parts.context
        slow_EH, fast_EH = torch.zeros_like(weight_EH), weight_EH.clone()
        slow_EH[:, context], fast_EH[:, context] = weight_EH[:, context], 0
        return cls(_standardised(slow_EH, sample_TH), _standardised(fast_EH, sample_TH))

    def at(self, angle: float) -> Tensor:
        """[E, H]: 0 reads only the fast parts, pi / 2 only the slow one; the deviation stays near 1."""
        return math.sin(angle) * self.slow_EH + math.cos(angle) * self.fast_EH


def _standardised(weight_EH: Tensor, sample_TH: Tensor) -> Tensor:
    output_TE = sample_TH @ weight_EH.T
    deviation_E, mean_E = output_TE.std(0), output_TE.mean(0)
    scaled_EH = weight_EH / deviation_E[:, None]
    scaled_EH[:, CONSTANT] = -(mean_E / deviation_E) / sample_TH[:, CONSTANT].mean()
    return scaled_EH


def router(projection: Projection, angle: float, popularity_E: Tensor) -> Tensor:
    """[E, H]; `popularity_E` is in logits times the constant coordinate's mean."""
    weight_EH = ROUTER_STD * projection.at(angle)
    weight_EH[:, CONSTANT] += popularity_E
    return weight_EH


def signatures(embeddings_VH: Tensor, first_attention: Mapping[str, Tensor], shape: Shape) -> Tensor:
    """[V, H]: what the first layer's attention makes of a text in which a token is repeated for ever."""
    normed_VH = torch.nn.functional.rms_norm(embeddings_VH, embeddings_VH.shape[1:])
    values_VKh = (normed_VH @ first_attention["v_proj.weight"].T).unflatten(1, (shape.key_heads, -1))
    each_VH = values_VKh.repeat_interleave(shape.heads // shape.key_heads, dim=1).flatten(1)
    context_VH = torch.zeros_like(embeddings_VH)
    context = Parts.of(shape.hidden).context
    context_VH[:, context] = (each_VH @ first_attention["o_proj.weight"].T)[:, context]
    return context_VH


def output_layer(source: Source, log_frequency_V: Tensor, signature_VH: Tensor, sample_TH: Tensor) -> Tensor:
    """[V, H]: log frequencies in the constant coordinate, less what is in the context already, and random numbers.

    The random numbers depend on memory and context, hardly on the last token: equal tokens are followed by others.
    """
    projection = Projection.on(source, len(log_frequency_V), sample_TH, token_gain=FILL)
    weight_VH = VOCABULARY_STD * projection.at(math.pi / 6)
    norm = math.sqrt(sample_TH.shape[1]) / 2 / sample_TH[:, CONSTANT].mean()  # of the hidden states before their norm
    weight_VH -= REPETITION * norm * signature_VH / signature_VH.pow(2).sum(1, keepdim=True)
    weight_VH[:, CONSTANT] += log_frequency_V / sample_TH[:, CONSTANT].mean()
    return weight_VH


def named(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same weights, `prefix` before their names."""
    return {f"{prefix}.{name}": weight for name, weight in weights.items()}
