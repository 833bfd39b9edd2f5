"""Attention over packed rows that does not compute what the mask rules out.

It is part of transformers' attention interface. torch's kernel for the CPU computes every pair of a row's positions and masks
what is in the future or in another document. Here neighbouring queries attend together, through transformers' own function, to no
more keys than from the first to the last that their mask allows; the rest of the mask is applied as ever, so this is right
for any mask. Rows need not be packed: of one document about a third less is computed.
Letters: B batch, H heads, S positions, N numbers of a head.
"""

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface

from training.model.transformers_internals import sdpa_attention_forward, sdpa_mask

IMPLEMENTATION = "remoe_packed"
MOST_QUERIES = 192
"""Queries that attend together: few enough to skip much of the future, enough for the kernel's own blocks ..."""
FEWEST_QUERIES = 64
"""... and at least that many, whatever the documents' lengths, to outweigh the calls."""


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers; doing it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, packed_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' own mask; on the CPU also where its kernel could do without, because all rows are one document."""
    if torch.device(kwargs.get("device", "cpu")).type == "cpu":
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


def packed_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The function in transformers' attention interface: [B, H, S, N] each, boolean mask [B, 1, S, S]; returns [B, S, H, N].

    Other masks, and accelerators, which have kernels of their own, are left to transformers.
    """
    if (
        attention_mask is None
        or attention_mask.dtype != torch.bool
        or attention_mask.shape[:2] != (len(query), 1)
        or query.device.type != "cpu"
        or kwargs.get("position_bias") is not None
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for row, parts in enumerate(_parts_of(attention_mask, query.dtype)):
        queries = query[row : row + 1].split([part.mask_qk.shape[0] for part in parts], dim=2)
        for part, query_1HqN in zip(parts, queries, strict=True):
            seen = (key[row : row + 1, :, part.keys], value[row : row + 1, :, part.keys], part.mask_qk[None, None])
            outputs.append(sdpa_attention_forward(module, query_1HqN, *seen, **kwargs)[0])
    return torch.cat(outputs, dim=1).view(*query.transpose(1, 2).shape[:3], value.shape[-1]), None


class _Part(NamedTuple):
    """Neighbouring queries of one row that attend together."""

    keys: slice  # from the first to the last key that one of them may see
    mask_qk: Tensor  # 0 where a query may see a key, else -inf; all layers share it, and so does what autograd keeps


_PARTS: MutableMapping[Tensor, dict[torch.dtype, list[list[_Part]]]] = WeakIdKeyDictionary()


def _parts_of(mask_B1SS: Tensor, dtype: torch.dtype) -> list[list[_Part]]:
    """The parts of every row, found once per mask: all layers of one kind are given the same."""
    known = _PARTS.setdefault(mask_B1SS, {})
    if dtype not in known:
        known[dtype] = [_parts(mask_SS, dtype) for mask_SS in mask_B1SS[:, 0]]
    return known[dtype]


def _parts(mask_SS: Tensor, dtype: torch.dtype) -> list[_Part]:
    """A part ends before the query that sees nothing before itself, if it is not too small, or when it is full."""
    sees_S = mask_SS.any(1)
    first_S = mask_SS.int().argmax(1).where(sees_S, 0).tolist()
    end_S = (mask_SS.shape[1] - mask_SS.flip(1).int().argmax(1)).where(sees_S, 1).tolist()
    parts, begin = [], 0
    for end in range(1, len(mask_SS) + 1):
        queries = end - begin
        if end < len(mask_SS) and queries < MOST_QUERIES and (first_S[end] < end or queries < FEWEST_QUERIES):
            continue
        keys = slice(min(first_S[begin:end]), max(end_S[begin:end]))
        mask_qk = torch.zeros(queries, keys.stop - keys.start, dtype=dtype, device=mask_SS.device)
        parts.append(_Part(keys, mask_qk.masked_fill_(~mask_SS[begin:end, keys], -torch.inf)))
        begin = end
    return parts
