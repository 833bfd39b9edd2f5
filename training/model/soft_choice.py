"""A choice of the largest scores made soft, so that it has a gradient. Letters: E experts, K chosen."""

import torch
from torch import Tensor


def soft_choice(scores_E: Tensor, top_k: int, temperature: float) -> Tensor:
    """[..., E] how far each expert is chosen: c = sigmoid((z - threshold) / temperature); ours, not published.

    The threshold is midway between the last score that is chosen and the first that is not. When scores move the threshold
    moves along, so that the sum of all c stays: one expert can only come in for another. So there is no gradient where no
    call is close.
    """
    z_E = scores_E.detach()
    threshold_1 = z_E.topk(top_k + 1, dim=-1).values[..., -2:].mean(-1, keepdim=True)
    closeness_E = torch.sigmoid((z_E - threshold_1) / temperature)
    closeness_E = closeness_E * (1 - closeness_E)
    moves_E = closeness_E / closeness_E.sum(-1, keepdim=True) * (scores_E - z_E)  # of value 0
    return torch.sigmoid((scores_E - threshold_1 - moves_E.sum(-1, keepdim=True)) / temperature)
