"""Experts that do not train: forward, and the gradients of their input and of the routing weights; nothing else.

It is part of transformers' experts interface, so every family that the interface serves can be trained through it. What
autograd would keep of every layer - the sorted inputs, the outputs, the weighted outputs - is not kept, only what gate and up
projection gave: the gradient of a routing weight is <grad W_down, act(gate) * up>, which needs no output.

Rows go through in parts: on an accelerator all of them at once, on the CPU those of some experts after the other, so that
what is in between stays in the processor's caches; but for what is kept, all rows exist only as what a token's experts give,
to be added up in one go and in a fixed order.
Axes: T tokens, K chosen, R = T K rows sorted by expert, r rows of one part, E experts, e those of one part, H hidden,
J what gate and up projection give, I what the activation makes of it.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from training.model import transformers_internals as internals

IMPLEMENTATION = "remoe_frozen"
PART_ROWS = 2048
"""Rows that are worked on together on the CPU, rounded up to whole experts."""


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers; doing it again changes nothing."""
    internals.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, frozen_experts_forward)


def frozen_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The function in transformers' experts interface; the arguments have its names.

    Experts that train, lie on several devices or have a norm behind them are left to transformers' own function.
    """
    experts: Any = self
    trains = any(parameter.requires_grad for parameter in self.parameters(recurse=False))
    stock = trains or internals.is_expert_parallel(experts) or experts.has_post_expert_norm
    function: Callable[..., Tensor] = internals.grouped_mm_experts_forward if stock else _FrozenExperts.apply
    return function(self, hidden_states, top_k_index, top_k_weights)


class _Part(NamedTuple):
    """Neighbouring experts whose rows are worked on together."""

    rows: slice
    experts: slice
    ends_e: Tensor  # of each expert's rows, counted from the part's first row; int32


class _FrozenExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, experts: Any, hidden_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        sorted_R, order_R = expert_ids_TK.flatten().sort(stable=True)
        rows_TK = torch.empty_like(order_R).index_copy_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        rows_TK, tokens_R = rows_TK.view_as(expert_ids_TK), order_R // expert_ids_TK.shape[1]
        inputs_TH, kept = hidden_TH.to(experts.down_proj.dtype), []
        out_RH = _all_rows(len(order_R), inputs_TH)
        for part in _parts(sorted_R, experts.num_experts):
            inputs_rH = inputs_TH.index_select(0, tokens_R[part.rows])
            gate_up_rJ = _product(experts, _up(experts), inputs_rH, part, sorted_R)
            activated_rI = _activate(experts, gate_up_rJ)
            out_RH = _put(out_RH, _product(experts, "down_proj", activated_rI, part, sorted_R), part)
            kept.append(gate_up_rJ if ctx.needs_input_grad[1] else activated_rI)
        ctx.experts, ctx.hidden_dtype = experts, hidden_TH.dtype
        ctx.save_for_backward(weights_TK, sorted_R, tokens_R, rows_TK, *kept)
        weights_TK = weights_TK.to(out_RH.dtype)
        out_TH = nn.functional.embedding_bag(rows_TK, out_RH, per_sample_weights=weights_TK, mode="sum")
        return out_TH.to(hidden_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[None, Tensor | None, None, Tensor | None]:
        experts, (weights_TK, sorted_R, tokens_R, rows_TK, *kept) = ctx.experts, ctx.saved_tensors
        grad_TH, grad_R = grad_TH.to(experts.down_proj.dtype), weights_TK.new_empty(len(tokens_R))
        weights_R1 = torch.empty_like(grad_R).index_copy_(0, rows_TK.flatten(), weights_TK.flatten()).unsqueeze(1)
        grad_RH = _all_rows(len(tokens_R), grad_TH) if ctx.needs_input_grad[1] else None
        for part, kept_r in zip(_parts(sorted_R, experts.num_experts), kept, strict=True):
            grad_rH = grad_TH.index_select(0, tokens_R[part.rows])
            grad_rI = _product_back(experts, "down_proj", grad_rH, part)  # as if every weight were 1
            if grad_RH is None:
                grad_r = (grad_rI * kept_r).sum(1, dtype=grad_R.dtype)
            else:
                grad_r, grad_rJ = _activation_back(experts, kept_r, grad_rI, weights_R1[part.rows])
                grad_RH = _put(grad_RH, _product_back(experts, _up(experts), grad_rJ, part), part)
            if experts.has_bias:
                grad_r += (grad_rH * experts.down_proj_bias[sorted_R[part.rows]]).sum(1, dtype=grad_R.dtype)
            grad_R[part.rows] = grad_r
        grad_hidden = None
        if grad_RH is not None:
            grad_hidden = nn.functional.embedding_bag(rows_TK, grad_RH, mode="sum").to(ctx.hidden_dtype)
        return None, grad_hidden, None, grad_R[rows_TK]


def _all_rows(rows: int, like_TH: Tensor) -> Tensor:
    """What is to be added up: in float32 on the CPU, and in the experts' precision where `_put` takes one part for all."""
    in_parts = _has_caches(like_TH.device)
    return like_TH.new_empty(rows if in_parts else 0, like_TH.shape[1], dtype=torch.float32 if in_parts else None)


