"""Keys and values of whole blocks of prompts, kept for later requests that begin the same.

A block is a fixed number of tokens; its name stands for all tokens of the prompt up to its end. The order is LRU, and a
block counts as more recent than those that follow it in a prompt: a beginning outlives its continuations, so what is
held of a prompt is always its beginning. Names of blocks that were given up stay in the order, without their content:
their place tells how large the cache would have had to be.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch

Name = bytes
Block = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, both [1, heads, block_tokens, head_dim]."""

NAMES = 16384
"""Blocks that are remembered by name, at most."""


def block_names(token_ids: Sequence[int], block_tokens: int) -> list[Name]:
    """A name for every whole block of a prompt."""
    ids = np.asarray(token_ids, dtype=np.int64)
    names, name = [], b""
    for end in range(block_tokens, len(ids) + 1, block_tokens):
        name = hashlib.sha256(name + ids[end - block_tokens : end].tobytes()).digest()
        names.append(name)
    return names


class PrefixCache:
    """Blocks by name, at most `capacity_bytes` of them.

    Args:
        make_room: says whether this many bytes may be held, before they are.

    Attributes:
        block_bytes: bytes of one block; None until the first was kept. All are equal.
        held_bytes: bytes of all that are held.
    """

    def __init__(self, capacity_bytes: int, *, make_room: Callable[[int], bool] = lambda _: True) -> None:
        self.capacity_bytes, self._make_room = capacity_bytes, make_room
        self.block_bytes: int | None = None
        self.held_bytes = 0
        self._order: OrderedDict[Name, Block | None] = OrderedDict()  # most recent last

    def find(self, names: Sequence[Name]) -> list[Block]:
        """What is held of a prompt's beginning; changes no order."""
        held: Any = takewhile(lambda block: block is not None, (self._order.get(name) for name in names))
        return list(held)

    def distances(self, names: Sequence[Name]) -> list[int]:
        """The number of blocks the cache must hold to have each of these; 0 for those that were never used."""
        place = {name: i + 1 for i, name in enumerate(reversed(self._order))}
        return [place.get(name, 0) for name in names]

    def use(self, names: Sequence[Name], block_of: Callable[[int], Block]) -> None:
        """A prompt was computed: its blocks are the most recent now, and those that fit are held.

        Args:
            block_of: makes the block that `names[i]` stands for; called for those that are not held.
        """
        for name in reversed(names):
            self._order.setdefault(name, None)
            self._order.move_to_end(name)
        own = frozenset(names)
        for i, name in enumerate(names):
            if self._order[name] is None and not self._hold(name, block_of(i), but=own):
                break
        while len(self._order) > NAMES:
            self._order.popitem(last=False)  # holds nothing: far fewer fit

    def resize(self, capacity_bytes: int) -> None:
        """Hold this many bytes at most from now on."""
        self.capacity_bytes = capacity_bytes
        self.shrink(capacity_bytes)

    def shrink(self, held_bytes: int) -> None:
        """Give up the least recent until at most this many bytes are held; the capacity stays."""
        for name in self._held_least_recent_first():
            if self.held_bytes <= held_bytes:
                break
            self._give_up(name)

    def _hold(self, name: Name, block: Block, *, but: frozenset[Name]) -> bool:
        """Hold a block in the place of less recent ones, but for these; False if there is no room."""
        self.block_bytes = sum(keys.nbytes + values.nbytes for keys, values in block)
        while (held := self.held_bytes + self.block_bytes) > self.capacity_bytes or not self._make_room(held):
            victim = next(self._held_least_recent_first(), None)
            if victim is None or victim in but:
                return False
            self._give_up(victim)
        self._order[name] = block
        self.held_bytes += self.block_bytes
        return True

    def _held_least_recent_first(self) -> Iterator[Name]:
        return iter([name for name, block in self._order.items() if block is not None])

    def _give_up(self, name: Name) -> None:
        assert self.block_bytes is not None, "a block is held"
        self._order[name] = None
        self.held_bytes -= self.block_bytes
