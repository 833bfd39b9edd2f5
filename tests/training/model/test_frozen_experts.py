"""The frozen-experts function against experts applied one token at a time, and inside whole models of several families."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.moe import use_experts_implementation

from tests.conftest import needs_gpu, small_config
from training.model import frozen_experts
from training.model.frozen_experts import IMPLEMENTATION, register
from training.model.loading import ModelArguments, build_model
from training.model.routers import find_routers

HIDDEN, INNER = 16, 8


class Weights(nn.Module):
    """What transformers' experts modules hold, in any of its layouts."""

    def __init__(self, config: Any, experts: int, layout: dict[str, bool]) -> None:
        super().__init__()
        self.num_experts, self.act_fn = experts, nn.SiLU()
        name, width = ("gate_up_proj", 2 * INNER) if layout["has_gate"] else ("up_proj", INNER)
        for key, (rows, columns) in {name: (width, HIDDEN), "down_proj": (HIDDEN, INNER)}.items():
            shape = (experts, columns, rows) if layout["is_transposed"] else (experts, rows, columns)
            self.register_parameter(key, nn.Parameter(torch.randn(shape) / columns**0.5, requires_grad=False))
            if layout["has_bias"]:
                self.register_parameter(f"{key}_bias", nn.Parameter(torch.randn(experts, rows), requires_grad=False))

    def forward(self, *_: Any) -> Tensor:
        raise AssertionError("the implementation that is registered is called instead")


def made(experts: int, layout: dict[str, bool], dtype: torch.dtype = torch.float32) -> Any:
    register()
    kind: Any = use_experts_implementation(type("Experts", (Weights,), {}), **layout)
    return kind(SimpleNamespace(_experts_implementation=IMPLEMENTATION), experts, layout).to(dtype)


