"""What kind of router a family has, found out by what a copy of it does; never by a list of names.

Every router of transformers gives (logits, weights of the chosen experts, their ids). A copy with random weights tells on
which of its parameters the logits depend (those train; correction biases only shift the choice and stay frozen), by which
function logits become weights, and whether the largest logits are always the ones that are chosen. A copy as it is tells
the rest of how weights are made: a scale may be a weight itself.
Letters: T tokens, E experts, K chosen.
"""

import copy
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from configs.load import UserError
from training.model.router_calls import AskedRouter

PROBE_TOKENS, SCALE_TOKENS = 128, 64
MOST_GROUPS = 32
TOLERANCE = 1e-4
PROBABILITIES = "probabilities"


class Weighing(NamedTuple):
    """How the mixing weights of chosen experts follow from the logits of all.

    Attributes:
        scoring: `softmax` over all experts, or `sigmoid` of each logit.
        normalised: whether the scores of the chosen experts are divided by their sum.
        scale: what comes out is multiplied by.
    """

    scoring: str
    normalised: bool
    scale: float = 1.0

    def weights(self, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """The weights [T, K] of these experts; 0 where the id is negative, of an expert that is left out."""
        scores_TE = logits_TE.softmax(-1) if self.scoring == "softmax" else logits_TE.sigmoid()
        scores_TK = torch.where(ids_TK < 0, 0.0, scores_TE.gather(1, ids_TK.clamp_min(0)))
        return self.scale * (scores_TK / scores_TK.sum(-1, keepdim=True) if self.normalised else scores_TK)


class Choosing(NamedTuple):
    """How the chosen experts follow from the logits of all: the largest of `scoring` plus a bias, in the best groups.

    Attributes:
        scoring: `softmax`, `sigmoid`, or `logits` as they are.
        bias: place of the correction bias among `shifts`; None where there is none.
        groups: that many groups of neighbouring experts, of which the best `kept_groups` are chosen from.
        of_group: how many of a group's largest scores add up to what the group is worth.
    """

    scoring: str = "logits"
    bias: int | None = None
    groups: int = 1
    kept_groups: int = 1
    of_group: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether the largest logits are chosen, whatever the scoring."""
        return self.bias is None and self.groups == 1

    def scores(self, logits_TE: Tensor, bias_E: Tensor | None) -> Tensor:
        """[T, E]: what experts are chosen by."""
        of_logits = {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid, "logits": lambda z: z}
        scores_TE: Tensor = of_logits[self.scoring](logits_TE)
        return scores_TE if bias_E is None else scores_TE + bias_E

    def allowed(self, scores_TE: Tensor) -> Tensor:
        """[T, E]: the experts of the groups that are chosen from."""
        grouped_TGe = scores_TE.unflatten(-1, (self.groups, -1))
        worth_TG = grouped_TGe.topk(min(self.of_group, grouped_TGe.shape[-1]), dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter_(
            1, worth_TG.topk(self.kept_groups, dim=-1).indices, True
        )
        return kept_TG[..., None].expand_as(grouped_TGe).flatten(1)

    def ids(self, logits_TE: Tensor, bias_E: Tensor | None, top_k: int) -> Tensor:
        """[T, K]: the experts that are chosen."""
        scores_TE = self.scores(logits_TE, bias_E)
        return scores_TE.masked_fill(~self.allowed(scores_TE), -torch.inf).topk(top_k, dim=-1).indices


class RouterKind(NamedTuple):
    """How a router works.

    Attributes:
        scoring: `softmax` or `sigmoid` of the logits, to which P_t is proportional; or `probabilities`, where these stand in
            place of logits (Gemma 4).
        trained: names of the parameters inside the router that the logits depend on.
        takes_largest: whether the experts with the largest logits are chosen, whatever biases or groups there are.
        weighing: how weights follow from the logits, for any choice; None where that is not known (SparseMixer).
        choosing: how experts are chosen; None where that is not known.
    """

    scoring: str
    trained: tuple[str, ...]
    takes_largest: bool
    weighing: Weighing | None
    choosing: Choosing | None

    def log_scores(self, logits: Tensor) -> Tensor:
        """Float32 log scores, whose softmax over the experts is P_t."""
        if self.scoring == PROBABILITIES:
            return logits.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        return logits.float() if self.scoring == "softmax" else logsigmoid(logits.float())

    def __str__(self) -> str:
        choice = "largest chosen" if self.takes_largest else "choice by groups or a correction bias"
        scoring = "softmax" if self.scoring == PROBABILITIES else self.scoring
        return f"{scoring} of logits, {choice}, {' and '.join(self.trained)} of each train"


def kind_of(router: AskedRouter, *, hidden_size: int) -> RouterKind:
    """The kind of a router, which is left as it is; a `UserError` if it weighs experts in no known way."""
    with torch.inference_mode(False), torch.enable_grad():  # whoever asks may have switched gradients off
        probe = _randomised(router)
        draw = torch.Generator().manual_seed(1)
        outputs = probe.ask(torch.randn(PROBE_TOKENS, hidden_size, generator=draw))
        named = dict(probe.module.named_parameters())
        gradients = torch.autograd.grad(outputs[0].sum(), list(named.values()), allow_unused=True)
    logits_TE, weights_TK, ids_TK = (tensor.detach() for tensor in outputs)
    scoring = _scoring(logits_TE.float(), weights_TK.float(), ids_TK)
    if scoring is None:
        raise UserError(
            f"{type(router.module).__name__} weighs experts neither by a softmax nor by a sigmoid of its logits: of which "
            "probabilities an objective or a lever should be made is not known; use neither with this model"
        )
    trained = tuple(name for name, gradient in zip(named, gradients, strict=True) if gradient is not None)
    choosing = _choosing(logits_TE, ids_TK, _shifts(probe, trained, experts=logits_TE.shape[-1]))
    return RouterKind(
        scoring=scoring,
        trained=trained,
        takes_largest=choosing is not None and choosing.is_plain,
        weighing=_weighing(router.copied(), scoring, hidden_size),
        choosing=choosing,
    )


@torch.no_grad()
def logits_alone(router: AskedRouter, kind: RouterKind, *, hidden_size: int) -> Callable[[Tensor], Tensor] | None:
    """From hidden states to a router's logits by one product, where that gives the same bits; else None.

    What a router does with its logits takes several small steps, which nobody needs who compares logits.
    """
    tensors = [router.module.get_parameter(name) for name in kind.trained]
    weight_EH = next((tensor for tensor in tensors if tensor.dim() == 2 and tensor.shape[1] == hidden_size), None)
    if weight_EH is None:
        return None
    bias_E = next((tensor for tensor in tensors if tensor.shape == weight_EH.shape[:1]), None)
    if len(tensors) > 1 + (bias_E is not None):
        return None

    def as_it_is(hidden: Tensor) -> Tensor:
        return linear(hidden, weight_EH, bias_E)

    def in_float32(hidden: Tensor) -> Tensor:
        return linear(hidden.float(), weight_EH.float(), None if bias_E is None else bias_E.float())

    device, draw = weight_EH.device.type, torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(SCALE_TOKENS, hidden_size, generator=draw).to(weight_EH)
    for product in (as_it_is, in_float32):
        equal = [torch.equal(product(hidden_TH), router.ask(hidden_TH)[0])]
        with torch.autocast(device, torch.bfloat16):
            equal.append(torch.equal(product(hidden_TH.bfloat16()), router.ask(hidden_TH.bfloat16())[0]))
        if all(equal):
            return product
    return None


def correction_bias(router: AskedRouter, kind: RouterKind) -> Tensor:
    """The bias [E] that shifts the choice of a router of this kind, which has one."""
    assert kind.choosing is not None
    assert kind.choosing.bias is not None
    experts = {tensor.shape[0] for name, tensor in router.module.named_parameters() if name in kind.trained}
    found = [tensor for size in experts for tensor in _shifts(router, kind.trained, experts=size)]
    return found[kind.choosing.bias].detach()


def _shifts(router: AskedRouter, trained: Collection[str], *, experts: int) -> list[Tensor]:
    """What may shift a router's choice: every tensor of one number for each expert that its logits do not depend on."""
    own = [tensor for name, tensor in router.module.named_parameters() if name not in trained]
    candidates = [*own, *router.module.buffers(), *(part for part in router.further if isinstance(part, Tensor))]
    return [tensor for tensor in candidates if tensor.numel() == experts and tensor.is_floating_point()]


def _choosing(logits_TE: Tensor, ids_TK: Tensor, shifts: Sequence[Tensor]) -> Choosing | None:
    """The simplest way of choosing that leads to these experts for all tokens; None if none that is known does."""
    experts, top_k = logits_TE.shape[-1], ids_TK.shape[-1]
    chosen = ids_TK.sort(-1).values
    for groups in (groups for groups in range(1, MOST_GROUPS + 1) if experts % groups == 0):
        for kept in range(1, groups if groups > 1 else 2):
            if kept * (experts // groups) < top_k:
                continue
            for scoring, of_group, bias in itertools.product(
                ("logits", "softmax", "sigmoid"), (1, 2) if groups > 1 else (1,), (None, *range(len(shifts)))
            ):
                way = Choosing(scoring, bias, groups, kept, of_group)
                bias_E = None if bias is None else shifts[bias].detach().flatten().float()
                if torch.equal(way.ids(logits_TE.float(), bias_E, top_k).sort(-1).values, chosen):
                    return way
    return None


@torch.no_grad()
def _weighing(router: AskedRouter, scoring: str, hidden_size: int) -> Weighing | None:
    """How a router that scores in this way goes on, in its own precision and on its device; None if in no known way."""
    draw = torch.Generator().manual_seed(0)
    router.module.eval()
    hidden_TH = torch.randn(SCALE_TOKENS, hidden_size, generator=draw).to(next(router.module.parameters()))
    logits_TE, weights_TK, ids_TK = router.ask(hidden_TH)
    for normalised in (False, True) if scoring != PROBABILITIES else ():
        plain_TK = Weighing(scoring, normalised).weights(logits_TE.float(), ids_TK)
        scale = float(weights_TK.float().sum() / plain_TK.sum())
        if torch.allclose(weights_TK.float(), scale * plain_TK, rtol=2e-2, atol=1e-4):
            return Weighing(scoring, normalised, scale)
    return None


def _randomised(router: AskedRouter) -> AskedRouter:
    """A copy on the CPU in float32 that decides as in inference, with biases large enough to change choices."""
    module = copy.deepcopy(router.module).to("cpu", torch.float32).eval()
    further = [
        torch.zeros(part.shape, dtype=part.dtype) if isinstance(part, Tensor) else part for part in router.further
    ]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        beside = [part.data for part in further if isinstance(part, Tensor)]
        for tensor in [*module.parameters(), *module.buffers(), *beside]:
            if tensor.is_floating_point() and tensor.dim() > 0:  # a scalar is no weight of an expert
                tensor.copy_(torch.randn(tensor.shape, generator=draw) / max(1, tensor.shape[-1] ** 0.5))
    return AskedRouter(module.requires_grad_(True), tuple(further), router.axes)


def _scoring(logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> str | None:
    """Which function of the logits the weights are proportional to; `PROBABILITIES` if they are none; None if unknown."""
    if (logits_TE >= 0).all() and torch.allclose(logits_TE.sum(-1), torch.ones(len(logits_TE)), atol=TOLERANCE):
        return PROBABILITIES
    chosen_TK = logits_TE.gather(-1, ids_TK)
    shares_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    if torch.allclose(shares_TK, chosen_TK.softmax(-1), atol=TOLERANCE):
        return "softmax"
    if torch.allclose(shares_TK, logsigmoid(chosen_TK).softmax(-1), atol=TOLERANCE):
        return "sigmoid"
    # a softmax over the closest calls alone, as SparseMixer's (arXiv 2409.12136): 1 / w is a sum over the m largest
    descending_TE = logits_TE.sort(-1, descending=True).values
    sums_TE = (descending_TE - descending_TE[:, :1]).exp().cumsum(-1)
    first_T1 = weights_TK.gather(-1, chosen_TK.argmax(-1, keepdim=True))
    return "softmax" if ((1 / first_T1 - sums_TE).abs().amin(-1) < TOLERANCE).all() else None
