"""The products of one call of a layer's experts, in the order and on matrices of the shape transformers computes with.

The last bits depend on both, and transformers (5.23) computes in two ways. `GroupedProducts` is its `grouped_mm`: rows
sorted by expert id, one product per expert over all its rows. `BatchedProducts` is its `batched_mm`, to which `generate`
turns on an accelerator for every step but the first: one product per row, with a copy of its expert's matrices.
Experts are handed in some at a time, in whatever order they land.
Axes: T tokens, K chosen, R = T K rows, H hidden, I intermediate, J = 2 I (gate, then up).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from evaluation.engine.cache.policies import Key
from evaluation.engine.slot_memory import NOT_FILLED, SlotMemory
from training.model.transformers_internals import batched_linear

PACKED_ROWS = 2
"""Rows of an expert that are multiplied by packed numbers, each alone, where that is allowed; for more it is decoded once."""
COMBINED_TOKENS = 64
"""Tokens whose weighted rows exist at once, in the wider precision of the weights."""


class Products(Protocol):
    """What the pager asks of either way to compute."""

    def whole(self, placed: Mapping[Key, int]) -> None:
        """Everything that can be done with these experts, which lie in these slots until others are handed in."""

    def combined(self, weights_TK: Tensor) -> Tensor:
        """TH: the sum of each token's rows, weighted; after every expert was handed in."""


