"""The routers seam: find every router of a mixture-of-experts model and observe what it does in a forward pass.

They are found through transformers' own interface, which names the class of the routers, never by a list of families;
`router_kind.py` says of what kind they are. Losses, traces and metrics are all computed from `Routing`.
Letters: B batch, S sequence, E experts, K chosen, D hidden.
"""

import copy
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.load import UserError
from training.model.cache_in_the_loop import CacheInTheLoop
from training.model.router_calls import AskedRouter, asked_routers
from training.model.router_kind import RouterKind, correction_bias, kind_of, logits_alone
from training.model.transformers_internals import router_classes

ANOTHER = "use the model it was made for"
_KINDS: "WeakKeyDictionary[PreTrainedModel, RouterKind]" = WeakKeyDictionary()


class Routing(NamedTuple):
    """What one layer's router did.

    Attributes:
        logits_BSE: log scores up to a constant, so that P_t is their softmax; float32, with gradient.
        weights_BSK: mixing weights of the chosen experts, heaviest first, no gradient.
        ids_BSK: the chosen experts, in the order of `weights_BSK`.
        reference_logits_BSE: the original router's scores on the same hidden states, no gradient; None if not asked for.
        score_BSE: what experts are chosen by, what residents get included, with gradient; None but with a cache in the loop.
        resident_BSE: bool: what that cache holds before each choice; None without one.
    """

    logits_BSE: Tensor
    weights_BSK: Tensor
    ids_BSK: Tensor
    reference_logits_BSE: Tensor | None = None
    score_BSE: Tensor | None = None
    resident_BSE: Tensor | None = None


def find_routers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Module name -> router of every MoE layer, in layer order; a `UserError` if there is none."""
    wanted = router_classes(model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, wanted)}
    if not found:
        raise UserError(
            f"{type(model).__name__} ({model.config.model_type}) has no routers: looked for modules of the class that "
            "transformers records as router_logits; give a mixture-of-experts model such as OLMoE or Qwen2-MoE"
        )
    return found


def ask_routers(model: PreTrainedModel) -> dict[str, AskedRouter]:
    """`find_routers`, each as its block asks it; a `UserError` if that is not understood."""
    return asked_routers(model, find_routers(model))


def router_kind(model: PreTrainedModel) -> RouterKind:
    """How the routers of a model score and what of them trains; a `UserError` if that is not understood.

    Found out once: of a model that was sharded since then it could not be.
    """
    if model not in _KINDS:
        hidden_size = model.config.get_text_config().hidden_size
        _KINDS[model] = kind_of(next(iter(ask_routers(model).values())), hidden_size=hidden_size)
    return _KINDS[model]


def most_chosen(model: PreTrainedModel) -> int:
    """How many experts a token chooses, in the layer where it is most; the model may be without weights."""
    hidden_size = model.config.get_text_config().hidden_size
    with torch.no_grad():
        asked = [
            router.ask(torch.zeros(1, hidden_size).to(next(router.module.parameters())))
            for router in ask_routers(model).values()
        ]
    return max(ids_TK.shape[-1] for _, _, ids_TK in asked)


def task_reaches_routers(model: PreTrainedModel) -> bool:
    """Whether what the model predicts depends on its routers' logits; one expert with the weight 1 never does."""
    weighing = router_kind(model).weighing
    return weighing is None or not weighing.normalised or most_chosen(model) > 1


