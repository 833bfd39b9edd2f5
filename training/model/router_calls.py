"""How the blocks of a family call their routers, recorded from one call of a copy without weights.

Most routers are given the hidden states alone; some a correction bias that lies beside them in their block too.
Letters: T tokens, E experts, K chosen, D hidden.
"""

import copy
import inspect
import operator
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.load import UserError
from training.model import transformers_internals as internals

RECORDED_TOKENS = 4
NO_EXPERTS = "remoe_no_experts"


@dataclass(frozen=True)
class AskedRouter:
    """A router and what its block gives it beside the hidden states.

    Attributes:
        further: these arguments, in order; tensors are the model's own.
        axes: of the hidden states: 2, tokens and numbers, or 3, with a batch before them.
    """

    module: nn.Module
    further: tuple[Any, ...] = ()
    axes: int = 2

    def ask(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], weights [T, K] and ids [T, K]; hooks of the router are not called.

        Raises:
            UserError: the router gives something else.
        """
        outputs = self.module.forward(hidden_TD if self.axes == 2 else hidden_TD[None], *self.further)
        return checked(self.module, outputs, tokens=len(hidden_TD))

    def copied(self) -> "AskedRouter":
        """The same with copies of everything, at the same place and in the same precision."""
        further = tuple(copy.deepcopy(part) for part in self.further)
        return AskedRouter(copy.deepcopy(self.module), further, self.axes)


def checked(router: nn.Module, outputs: Any, *, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first three of a router's outputs, one row for each token; a `UserError` if they are not what is understood."""
    parts = outputs[:3] if isinstance(outputs, tuple) and len(outputs) >= 3 else ()
    if parts and all(isinstance(part, Tensor) and part.dim() >= 2 for part in parts):
        logits, weights, ids = (part.reshape(-1, part.shape[-1]) for part in parts)
        chosen = weights.shape == ids.shape and not ids.is_floating_point() and logits.shape[-1] >= ids.shape[-1]
        if chosen and len(logits) == len(ids) == tokens:
            return logits, weights, ids
    raise UserError(
        f"{type(router).__name__} gives no logits, weights and ids of the chosen experts for every token, which routers of "
        "mixture-of-experts models in transformers do; routers of this kind are not supported"
    )


def asked_routers(model: PreTrainedModel, routers: Mapping[str, nn.Module]) -> dict[str, AskedRouter]:
    """Every one of these routers, by its name in `model`, as its block asks it.

    Raises:
        UserError: one is given what earlier layers compute, or how it is called cannot be found out.
    """
    if not any(_takes_more(router) for router in routers.values()):
        return {name: AskedRouter(router) for name, router in routers.items()}
    calls, asked = _recorded_calls(model, routers), {}
    for name, router in routers.items():
        block = model.get_submodule(name.rpartition(".")[0])
        axes, *further = calls[name]
        asked[name] = AskedRouter(router, tuple(_found(block, part) for part in further), axes)
    return asked


def _takes_more(router: nn.Module) -> bool:
    """Whether its class's `forward` has arguments beside itself and the hidden states."""
    return len(inspect.signature(type(router).forward).parameters) > 2


@dataclass(frozen=True)
class _Own:
    """A tensor of the block, by its name there."""

    name: str


def _found(block: nn.Module, part: Any) -> Any:
    """What a recorded argument is in a block of the model itself."""
    return operator.attrgetter(part.name)(block) if isinstance(part, _Own) else part


def _recorded_calls(model: PreTrainedModel, names: Iterable[str]) -> dict[str, list[Any]]:
    """Router name -> axes of the hidden states, and the other arguments: a block's own tensors by `_Own`, plain values."""
    calls: dict[str, list[Any]] = {}
    internals.ALL_EXPERTS_FUNCTIONS.register(NO_EXPERTS, _no_experts)
    config = copy.deepcopy(model.config)  # which is changed by what follows
    with torch.device("meta"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initialising on meta warns, in some families
        copied = AutoModelForCausalLM.from_config(config, experts_implementation=NO_EXPERTS).eval()
        hidden_1TD = torch.zeros(1, RECORDED_TOKENS, config.get_text_config().hidden_size)
        for name in names:
            block = copied.get_submodule(name.rpartition(".")[0])
            copied.get_submodule(name).register_forward_pre_hook(_recorder(calls, name, block), with_kwargs=True)
            try:
                block(hidden_1TD)
            except Exception as error:  # after the call it does not matter what a block without values cannot do
                if name not in calls:
                    kind = f"{type(model).__name__}: how its blocks call the router {name} cannot be found out"
                    raise UserError(f"{kind} ({error}); such routers are not supported") from error
    return calls


def _no_experts(_: nn.Module, hidden_states: Tensor, *__: Tensor) -> Tensor:
    """In place of experts, whose functions need to know how many rows each has; part of transformers' experts interface."""
    return torch.zeros_like(hidden_states)


def _recorder(calls: dict[str, list[Any]], name: str, block: nn.Module) -> Any:
    def hook(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(type(router).forward).bind(router, *args, **kwargs).arguments
        hidden, *further = list(given.values())[1:]
        own = dict([*block.named_parameters(), *block.named_buffers()])
        call = [hidden.dim()]
        for part in further:
            found = next((own_name for own_name, tensor in own.items() if tensor is part), None)
            if found is None and isinstance(part, Tensor):
                raise UserError("it is given what its block computes beside the hidden states")
            call.append(part if found is None else _Own(found))
        calls[name] = call

    return hook