class GroupedProducts:
    """As `transformers.integrations.moe.grouped_mm_experts_forward`; expert by expert, or step by step over all rows."""

    def __init__(self, experts: nn.Module, memory: SlotMemory, hidden_TH: Tensor, expert_ids_TK: Tensor) -> None:
        self._experts: Any = experts
        self._activation: Any = self._experts._apply_gate
        self._rows = _Rows.of(expert_ids_TK)
        hidden_RH = hidden_TH.index_select(0, self._rows.token_R).to(memory.dtype)
        self.memory, self._multiply, self._hidden_RH = memory, memory.device.multiply, hidden_RH
        self._fill = memory.filled_rows if torch.get_num_threads() == memory.filled_for_threads else NOT_FILLED
        self._gate_up_RJ = hidden_RH.new_empty(len(hidden_RH), memory.gate_up_columns)
        self._out_RH = torch.empty_like(hidden_RH)

    def rows_are_independent(self) -> bool:
        """Whether the activation gives a row the same bits alone as in the matrix of all rows."""
        counts = {len(self._hidden_RH), *(part.stop - part.start for part in self._rows.of_expert.values())}
        return self.memory.device.rows_are_independent(counts, self.memory.gate_up_columns // 2)

    def whole(self, placed: Mapping[Key, int]) -> None:
        """Compute everything for the rows of these experts, packed products of all at once."""
        packed, rest = self._packed_and_rest(placed)
        if packed.slots:
            self._packed_up(packed)
            self._packed_down(packed, self._activation(self._gate_up_RJ[packed.rows]))
        for (_, expert), slot in rest.items():
            part = self._rows.of_expert[expert]
            self._up(part, expert, slot)
            self._down(part, expert, slot, self._activation(self._gate_up_RJ[part]))

    def up(self, placed: Mapping[Key, int]) -> None:
        """Gate and up projection of the rows of these experts, which lie in these slots."""
        packed, rest = self._packed_and_rest(placed)
        if packed.slots:
            self._packed_up(packed)
        for (_, expert), slot in rest.items():
            self._up(self._rows.of_expert[expert], expert, slot)

    def activate(self) -> None:
        """The activation over the matrix of all rows; what it makes of rows that are not computed yet is not read."""
        self._activated_RI = self._activation(self._gate_up_RJ)

    def down(self, placed: Mapping[Key, int]) -> None:
        """Down projection, after `up` and `activate`."""
        packed, rest = self._packed_and_rest(placed)
        if packed.slots:
            self._packed_down(packed, self._activated_RI[packed.rows])
        for (_, expert), slot in rest.items():
            part = self._rows.of_expert[expert]
            self._down(part, expert, slot, self._activated_RI[part])

    def combined(self, weights_TK: Tensor) -> Tensor:
        """Weight the rows, put them back into routing order and add up each token's; some tokens after the other."""
        if len(weights_TK) <= COMBINED_TOKENS:
            return _weighted_sum(self._out_RH.index_select(0, self._rows.place_R), weights_TK)
        place_TK = self._rows.place_R.view(weights_TK.shape)
        parts = zip(place_TK.split(COMBINED_TOKENS), weights_TK.split(COMBINED_TOKENS), strict=True)
        return torch.cat([_weighted_sum(self._out_RH[place_tK.flatten()], part_tK) for place_tK, part_tK in parts])

    def _up(self, part: slice, expert: int, slot: int) -> None:
        out = self._product(slot, "gate_up", self._hidden_RH[part], self._gate_up_RJ[part])
        if self._experts.has_bias:
            out.add_(self._experts.gate_up_proj_bias[expert])

    def _down(self, part: slice, expert: int, slot: int, activated_RI: Tensor) -> None:
        out = self._product(slot, "down", activated_RI, self._out_RH[part])
        self.memory.device.used(slot)
        if self._experts.has_bias:
            out.add_(self._experts.down_proj_bias[expert])

    def _product(self, slot: int, matrix: str, input_RN: Tensor, out_RM: Tensor) -> Tensor:
        """Rows times a matrix of the expert in `slot`, into `out_RM`, which is returned."""
        return self._multiply(input_RN, self.memory.matrix(slot, matrix), out=out_RM, sizes=self._fill[matrix])

    def _packed_and_rest(self, placed: Mapping[Key, int]) -> tuple["_PackedRows", Mapping[Key, int]]:
        """What is multiplied by numbers as they are stored, and the experts that are not."""
        if not self.memory.multiplies_packed:
            return _PackedRows.of([]), placed
        packed, rest = list[tuple[int, int, int]](), dict[Key, int]()
        for key, slot in placed.items():
            part = self._rows.of_expert[key[1]]
            if part.stop - part.start > PACKED_ROWS:
                rest[key] = slot
            else:
                packed += [(row, key[1], slot) for row in range(part.start, part.stop)]
        return _PackedRows.of(packed), rest

    def _packed_up(self, packed: "_PackedRows") -> None:
        bias = self._experts.gate_up_proj_bias if self._experts.has_bias else None
        products_XJ = self._packed_product(packed, "gate_up", self._hidden_RH[packed.rows], bias)
        self._gate_up_RJ[packed.rows] = products_XJ

    def _packed_down(self, packed: "_PackedRows", activated_XI: Tensor) -> None:
        bias = self._experts.down_proj_bias if self._experts.has_bias else None
        self._out_RH[packed.rows] = self._packed_product(packed, "down", activated_XI, bias)

    def _packed_product(self, packed: "_PackedRows", matrix: str, input_XN: Tensor, bias_EM: Tensor | None) -> Tensor:
        products_XM = torch.from_numpy(self.memory.multiply(packed.slots, matrix, input_XN.float().numpy()))
        products_XM = products_XM.to(self.memory.dtype)
        return products_XM if bias_EM is None else products_XM.add_(bias_EM[packed.experts])


class BatchedProducts:
    """As `transformers.integrations.moe.batched_mm_experts_forward`; it takes the memory of R experts, as that does."""

    def __init__(self, experts: nn.Module, memory: SlotMemory, hidden_TH: Tensor, expert_ids_TK: Tensor) -> None:
        self._experts: Any = experts
        self._memory, self._ids_R = memory, expert_ids_TK.reshape(-1)
        self._hidden_RH = hidden_TH.repeat_interleave(expert_ids_TK.shape[1], dim=0).to(memory.dtype)
        self._rows_of: dict[int, list[int]] = {}
        for row, expert in enumerate(self._ids_R.tolist()):
            self._rows_of.setdefault(expert, []).append(row)
        width, hidden = memory.gate_up_columns, self._hidden_RH.shape[1]
        # right-hand sides of products; transposed in memory where the model's are
        self._gate_up_RHJ = self._empty(len(self._ids_R), hidden, width)
        self._down_RIH = self._empty(len(self._ids_R), width // 2, hidden)

    def whole(self, placed: Mapping[Key, int]) -> None:
        """Copy the matrices of these experts for each of their rows."""
        for (_, expert), slot in placed.items():
            for row in self._rows_of[expert]:
                self._gate_up_RHJ[row].copy_(self._memory.gate_up_HJ(slot))
                self._down_RIH[row].copy_(self._memory.down_IH(slot))
            self._memory.device.used(slot)

    def combined(self, weights_TK: Tensor) -> Tensor:
        """All products, then the sum of each token's rows, weighted."""
        activated_RI = self._experts._apply_gate(self._linear(self._hidden_RH, self._gate_up_RHJ, "gate_up_proj_bias"))
        return _weighted_sum(self._linear(activated_RI, self._down_RIH, "down_proj_bias"), weights_TK)

    def _empty(self, rows: int, inputs: int, outputs: int) -> Tensor:
        if self._experts.is_transposed:
            return self._hidden_RH.new_empty(rows, inputs, outputs)
        return self._hidden_RH.new_empty(rows, outputs, inputs).mT

    def _linear(self, input_RN: Tensor, weight_RNM: Tensor, bias_name: str) -> Tensor:
        transposed = self._experts.is_transposed
        bias_RM = getattr(self._experts, bias_name)[self._ids_R] if self._experts.has_bias else None
        as_stored = weight_RNM if transposed else weight_RNM.mT
        return batched_linear(input_RN, as_stored, bias=bias_RM, is_transposed=transposed)


def _weighted_sum(rows_RH: Tensor, weights_TK: Tensor) -> Tensor:
    return (rows_RH * weights_TK.reshape(-1, 1)).view(*weights_TK.shape, -1).sum(dim=1)


class _PackedRows(NamedTuple):
    """Rows that are multiplied by an expert's numbers as they are stored, with the expert and the slot of each."""

    rows: slice | list[int]  # a slice where they follow each other, as all rows do where nothing is missing
    experts: list[int]
    slots: list[int]

    @classmethod
    def of(cls, found: Iterable[tuple[int, int, int]]) -> "_PackedRows":
        """Of each a row, an expert and a slot."""
        by_row = sorted(found)
        rows, experts, slots = ([one[which] for one in by_row] for which in range(3))
        follow = bool(rows) and rows[-1] - rows[0] == len(rows) - 1
        return cls(slice(rows[0], rows[-1] + 1) if follow else rows, experts, slots)


@dataclass(frozen=True)
class _Rows:
    """Token-expert pairs sorted by expert id, as the resident implementation sorts them."""

    token_R: Tensor  # sorted position -> token
    place_R: Tensor  # pair -> sorted position
    of_expert: dict[int, slice]  # sorted positions of each expert

    @classmethod
    def of(cls, expert_ids_TK: Tensor) -> "_Rows":
        sorted_ids_R, order_R = torch.sort(expert_ids_TK.reshape(-1))
        counts = Counter(sorted_ids_R.tolist())
        ends = accumulate(counts.values())
        of_expert = {e: slice(end - n, end) for (e, n), end in zip(counts.items(), ends, strict=True)}
        return cls(order_R // expert_ids_TK.shape[1], order_R.argsort(), of_expert)
