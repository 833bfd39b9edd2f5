"""`generate` for conversations: what an earlier prompt with the same beginning computed is not computed again.

Prompts are computed in blocks of a fixed number of tokens, each in a call of its own, whether their beginning is held or
not (`prefill_chunk_size` of transformers). A block's keys and values therefore depend on nothing but the tokens up to
its end, and what is said never depends on what was held: it is what plain `generate(prefill_chunk_size=block_tokens)`
says. Keys and values of an answer are not kept: they were computed token by token, so with the next prompt they are
computed again, in its blocks.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from configs.load import UserError
from evaluation.engine.memory.prefix_cache import Block, PrefixCache, block_names

BLOCK_TOKENS = 256
"""Small blocks share more and waste less; large ones read the experts less often while a prompt is computed."""


class Conversations:
    """`generate` with a prefix cache.

    Args:
        watch: called with the distances of every prompt's blocks, see `PrefixCache.distances`.

    Attributes:
        found_tokens, computed_tokens: how many tokens of all prompts so far were found, and how many computed.
    """

    def __init__(
        self, model: PreTrainedModel, kept: PrefixCache, *, block_tokens: int = BLOCK_TOKENS,
        watch: Callable[[list[int]], None] | None = None,
    ) -> None:  # fmt: skip
        if block_tokens < 1:
            raise UserError(f"blocks of {block_tokens} tokens make no sense; write at least 1")
        check_keeps_everything(model.config)
        self.block_tokens, self.kept = block_tokens, kept
        self.found_tokens = self.computed_tokens = 0
        self._model, self.watch = model, watch

    def generate(self, input_ids_BT: torch.Tensor, **options: Any) -> Any:
        """What `model.generate(input_ids, prefill_chunk_size=block_tokens, **options)` returns, for one prompt.

        Args:
            input_ids_BT: [1, tokens]; all options are `generate`'s, but it makes its own cache.
        """
        assert len(input_ids_BT) == 1, "several prompts at once have no beginning in common"
        token_ids = input_ids_BT[0].tolist()
        names = block_names(token_ids, self.block_tokens)
        found = self.kept.find(names[: (len(token_ids) - 1) // self.block_tokens])  # something is left to compute
        if self.watch is not None:
            self.watch(self.kept.distances(names))
        self.found_tokens += len(found) * self.block_tokens
        self.computed_tokens += len(token_ids) - len(found) * self.block_tokens
        cache = _joined(found)
        generate: Any = self._model.generate
        try:
            return generate(
                input_ids=input_ids_BT,
                attention_mask=torch.ones_like(input_ids_BT),
                past_key_values=cache,
                prefill_chunk_size=self.block_tokens,
                **options,
            )
        finally:  # also of a request that was broken off: whole blocks are whole
            whole = min((layer.get_seq_length() for layer in cache.layers), default=0) // self.block_tokens
            self.kept.use(names[:whole], lambda index: _block(cache, index * self.block_tokens, self.block_tokens))


def check_keeps_everything(config: PretrainedConfig) -> None:
    """Raise `UserError` if such a model's cache is more, or less, than the keys and values of all tokens."""
    for layer in DynamicCache(config=config).layers:
        if type(layer) is not DynamicLayer:
            raise UserError(
                f"a {config.model_type} model keeps {type(layer).__name__} of a context, which cannot be cut into blocks; "
                "a prefix cache is for models whose layers all attend to the whole context"
            )


def _joined(blocks: list[Block]) -> Any:
    """A DynamicCache that holds these blocks, one after the other."""
    layers = [zip(*parts, strict=True) for parts in zip(*blocks, strict=True)]  # keys, then values, of every block
    return DynamicCache([tuple(torch.cat(tensors, dim=-2) for tensors in layer) for layer in layers])


def _block(cache: Any, start: int, tokens: int) -> Block:
    """A copy of the first tokens of a cache, this many."""
    part = slice(start, start + tokens)
    return [(layer.keys[..., part, :].clone(), layer.values[..., part, :].clone()) for layer in cache.layers]