def one_by_one(module: Any, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    def matrix(name: str, expert: int) -> Tensor:
        weight = getattr(module, name)[expert]
        return weight if module.is_transposed else weight.T

    def bias(name: str, expert: int) -> Any:
        return getattr(module, f"{name}_bias")[expert] if module.has_bias else 0

    up = "gate_up_proj" if module.has_gate else "up_proj"
    sums = []
    for token, ids in enumerate(ids_TK.tolist()):
        outs = []
        for place, expert in enumerate(ids):
            inner = hidden_TH[token] @ matrix(up, expert) + bias(up, expert)
            inner = nn.functional.silu(inner[:INNER]) * inner[INNER:] if module.has_gate else nn.functional.silu(inner)
            outs.append((inner @ matrix("down_proj", expert) + bias("down_proj", expert)) * weights_TK[token, place])
        sums.append(torch.stack(outs).sum(0))
    return torch.stack(sums)


LAYOUTS = st.fixed_dictionaries({name: st.booleans() for name in ("is_transposed", "has_bias", "has_gate")})


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 7), top_k=st.integers(1, 3), idle=st.integers(0, 4), layout=LAYOUTS, seed=st.integers(0, 99),
    crowded=st.booleans(), part_rows=st.sampled_from([1, 3, 2048]),
)  # fmt: skip
def test_output_and_both_gradients_are_those_of_experts_one_by_one(
    tokens: int, top_k: int, idle: int, layout: dict[str, bool], seed: int, crowded: bool, part_rows: int
) -> None:
    """From one token on, with experts that nobody chooses, or with everybody choosing the same ones; in few parts or many."""
    torch.manual_seed(seed)
    module = made(top_k + idle, layout)
    hidden, grad = torch.randn(tokens, HIDDEN, requires_grad=True), torch.randn(tokens, HIDDEN)
    scores = torch.rand(1 if crowded else tokens, top_k + idle).expand(tokens, -1)
    ids, weights = scores.topk(top_k).indices, torch.rand(tokens, top_k, requires_grad=True)
    expected = one_by_one(module, hidden, ids, weights)
    with patch.object(frozen_experts, "PART_ROWS", part_rows):
        found = module(hidden, ids, weights)
        gradients = torch.autograd.grad(found, (hidden, weights), grad)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (hidden, weights), grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def a_call(dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    module = made(5, {"is_transposed": False, "has_bias": False, "has_gate": True}, dtype)
    hidden, ids = torch.randn(6, HIDDEN, requires_grad=True), torch.rand(6, 5).topk(2).indices
    return module, hidden, ids, torch.rand(6, 2, requires_grad=True)


def test_sixteen_bit_experts_take_float32_inputs_and_weights_and_give_them_float32_gradients() -> None:
    """What autocast brings: norms and routers give float32."""
    module, hidden, ids, weights = a_call(torch.bfloat16)
    expected = one_by_one(module.float(), hidden, ids, weights)
    wanted = torch.autograd.grad(expected.sum(), (hidden, weights))
    found = module.to(torch.bfloat16)(hidden, ids, weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    for ours, theirs in zip(torch.autograd.grad(found.sum(), (hidden, weights)), wanted, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)


class Made(TorchDispatchMode):
    """Notes what tensors are made, by precision and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[torch.dtype, torch.Size]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found |= {(one.dtype, one.shape) for one in tree_leaves(out) if isinstance(one, Tensor)}
        return out


def test_on_an_accelerator_all_rows_exist_in_sixteen_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hidden, ids, weights = a_call(torch.bfloat16)
    all_rows = torch.Size((ids.numel(), HIDDEN))
    expected = one_by_one(module.float(), hidden, ids, weights)
    wanted = torch.autograd.grad(expected.sum(), (hidden, weights))
    module.to(torch.bfloat16)
    with Made() as on_cpu:
        torch.autograd.grad(module(hidden, ids, weights).sum(), (hidden, weights))
    assert (torch.float32, all_rows) in on_cpu.found
    monkeypatch.setattr(frozen_experts, "_has_caches", lambda _: False)
    with Made() as made_tensors:
        found = module(hidden, ids, weights)
        gradients = torch.autograd.grad(found.sum(), (hidden, weights))
    assert (torch.bfloat16, all_rows) in made_tensors.found
    assert (torch.float32, all_rows) not in made_tensors.found
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)


def test_the_activation_that_is_written_out_has_the_bits_of_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hidden, ids, weights = a_call()
    written_out = torch.autograd.grad(module(hidden, ids, weights).sum(), (hidden, weights))
    monkeypatch.setattr(frozen_experts, "_is_swiglu", lambda experts: False)
    by_autograd = torch.autograd.grad(module(hidden, ids, weights).sum(), (hidden, weights))
    assert all(map(torch.equal, written_out, by_autograd))


@pytest.mark.parametrize("input_trains", [True, False])
def test_only_what_gate_and_up_give_is_kept_of_every_row(input_trains: bool) -> None:
    """In the first layer, whose input comes from frozen embeddings, half of that."""
    module, hidden, ids, weights = a_call()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(hidden if input_trains else hidden.detach(), ids, weights)
    rows = ids.numel()
    numbers = rows * (2 * INNER if input_trains else INNER) + rows
    assert sum(tensor.numel() for tensor in kept if tensor.is_floating_point()) == numbers


def test_where_the_input_needs_no_gradient_none_is_computed() -> None:
    """The first layer with experts: nothing before its router trains."""
    module, hidden, ids, weights = a_call()
    (expected,) = torch.autograd.grad(module(hidden, ids, weights).sum(), weights)
    module(hidden.detach(), ids, weights).sum().backward()
    torch.testing.assert_close(weights.grad, expected)
    assert hidden.grad is None


def test_experts_that_train_are_left_to_transformers_and_do_train() -> None:
    module, hidden, ids, weights = a_call()
    frozen = module(hidden, ids, weights)
    trained = module.requires_grad_()(hidden, ids, weights)
    torch.testing.assert_close(trained, frozen)
    trained.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_on_cuda_it_is_what_the_cpu_computes(
    dtype: torch.dtype, has_bias: bool, has_gate: bool, is_transposed: bool
) -> None:
    torch.manual_seed(7)
    module = made(9, {"is_transposed": is_transposed, "has_bias": has_bias, "has_gate": has_gate}, dtype)
    hidden, ids = torch.randn(200, HIDDEN, dtype=dtype), torch.rand(200, 8).topk(3).indices  # nobody chooses the last
    weights, grad = torch.rand(200, 3), torch.randn(200, HIDDEN, dtype=dtype)
    outcomes = []
    for device in ("cpu", "cuda"):
        module = module.to(device)
        inputs = [tensor.to(device).requires_grad_() for tensor in (hidden, weights)]
        found = module(inputs[0], ids.to(device), inputs[1])
        outcomes.append([found, *torch.autograd.grad(found, inputs, grad.to(device))])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for expected, found in zip(*outcomes, strict=True):
        assert found.is_cuda
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found.cpu(), expected, **tolerance)


FAMILIES = ["qwen2_moe", "olmoe", "mixtral", "qwen3_moe", "deepseek_v2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_the_same_and_its_routers_get_the_same_gradients(
    family: str, tiny_model: Callable[..., Any]
) -> None:
    assert small_config(family).hidden_size % 4 == 0
    ids = torch.randint(1, 250, (2, 12), generator=torch.Generator().manual_seed(5))
    outcomes = []
    for implementation in (IMPLEMENTATION, "eager"):
        register()
        model = tiny_model(family).requires_grad_(False).train()
        gates = [parameter for router in find_routers(model).values() for parameter in router.parameters()]
        for gate in gates:
            gate.requires_grad_(True)
        model.set_experts_implementation(implementation)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        outcomes.append([loss.detach(), *torch.autograd.grad(loss, gates)])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_recomputing_activations_gives_the_same_gradients(tiny_model: Callable[..., Any]) -> None:
    register()
    ids = torch.randint(1, 250, (2, 12), generator=torch.Generator().manual_seed(5))
    outcomes = []
    for checkpointing in (False, True):
        model = tiny_model("olmoe").requires_grad_(False).train()
        model.set_experts_implementation(IMPLEMENTATION)
        gates = [router.weight.requires_grad_(True) for router in find_routers(model).values()]
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        outcomes.append(torch.autograd.grad(loss, gates))
    for recomputed, kept in zip(*outcomes, strict=True):
        assert torch.equal(recomputed, kept)


def test_routers_are_trained_through_it_and_whole_models_are_not(model_dir: Callable[[str], Any]) -> None:
    used = {
        trainable: build_model(
            ModelArguments(model_name_or_path=str(model_dir("qwen2_moe")), trainable=trainable), seed=0
        ).config._experts_implementation
        for trainable in ("routers", "all")
    }
    assert used["routers"] == IMPLEMENTATION
    assert used["all"] != IMPLEMENTATION
