"""What a routing trace says about locality and balance; numpy only, no model.

Letters: T tokens, L layers, K chosen, E experts.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from evaluation.engine.cache.trace import RouteTrace


def reuse_rate_per_layer(trace: RouteTrace) -> npt.NDArray[np.floating]:
    """EOR: mean over neighbouring tokens of one request of |E_t and E_{t-1}| / K; [L], NaN without neighbours."""
    chosen_TLE = _chosen(trace)
    neighbours_T = trace.request_id[1:] == trace.request_id[:-1]
    common_TL = (chosen_TLE[1:] & chosen_TLE[:-1]).sum(-1)[neighbours_T]
    return common_TL.mean(0) / trace.top_k if len(common_TL) else np.full(trace.layers, np.nan)


def routing_summary(trace: RouteTrace) -> dict[str, Any]:
    """EOR per layer and mean beside its chance level K/E; entropy (nats) and variation of the load; dead experts."""
    reuse_L, load_LE = reuse_rate_per_layer(trace), trace.expert_uses
    share_LE = load_LE / load_LE.sum(-1, keepdims=True)
    entropy_L = -np.where(share_LE > 0, share_LE * np.log(np.where(share_LE > 0, share_LE, 1)), 0).sum(-1)
    return {
        "n_tokens": trace.tokens,
        "reuse_rate_mean": _number(reuse_L.mean()),
        "reuse_rate_per_layer": [_number(rate) for rate in reuse_L],
        "chance_reuse_rate": trace.top_k / trace.num_experts,
        "load_entropy_per_layer": entropy_L.tolist(),
        "load_cv_per_layer": (load_LE.std(-1) / load_LE.mean(-1)).tolist(),
        "dead_experts_per_layer": (load_LE == 0).sum(-1).tolist(),
    }


def _chosen(trace: RouteTrace) -> npt.NDArray[np.bool_]:
    chosen_TLE = np.zeros((trace.tokens, trace.layers, trace.num_experts), dtype=bool)
    np.put_along_axis(chosen_TLE, trace.expert_ids.astype(np.int64), True, axis=-1)
    return chosen_TLE


def _number(value: np.floating) -> float | None:
    """NaN (nothing to measure) as null."""
    return None if np.isnan(value) else float(value)
