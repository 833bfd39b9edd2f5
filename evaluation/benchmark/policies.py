"""Cache policies beside the optimum: the misses of each, in units of the optimum's, on held-out text of every domain.

Teacher-forced routing of the model that ships (or another) on the test split, cold per request; and `all domains`, one
request that goes from domain to domain and back, as a long conversation does. `static` gets a profile of all domains
from the validation split. Prints the tables of evaluation/engine/README.md.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.checks import at_least
from configs.load import UserError
from data.corpus import DOMAINS
from data.pieces import spread_pieces
from evaluation.engine.cache.pool import SCOPES
from evaluation.engine.cache.replay import POLICIES, Request, check_choice, replay, requests_of
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
        if not re.fullmatch(r"\d+(,\d+)*", self.slots):
            raise UserError(f"--slots {self.slots!r} is no list of numbers; write for example 4,8,16")

    @property
    def sizes(self) -> list[int]:
        return [int(size) for size in self.slots.split(",")]


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
    tokens = len(ids_TLK)
    return RouteTrace(
        ids_TLK,
        phase=np.ones(tokens, np.uint8),
        request_id=np.zeros(tokens, np.int32),
        call=np.arange(tokens),
        num_experts=traces[0].num_experts,
        layer_ids=traces[0].layer_ids,
    )


def regrets(texts: dict[str, RouteTrace], profile: RouteTrace, *, sizes: Sequence[int]) -> Regrets:
    """The regret of every policy on every text; sizes are slots of a layer, a global pool has as many for each layer."""
    for slots in sizes:
        check_choice(profile, policy="lru", cache_scope="per_layer", slots=slots)
    found: Regrets = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for text, trace in progress.track(texts.items(), description="replaying"):
            requests = requests_of(trace)
            for scope, slots in itertools.product(SCOPES, sizes):
                total = slots * (trace.layers if scope == "global" else 1)
                misses = _misses(trace, profile, requests, scope=scope, slots=total)
                found[scope, slots, text] = {name: count / misses["belady"] for name, count in misses.items()}
    return found


def _misses(
    trace: RouteTrace, profile: RouteTrace, requests: list[Request], *, scope: str, slots: int
) -> dict[str, int]:
    """Policy -> misses with this number of slots in a pool."""
    return {
        policy: replay(
            trace,
            policy=policy,
            cache_scope=scope,
            requests=requests,
            slots=slots,
            profile=profile if policy == "static" else None,
        ).misses
        for policy in POLICIES
    }


def markdown(found: Regrets, *, scope: str, layers: int, num_experts: int) -> list[str]:
    """Lines of a table with a row per size: the geometric mean over the domains, and `all domains`."""
    policies = [policy for policy in POLICIES if policy != "belady"]
    lines = [
        f"| `{scope}`: experts held | " + " | ".join(policies) + " |",
        "|---|" + "---|" * len(policies),
    ]
    for texts, label in ((DOMAINS, ""), (("all domains",), ", one long request")):
        for slots in sorted({slots for name, slots, _ in found if name == scope}):
            held = slots * (layers if scope == "global" else 1)
            row = {p: _mean([found[scope, slots, text][p] for text in texts]) for p in policies}
            cells = [f"**{row[p]:.2f}**" if row[p] == min(row.values()) else f"{row[p]:.2f}" for p in policies]
            lines.append(f"| {held} ({slots / num_experts:.0%}){label} | " + " | ".join(cells) + " |")
    return lines


def _mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def _trace(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: str, domains: Sequence[str], requests: int
) -> RouteTrace:
    pieces = spread_pieces(
        tokenizer, split, domains, tokens=LONGEST, at_least=SHORTEST, every=LONGEST, per_domain=requests
    )
    return teacher_forced_trace(model, pieces, max_length=LONGEST, progress=f"{split} {' '.join(domains)}")[0]
