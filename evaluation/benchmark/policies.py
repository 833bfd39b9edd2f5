"""Cache policies beside the optimum: the misses of each, in units of the optimum's, on held-out text of every domain.

Teacher-forced routing of the model that ships (or another) on the test split, cold per request; and `all domains`, one
request that goes from domain to domain and back, as a long conversation does. `static` gets a profile of all domains
from the validation split. Prints the tables of evaluation/engine/README.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.checks import at_least, whole_numbers
from data.corpus import DOMAINS
from data.pieces import spread_pieces
from evaluation.engine.cache.pool import SCOPES
from evaluation.engine.cache.replay import POLICIES, check_choice, replay_all
from evaluation.engine.cache.trace import RouteTrace
from evaluation.tracing import teacher_forced_trace
from training.model.loading import load_pretrained, load_tokenizer, local_folder
from training.run_folder.router_delta import load_for

SHORTEST, LONGEST = 256, 512  # tokens of a request
Regrets = dict[tuple[str, int, str], dict[str, float]]
"""(scope, slots, text) -> policy -> misses / misses of the optimum."""


@dataclass(frozen=True, kw_only=True)
class PoliciesBenchmark:
    """Compare all cache policies with the optimum on held-out text of the shipped corpus.

    example:
      remoe bench policies --model data/embedded/model --slots 4,6,8,12,16,24
    """

    model: str = "data/embedded/model"  # folder or hub name
    router_delta: str | None = None  # use the routers of this delta
    slots: str = "4,6,8,12,16,24"  # sizes, in slots of a layer, with commas between
    requests: int = 10  # of each domain

    def __post_init__(self) -> None:
        at_least(self, requests=2)
        _ = self.sizes

    @property
    def sizes(self) -> list[int]:
        return whole_numbers(self.slots, flag="--slots", example="4,8,16")


def benchmark(options: PoliciesBenchmark) -> None:
    """Trace, replay, print a table for each scope."""
    delta = load_for(local_folder(options.model), options.router_delta) if options.router_delta else None
    model, tokenizer = load_pretrained(options.model, router_delta=delta), load_tokenizer(options.model)
    traces = {domain: _trace(model, tokenizer, "test", [domain], options.requests) for domain in DOMAINS}
    profile = _trace(model, tokenizer, "validation", DOMAINS, options.requests)
    texts = traces | {"all domains": one_request(list(traces.values()))}
    found = regrets(texts, profile, sizes=options.sizes)
    for scope in SCOPES:
        lines = markdown(found, scope=scope, layers=profile.layers, num_experts=profile.num_experts)
        print("\n".join(lines), end="\n\n")


def one_request(traces: Sequence[RouteTrace]) -> RouteTrace:
    """The first two requests of every trace, the first ones of all before the second ones, as a single request."""
    ids_TLK = np.concatenate([trace.expert_ids[trace.request_id == n] for n in range(2) for trace in traces])
    number_T = np.arange(len(ids_TLK))
    return replace(
        traces[0], expert_ids=ids_TLK, phase=np.ones_like(number_T), request_id=np.zeros_like(number_T), call=number_T
    )


def regrets(texts: dict[str, RouteTrace], profile: RouteTrace, *, sizes: Sequence[int]) -> Regrets:
    """The regret of every policy on every text; sizes are slots of a layer, a global pool has as many for each layer."""
    for slots in sizes:
        check_choice(profile, policy="lru", cache_scope="per_layer", slots=slots)
    found: Regrets = {}
    for text, trace in texts.items():
        for scope in SCOPES:
            pools = {slots * (trace.layers if scope == "global" else 1): slots for slots in sizes}
            results = replay_all(trace, POLICIES, scopes=[scope], sizes=list(pools), profile=profile)
            optimum = {result.slots: result.misses for result in results if result.policy == "belady"}
            for result in results:
                regret = result.misses / optimum[result.slots]
                found.setdefault((scope, pools[result.slots], text), {})[result.policy] = regret
    return found


def markdown(found: Regrets, *, scope: str, layers: int, num_experts: int) -> list[str]:
    """Lines of a table with a row per size: the geometric mean over the domains, and `all domains`."""
    policies = [policy for policy in POLICIES if policy != "belady"]
    lines = [f"| `{scope}`: experts held | " + " | ".join(policies) + " |", "|---|" + "---|" * len(policies)]
    for texts, label in ((DOMAINS, ""), (("all domains",), ", one long request")):
        for slots in sorted({slots for name, slots, _ in found if name == scope}):
            held = slots * (layers if scope == "global" else 1)
            row = [
                np.exp(np.mean([np.log(found[scope, slots, text][policy]) for text in texts])) for policy in policies
            ]
            cells = [f"**{mean:.2f}**" if mean == min(row) else f"{mean:.2f}" for mean in row]
            lines.append(f"| {held} ({slots / num_experts:.0%}){label} | " + " | ".join(cells) + " |")
    return lines


def _trace(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: str, domains: Sequence[str], requests: int
) -> RouteTrace:
    pieces = spread_pieces(
        tokenizer, split, domains, tokens=LONGEST, at_least=SHORTEST, every=LONGEST, per_domain=requests
    )
    return teacher_forced_trace(model, pieces, max_length=LONGEST, progress=f"{split} {' '.join(domains)}")[0]
