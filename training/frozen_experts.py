"""Experts that do not train: forward, and the gradients of their input and of the routing weights; nothing else.

In transformers' experts interface, so every family whose experts it serves can be trained through this. What autograd
would keep of every layer - the sorted inputs, the outputs, the weighted outputs - is not kept, only what gate and up
projection gave: the gradient of a routing weight is <grad W_down, act(gate) * up>, which needs no output.
Axes: T tokens, K chosen, R = T K rows sorted by expert, E experts, H hidden, J what gate and up projection give.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear, grouped_mm_experts_forward

IMPLEMENTATION = "remoe_frozen"


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers; doing it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, frozen_experts_forward)


def frozen_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The function in transformers' experts interface; the arguments have its names.

    Experts that train, lie on several devices or have a norm behind them are left to transformers' own function.
    """
    experts: Any = self
    trains = any(parameter.requires_grad for parameter in self.parameters(recurse=False))
    if trains or experts._is_expert_parallel or experts.has_post_expert_norm:
        stock: Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return stock
    out: Tensor = _FrozenExperts.apply(experts, hidden_states, top_k_index, top_k_weights)
    return out


class _Rows(NamedTuple):
    """Token-expert pairs sorted by expert."""

    order_R: Tensor  # sorted position -> pair
    experts_R: Tensor  # sorted
    ends_E: Tensor  # of each expert's rows, int32

    @classmethod
    def of(cls, expert_ids_TK: Tensor, num_experts: int) -> "_Rows":
        experts_R, order_R = expert_ids_TK.flatten().sort(stable=True)
        ends_E = torch.searchsorted(experts_R, torch.arange(num_experts, device=experts_R.device), right=True)
        return cls(order_R, experts_R, ends_E.to(torch.int32))


class _FrozenExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, experts: Any, hidden_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        rows = _Rows.of(expert_ids_TK, experts.num_experts)
        name = "gate_up_proj" if experts.has_gate else "up_proj"
        gate_up_RJ = _project(experts, name, hidden_TH[rows.order_R // expert_ids_TK.shape[1]], rows)
        out_RH = _project(experts, "down_proj", _activate(experts, gate_up_RJ), rows)
        ctx.experts, ctx.name, ctx.hidden_dtype = experts, name, hidden_TH.dtype
        ctx.save_for_backward(gate_up_RJ, weights_TK, *rows)
        return _sum_of_tokens(out_RH * weights_TK.flatten()[rows.order_R, None], rows, weights_TK).to(hidden_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[None, Tensor | None, None, Tensor | None]:
        gate_up_RJ, weights_TK, *parts = ctx.saved_tensors
        rows, experts = _Rows(*parts), ctx.experts
        grad_RH = grad_TH[rows.order_R // weights_TK.shape[1]].to(gate_up_RJ.dtype)
        grad_RI = _project_back(experts, "down_proj", grad_RH, rows)  # as if every weight were 1
        with torch.enable_grad():
            gate_up_RJ = gate_up_RJ.detach().requires_grad_()
            activated_RI = _activate(experts, gate_up_RJ)
        grad_hidden_TH = grad_weights_TK = None
        if ctx.needs_input_grad[3]:
            grad_R = (grad_RI * activated_RI.detach()).sum(1, dtype=weights_TK.dtype)
            if experts.has_bias:
                grad_R += (grad_RH * experts.down_proj_bias[rows.experts_R]).sum(1, dtype=weights_TK.dtype)
            grad_weights_TK = torch.empty_like(grad_R).index_copy_(0, rows.order_R, grad_R).view_as(weights_TK)
        if ctx.needs_input_grad[1]:
            grad_RI.mul_(weights_TK.flatten()[rows.order_R, None])
            (grad_RJ,) = torch.autograd.grad(activated_RI, gate_up_RJ, grad_RI)
            grad_rows_RH = _project_back(experts, ctx.name, grad_RJ, rows)
            grad_hidden_TH = _sum_of_tokens(grad_rows_RH, rows, weights_TK).to(ctx.hidden_dtype)
        return None, grad_hidden_TH, None, grad_weights_TK


def _activate(experts: Any, gate_up_RJ: Tensor) -> Tensor:
    activated: Tensor = experts._apply_gate(gate_up_RJ) if experts.has_gate else experts.act_fn(gate_up_RJ)
    return activated


def _project(experts: Any, name: str, rows_RN: Tensor, rows: _Rows) -> Tensor:
    """Every row through its expert's matrix `name`, with its bias where there is one."""
    weight_E, bias_E = getattr(experts, name), getattr(experts, f"{name}_bias") if experts.has_bias else None
    bias_R = None if bias_E is None else bias_E[rows.experts_R]
    out: Tensor = _grouped_linear(rows_RN, weight_E, rows.ends_E, bias=bias_R, is_transposed=experts.is_transposed)
    return out


def _project_back(experts: Any, name: str, grad_RN: Tensor, rows: _Rows) -> Tensor:
    """The gradient of what `_project` was given."""
    out: Tensor = _grouped_linear(grad_RN, getattr(experts, name), rows.ends_E, is_transposed=not experts.is_transposed)
    return out


def _sum_of_tokens(out_RH: Tensor, rows: _Rows, weights_TK: Tensor) -> Tensor:
    """[T, H]: each token's rows added up, in routing order, so that the sum is the same on every device."""
    pairs_RH = torch.empty_like(out_RH).index_copy_(0, rows.order_R, out_RH)
    return pairs_RH.view(*weights_TK.shape, -1).sum(1)
