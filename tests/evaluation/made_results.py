"""A made-up results file of four arms, one with three seeds; plausible, smooth and the same at every call."""

import math
from typing import Any

from evaluation.results import Results, checked_results

SIZES = (4, 6, 8, 12, 16, 24, 32)
POLICIES = {"lru": 1.0, "lfu": 1.06, "fifo": 1.08, "belady": 0.72}
TASKS = {
    "arithmetic": ("exact_match", 0.51, 0.0),
    "headword": ("acc", 0.44, 0.25),
    "letters": ("exact_match", 0.78, 0.0),
    "next_line_prose": ("acc", 0.41, 0.25),
    "next_line_code": ("acc", 0.53, 0.25),
}
DOMAINS = {"prose": 85.1, "code": 21.7, "glosses": 96.3, "puzzles": 5.2}
DEMAND_BYTES = 1327104
# name: objective, coefficients, EOR, factor on misses, mean perplexity change
ARMS: dict[str, tuple[str | None, dict[str, float], float, float, float]] = {
    "base": (None, {}, 0.347, 1.0, 0.0),
    "ce_only": ("ce_only", {}, 0.349, 0.998, -0.0011),
    "remoe": ("remoe", {"reuse_coef": 0.2, "router_kl_coef": 0.45, "smooth_coef": 0.05}, 0.47, 0.77, 0.0162),
    "cache": ("cache", {"reuse_coef": 0.6, "router_kl_coef": 0.45}, 0.466, 0.70, 0.0089),
}


def made_results(arms: tuple[str, ...] = tuple(ARMS), *, cache_seeds: int = 3) -> Results:
    """A fresh copy each time; change it as a test needs."""
    return checked_results(made_content(arms, cache_seeds=cache_seeds))


def made_content(arms: tuple[str, ...] = tuple(ARMS), *, cache_seeds: int = 3) -> dict[str, Any]:
    """The same as a file of JSON has it."""
    return {
        "format_version": 1,
        "created": "2026-11-22T13:00:00Z",
        "reproduce": {
            "command": "remoe run configs/run/demo.yaml",
            "commit": "abc123+dirty",
            "config": {"train": {"max_steps": 400, "learning_rate": 0.002}, "arms": list(arms)},
            "machine": {"cpu": "Example CPU @ 2.2 GHz", "cores": 2, "memory_gib": 23.4, "torch": "2.13.0"},
            "seconds": {"train": 300.1, "evaluate": 200.2},
        },
        "model": {"name": "data/embedded/model", "n_parameters": 7008192, "layers": 4, "experts": 32, "top_k": 4,
                  "expert_bytes": 82944, "token_demand_bytes": DEMAND_BYTES, "dtype": "bfloat16"},
        "plans": [_plan(budget, slots) for budget, slots in ((46 * 2**20, 20), (64 * 2**20, 128))],
        "arms": {name: _arm(name, cache_seeds if name == "cache" else 1) for name in arms},
    }  # fmt: skip


def _plan(budget_bytes: int, slots: int) -> dict[str, Any]:
    parts = {"resident_bytes": 8 * 2**20, "buffer_bytes": 2**20, "kv_bytes": 2**18, "activation_bytes": 26 * 2**20}
    return {
        "division": {
            "budget_bytes": budget_bytes, **parts, "expert_cache_bytes": slots * 82944, "context_tokens": 256, "slots": slots
        },
        "read_bandwidth": {"bytes_per_second": 2e9},
        "measured": {"compute_ms": 4.0},
    }  # fmt: skip


def _arm(name: str, n_seeds: int) -> dict[str, Any]:
    objective, coefficients, *_ = ARMS[name]
    return {
        "objective": objective,
        "coefficients": dict(coefficients),
        "runs": [_run(name, seed) for seed in range(n_seeds)],
    }


