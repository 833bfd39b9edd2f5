"""How checkpoints write experts down: names to (layer, expert, part), and the one format all experts of a model have.

Two forms: three matrices for every expert, or two a layer that hold all its experts. A matrix is one tensor, or several if its
numbers are packed. Names and shapes only: no files are opened.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from configs.load import UserError
from training.model.expert_format import FUSED, SEPARATE, ExpertFormat
from training.model.number_formats.formats import Plain, Stored
from training.model.number_formats.found import BESIDE, KNOWN, format_of
from training.model.number_formats.mxfp4 import Mxfp4
from training.model.shards import AGAIN, StoredTensor


class Form(NamedTuple):
    """How names tell layer, module, what of an expert, and where each is a tensor of its own the expert; the matrices."""

    name: re.Pattern[str]
    roles: Mapping[str, str]  # how names go on, but for how they end if numbers are packed


SEPARATE_FORM = Form(
    re.compile(r"(?P<module>.*\blayers\.(?P<layer>\d+)\..*\bexperts)\.(?P<expert>\d+)\.(?P<part>.+)"),
    {"gate_proj.weight": "gate", "up_proj.weight": "up", "down_proj.weight": "down"}
    | {"w1.weight": "gate", "w3.weight": "up", "w2.weight": "down"},
)
FUSED_FORM = Form(  # biases are small: they are resident
    re.compile(
        r"(?P<module>.*\blayers\.(?P<layer>\d+)\..*?\b(experts|block_sparse_moe))\."
        r"(?P<part>(?<=experts\.)[a-z]\w*|(in|out)put_linear\.\w+)(?<![._]bias)"
    ),
    {"gate_up_proj": "gate_up", "down_proj": "down"}
    | {"input_linear.weight": "gate_up", "output_linear.weight": "down"},
)
LOOKED_FOR = (
    "`...mlp.experts.N.{gate,up,down}_proj.weight`, `...block_sparse_moe.experts.N.{w1,w2,w3}.weight`, "
    "`...experts.{gate_up,down}_proj` or `...block_sparse_moe.{input,output}_linear.weight`"
)

Matrices = dict[str, dict[str, StoredTensor]]
"""Role -> how the name of a tensor ends -> where it lies: an expert as it was found."""
PartsByExpert = dict[tuple[int, int], dict[str, StoredTensor]]
"""(layer id, expert) -> part -> where it lies."""


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
    found, module_of = _find({name: tensors[name] for name in names}, form, model_dir)
    fused = form is FUSED_FORM
    layer_ids = sorted({layer for layer, _ in found})
    num_experts = 1 + max(expert for _, expert in found)
    if fused and len(numbers := {tensors[name].shape[0] for name in names}) > 1:
        raise UserError(
            f"{model_dir}: gate_up and down are of {numbers} experts; experts without weights are not supported"
        )
    try:
        expert_format = (_fused_format if fused else _separate_format)(_whole_expert(found, form, model_dir))
    except ValueError as error:
        raise UserError(f"{model_dir}: experts cannot be paged: {error}") from error
    parts = {
        (layer, expert): _checked(found.get((layer, expert), {}), expert_format, layer=layer, expert=expert)
        for layer in layer_ids
        for expert in range(num_experts)
    }
    if fused and not expert_format.is_quantised:
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


def _find(
    tensors: Mapping[str, StoredTensor], form: Form, model_dir: Path
) -> tuple[dict[tuple[int, int], Matrices], dict[str, str]]:
    """All experts in this form by layer id and number, and the tensors they are from, each with its module."""
    found: dict[tuple[int, int], Matrices] = {}
    module_of: dict[str, str] = {}
    for name, tensor in tensors.items():
        match = form.name.fullmatch(name)
        assert match, f"{name} is of another form"
        module_of[name] = match["module"]
        if name.endswith(BESIDE):
            continue
        matrix = next((matrix for matrix in form.roles if re.fullmatch(rf"{matrix}(_\w+)?", match["part"])), None)
        if matrix is None or (form is FUSED_FORM and not tensor.shape):
            raise UserError(
                f"{model_dir}: expert tensor {name} ({tensor.dtype} {list(tensor.shape)}) is not supported; supported are "
                f"{KNOWN}, named {LOOKED_FOR}"
            )
        role, ending = form.roles[matrix], match["part"].removeprefix(matrix)
        for expert, part in _slices(tensor) if form is FUSED_FORM else [(int(match["expert"]), tensor)]:
            stored = found.setdefault((int(match["layer"]), expert), {}).setdefault(role, {})
            if ending in stored:
                raise UserError(f"{model_dir}: layer {match['layer']} has two sets of experts, the second is {name}")
            stored[ending] = part
    return found, module_of


def _slices(tensor: StoredTensor) -> list[tuple[int, StoredTensor]]:
    """One expert after the other; a truncated length is found by `_checked`."""
    experts = tensor.shape[0]
    each: dict[str, Any] = {"shape": tensor.shape[1:], "length_bytes": tensor.length_bytes // max(1, experts)}
    offsets = [tensor.offset + expert * each["length_bytes"] for expert in range(experts)]
    return [(i, replace(tensor, name=f"{tensor.name}[{i}]", offset=offset, **each)) for i, offset in enumerate(offsets)]


def _whole_expert(found: Mapping[tuple[int, int], Matrices], form: Form, model_dir: Path) -> Matrices:
    """The first expert that has all its matrices."""
    roles = set(form.roles.values())
    whole = next((matrices for matrices in found.values() if set(matrices) == roles), None)
    if whole is not None:
        return whole
    if form is SEPARATE_FORM and not any("gate" in matrices for matrices in found.values()):
        raise UserError(f"{model_dir}: experts have no gate matrix; experts without a gate are not supported")
    matrices = next(iter(found.values()))
    present = ", ".join(tensor.name for stored in matrices.values() for tensor in stored.values())
    raise UserError(
        f"{model_dir}: of {' and '.join(dict.fromkeys(form.roles.values()))} there is only {present}; {AGAIN}"
    )


def _separate_format(whole: Matrices) -> ExpertFormat:
    """Every matrix is stored output by output."""
    hidden, intermediate = _rows(whole["down"]), _rows(whole["gate"])
    return _format(whole, ExpertFormat(hidden, intermediate, Plain("F32"), SEPARATE))


def _fused_format(whole: Matrices) -> ExpertFormat:
    """A fused family is transposed if gate_up has twice as many columns as down has rows, and not rows as down columns.

    Packed numbers are those of gpt-oss, which is transposed in the model and not as it is stored.
    """
    if "" not in whole["down"]:
        hidden, intermediate = _rows(whole["down"]), _rows(whole["gate_up"]) // 2
        return _format(whole, ExpertFormat(hidden, intermediate, Mxfp4(is_gpt_oss=True), FUSED, transposed=True))
    gate_up, down = whole["gate_up"][""], whole["down"][""]
    for transposed in (False, True):
        hidden, intermediate = down.shape[::-1] if transposed else down.shape
        found = ExpertFormat(hidden, intermediate, Plain("F32"), FUSED, transposed)
        if gate_up.shape == found.shape("gate_up"):
            return _format(whole, found)
    raise ValueError(
        f"{gate_up.name} {list(gate_up.shape)} and {down.name} {list(down.shape)} do not belong to a gated expert; experts "
        "without a gate are not supported"
    )


def _rows(stored: Mapping[str, StoredTensor]) -> int:
    """Rows of a matrix as it is stored."""
    numbers = next((stored[ending] for ending in ("", "_packed", "_blocks") if ending in stored), None)
    if numbers is None or len(numbers.shape) < 2:
        raise ValueError(f"{next(iter(stored.values())).name} is no matrix in a format that is known: {KNOWN}")
    return numbers.shape[0]


def _format(whole: Matrices, like: ExpertFormat) -> ExpertFormat:
    """What `like` is, with numbers as they are stored; a `ValueError` if they are in no known format."""
    matrices = {
        like.stored_shape(role): {ending: Stored(tensor.dtype, tensor.shape) for ending, tensor in whole[role].items()}
        for role in ("down", like.roles[0])
    }
    return replace(like, numbers=format_of(matrices))


def _checked(matrices: Matrices, expected: ExpertFormat, *, layer: int, expert: int) -> dict[str, StoredTensor]:
    """The parts of an expert, which are as the others are."""
    parts = {}
    for name, (role, ending, (dtype, shape)) in expected.parts.items():
        if role not in matrices:
            raise UserError(
                f"layer {layer} expert {expert} has no {role} matrix in the checkpoint; {AGAIN}, "
                "unless it has experts that compute nothing, which are not supported"
            )
        if (tensor := matrices[role].get(ending)) is None:
            other = next(iter(matrices[role].values())).name
            raise UserError(
                f"layer {layer} expert {expert}: beside {other} there is nothing that ends in {ending!r}; {AGAIN}"
            )
        wanted_bytes = expected.parts[name].stored.length_bytes
        if (tensor.shape, tensor.dtype, tensor.length_bytes) != (shape, dtype, wanted_bytes):
            raise UserError(
                f"{tensor.shard}: {tensor.name} is {tensor.dtype} {list(tensor.shape)} in {tensor.length_bytes} bytes, "
                f"not {dtype} {list(shape)} in {wanted_bytes} as the others; {AGAIN}"
            )
        parts[name] = tensor
    unread = [
        tensor.name for role in matrices for ending, tensor in matrices[role].items() if role + ending not in parts
    ]
    if unread:
        raise UserError(f"layer {layer} expert {expert} has {unread[0]}, which the others have not; {AGAIN}")
    return parts
