"""What a model needs in memory besides its experts, worked out: residents, KV cache and activations.

Keys and values are counted as DynamicCache keeps them (transformers 5.23, on the CPU, scaled dot product attention), and
activations as the largest set of intermediate tensors that is alive at once, which is that of a MoE layer over all rows of a
prompt. All are upper bounds, in bytes; `tests/.../test_needs.py` holds them against the real thing.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

SLACK_BYTES = 28 * 2**20
"""What the allocator and small tensors take beyond the tensors that are counted; measured, see the engine's README."""

SCORES = 4
"""Tensors of attention scores that are alive at once, where attention makes them at all."""


@dataclass(frozen=True)
class Needs:
    """Bytes per unit; see `kv_bytes` and `activation_bytes`."""

    layers: int
    kv_bytes_per_token: int  # of one sequence, all layers
    row_bytes: int  # of one token of a prompt while a layer computes
    mask_bytes: int  # of one token of a prompt for each it attends to: the mask, and scores where they are made

    def kv_bytes(self, tokens: int) -> int:
        """Keys and values of this many tokens, over all sequences; while one layer grows it is there twice."""
        return tokens * self.kv_bytes_per_token + self.layer_kv_bytes(tokens)

    def layer_kv_bytes(self, tokens: int) -> int:
        """Keys and values of this many tokens in one layer."""
        return tokens * (self.kv_bytes_per_token // self.layers)

    def activation_bytes(self, *, rows: int, context_tokens: int) -> int:
        """Intermediate tensors of a call over `rows` tokens that attend to `context_tokens` each."""
        return SLACK_BYTES + rows * (self.row_bytes + self.mask_bytes * context_tokens)


def needs_of(config: PretrainedConfig, itemsize: int, *, top_k: int, intermediate: int) -> Needs:
    """The needs of a model that computes in numbers of `itemsize` bytes.

    Args:
        intermediate: width of a routed expert.
    """
    text = config.get_text_config()
    heads, hidden, layers = text.num_attention_heads, text.hidden_size, text.num_hidden_layers
    kv_numbers = layers * _kv_numbers(text, heads=heads, hidden=hidden)
    moe_numbers = top_k * (2 * hidden + 4 * intermediate)  # pager.py: rows in, gate and up, activated (twice), rows out
    dense = getattr(text, "intermediate_size", None) or 0
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    other_numbers = 8 * hidden + 3 * max(dense, shared)  # residual stream, projections, a dense or shared layer
    return Needs(
        layers=layers,
        kv_bytes_per_token=itemsize * kv_numbers,
        row_bytes=itemsize * (moe_numbers + other_numbers),
        mask_bytes=2 * itemsize + 1 + (SCORES * heads * itemsize if _makes_scores(text) else 0),
    )


def _makes_scores(text: PretrainedConfig) -> bool:
    """Whether attention makes its scores as a tensor: eager attention, and sdpa where keys and values differ in size."""
    return bool(text._attn_implementation == "eager" or getattr(text, "kv_lora_rank", None))


def _kv_numbers(text: PretrainedConfig, *, heads: int, hidden: int) -> int:
    """Numbers that one layer caches of one token."""
    if getattr(text, "kv_lora_rank", None):  # latent attention is cached compressed
        return int(text.kv_lora_rank + text.qk_rope_head_dim)
    head = getattr(text, "head_dim", None) or hidden // heads
    return 2 * head * (getattr(text, "num_key_value_heads", None) or heads)
