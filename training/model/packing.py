"""Documents of a packed row, kept apart: found out whether a model does it itself, and a row for each where it does not.

transformers tells a document's edge by positions that start again. Some families do not pass these on to their masks
(GPT-OSS, transformers 5.23), and a convolution, linear attention or a state-space layer knows none on the processor.
Letters: B rows, S positions, D documents of all rows, T tokens of the longest of them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class OnePerRow(NamedTuple):
    """The documents of packed rows, each in a row of its own, filled up on the right.

    `place_BS` is where each position of the packed rows is now, in the flattened [D, T].
    """

    input_ids_DT: Tensor
    position_ids_DT: Tensor
    place_BS: Tensor


def one_per_row(input_ids_BS: Tensor, document_ids_BS: Tensor) -> OnePerRow:
    """Every run of equal document ids in a row becomes a row."""
    begins_BS = torch.ones_like(document_ids_BS, dtype=torch.bool)
    begins_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    row = begins_BS.flatten().cumsum(0) - 1
    positions = torch.arange(len(row), device=row.device)
    column = positions - positions[begins_BS.flatten()][row]
    longest = int(column.max()) + 1
    place = row * longest + column
    input_ids_DT = input_ids_BS.new_zeros(int(row[-1]) + 1, longest)
    input_ids_DT.view(-1)[place] = input_ids_BS.flatten()
    position_ids_DT = torch.arange(longest, device=row.device).expand_as(input_ids_DT)
    return OnePerRow(input_ids_DT, position_ids_DT, place.view_as(input_ids_BS))


def keeps_documents_apart(model: PreTrainedModel, row_tokens: int, *, sharded: bool = False) -> bool:
    """Whether what a model gives for the second document of a packed row of this length depends on nothing in the first.

    The gradient tells it without a threshold: what attention masks out has a gradient of exactly 0. A sharded model can only
    be called as a whole; of another one the logits of so many positions are spared.
    """
    split, leaves = min(row_tokens // 2 + 1, row_tokens - 1), []

    def as_leaf(_: Any, __: Any, embeddings_BSD: Tensor) -> Tensor:
        leaves.append(embeddings_BSD.detach().requires_grad_())
        return leaves[-1]

    device = next(model.parameters()).device
    ids_BS = torch.arange(1, row_tokens + 1, device=device)[None] % model.config.get_text_config().vocab_size
    position_ids_BS = torch.cat([torch.arange(n, device=device) for n in (split, row_tokens - split)])[None]
    handle = model.get_input_embeddings().register_forward_hook(as_leaf)
    try:
        called = model if sharded else model.base_model
        outputs_BSX = called(input_ids=ids_BS, position_ids=position_ids_BS, use_cache=False)[0]
    finally:
        handle.remove()
    second = outputs_BSX[:, split:].float()
    # a plain sum of normed states is flat
    weights = torch.linspace(-1, 1, second.numel(), device=device).view_as(second)
    (gradient_BSD,) = torch.autograd.grad((second * weights).sum(), leaves[0])
    return not bool(gradient_BSD[:, :split].any())
