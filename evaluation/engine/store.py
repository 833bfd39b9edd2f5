"""Where expert weights live: the checkpoint's own shards, read in place, if they allow it one ranged read per expert.

An expert is three matrices, called by role whatever the family calls them: gate and up [I, H], down [H, I]
(I intermediate, H hidden). The store knows files and bytes; it knows no slots, no policies and no torch.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configs.load import UserError
from evaluation.engine.shards import AGAIN, StoredTensor, read_index

ROLES = ("gate", "up", "down")
ROLE_OF = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
EXPERT_TENSOR = re.compile(r"(?P<module>.*\blayers\.(?P<layer>\d+)\..*\bexperts)\.(?P<expert>\d+)\.(?P<part>.+)")
FUSED_TENSOR = re.compile(r".*(\bexperts\.[a-z]\w*|\.block_sparse_moe\.(input|output)_linear\b).*")
LOOKED_FOR = "`...mlp.experts.N.{gate,up,down}_proj.weight` or `...block_sparse_moe.experts.N.{w1,w2,w3}.weight`"


@dataclass(frozen=True)
class ExpertShape:
    """What all experts of a checkpoint have in common."""

    hidden: int
    intermediate: int
    dtype: str  # as stored, spelled as in safetensors

    @property
    def part_bytes(self) -> int:
        """Stored bytes of one of the three matrices."""
        return self.hidden * self.intermediate * DTYPE_BYTES[self.dtype]

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of one expert."""
        return 3 * self.part_bytes


class Extent(NamedTuple):
    """Adjacent parts of one expert: one ranged read."""

    shard: Path
    offset: int
    roles: tuple[str, ...]  # in file order


class ExpertStore:
    """Index over a checkpoint's experts; `reader.py` reads what it points to.

    Attributes:
        layer_ids: the layers that have experts, ascending, as the checkpoint numbers them.
        modules: for each layer id, the checkpoint's name of the module its experts belong to.
        resident: the tensors that are no experts.
        shards: the files that hold experts.

    Raises:
        UserError: see `read_index`; no experts; experts in a form that is not supported; an incomplete expert.
    """

    def __init__(self, model_dir: str | Path) -> None:
        tensors = read_index(model_dir)
        self.model_dir = Path(model_dir)
        self._parts, self.modules = _expert_parts(tensors, self.model_dir)
        self.layer_ids = sorted({layer for layer, _ in self._parts})
        self.num_experts = 1 + max(expert for _, expert in self._parts)
        self.shape = _common_shape(self._parts, self.layer_ids, self.num_experts)
        self._whole = {key: _extents(roles) for key, roles in self._parts.items()}
        self.resident = {name: tensor for name, tensor in tensors.items() if not EXPERT_TENSOR.fullmatch(name)}
        self.shards = sorted({tensor.shard for roles in self._parts.values() for tensor in roles.values()})

    def extents(self, layer_id: int, expert: int, roles: Collection[str] = ROLES) -> list[Extent]:
        """The ranged reads that bring this expert, or only some of its matrices: one if they are adjacent."""
        if len(roles) == len(ROLES):
            return self._whole[layer_id, expert]
        return _extents({role: self._parts[layer_id, expert][role] for role in roles})


PartsByExpert = dict[tuple[int, int], dict[str, StoredTensor]]


def _expert_parts(tensors: Mapping[str, StoredTensor], model_dir: Path) -> tuple[PartsByExpert, dict[int, str]]:
    """For every (layer id, expert) its tensors by role, and every layer's module name."""
    parts: PartsByExpert = {}
    modules: dict[int, str] = {}
    for name, tensor in tensors.items():
        match = EXPERT_TENSOR.fullmatch(name)
        if not match:
            continue
        role = ROLE_OF.get(match["part"].removesuffix(".weight")) if match["part"].endswith(".weight") else None
        if role is None or tensor.dtype not in DTYPE_BYTES or len(tensor.shape) != 2:
            raise UserError(
                f"{model_dir}: expert tensor {name} ({tensor.dtype} {list(tensor.shape)}) is not supported; "
                f"supported are matrices of {', '.join(DTYPE_BYTES)} named {LOOKED_FOR}"
            )
        layer = int(match["layer"])
        if modules.setdefault(layer, match["module"]) != match["module"]:
            raise UserError(
                f"{model_dir}: layer {layer} has two sets of experts, {modules[layer]} and {match['module']}"
            )
        parts.setdefault((layer, int(match["expert"])), {})[role] = tensor
    if not parts:
        raise UserError(_no_experts(tensors, model_dir))
    return parts, modules


def _no_experts(names: Iterable[str], model_dir: Path) -> str:
    fused = next((name for name in names if FUSED_TENSOR.fullmatch(name)), None)
    if fused:
        return f"{model_dir} stores a layer's experts in one tensor ({fused}); not supported yet, only {LOOKED_FOR}"
    return f"{model_dir} has no experts: no tensor is named {LOOKED_FOR}; give a mixture-of-experts checkpoint"


def _common_shape(parts: PartsByExpert, layer_ids: list[int], num_experts: int) -> ExpertShape:
    """The one shape of all experts; an incomplete or deviating one is a `UserError`."""
    role, tensor = next(iter(next(iter(parts.values())).items()))
    intermediate, hidden = tensor.shape if role != "down" else tensor.shape[::-1]
    shape = ExpertShape(hidden, intermediate, tensor.dtype)
    for layer in layer_ids:
        for expert in range(num_experts):
            _check_expert(parts.get((layer, expert), {}), shape, layer=layer, expert=expert)
    return shape


def _check_expert(roles: Mapping[str, StoredTensor], shape: ExpertShape, *, layer: int, expert: int) -> None:
    for role in ROLES:
        if role not in roles:
            raise UserError(f"layer {layer} expert {expert} has no {role} matrix in the checkpoint; {AGAIN}")
        tensor = roles[role]
        rows_columns = (shape.hidden, shape.intermediate) if role == "down" else (shape.intermediate, shape.hidden)
        if (tensor.shape, tensor.dtype, tensor.length_bytes) != (rows_columns, shape.dtype, shape.part_bytes):
            raise UserError(
                f"{tensor.shard}: {tensor.name} is {tensor.dtype} {list(tensor.shape)} in {tensor.length_bytes} bytes, "
                f"not {shape.dtype} {list(rows_columns)} in {shape.part_bytes} as the others; {AGAIN}"
            )


def _extents(roles: Mapping[str, StoredTensor]) -> list[Extent]:
    """Adjacent parts joined: as few ranged reads as the file allows."""
    extents: list[Extent] = []
    end: tuple[Path, int] | None = None
    for role, tensor in sorted(roles.items(), key=lambda item: (item[1].shard, item[1].offset)):
        if end == (tensor.shard, tensor.offset):
            extents[-1] = extents[-1]._replace(roles=(*extents[-1].roles, role))
        else:
            extents.append(Extent(tensor.shard, tensor.offset, (role,)))
        end = (tensor.shard, tensor.offset + tensor.length_bytes)
    return extents