def _run(name: str, seed: int) -> dict[str, Any]:
    _, _, reuse, factor, cost = ARMS[name]
    reuse, factor, cost = reuse + 0.004 * seed, factor + 0.01 * seed, cost + (0.0004 * seed if cost else 0)
    tuned = name != "base"
    tasks = {
        task: {"metric": metric, "value": value - 2 * cost * (i % 2), "stderr": 0.028, "n": 300, "chance": chance}
        for i, (task, (metric, value, chance)) in enumerate(TASKS.items())
    }
    perplexity = {
        domain: {"word_perplexity": value * (1 + 1.6 * cost), "perplexity": value**0.6 * (1 + cost), "n": 300}
        for domain, value in DOMAINS.items()
    }
    return {
        "seed": seed if tuned else None,
        "history": [_record(step, reuse, seed) for step in range(10, 401, 10)] if tuned else [],
        "quality": {"tasks": tasks, "perplexity": perplexity, "mean_perplexity": 12.9 * (1 + cost)},
        "difference": _difference(cost) if tuned else None,
        "routing": {
            "n_tokens": 60000,
            "reuse_rate_mean": reuse,
            "reuse_rate_per_layer": [reuse + 0.05 * (layer - 1.5) for layer in range(4)],
            "chance_reuse_rate": 0.125,
            "load_entropy_per_layer": [3.32, 3.28, 3.21, 3.17],
            "load_cv_per_layer": [0.41, 0.45, 0.52, 0.58],
            "dead_experts_per_layer": [0, 0, 0, 0],
            "nll": 3.4 + cost,
        },
        "replay": [_replay(policy, slots, factor) for policy in POLICIES for slots in SIZES],
        "lru_curves": {
            "per_layer": {"accesses": 960000, "misses": [960000] * 4 + [_lru_misses(s, factor) for s in range(4, 33)]},
            "global": {
                "accesses": 960000,
                "misses": [960000] * 16 + [_lru_misses(s // 4, factor) for s in range(16, 129)],
            },
        },
        "decode": [_decode(demands, factor) for demands in (0.5, 1.0, 2.0, 4.0)],
    }


def _record(step: int, reuse: float, seed: int) -> dict[str, float]:
    wave = 0.03 * math.sin(step * 1.7 + seed) + 0.02 * math.sin(step * 0.31 + 2 * seed)
    grown = 1 - math.exp(-step / 120)
    return {
        "train/global_step": step,
        "train/loss": 3.42 - 0.02 * grown + wave,
        "moe/reuse_rate_mean": 0.347 + (reuse - 0.347) * grown + wave / 9,
    }


def _difference(cost: float) -> dict[str, Any]:
    tasks = {}
    for i, task in enumerate(TASKS):
        middle = -2 * cost * (i % 2) + 0.002 * (i % 3)
        tasks[task] = {"difference": middle, "low": middle - 0.017, "high": middle + 0.017}
    perplexity = {}
    for i, domain in enumerate([*DOMAINS, "mean"]):
        middle = cost * (1 + 0.2 * (i - 1.5)) if domain != "mean" else cost
        perplexity[domain] = {"relative": middle, "low": middle - 0.0021, "high": middle + 0.0021}
    return {"tasks": tasks, "perplexity": perplexity}


def _lru_misses(slots: int, factor: float) -> int:
    return int(_replay("lru", slots, factor)["misses"])


def _replay(policy: str, slots: int, factor: float) -> dict[str, Any]:
    first = 0.061
    share = (0.66 * math.exp(-(slots - 4) / 7.5)) * factor * POLICIES[policy] if slots < 32 else 0.0
    misses = round(960000 * (share + first))
    optimum = round(960000 * (share / POLICIES[policy] * POLICIES["belady"] + first))
    return {
        "policy": policy, "cache_scope": "per_layer", "slots": slots, "accesses": 960000, "misses": misses,
        "hit_rate": 1 - misses / 960000, "first_touches": round(960000 * first),
        "misses_without_first_touches": misses - round(960000 * first), "policy_regret": misses / optimum,
    }  # fmt: skip


def _decode(demands: float, factor: float) -> dict[str, Any]:
    hits = 0.0 if demands < 1 else 1 - 0.75 * factor / demands**0.7
    return {
        "expert_cache_bytes": int(demands * DEMAND_BYTES), "demands": demands,
        "hit_rate": {"prefill": hits / 2, "decode": hits}, "bytes_read_per_token": DEMAND_BYTES * (1 - hits),
        "ttft_ms": _turns(40.0 - 9 * hits), "tpot_ms": _turns(11.0 - 5 * hits), "mean_ttft_ms": 40.0 - 9 * hits,
        "mean_tpot_ms": 11.0 - 5 * hits, "output_throughput": 90 + 30 * hits, "n_prompts": 8, "n_tokens": 512,
        "repeats": 2, "cache_policy": "decayed", "cache_scope": "global",
    }  # fmt: skip


def _turns(middle: float) -> list[float]:
    """A time of 16 turns, each up to a tenth away from the middle."""
    return [middle * (1 + 0.1 * math.sin(2.3 * turn)) for turn in range(16)]


def changed(results: Any, *path: str | int, value: Any) -> Any:
    """`results`, models or JSON, with another value at a place."""
    node = results
    for key in path[:-1]:
        node = node[key] if isinstance(node, dict | list) else getattr(node, str(key))
    if isinstance(node, dict | list):
        node[path[-1]] = value  # type: ignore[index]
    else:
        setattr(node, str(path[-1]), value)
    return results
