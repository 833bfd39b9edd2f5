"""How checkpoints write experts down: names to (layer, expert, role), and the one format all experts of a model have.

Two forms: three matrices for every expert, or two tensors a layer that hold all its experts. Names and shapes only: no files
are opened.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from configs.load import UserError
from evaluation.engine.store.expert_format import DTYPE_BYTES, FUSED, ExpertFormat
from training.model.shards import AGAIN, StoredTensor


class Form(NamedTuple):
    """How names tell layer, module, part, and where each is a tensor of its own the expert; what parts are; axes of a tensor."""

    name: re.Pattern[str]
    roles: Mapping[str, str]
    axes: int


SEPARATE_FORM = Form(
    re.compile(r"(?P<module>.*\blayers\.(?P<layer>\d+)\..*\bexperts)\.(?P<expert>\d+)\.(?P<part>.+)"),
    {"gate_proj.weight": "gate", "up_proj.weight": "up", "down_proj.weight": "down"}
    | {"w1.weight": "gate", "w3.weight": "up", "w2.weight": "down"},
    axes=2,
)
FUSED_FORM = Form(  # biases are small: they are resident
    re.compile(
        r"(?P<module>.*\blayers\.(?P<layer>\d+)\..*?\b(experts|block_sparse_moe))\."
        r"(?P<part>(?<=experts\.)[a-z]\w*|(in|out)put_linear\.\w+)(?<![._]bias)"
    ),
    {"gate_up_proj": "gate_up", "down_proj": "down"}
    | {"input_linear.weight": "gate_up", "output_linear.weight": "down"},
    axes=3,
)
LOOKED_FOR = (
    "`...mlp.experts.N.{gate,up,down}_proj.weight`, `...block_sparse_moe.experts.N.{w1,w2,w3}.weight`, "
    "`...experts.{gate_up,down}_proj` or `...block_sparse_moe.{input,output}_linear.weight`"
)

PartsByExpert = dict[tuple[int, int], dict[str, StoredTensor]]
"""(layer id, expert) -> role -> where it lies."""


@dataclass(frozen=True)
class ExpertLayout:
    """The experts of a checkpoint.

    Attributes:
        others: experts of blocks beside the model's layers, which predict further tokens; transformers does not load them.
        meta_shapes: a tensor name -> shape that stands for all experts of a layer when a model is made without them.
        module_of: the tensors that are experts, and the checkpoint's name of the module that each belongs to.
    """

    parts: PartsByExpert
    format: ExpertFormat
    layer_ids: list[int]
    num_experts: int
    meta_shapes: dict[str, tuple[int, ...]]
    module_of: dict[str, str]
    others: set[str]


def expert_layout(tensors: Mapping[str, StoredTensor], model_dir: Path) -> ExpertLayout:
    """Find the experts among a checkpoint's tensors.

    Raises:
        UserError: there are none, they are in a form that is not supported, or one is incomplete or unlike the others.
    """
    form, names, others = _model_experts(tensors, model_dir)
    parts, module_of = _find({name: tensors[name] for name in names}, form, model_dir)
    fused = form is FUSED_FORM
    some = next(iter(parts.values()))
    expert_format = _fused_format(some, model_dir) if fused else _separate_format(parts, model_dir)
    layer_ids = sorted({layer for layer, _ in parts})
    num_experts = 1 + max(expert for _, expert in parts)
    if fused and len(numbers := {tensors[name].shape[0] for name in names}) > 1:
        raise UserError(
            f"{model_dir}: gate_up and down are of {numbers} experts; experts without weights are not supported"
        )
    for layer in layer_ids:
        for expert in range(num_experts):
            _check_expert(parts.get((layer, expert), {}), expert_format, layer=layer, expert=expert)
    if fused:
        meta_shapes = {name: tensors[name].shape for name in module_of}
    else:
        modules = dict.fromkeys(module_of.values())
        meta_shapes = {f"{m}.{role}_proj": (num_experts, *expert_format.shape(role)) for m in modules for role in FUSED}
    return ExpertLayout(parts, expert_format, layer_ids, num_experts, meta_shapes, module_of, others)


def _model_experts(tensors: Mapping[str, StoredTensor], model_dir: Path) -> tuple[Form, list[str], set[str]]:
    """The form of the experts of the model's layers and their names, and the names of other blocks' experts.

    The model's own list of layers is the longest, but for what is called mtp, which predicts tokens further ahead.
    """
    found: dict[str, dict[str, re.Match[str]]] = {}
    for name in tensors:
        if match := SEPARATE_FORM.name.fullmatch(name) or FUSED_FORM.name.fullmatch(name):
            found.setdefault(name[: match.start("layer")], {})[name] = match
    if not found:
        raise UserError(
            f"{model_dir} has no experts in a form that is known: no tensor is named {LOOKED_FOR}; others are not supported"
        )
    rank = {block: ("mtp" not in block, len({match["layer"] for match in found[block].values()})) for block in found}
    main, *tied = sorted(found, key=lambda block: rank[block], reverse=True)
    if tied and rank[tied[0]] == rank[main]:
        raise UserError(
            f"{model_dir}: there are two sets of experts, {main}* and {tied[0]}*; remove what is not the model's"
        )
    forms = {match.re for match in found[main].values()}
    if len(forms) > 1:
        raise UserError(f"{model_dir}: {main} has experts in two forms; {AGAIN}")
    form = FUSED_FORM if FUSED_FORM.name in forms else SEPARATE_FORM
    return form, list(found[main]), {name for block in found.keys() - {main} for name in found[block]}


def _find(tensors: Mapping[str, StoredTensor], form: Form, model_dir: Path) -> tuple[PartsByExpert, dict[str, str]]:
    """The parts of all experts in this form, and the tensors they are from, each with its module."""
    parts: PartsByExpert = {}
    module_of: dict[str, str] = {}
    for name, tensor in tensors.items():
        match = form.name.fullmatch(name)
        assert match, f"{name} is of another form"
        role = form.roles.get(match["part"])
        if role is None or tensor.dtype not in DTYPE_BYTES or len(tensor.shape) != form.axes:
            raise UserError(
                f"{model_dir}: expert tensor {name} ({tensor.dtype} {list(tensor.shape)}) is not supported"
                f"{', nor are other quantised experts' if tensor.dtype not in DTYPE_BYTES else ''}; "
                f"supported are matrices of {', '.join(DTYPE_BYTES)} named {LOOKED_FOR}"
            )
        module_of[name] = match["module"]
        for expert, part in _slices(tensor) if form is FUSED_FORM else [(int(match["expert"]), tensor)]:
            roles = parts.setdefault((int(match["layer"]), expert), {})
            if role in roles:
                raise UserError(f"{model_dir}: layer {match['layer']} has two sets of experts, the second is {name}")
            roles[role] = part
    return parts, module_of


def _slices(tensor: StoredTensor) -> list[tuple[int, StoredTensor]]:
    """One expert after the other; a truncated length is found by `_check_expert`."""
    experts = tensor.shape[0]
    each: dict[str, Any] = {"shape": tensor.shape[1:], "length_bytes": tensor.length_bytes // experts}
    offsets = [tensor.offset + expert * each["length_bytes"] for expert in range(experts)]
    return [(i, replace(tensor, name=f"{tensor.name}[{i}]", offset=offset, **each)) for i, offset in enumerate(offsets)]


def _separate_format(parts: PartsByExpert, model_dir: Path) -> ExpertFormat:
    roles = next(iter(parts.values()))
    if not any("gate" in roles for roles in parts.values()):
        raise UserError(f"{model_dir}: experts have no gate matrix; experts without a gate are not supported")
    role, tensor = next(iter(roles.items()))
    intermediate, hidden = tensor.shape if role != "down" else tensor.shape[::-1]
    return ExpertFormat(hidden, intermediate, tensor.dtype)


def _fused_format(roles: Mapping[str, StoredTensor], model_dir: Path) -> ExpertFormat:
    """A fused family is transposed if gate_up has twice as many columns as down has rows, and not rows as down columns."""
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
            raise UserError(
                f"layer {layer} expert {expert} has no {role} matrix in the checkpoint; {AGAIN}, "
                "unless it has experts that compute nothing, which are not supported"
            )
        tensor, wanted_bytes = roles[role], expected.role_bytes(role)
        if (tensor.shape, tensor.dtype, tensor.length_bytes) != (expected.shape(role), expected.dtype, wanted_bytes):
            raise UserError(
                f"{tensor.shard}: {tensor.name} is {tensor.dtype} {list(tensor.shape)} in {tensor.length_bytes} bytes, "
                f"not {expected.dtype} {list(expected.shape(role))} in {wanted_bytes} as the others; {AGAIN}"
            )
