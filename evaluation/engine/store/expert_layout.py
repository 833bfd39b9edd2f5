"""How checkpoints write experts down: names to (layer, expert, role), and the one shape all experts of a model have.

Two forms: three matrices for every expert, or two tensors a layer that hold all its experts. Roles, whatever a family
calls them: `gate` and `up` [I, H] (or `gate_up`, both in one) and `down` [H, I] (I intermediate, H hidden); a
transposed family (gpt-oss) has `gate_up` [H, 2 I] and `down` [I, H]. Names and shapes only: no files are opened.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.load import UserError
from evaluation.engine.store.shards import AGAIN, StoredTensor

SEPARATE = ("gate", "up", "down")
FUSED = ("gate_up", "down")
ROLE_OF = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
FUSED_ROLE_OF = {
    "experts.gate_up_proj": "gate_up",
    "experts.down_proj": "down",
    "block_sparse_moe.input_linear.weight": "gate_up",
    "block_sparse_moe.output_linear.weight": "down",
}
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
SEPARATE_TENSOR = re.compile(r"(?P<module>.*\blayers\.(?P<layer>\d+)\..*\bexperts)\.(?P<expert>\d+)\.(?P<part>.+)")
FUSED_TENSOR = re.compile(
    r"(?P<module>.*\blayers\.(?P<layer>\d+)\..*?)\b(?P<part>experts\.[a-z]\w*|block_sparse_moe\.(in|out)put_linear\.\w+)"
)
BIAS = re.compile(r"(_bias|\.bias)$")
LOOKED_FOR = (
    "`...mlp.experts.N.{gate,up,down}_proj.weight`, `...block_sparse_moe.experts.N.{w1,w2,w3}.weight`, "
    "`...experts.{gate_up,down}_proj` or `...block_sparse_moe.{input,output}_linear.weight`"
)

PartsByExpert = dict[tuple[int, int], dict[str, StoredTensor]]
"""(layer id, expert) -> role -> where it lies."""


@dataclass(frozen=True)
class ExpertShape:
    """What all experts of a checkpoint have in common."""

    hidden: int
    intermediate: int
    dtype: str  # as stored, spelled as in safetensors
    roles: tuple[str, ...] = SEPARATE  # what an expert is made of: SEPARATE or FUSED
    transposed: bool = False

    def of(self, role: str) -> tuple[int, int]:
        """Rows and columns of one of an expert's matrices."""
        rows = {"down": self.hidden, "gate_up": 2 * self.intermediate}.get(role, self.intermediate)
        columns = self.intermediate if role == "down" else self.hidden
        return (columns, rows) if self.transposed else (rows, columns)

    def role_bytes(self, role: str) -> int:
        """Stored bytes of one of an expert's matrices."""
        rows, columns = self.of(role)
        return rows * columns * DTYPE_BYTES[self.dtype]

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of one expert."""
        return sum(self.role_bytes(role) for role in self.roles)


@dataclass(frozen=True)
class ExpertLayout:
    """The experts of a checkpoint.

    Attributes:
        meta_shapes: a tensor name -> shape that stands for all experts of a layer when a model is made without them.
        names: the tensors that are experts.
    """

    parts: PartsByExpert
    shape: ExpertShape
    layer_ids: list[int]
    num_experts: int
    meta_shapes: dict[str, tuple[int, ...]]
    names: frozenset[str]


def expert_layout(tensors: Mapping[str, StoredTensor], model_dir: Path) -> ExpertLayout:
    """Find the experts among a checkpoint's tensors.

    Raises:
        UserError: there are none, they are in a form that is not supported, or one is incomplete or unlike the others.
    """
    separate, separate_names = _separate_parts(tensors, model_dir)
    fused, fused_names = _fused_parts(tensors, model_dir) if not separate else ({}, [])
    parts, names = separate or fused, separate_names or fused_names
    if not parts:
        raise UserError(
            f"{model_dir} has no experts: no tensor is named {LOOKED_FOR}; give a mixture-of-experts checkpoint"
        )
    shape = _separate_shape(parts) if separate else _fused_shape(parts, model_dir)
    layer_ids = sorted({layer for layer, _ in parts})
    num_experts = 1 + max(expert for _, expert in parts)
    for layer in layer_ids:
        for expert in range(num_experts):
            _check_expert(parts.get((layer, expert), {}), shape, layer=layer, expert=expert)
    meta_shapes: dict[str, tuple[int, ...]] = {name: tensors[name].shape for name in fused_names}
    for module in _modules(separate_names, model_dir).values():
        meta_shapes |= {f"{module}.{role}_proj": (num_experts, *shape.of(role)) for role in FUSED}
    return ExpertLayout(parts, shape, layer_ids, num_experts, meta_shapes, frozenset(names))


def _separate_parts(tensors: Mapping[str, StoredTensor], model_dir: Path) -> tuple[PartsByExpert, list[str]]:
    parts: PartsByExpert = {}
    names = []
    for name, tensor in tensors.items():
        match = SEPARATE_TENSOR.fullmatch(name)
        if not match:
            continue
        role = ROLE_OF.get(match["part"].removesuffix(".weight")) if match["part"].endswith(".weight") else None
        if role is None or tensor.dtype not in DTYPE_BYTES or len(tensor.shape) != 2:
            raise _unsupported(tensor, model_dir)
        parts.setdefault((int(match["layer"]), int(match["expert"])), {})[role] = tensor
        names.append(name)
    return parts, names


def _modules(names: Iterable[str], model_dir: Path) -> dict[int, str]:
    """Layer id -> the checkpoint's name of the module its experts belong to."""
    modules: dict[int, str] = {}
    for name in names:
        match = SEPARATE_TENSOR.fullmatch(name)
        assert match is not None, "only matching names are collected"
        layer, module = int(match["layer"]), match["module"]
        if modules.setdefault(layer, module) != module:
            raise UserError(f"{model_dir}: layer {layer} has two sets of experts, {modules[layer]} and {module}")
    return modules


