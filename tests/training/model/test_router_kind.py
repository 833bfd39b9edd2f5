"""What a router does with its logits is found out by asking it."""

import pytest
import torch
from torch import Tensor

from training.model.router_calls import AskedRouter
from training.model.router_kind import Weighing, kind_of, logits_alone

N_EXPERTS, TOP_K, HIDDEN = 6, 3, 8


class Router(torch.nn.Module):
    """Chooses the 3 largest of 6 logits and weighs them in the way it is told."""

    def __init__(self, weighing: Weighing) -> None:
        super().__init__()
        self.gate, self.weighing = torch.nn.Linear(HIDDEN, N_EXPERTS), weighing

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = self.gate(hidden_TH)
        ids_TK = logits_TE.topk(TOP_K).indices
        return logits_TE, self.weighing.weights(logits_TE, ids_TK), ids_TK


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5, 16.0])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_how_a_router_weighs_is_found_out(scoring: str, normalised: bool, scale: float) -> None:
    weighing = Weighing(scoring, normalised, scale)
    kind = kind_of(AskedRouter(Router(weighing)), hidden_size=HIDDEN)
    assert kind.weighing is not None
    assert kind.weighing._replace(scale=1.0) == weighing._replace(scale=1.0)
    assert kind.weighing.scale == pytest.approx(scale)
    assert (kind.scoring, kind.trained, kind.takes_largest) == (scoring, ("gate.weight", "gate.bias"), True)


class ScaledRouter(Router):
    """One whose scale is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(Weighing("softmax", normalised=True))
        self.scale = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE, weights_TK, ids_TK = super().forward(hidden_TH)
        return logits_TE, self.scale * weights_TK, ids_TK


def test_a_scale_that_is_a_weight_is_the_routers_own_and_does_not_train() -> None:
    kind = kind_of(AskedRouter(ScaledRouter()), hidden_size=HIDDEN)
    assert kind.weighing == Weighing("softmax", normalised=True, scale=pytest.approx(3.0))
    assert kind.trained == ("gate.weight", "gate.bias")


class RouterOfScaled(Router):
    """Hidden numbers are scaled first, each by a weight of its own, as in Gemma 4."""

    def __init__(self) -> None:
        super().__init__(Weighing("softmax", normalised=False))
        self.gate = torch.nn.Linear(HIDDEN, N_EXPERTS, bias=False)
        self.before = torch.nn.Parameter(torch.ones(HIDDEN))

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(hidden_TH * self.before)


def test_logits_are_one_product_with_a_bias_but_not_where_more_is_done() -> None:
    plain, scaled = AskedRouter(Router(Weighing("softmax", normalised=False))), AskedRouter(RouterOfScaled())
    product = logits_alone(plain, kind_of(plain, hidden_size=HIDDEN), hidden_size=HIDDEN)
    assert product is not None
    hidden_TH = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(3))
    assert torch.equal(product(hidden_TH), plain.ask(hidden_TH)[0])
    kind = kind_of(scaled, hidden_size=HIDDEN)
    assert "before" in kind.trained
    assert logits_alone(scaled, kind, hidden_size=HIDDEN) is None


def test_a_16_bit_router_is_asked_in_its_own_precision_and_left_as_it_is() -> None:
    router = Router(Weighing("softmax", normalised=False, scale=16.0)).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    state = torch.get_rng_state()
    kind = kind_of(AskedRouter(router), hidden_size=HIDDEN)
    assert kind.weighing is not None
    assert kind.weighing.scale == pytest.approx(16.0, rel=1e-2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in router.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
