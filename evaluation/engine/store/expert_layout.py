"""How checkpoints write experts down: names to (layer, expert, role), and the one format all experts of a model have.

Two forms: three matrices for every expert, or two tensors a layer that hold all its experts. Names and shapes only: no files
are opened.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configs.load import UserError
from evaluation.engine.store.expert_format import DTYPE_BYTES, FUSED, ExpertFormat
from evaluation.engine.store.shards import AGAIN, StoredTensor

ROLE_OF = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
FUSED_ROLE_OF = {
    "experts.gate_up_proj": "gate_up",
    "experts.down_proj": "down",
    "block_sparse_moe.input_linear.weight": "gate_up",
    "block_sparse_moe.output_linear.weight": "down",
}
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


class Found(NamedTuple):
    """The expert tensors of one form."""

    parts: PartsByExpert
    module_of: dict[str, str]  # tensor -> the checkpoint's name of the module that its experts belong to


@dataclass(frozen=True)
class ExpertLayout:
    """The experts of a checkpoint.

    Attributes:
        meta_shapes: a tensor name -> shape that stands for all experts of a layer when a model is made without them.
        module_of: the tensors that are experts, and the module that each belongs to.
    """

    parts: PartsByExpert
    format: ExpertFormat
    layer_ids: list[int]
    num_experts: int
    meta_shapes: dict[str, tuple[int, ...]]
    module_of: dict[str, str]


def expert_layout(tensors: Mapping[str, StoredTensor], model_dir: Path) -> ExpertLayout:
    """Find the experts among a checkpoint's tensors.

    Raises:
        UserError: there are none, they are in a form that is not supported, or one is incomplete or unlike the others.
    """
    for find, describe in FORMATS:
        found = find(tensors, model_dir)
        if found.parts:
            return _checked(found, describe(found.parts, model_dir), tensors)
    raise UserError(
        f"{model_dir} has no experts: no tensor is named {LOOKED_FOR}; give a mixture-of-experts checkpoint"
    )


def _checked(found: Found, expert_format: ExpertFormat, tensors: Mapping[str, StoredTensor]) -> ExpertLayout:
    parts, module_of = found
    layer_ids = sorted({layer for layer, _ in parts})
    num_experts = 1 + max(expert for _, expert in parts)
    for layer in layer_ids:
        for expert in range(num_experts):
            _check_expert(parts.get((layer, expert), {}), expert_format, layer=layer, expert=expert)
    if expert_format.roles == FUSED:
        meta_shapes = {name: tensors[name].shape for name in module_of}
    else:
        modules = dict.fromkeys(module_of.values())
        meta_shapes = {f"{m}.{role}_proj": (num_experts, *expert_format.shape(role)) for m in modules for role in FUSED}
    return ExpertLayout(parts, expert_format, layer_ids, num_experts, meta_shapes, module_of)


def _separate_parts(tensors: Mapping[str, StoredTensor], model_dir: Path) -> Found:
    found, modules = Found({}, {}), dict[str, str]()
    for name, tensor in tensors.items():
        match = SEPARATE_TENSOR.fullmatch(name)
        if not match:
            continue
        role = ROLE_OF.get(match["part"].removesuffix(".weight")) if match["part"].endswith(".weight") else None
        if role is None or tensor.dtype not in DTYPE_BYTES or len(tensor.shape) != 2:
            raise _unsupported(tensor, model_dir)
        module, first = match["module"], modules.setdefault(match["layer"], match["module"])
        if module != first:
            raise UserError(f"{model_dir}: layer {match['layer']} has two sets of experts, {first} and {module}")
        found.parts.setdefault((int(match["layer"]), int(match["expert"])), {})[role] = tensor
        found.module_of[name] = module
    return found


def _fused_parts(tensors: Mapping[str, StoredTensor], model_dir: Path) -> Found:
    found = Found({}, {})
    for name, tensor in tensors.items():
        match = FUSED_TENSOR.fullmatch(name)
        if not match or BIAS.search(name):  # biases are small: they are resident
            continue
        role = FUSED_ROLE_OF.get(match["part"])
        if role is None or tensor.dtype not in DTYPE_BYTES or len(tensor.shape) != 3:
            raise _unsupported(tensor, model_dir)
        for expert, slice_ in enumerate(_slices(tensor)):
            roles = found.parts.setdefault((int(match["layer"]), expert), {})
            if role in roles:
                raise UserError(f"{model_dir}: layer {match['layer']} has two sets of experts, the second is {name}")
            roles[role] = slice_
        found.module_of[name] = match["module"] + match["part"].partition(".")[0]
    return found


def _slices(tensor: StoredTensor) -> Iterable[StoredTensor]:
    """One expert after the other; a truncated length is found by `_check_expert`."""
    experts = tensor.shape[0]
    length_bytes = tensor.length_bytes // experts
    for expert in range(experts):
        name, offset = f"{tensor.name}[{expert}]", tensor.offset + expert * length_bytes
        yield StoredTensor(name, tensor.shard, tensor.dtype, tensor.shape[1:], offset, length_bytes)


def _separate_format(parts: PartsByExpert, _: Path) -> ExpertFormat:
    role, tensor = next(iter(next(iter(parts.values())).items()))
    intermediate, hidden = tensor.shape if role != "down" else tensor.shape[::-1]
    return ExpertFormat(hidden, intermediate, tensor.dtype)


def _fused_format(parts: PartsByExpert, model_dir: Path) -> ExpertFormat:
    """A fused family is transposed if gate_up has twice as many columns as down has rows, and not rows as down columns."""
    roles = next(iter(parts.values()))
    if set(roles) != set(FUSED):
        present = ", ".join(tensor.name for tensor in roles.values())
        raise UserError(f"{model_dir}: of gate_up and down there is only {present}; {AGAIN}")
    gate_up, down = roles["gate_up"].shape, roles["down"].shape
    for transposed in (False, True):
        hidden, intermediate = down[::-1] if transposed else down
        found = ExpertFormat(hidden, intermediate, roles["down"].dtype, FUSED, transposed)
        if gate_up == found.shape("gate_up"):
            return found
    raise UserError(
        f"{model_dir}: {roles['gate_up'].name} {list(gate_up)} and {roles['down'].name} {list(down)} do not belong to a "
        "gated expert; experts without a gate are not supported"
    )


def _check_expert(roles: Mapping[str, StoredTensor], expected: ExpertFormat, *, layer: int, expert: int) -> None:
    for role in expected.roles:
        if role not in roles:
            raise UserError(f"layer {layer} expert {expert} has no {role} matrix in the checkpoint; {AGAIN}")
        tensor, wanted_bytes = roles[role], expected.role_bytes(role)
        if (tensor.shape, tensor.dtype, tensor.length_bytes) != (expected.shape(role), expected.dtype, wanted_bytes):
            raise UserError(
                f"{tensor.shard}: {tensor.name} is {tensor.dtype} {list(tensor.shape)} in {tensor.length_bytes} bytes, "
                f"not {expected.dtype} {list(expected.shape(role))} in {wanted_bytes} as the others; {AGAIN}"
            )


def _unsupported(tensor: StoredTensor, model_dir: Path) -> UserError:
    return UserError(
        f"{model_dir}: expert tensor {tensor.name} ({tensor.dtype} {list(tensor.shape)}) is not supported; "
        f"supported are matrices of {', '.join(DTYPE_BYTES)} named {LOOKED_FOR}"
    )


FORMATS: tuple[
    tuple[Callable[[Mapping[str, StoredTensor], Path], Found], Callable[[PartsByExpert, Path], ExpertFormat]], ...
]
FORMATS = ((_separate_parts, _separate_format), (_fused_parts, _fused_format))
"""How each form is found among the tensors, and what its experts are then; the first that finds any decides."""
