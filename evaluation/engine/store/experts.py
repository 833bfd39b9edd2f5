"""Where expert weights live: the checkpoint's own shards, in place, if they allow it one ranged read per expert.

The store knows files and byte ranges; `reader.py` reads them. It knows no slots, no policies and no torch.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from evaluation.engine.store.records import ALIGN_BYTES, NO_LEADS, Leads, Record, StoredRecord
from training.model.expert_format import FUSED
from training.model.expert_layout import expert_layout
from training.model.shards import StoredTensor, read_index


class Extent(NamedTuple):
    """Adjacent parts of one expert: one ranged read."""

    shard: Path
    offset: int
    parts: tuple[str, ...]  # in file order
    length_bytes: int


class ExpertStore:
    """Index over a checkpoint's experts; a damaged or unsupported one is refused.

    Attributes:
        format: what all experts have in common.
        layer_ids: the layers that have experts, ascending, as the checkpoint numbers them.
        meta_shapes: what stands for the experts when a model is made without them; see `ExpertLayout`.
        module_bytes: bytes of the experts of each layer, by the checkpoint's name of their module, in layer order.
        names: of the tensors that are experts.
        resident: the tensors that are no experts, of the model's layers or of others.
        stored_tensors: how many tensors the checkpoint has.
        shards: the files that hold experts.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        tensors = read_index(model_dir)
        layout = expert_layout(tensors, self.model_dir)
        self.format, self.layer_ids, self.num_experts = layout.format, layout.layer_ids, layout.num_experts
        self.meta_shapes, self._parts = layout.meta_shapes, layout.parts
        self._whole = {key: _extents(parts) for key, parts in self._parts.items()}
        layer_bytes = self.num_experts * self.format.expert_bytes
        self.module_bytes = dict.fromkeys(sorted(set(layout.module_of.values()), key=_numbers), layer_bytes)
        self.names = set(layout.module_of)
        experts = self.names | layout.others
        self.resident = {name: tensor for name, tensor in tensors.items() if name not in experts}
        self.stored_tensors = len(tensors)
        self.shards = sorted({tensor.shard for parts in self._parts.values() for tensor in parts.values()})

    def tensors(self, layer_id: int, expert: int) -> dict[str, StoredTensor]:
        """Part -> where it lies."""
        return self._parts[layer_id, expert]

    def extents(self, layer_id: int, expert: int, parts: Collection[str] | None = None) -> list[Extent]:
        """The ranged reads that bring this expert, or only some of its parts: one if they are adjacent."""
        if parts is None:
            return self._whole[layer_id, expert]
        return _extents({part: self._parts[layer_id, expert][part] for part in parts})

    @property
    def longest_bytes(self) -> int:
        """The longest of all ranged reads."""
        return max(extent.length_bytes for extents in self._whole.values() for extent in extents)

    @property
    def all_experts_bytes(self) -> int:
        return sum(self.module_bytes.values())

    @property
    def resident_bytes(self) -> int:
        """Stored bytes of everything that is no expert."""
        return sum(tensor.length_bytes for tensor in self.resident.values())

    def active_bytes(self, *, top_k: int, tied_embeddings: bool) -> int:
        """Weights that one token needs: of each layer's experts the `top_k` chosen, and everything else.

        But for the embeddings, of which a token needs one row, unless they are the output matrix too.
        """
        embedding_bytes = sum(
            tensor.length_bytes for name, tensor in self.resident.items() if name.endswith("embed_tokens.weight")
        )
        chosen_bytes = len(self.layer_ids) * top_k * self.format.expert_bytes
        return self.resident_bytes + chosen_bytes - (0 if tied_embeddings else embedding_bytes)

    @property
    def keys(self) -> Iterable[tuple[int, int]]:
        """Layer id and number of every expert."""
        return self._parts

    def leads(self, layer_id: int, expert: int) -> Leads:
        """Where an expert's matrices start in the resident model.

        It maps fused tensors as they lie in the file; all others it copies onto a boundary.
        """
        if self.format.roles != FUSED or self.format.is_quantised:
            return NO_LEADS
        parts = self._parts[layer_id, expert]
        return Leads(*(parts[matrix].offset % ALIGN_BYTES for matrix in Leads._fields))

    def stored_record(self) -> StoredRecord:
        """What one slot is that holds experts as they are stored."""
        return StoredRecord(self.format)

    def record(self, itemsize: int) -> Record:
        """What one slot is in a precision of `itemsize` bytes."""
        on_boundary = all(self.leads(*key) == NO_LEADS for key in self.keys)
        return Record(self.format, itemsize, 0 if on_boundary else ALIGN_BYTES)


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _extents(parts: Mapping[str, StoredTensor]) -> list[Extent]:
    """Adjacent parts joined: as few ranged reads as the file allows."""
    extents: list[Extent] = []
    end: tuple[Path, int] | None = None
    for part, tensor in sorted(parts.items(), key=lambda item: (item[1].shard, item[1].offset)):
        if end == (tensor.shard, tensor.offset):
            extent = extents.pop()
            length_bytes = extent.length_bytes + tensor.length_bytes
            extents.append(extent._replace(parts=(*extent.parts, part), length_bytes=length_bytes))
        else:
            extents.append(Extent(tensor.shard, tensor.offset, (part,), tensor.length_bytes))
        end = (tensor.shard, tensor.offset + tensor.length_bytes)
    return extents