def _fused_parts(tensors: Mapping[str, StoredTensor], model_dir: Path) -> tuple[PartsByExpert, list[str]]:
    parts: PartsByExpert = {}
    names = []
    for name, tensor in tensors.items():
        match = FUSED_TENSOR.fullmatch(name)
        if not match or BIAS.search(name):  # biases are small: they are resident
            continue
        role = FUSED_ROLE_OF.get(match["part"])
        if role is None or tensor.dtype not in DTYPE_BYTES or len(tensor.shape) != 3:
            raise _unsupported(tensor, model_dir)
        for expert, slice_ in enumerate(_slices(tensor)):
            roles = parts.setdefault((int(match["layer"]), expert), {})
            if role in roles:
                raise UserError(f"{model_dir}: layer {match['layer']} has two sets of experts, the second is {name}")
            roles[role] = slice_
        names.append(name)
    return parts, names


def _slices(tensor: StoredTensor) -> Iterable[StoredTensor]:
    """One expert after the other; a truncated length is found by `_check_expert`."""
    experts = tensor.shape[0]
    length_bytes = tensor.length_bytes // experts
    for expert in range(experts):
        name, offset = f"{tensor.name}[{expert}]", tensor.offset + expert * length_bytes
        yield StoredTensor(name, tensor.shard, tensor.dtype, tensor.shape[1:], offset, length_bytes)


def _separate_shape(parts: PartsByExpert) -> ExpertShape:
    role, tensor = next(iter(next(iter(parts.values())).items()))
    intermediate, hidden = tensor.shape if role != "down" else tensor.shape[::-1]
    return ExpertShape(hidden, intermediate, tensor.dtype)


def _fused_shape(parts: PartsByExpert, model_dir: Path) -> ExpertShape:
    """Whether a fused family is transposed shows in its shapes: gate_up has the same columns as down has rows, or not."""
    roles = next(iter(parts.values()))
    if set(roles) != set(FUSED):
        present = ", ".join(tensor.name for tensor in roles.values())
        raise UserError(f"{model_dir}: of gate_up and down there is only {present}; {AGAIN}")
    gate_up, down = roles["gate_up"].shape, roles["down"].shape
    for transposed in (False, True):
        hidden, intermediate = down[::-1] if transposed else down
        shape = ExpertShape(hidden, intermediate, roles["down"].dtype, FUSED, transposed)
        if gate_up == shape.of("gate_up"):
            return shape
    raise UserError(
        f"{model_dir}: {roles['gate_up'].name} {list(gate_up)} and {roles['down'].name} {list(down)} do not belong to a "
        "gated expert; experts without a gate are not supported"
    )


def _check_expert(roles: Mapping[str, StoredTensor], shape: ExpertShape, *, layer: int, expert: int) -> None:
    for role in shape.roles:
        if role not in roles:
            raise UserError(f"layer {layer} expert {expert} has no {role} matrix in the checkpoint; {AGAIN}")
        tensor, wanted_bytes = roles[role], shape.role_bytes(role)
        if (tensor.shape, tensor.dtype, tensor.length_bytes) != (shape.of(role), shape.dtype, wanted_bytes):
            raise UserError(
                f"{tensor.shard}: {tensor.name} is {tensor.dtype} {list(tensor.shape)} in {tensor.length_bytes} bytes, "
                f"not {shape.dtype} {list(shape.of(role))} in {wanted_bytes} as the others; {AGAIN}"
            )


def _unsupported(tensor: StoredTensor, model_dir: Path) -> UserError:
    return UserError(
        f"{model_dir}: expert tensor {tensor.name} ({tensor.dtype} {list(tensor.shape)}) is not supported; "
        f"supported are matrices of {', '.join(DTYPE_BYTES)} named {LOOKED_FOR}"
    )
