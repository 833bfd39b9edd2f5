"""How scores are made of what a layer's router gives.

Axes: T tokens, E experts, K chosen.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.load import UserError
from evaluation.engine.levers.scores import Array, Ids, Scores, mixing_mass
from training.model.router_calls import AskedRouter
from training.model.router_kind import RouterKind, correction_bias


@dataclass(frozen=True)
class Scorer:
    """Makes `Scores` of what one layer's router gives.

    Args:
        kind: of the router; it must say how weights and choices are made.
        bias_E: its correction bias, if it has one.
    """

    kind: RouterKind
    bias_E: Tensor | None = None

    @classmethod
    def of(cls, asked: AskedRouter, kind: RouterKind) -> "Scorer":
        """Of this router; a `UserError` if it is not known how it weighs or chooses."""
        if kind.weighing is None or kind.choosing is None:
            raise UserError(
                f"{type(asked.module).__name__} {'chooses' if kind.choosing is None else 'weighs'} experts in a way that "
                f"levers do not know ({kind}); leave --lever out"
            )
        return cls(kind, None if kind.choosing.bias is None else correction_bias(asked, kind))

    def scores(self, logits_TE: Tensor, ids_TK: Ids) -> Scores:
        """Of one call."""
        assert self.kind.weighing is not None
        assert self.kind.choosing is not None
        z_TE, weighing, choosing = logits_TE.float().cpu().numpy(), self.kind.weighing, self.kind.choosing
        mass_TE, own_T1 = mixing_mass(z_TE, ids_TK, weighing.scoring == "sigmoid", weighing.normalised)
        if choosing.is_plain:
            return Scores(z_TE, mass_TE, mass_TE, ids_TK, _never)
        bias_E = None if self.bias_E is None else self.bias_E.float().cpu()
        allowed_TE = choosing.allowed(choosing.scores(torch.from_numpy(z_TE), bias_E)).numpy()

        def decided(other_TE: Array) -> Array:
            if bias_E is None:
                found_TE, _ = mixing_mass(other_TE, ids_TK, weighing.scoring == "sigmoid", False)
            else:
                found_TE = choosing.scores(torch.from_numpy(other_TE), bias_E).numpy()
            return np.where(allowed_TE, found_TE / own_T1, -np.inf)

        return Scores(z_TE, mass_TE, decided(z_TE), ids_TK, decided)


def _never(other_TE: Array) -> Array:
    raise AssertionError("where the largest logits are chosen these decide")
