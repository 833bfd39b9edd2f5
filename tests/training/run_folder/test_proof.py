"""The proof refuses every way in which a run could train something else than it says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from configs.load import UserError
from training.model.loading import trained_parameters
from training.model.routers import router_parameters
from training.run_folder import proof

Make = Callable[..., Any]


@pytest.fixture
def model(tiny_model: Make) -> Any:
    """Only routers train, and one backward pass was done."""
    model = tiny_model("qwen2_moe").requires_grad_(False)
    for parameter in router_parameters(model).values():
        parameter.requires_grad_()
    ids = torch.arange(1, 19).view(2, 9)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return model


def test_gradient_norms_of_the_trained_tensors_are_given(model: Any) -> None:
    trained = trained_parameters(model)
    norms = proof.check_gradients(model, trained)
    assert list(norms) == list(router_parameters(model))
    assert norms == {name: float(parameter.grad.norm()) for name, parameter in trained.items()}
    assert all(norm > 0 for norm in norms.values())


@pytest.mark.parametrize("broken", [None, 0.0, float("nan"), float("inf")])
def test_a_router_without_a_finite_gradient_is_refused(broken: float | None, model: Any) -> None:
    name, parameter = list(router_parameters(model).items())[1]
    if broken is None:
        parameter.grad = None
    else:
        parameter.grad.zero_()
        parameter.grad[0, 0] = broken
    words = {None: "None", 0.0: r"0\.0"}.get(broken, str(broken))
    with pytest.raises(UserError, match=rf"trained tensor {name} has gradient {words} at the first step"):
        proof.check_gradients(model, trained_parameters(model))


def test_a_router_whose_gradient_is_rounding_noise_is_refused(model: Any) -> None:
    first, *_ = router_parameters(model)
    model.get_parameter(first).grad.mul_(1e-8)
    with pytest.raises(UserError, match=rf"trained tensor {first} has a gradient of norm .* that is rounding noise"):
        proof.check_gradients(model, trained_parameters(model))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_frozen_tensor_with_a_gradient_is_refused(value: float, model: Any) -> None:
    frozen = model.model.norm.weight
    frozen.grad = torch.full_like(frozen, value)
    with pytest.raises(UserError, match=r"frozen tensor model\.norm\.weight has a gradient .*only 2 may train"):
        proof.check_gradients(model, trained_parameters(model))


def test_the_frozen_hash_does_not_see_the_routers(model: Any) -> None:
    trained = trained_parameters(model)
    before = proof.frozen_sha256(model.state_dict().items(), trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 1
    assert proof.frozen_sha256(model.state_dict().items(), trained) == before


def test_the_frozen_hash_sees_every_frozen_tensor(model: Any) -> None:
    trained = trained_parameters(model)
    before = proof.frozen_sha256(model.state_dict().items(), trained)
    frozen = [(name, tensor) for name, tensor in model.state_dict().items() if name not in trained]
    assert len(frozen) > 20
    for name, tensor in frozen:
        last = tensor.flatten()[-1:]  # a view: the smallest change at the end
        old = last.clone()
        last.copy_(torch.nextafter(old, torch.full_like(old, torch.inf)))
        assert proof.frozen_sha256(model.state_dict().items(), trained) != before, name
        last.copy_(old)
    assert proof.frozen_sha256(model.state_dict().items(), trained) == before


def test_the_frozen_hash_sees_two_tensors_that_change_places(model: Any) -> None:
    trained = trained_parameters(model)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight += 1
    before = proof.frozen_sha256(model.state_dict().items(), trained)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight -= 1
        model.model.layers[1].input_layernorm.weight += 1
    assert proof.frozen_sha256(model.state_dict().items(), trained) != before


def test_the_hash_of_a_tensor_covers_dtype_shape_and_bytes() -> None:
    zeros = torch.zeros(2, 3)
    different = [
        zeros,
        zeros.int(),
        zeros.view(3, 2),
        zeros.to(torch.bfloat16),
        zeros.clone().index_fill_(0, torch.tensor(1), 1),
    ]
    assert len({proof.tensor_sha256(tensor) for tensor in different}) == len(different)
    assert proof.tensor_sha256(zeros.T.contiguous().T) == proof.tensor_sha256(zeros)
    assert len(proof.tensor_sha256(torch.tensor(1.0))) == 64


def test_a_tied_tensor_counts_as_trained_under_both_names(tiny_model: Make) -> None:
    model = tiny_model("qwen2_moe")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    trained = trained_parameters(model)
    assert "lm_head.weight" not in trained
    before = proof.frozen_sha256(model.state_dict().items(), trained)
    with torch.no_grad():
        model.lm_head.weight += 1
    assert proof.frozen_sha256(model.state_dict().items(), trained) == before
