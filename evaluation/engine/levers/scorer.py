"""How scores are made of what a layer's router gives.

Axes: T tokens, E experts, K chosen.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.load import UserError
from evaluation.engine.levers.scores import Array, Ids, Scores, probabilities
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
        z_TE = logits_TE.float().cpu().numpy()
        mass_TE = probabilities(z_TE, self.kind.weighing.scoring)
        own_T1: Any = 1.0
        if self.kind.weighing.normalised:
            own_T1 = np.take_along_axis(mass_TE, ids_TK, 1).sum(1, keepdims=True)
            mass_TE = mass_TE / own_T1
        scoring, choosing = self.kind.weighing.scoring, self.kind.choosing
        if choosing.is_plain:
            return Scores(z_TE, mass_TE, mass_TE, ids_TK, lambda other_TE: probabilities(other_TE, scoring) / own_T1)
        bias_E = None if self.bias_E is None else self.bias_E.float().cpu()
        allowed_TE = choosing.allowed(choosing.scores(torch.from_numpy(z_TE), bias_E)).numpy()

        def decided(other_TE: Array) -> Array:
            if bias_E is None:
                found_TE = probabilities(other_TE, scoring)
            else:
                found_TE = choosing.scores(torch.from_numpy(other_TE), bias_E).numpy()
            return np.where(allowed_TE, found_TE / own_T1, -np.inf)

        return Scores(z_TE, mass_TE, decided(z_TE), ids_TK, decided)