def router_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameter name -> gate weight (and bias, where a family has one) of every router; no correction bias.

    Under ZeRO-3 they are plain tensors.
    """
    trained = router_kind(model).trained
    return {
        f"{name}.{parameter_name}": operator.attrgetter(parameter_name)(router)
        for name, router in find_routers(model).items()
        for parameter_name in trained
    }


def copy_into_routers(model: PreTrainedModel, router_delta: Mapping[str, Tensor]) -> None:
    """Overwrite the routers of a loaded model by the tensors of a router delta, cast to their precision.

    Raises:
        UserError: its names or shapes are not those of the model's routers.
    """
    routers = router_parameters(model)
    for name, weight in router_delta.items():
        if name not in routers:
            raise UserError(f"router delta: the model has no router weight {name}; {ANOTHER}")
        if routers[name].shape != weight.shape:
            shapes = f"{name} has shape {list(weight.shape)}, the model's is {list(routers[name].shape)}"
            raise UserError(f"router delta: {shapes}; {ANOTHER}")
    if missing := sorted(routers.keys() - router_delta.keys()):
        raise UserError(f"router delta: {missing[0]}, a router of the model, is not in it; {ANOTHER}")
    with torch.no_grad():
        for name, parameter in routers.items():
            parameter.copy_(router_delta[name])


class RouterObserver:
    """Records every router's output while `recording()`; outside of it the hooks do nothing.

    Recomputation under gradient checkpointing happens in the backward pass, outside `recording()`, and is not seen.
    """

    def __init__(self, model: PreTrainedModel, *, with_reference: bool = False) -> None:
        self.names, self.kind = list(find_routers(model)), router_kind(model)
        self._hidden_size = model.config.get_text_config().hidden_size
        self._recorded: dict[str, Routing] | None = None
        self._uses_reference = False
        self._shape = (0, 0)
        self._place_BS: Tensor | None = None
        self._cache: CacheInTheLoop | None = None
        self._local = False
        self._handles = []
        for name, asked in ask_routers(model).items():
            router = asked.module
            reference = replace(asked, module=copy.deepcopy(router).requires_grad_(False)) if with_reference else None
            self._handles.append(router.register_forward_hook(self._hook(name, asked, reference), with_kwargs=True))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def recording(
        self, batch_size: int, sequence_length: int, *, place_BS: Tensor | None = None,
        cache: CacheInTheLoop | None = None, local: bool = False,
    ) -> Iterator[list[Routing]]:  # fmt: skip
        """The list that is yielded is filled, in layer order, when the block ends.

        Args:
            place_BS: a token of the batch is the row of the routers' outputs that stands there; None: they are in order.
            cache: inside, experts are chosen as it says, which is what is recorded.
            local: what is recorded has a graph that ends at each router's inputs, whether or not gradients are switched on.
        """
        routings: list[Routing] = []
        self._recorded, self._shape, self._place_BS = {}, (batch_size, sequence_length), place_BS
        self._cache, self._local = cache, local
        try:
            yield routings
            with torch.enable_grad() if local else nullcontext():
                routings += [self._scored(self._recorded[name]) for name in self.names]
        finally:
            self._recorded = self._cache = None
            self._local = False

    def _scored(self, routing: Routing) -> Routing:
        """With log scores in the place of a router's first output.

        Not in the hook: checkpointing counts what a layer saves for its backward pass, and nothing is recorded in the second
        forward pass.
        """
        return routing._replace(logits_BSE=self.kind.log_scores(self._in_batch(routing.logits_BSE)))

    @contextmanager
    def original_routers(self) -> Iterator[None]:
        """Inside, the model computes with the routers it came with."""
        self._uses_reference = True
        try:
            yield
        finally:
            self._uses_reference = False

    def _bias(self, asked: AskedRouter) -> Tensor | None:
        has_bias = self.kind.choosing is not None and self.kind.choosing.bias is not None
        return correction_bias(asked, self.kind).float() if has_bias else None

    def _in_batch(self, output: Tensor) -> Tensor:
        """One of a router's outputs as [B, S, numbers of a token]."""
        if self._place_BS is None:
            return output.reshape(*self._shape, -1)
        return output.reshape(-1, output.shape[-1])[self._place_BS]

    def _hook(self, name: str, asked: AskedRouter, reference: AskedRouter | None) -> Any:
        product = None if reference is None else logits_alone(reference, self.kind, hidden_size=self._hidden_size)

        def hook(router: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: tuple[Tensor, ...]) -> Any:
            if self._uses_reference:
                assert reference is not None, "the original routers are kept with with_reference=True only"
                return reference.module(*inputs, **named)
            if self._recorded is None:
                return None
            if self._local:
                with torch.enable_grad():
                    return record(router.forward(*inputs, **named), inputs, named)
            return record(output, inputs, named)

        def record(output: tuple[Tensor, ...], inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            changed, score, resident = None, None, None
            if self._cache is not None:
                choice = self._cache.choose(*output[:3], kind=self.kind, bias_E=self._bias(asked))
                score, resident = self._in_batch(choice.score), self._in_batch(choice.resident)
                output = changed = (output[0], choice.weights, choice.ids, *output[3:])
            weights, ids = (self._in_batch(tensor.detach()) for tensor in output[1:3])
            if changed is not None:  # what was computed beside the choice is no part of it
                weights, ids = weights[..., : choice.top_k], ids[..., : choice.top_k]
            weights, order = weights.sort(dim=-1, descending=True, stable=True)
            reference_logits = None
            if reference is not None:
                with torch.no_grad():
                    logits = (
                        reference.module(*inputs, **named)[0] if product is None or not inputs else product(inputs[0])
                    )
                    reference_logits = self.kind.log_scores(self._in_batch(logits))
            assert self._recorded is not None
            self._recorded[name] = Routing(output[0], weights, ids.gather(-1, order), reference_logits, score, resident)
            return changed

        return hook
