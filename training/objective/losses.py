"""The router objective's terms as pure functions of one layer's routing: ReMoE (arXiv 2605.27081) and an LRU variant.

Every function returns a **sum** over its items; `counts` says how many items a batch has. Dividing once by the count
over all micro-batches and ranks makes the numbers independent of both. Padding (document id < 0) and document edges
break every pair (t, t-d). float32 throughout. No shape depends on what a tensor holds, so that an accelerator is never
waited for: sequences and windows have as many places as there may be, and what is empty counts for nothing.
Letters: B batch, S sequence, E experts, K chosen, C cache slots, N places for sequences, M for windows, W window.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from data.batches import IGNORE_LABEL
from training.model.soft_choice import soft_choice

EPSILON = 1e-8


def same_document(document_ids_BS: Tensor, lag: int) -> Tensor:
    """[B, S] bool: position t and t - lag are tokens of the same document."""
    mask = torch.zeros_like(document_ids_BS, dtype=torch.bool)
    if 0 < lag < document_ids_BS.shape[1]:
        mask[:, lag:] = (document_ids_BS[:, lag:] == document_ids_BS[:, :-lag]) & (document_ids_BS[:, lag:] >= 0)
    return mask


def sequence_index(document_ids_BS: Tensor) -> Tensor:
    """[B, S] int64: number of the sequence (a document's run inside one row) that a position belongs to."""
    starts = document_ids_BS != torch.roll(document_ids_BS, 1, dims=1)
    starts[:, 0] = True
    return starts.flatten().cumsum(0).view_as(document_ids_BS) - 1


def full_windows(document_ids_BS: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """[M, W] flat positions of the non-overlapping windows, and [M] bool: whether there is one.

    They restart with every sequence, partial ones are dropped.
    """
    flat, (rows, length) = sequence_index(document_ids_BS).flatten(), document_ids_BS.shape
    lengths_N = torch.zeros_like(flat).scatter_add_(0, flat, torch.ones_like(flat))
    first_N = lengths_N.cumsum(0) - lengths_N
    position = torch.arange(flat.numel(), device=flat.device)
    offset = position - first_N[flat]
    begins = (offset % window == 0) & (offset + window <= lengths_N[flat]) & (document_ids_BS.flatten() >= 0)
    number, most = begins.cumsum(0) - 1, rows * (length // window)
    first_M = torch.zeros(most + 1, dtype=torch.long, device=flat.device)
    first_M = first_M.scatter_(0, torch.where(begins, number, most), position)[:-1]
    there_M = torch.arange(most, device=flat.device) < begins.sum()
    return first_M.unsqueeze(1) + torch.arange(window, device=flat.device), there_M


def counts(document_ids_BS: Tensor, labels_BS: Tensor, *, lags: Sequence[int], window: int) -> dict[str, Tensor]:
    """How many items each sum below runs over: one float64 scalar a key, to be added over micro-batches and ranks.

    Keys: tokens (with a label), positions (not padding), sequences (of two tokens or more), windows, pairs_<lag>.
    """
    pairs = same_document(document_ids_BS, 1)
    index = sequence_index(document_ids_BS).flatten()
    sequences = torch.zeros(len(index), device=index.device).index_add_(0, index, pairs.flatten().float())
    items = {
        "tokens": (labels_BS != IGNORE_LABEL).sum(),
        "positions": (document_ids_BS >= 0).sum(),
        "sequences": (sequences > 0).sum(),
        "windows": full_windows(document_ids_BS, window)[1].sum(),
        **{f"pairs_{lag}": same_document(document_ids_BS, lag).sum() for lag in {1, *lags}},
    }
    return {key: value.double() for key, value in items.items()}


def trust_kl_sum(
    probs_BSE: Tensor, log_probs_BSE: Tensor, reference_log_probs_BSE: Tensor, document_ids_BS: Tensor
) -> Tensor:
    """L_trust: KL(P_t || P_t^ref), no gradient to the reference; over valid positions."""
    kl_BS = (probs_BSE * (log_probs_BSE - reference_log_probs_BSE.detach())).sum(-1)
    return _over_tokens(kl_BS, document_ids_BS)


def _over_tokens(values_BS: Tensor, document_ids_BS: Tensor) -> Tensor:
    """The sum over what is not padding."""
    return values_BS.where(document_ids_BS >= 0, 0.0).sum()


def previous_choice(ids_BSK: Tensor, document_ids_BS: Tensor, n_experts: int) -> Tensor:
    """[B, S, E] bool: expert is in E_{t-1}, the hard choice at the position before; none at a sequence's start."""
    chosen = ids_BSK.new_zeros(*ids_BSK.shape[:2], n_experts, dtype=torch.bool).scatter_(-1, ids_BSK, True)
    return torch.roll(chosen, 1, dims=1) & same_document(document_ids_BS, 1).unsqueeze(-1)


def lru_content(ids_BSK: Tensor, document_ids_BS: Tensor, n_experts: int, slots: int) -> Tensor:
    """[B, S, E] bool: expert is held by an LRU cache of `slots` experts just before position t; cold at sequence starts.

    What an event-atomic LRU holds is the `slots` experts with the latest last use; inside one event the heavier expert
    counts as the later one (`ids_BSK` comes heaviest first). So no simulation step by step is needed: a running maximum
    of use times, and its `slots` largest.
    """
    _, length, k = ids_BSK.shape
    times_SK = torch.arange(length * k, device=ids_BSK.device).view(length, k).flip(-1) + 1
    used = ids_BSK.new_zeros(*ids_BSK.shape[:2], n_experts).scatter_(-1, ids_BSK, times_SK.expand_as(ids_BSK))
    last_use = torch.roll(used.cummax(dim=1).values, 1, dims=1)
    last_use[:, 0] = 0
    position = torch.arange(length, device=ids_BSK.device).expand_as(document_ids_BS)
    starts = torch.where(same_document(document_ids_BS, 1), 0, position).cummax(dim=1).values
    last_use = last_use.masked_fill(last_use <= (starts * k).unsqueeze(-1), 0)  # used before this sequence began
    least = last_use.topk(min(slots, n_experts), dim=-1).values[..., -1:]
    return (last_use >= least.clamp(min=1)) & (document_ids_BS >= 0).unsqueeze(-1)


def reuse_loss_sum(probs_BSE: Tensor, reusable_BSE: Tensor, document_ids_BS: Tensor, top_k: int) -> Tensor:
    """L_reuse: -log(rho + 1e-8), summed over sequences of two tokens or more.

    rho is the mean over t >= 2 of (1/K) * sum of P_t over the reusable set, no gradient through the set; the log is
    taken per sequence, after the mean over t. With `previous_choice` this is ReMoE's term, with `lru_content` ours.
    """
    pairs = same_document(document_ids_BS, 1)
    mass_BS = (probs_BSE * reusable_BSE).sum(-1) / top_k * pairs
    index = sequence_index(document_ids_BS).flatten()
    length_N = torch.zeros(len(index), device=index.device).index_add(0, index, pairs.flatten().float())
    mass_N = torch.zeros(len(index), device=index.device).index_add(0, index, mass_BS.flatten())
    return -torch.log(mass_N / length_N.clamp(min=1) + EPSILON).where(length_N > 0, 0.0).sum()


def miss_loss_sum(
    logits_BSE: Tensor, held_BSE: Tensor, document_ids_BS: Tensor, top_k: int, temperature: float
) -> Tensor:
    """L_miss: the miss rate of a cache that holds `held_BSE`, made soft, over valid positions; ours, not published.

    The sum of `soft_choice` outside the cache / K. There is no gradient where all close calls are held or none is, and clear
    choices and their mixing weights stay as they are. No gradient through the set.
    """
    chosen_BSE = soft_choice(logits_BSE, top_k, temperature)
    miss_BS = chosen_BSE.masked_fill(held_BSE, 0.0).sum(-1) / top_k
    return _over_tokens(miss_BS, document_ids_BS)


def soft_cache(requests_BSE: Tensor, document_ids_BS: Tensor, *, slots: int, top_k: int, decay: float) -> Tensor:
    """[B, S, E] c_t: how far a soft cache holds each expert just before position t (MELINOE, arXiv 2602.11192).

    c_{t+1} = (decay Z_t c_t + r_t) / Z_{t+1} and Z_{t+1} = decay Z_t + K / C, both 0 where a sequence starts: what was asked
    for fades, and the parts add up to C. Worked out by doubling distances, with gradients to earlier requests.
    """
    follows_BS1 = same_document(document_ids_BS, 1).unsqueeze(-1).to(requests_BSE.dtype)
    step = torch.cat([requests_BSE, torch.full_like(requests_BSE[..., :1], top_k / slots)], dim=-1)
    sums = torch.nn.functional.pad(step, (0, 0, 1, 0))[:, :-1] * follows_BS1  # before position t: what t - 1 asked for
    keeps = decay * follows_BS1
    distance = 1
    while distance < document_ids_BS.shape[1]:
        earlier = torch.nn.functional.pad(sums, (0, 0, distance, 0))[:, :-distance]
        sums = sums + keeps * earlier
        keeps = keeps * torch.nn.functional.pad(keeps, (0, 0, distance, 0))[:, :-distance]
        distance *= 2
    return sums[..., :-1] / sums[..., -1:].clamp_min(EPSILON)


def soft_request_sum(requests_BSE: Tensor, cache_BSE: Tensor, document_ids_BS: Tensor) -> Tensor:
    """MELINOE's cache term: <r_t, 1 - c_t>, what is asked for and not held, over valid positions."""
    return _over_tokens((requests_BSE * (1 - cache_BSE)).sum(-1), document_ids_BS)


def margin_rank_sum(
    probs_BSE: Tensor, reference_logits_BSE: Tensor, document_ids_BS: Tensor, *, margin: float
) -> Tensor:
    """MELINOE's rank term: relu(margin - (P_i - P_j)) of pairs that the original router orders so, their mean, over positions."""
    order = reference_logits_BSE.argsort(dim=-1, descending=True)
    ranked_BSE = probs_BSE.gather(-1, order)
    experts = ranked_BSE.shape[-1]
    total = sum(
        _over_tokens(torch.relu(margin - (ranked_BSE[..., :-apart] - ranked_BSE[..., apart:])).sum(-1), document_ids_BS)
        for apart in range(1, experts)
    )
    return torch.as_tensor(total, device=probs_BSE.device) / (experts * (experts - 1) / 2)


def symmetric_kl_sums(probs_BSE: Tensor, log_probs_BSE: Tensor, document_ids_BS: Tensor, lags: Sequence[int]) -> Tensor:
    """[D] for each of `lags` half the sum of both KLs between P_t and P_{t-lag}, gradient to both: L_smooth, parts of L_lag."""
    pairs_DBS = [same_document(document_ids_BS, lag) for lag in lags]
    return _SymmetricKl.apply(probs_BSE, log_probs_BSE, pairs_DBS, lags)


class _SymmetricKl(torch.autograd.Function):
    """0.5 * sum over pairs of (P_t - P_s) (log P_t - log P_s); nothing is kept but the probabilities, however many lags."""

    @staticmethod
    def forward(
        ctx: Any, probs_BSE: Tensor, log_probs_BSE: Tensor, pairs_DBS: Sequence[Tensor], lags: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(probs_BSE, log_probs_BSE, *pairs_DBS)
        ctx.lags = lags
        sums = []
        for pairs_BS, lag in zip(pairs_DBS, lags, strict=True):
            products_BS = torch.linalg.vecdot(_change(probs_BSE, lag), _change(log_probs_BSE, lag))
            sums.append(products_BS.where(pairs_BS[:, lag:], 0.0).sum())
        return 0.5 * torch.stack(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_D: Tensor) -> tuple[Tensor, Tensor, None, None]:
        probs_BSE, log_probs_BSE, *pairs_DBS = ctx.saved_tensors
        of_probs, of_log_probs = torch.zeros_like(probs_BSE), torch.zeros_like(log_probs_BSE)
        for pairs_BS, lag, grad in zip(pairs_DBS, ctx.lags, grad_D, strict=True):
            weight_BS1 = (0.5 * grad * pairs_BS[:, lag:]).unsqueeze(-1)
            for of_one, other in ((of_probs, log_probs_BSE), (of_log_probs, probs_BSE)):
                change_BSE = _change(other, lag).mul_(weight_BS1)
                of_one[:, lag:] += change_BSE
                of_one[:, :-lag] -= change_BSE
        return of_probs, of_log_probs, None, None


def _change(tensor_BSE: Tensor, lag: int) -> Tensor:
    return tensor_BSE[:, lag:] - tensor_BSE[:, :-lag]


def working_set_sum(probs_BSE: Tensor, document_ids_BS: Tensor, window: int) -> Tensor:
    """L_ws: entropy (nats) of P averaged over a window, over the full windows."""
    windows_MW, there_M = full_windows(document_ids_BS, window)
    mean_ME = probs_BSE.flatten(0, 1)[windows_MW].mean(1)
    return -(mean_ME * torch.log(mean_ME + EPSILON)).sum(1).where(there_M, 0.0).sum()


def load_balance_sum(probs_BSE: Tensor, ids_BSK: Tensor, document_ids_BS: Tensor) -> Tensor:
    """Switch Transformer's auxiliary loss (arXiv 2101.03961, eq. 4) of one layer, times its number of positions."""
    valid, n_experts = document_ids_BS >= 0, probs_BSE.shape[-1]
    load_E = chosen_by_expert(ids_BSK, document_ids_BS, n_experts).float()
    probs_E = probs_BSE.where(valid.unsqueeze(-1), 0.0).sum((0, 1)) / valid.sum()
    return n_experts * (load_E / load_E.sum() * probs_E).sum() * valid.sum()


def chosen_by_expert(ids_BSK: Tensor, document_ids_BS: Tensor, n_experts: int) -> Tensor:
    """[E] float64: how often each expert was chosen, by tokens that are no padding."""
    counted_BSK = (document_ids_BS >= 0).unsqueeze(-1).expand_as(ids_BSK).double()
    return counted_BSK.new_zeros(n_experts).scatter_add_(0, ids_BSK.flatten(), counted_BSK.flatten())
