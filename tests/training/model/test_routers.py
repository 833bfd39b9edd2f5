"""Routers of several families are found, observed without being changed, and compared with their original."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.load import UserError
from training.model.router_kind import logits_alone
from training.model.routers import RouterObserver, Routing, ask_routers, find_routers, router_kind, router_parameters

FAMILIES = {
    "qwen2_moe": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    "olmoe": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    "mixtral": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    "qwen3_moe": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    "deepseek_v2": ["model.layers.1.mlp.gate"],  # its first layer has no experts
}
Make = Callable[..., Any]


def token_ids(rows: int = 2, *, length: int = 9) -> Tensor:
    return torch.randint(1, 264, (rows, length), generator=torch.Generator().manual_seed(2))


def observe(model: Any, observer: RouterObserver) -> list[Routing]:
    ids = token_ids()
    with observer.recording(*ids.shape) as routings:
        model(input_ids=ids, use_cache=False)
    return routings


@pytest.mark.parametrize("family", FAMILIES)
def test_the_routers_of_a_family_are_found_in_layer_order(family: str, tiny_model: Make) -> None:
    model = tiny_model(family)
    assert list(find_routers(model)) == FAMILIES[family]
    parameters = router_parameters(model)
    assert list(parameters) == [f"{name}.weight" for name in FAMILIES[family]]
    assert all(parameter.shape == (8, 16) for parameter in parameters.values())


def test_a_model_without_experts_is_refused_in_words(tiny_model: Make) -> None:
    with pytest.raises(UserError, match=r"LlamaForCausalLM \(llama\) has no routers: .*mixture-of-experts model"):
        find_routers(tiny_model("llama"))


def test_routers_of_which_nobody_knows_how_they_score_are_refused(tiny_model: Make) -> None:
    model = tiny_model()
    for router in find_routers(model).values():
        forward = router.forward
        router.forward = lambda hidden, forward=forward: (lambda z, w, ids: (z, w.sqrt(), ids))(*forward(hidden))
    with pytest.raises(UserError, match="Router weighs experts neither by a softmax nor by a sigmoid of its logits"):
        router_parameters(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_observed_is_what_a_forward_by_hand_gives(family: str, tiny_model: Make) -> None:
    model = tiny_model(family)
    hidden: list[Tensor] = []
    handles = [
        router.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
        for router in find_routers(model).values()
    ]
    routings = observe(model, RouterObserver(model))
    for handle in handles:
        handle.remove()
    assert len(routings) == len(hidden) == len(FAMILIES[family])
    for routing, states, router in zip(routings, hidden, find_routers(model).values(), strict=True):
        logits = states.reshape(2, 9, 16) @ router.weight.T
        chosen = logits.softmax(-1).topk(routing.ids_BSK.shape[-1])
        torch.testing.assert_close(routing.logits_BSE, logits)
        assert torch.equal(routing.ids_BSK, chosen.indices)
        share = routing.weights_BSK / routing.weights_BSK.sum(-1, keepdim=True)
        torch.testing.assert_close(share, chosen.values / chosen.values.sum(-1, keepdim=True))
        assert routing.reference_logits_BSE is None


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_does_not_change_the_model(family: str, tiny_model: Make) -> None:
    plain, observed = tiny_model(family), tiny_model(family)
    observer = RouterObserver(observed, with_reference=True)
    with observer.recording(2, 9):
        found = observed(input_ids=token_ids(), use_cache=False).logits
    assert torch.equal(found, plain(input_ids=token_ids(), use_cache=False).logits)
    assert list(observed.state_dict()) == list(plain.state_dict())
    assert len(list(observed.parameters())) == len(list(plain.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_original_router_on_the_current_hidden_states(family: str, tiny_model: Make) -> None:
    model, original = tiny_model(family), tiny_model(family)
    observer = RouterObserver(model, with_reference=True)
    hidden: list[Tensor] = []
    with torch.no_grad():
        for router in find_routers(model).values():
            router.weight += 0.7
            router.weight[0] *= -3
            router.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    routings = observe(model, observer)
    for routing, states, router in zip(routings, hidden, find_routers(original).values(), strict=True):
        assert routing.reference_logits_BSE is not None
        torch.testing.assert_close(routing.reference_logits_BSE, states.reshape(2, 9, 16) @ router.weight.T)
        assert not routing.reference_logits_BSE.requires_grad
        assert not torch.allclose(routing.reference_logits_BSE, routing.logits_BSE)
        assert routing.logits_BSE.requires_grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_reference_are_one_product_with_the_routers_own_bits(
    family: str, dtype: torch.dtype, autocast: bool, tiny_model: Make
) -> None:
    model = tiny_model(family)
    for asked in ask_routers(model).values():
        asked.module.to(dtype)
        product = logits_alone(asked, router_kind(model), hidden_size=16)
        assert product is not None
        hidden = torch.randn(37, 16, generator=torch.Generator().manual_seed(5), dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(product(hidden), asked.ask(hidden)[0])


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_reference_whose_logits_are_more_than_a_product_is_asked_itself(
    is_plain: bool, tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    router_class: Any = type(next(iter(find_routers(model).values())))
    asked, forward = [], router_class.forward

    def counted(self: Any, hidden: Tensor) -> Any:
        asked.append(self)
        return forward(self, hidden if is_plain else hidden / hidden.norm(dim=-1, keepdim=True))

    monkeypatch.setattr(router_class, "forward", counted)
    observer = RouterObserver(model, with_reference=True)
    asked.clear()
    for routing in observe(model, observer):
        assert routing.reference_logits_BSE is not None
        assert torch.equal(routing.reference_logits_BSE, routing.logits_BSE)
    assert len(asked) == (2 if is_plain else 4)


def test_chosen_experts_come_heaviest_first_even_if_the_router_gives_them_unsorted(tiny_model: Make) -> None:
    model = tiny_model("qwen2_moe")
    for router in find_routers(model).values():
        router.register_forward_hook(lambda _, inputs, output: (output[0], output[1].flip(-1), output[2].flip(-1)))
    for routing in observe(model, RouterObserver(model)):
        assert (routing.weights_BSK.diff(dim=-1) <= 0).all()
        probs = routing.logits_BSE.softmax(-1)
        torch.testing.assert_close(routing.weights_BSK, probs.gather(-1, routing.ids_BSK))


def test_nothing_is_recorded_outside_of_recording_or_after_close(tiny_model: Make) -> None:
    model = tiny_model("olmoe")
    observer = RouterObserver(model)
    routings = observe(model, observer)
    before = [routing.logits_BSE.clone() for routing in routings]
    model(input_ids=token_ids(3, length=4), use_cache=False)
    assert len(routings) == 2
    assert all(torch.equal(a, b.logits_BSE) for a, b in zip(before, routings, strict=True))
    observer.close()
    with pytest.raises(KeyError):  # no hook is left that could fill it
        observe(model, observer)


def test_the_original_routers_can_be_put_back_for_a_while(tiny_model: Make) -> None:
    model = tiny_model().requires_grad_(False)
    observer = RouterObserver(model, with_reference=True)
    before = model(input_ids=token_ids(), use_cache=False).logits
    for router in router_parameters(model).values():
        router += torch.randn(router.shape, generator=torch.Generator().manual_seed(1))
    tuned = model(input_ids=token_ids(), use_cache=False).logits
    with observer.original_routers():
        assert torch.equal(model(input_ids=token_ids(), use_cache=False).logits, before)
    assert torch.equal(model(input_ids=token_ids(), use_cache=False).logits, tuned)
    assert not torch.equal(before, tuned)


def test_a_failing_forward_pass_ends_the_recording(tiny_model: Make) -> None:
    model = tiny_model("olmoe")
    observer = RouterObserver(model)
    with pytest.raises(RuntimeError, match="stop"), observer.recording(2, 9):
        raise RuntimeError("stop")
    model(input_ids=token_ids(1, length=3), use_cache=False)  # another shape: recording would fail
    assert len(observe(model, observer)) == 2


@pytest.mark.parametrize("place", [None, torch.arange(18).view(2, 9)], ids=["in order", "placed"])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_gradient_checkpointing_gives_the_same_gradients_and_records_once(
    family: str, place: torch.Tensor | None, tiny_model: Make
) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model(family).requires_grad_(False).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        routers = router_parameters(model)
        observer = RouterObserver(model, with_reference=True)
        forwards: list[int] = []
        for router in find_routers(model).values():
            router.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        for parameter in routers.values():
            parameter.requires_grad_()
        with observer.recording(2, 9, place_BS=place) as routings:
            logits = model(input_ids=token_ids(), use_cache=False).logits
        loss = logits.float().logsumexp(-1).mean() + sum(r.logits_BSE.softmax(-1)[..., 0].mean() for r in routings)
        recorded = [routing.logits_BSE.detach().clone() for routing in routings]
        loss.backward()
        assert len(routings) == len(FAMILIES[family])
        assert all(torch.equal(a, b.logits_BSE) for a, b in zip(recorded, routings, strict=True))
        gradients.append([parameter.grad for parameter in routers.values()])
        calls.append(len(forwards))
    assert calls[1] == 2 * calls[0]  # the recomputation did happen
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(plain, recomputed)