def _put(all_RH: Tensor, rows_rH: Tensor, part: _Part) -> Tensor:
    """All rows with those of a part among them. Where there is one part it is not copied: memory traffic is what it takes."""
    if not len(all_RH):
        return rows_rH
    all_RH[part.rows] = rows_rH
    return all_RH


def _parts(sorted_R: Tensor, num_experts: int) -> Iterator[_Part]:
    """All experts at once on an accelerator, about `PART_ROWS` rows at once on the CPU."""
    ends_E = torch.searchsorted(sorted_R, torch.arange(num_experts, device=sorted_R.device), right=True).to(torch.int32)
    if not _has_caches(sorted_R.device):
        yield _Part(slice(None), slice(None), ends_E)
        return
    ends, row, first = ends_E.tolist(), 0, 0
    for expert, end in enumerate(ends):
        if end - row >= PART_ROWS or (expert == num_experts - 1 and end > row):
            yield _Part(slice(row, end), slice(first, expert + 1), ends_E[first : expert + 1] - row)
            row, first = end, expert + 1


def _has_caches(device: torch.device) -> bool:
    """Whether parts are worth their number: on an accelerator each would be waited for."""
    return device.type == "cpu"


def _up(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _is_swiglu(experts: Any) -> bool:
    """Whether the activation is silu(gate) * up, gate in the first half."""
    plain = experts.has_gate and internals.applies_plain_gate(experts)
    return plain and isinstance(experts.act_fn, (nn.SiLU, SiLUActivation))


def _activation_back(experts: Any, gate_up_rJ: Tensor, grad_rI: Tensor, weights_r1: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the routing weights and of `gate_up_rJ`; `grad_rI`, of the unweighted activation, is overwritten.

    For silu(gate) * up they are written out in the order in which autograd computes them, without what it allocates.
    """
    if not _is_swiglu(experts):
        with torch.enable_grad():
            input_rJ = gate_up_rJ.detach().requires_grad_()
            activated_rI = _activate(experts, input_rJ)
        grad_r = (grad_rI * activated_rI.detach()).sum(1, dtype=weights_r1.dtype)
        (grad_rJ,) = torch.autograd.grad(activated_rI, input_rJ, grad_rI.mul_(weights_r1))
        return grad_r, grad_rJ
    gate_rI, up_rI = gate_up_rJ.chunk(2, dim=-1)
    silu_rI, grad_rJ = nn.functional.silu(gate_rI), torch.empty_like(gate_up_rJ)
    grad_gate_rI, grad_up_rI = grad_rJ.chunk(2, dim=-1)
    activated_rI = torch.mul(silu_rI, up_rI, out=grad_gate_rI)
    grad_r = activated_rI.mul_(grad_rI).sum(1, dtype=weights_r1.dtype)
    torch.mul(grad_rI.mul_(weights_r1), silu_rI, out=grad_up_rI)
    torch.ops.aten.silu_backward.grad_input(grad_rI.mul_(up_rI), gate_rI, grad_input=grad_gate_rI)
    return grad_r, grad_rJ


def _activate(experts: Any, gate_up_rJ: Tensor) -> Tensor:
    if _is_swiglu(experts):
        gate_rI, up_rI = gate_up_rJ.chunk(2, dim=-1)
        return nn.functional.silu(gate_rI).mul_(up_rI)
    function: Callable[[Tensor], Tensor] = experts._apply_gate if experts.has_gate else experts.act_fn
    return function(gate_up_rJ)


def _product(experts: Any, name: str, rows_rN: Tensor, part: _Part, sorted_R: Tensor) -> Tensor:
    """Every row through its expert's matrix `name`, with its bias where there is one."""
    weight_e = getattr(experts, name)[part.experts]
    bias_r = getattr(experts, f"{name}_bias")[sorted_R[part.rows]] if experts.has_bias else None
    return internals.grouped_linear(rows_rN, weight_e, part.ends_e, bias=bias_r, is_transposed=experts.is_transposed)


def _product_back(experts: Any, name: str, grad_rN: Tensor, part: _Part) -> Tensor:
    """The gradient of the rows that `_product` was given."""
    weight_e = getattr(experts, name)[part.experts]
    return internals.grouped_linear(grad_rN, weight_e, part.ends_e, is_transposed=not experts.is_transposed)
