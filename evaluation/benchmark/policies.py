"""Which cache policy wins: the misses of each, in units of the optimum's, on held-out text of every shipped domain.

Teacher-forced routing of the model that ships (or another) on the test split, cold per request; and `all domains`, one
request that goes from domain to domain and back, as a long conversation does. `static` gets a profile of all domains
from the validation split. Prints the tables of evaluation/engine/README.md.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.command import run
from configs.load import UserError
from data.batches import tokenize
from data.corpus import DOMAINS, read_corpus
from evaluation.engine.cache.pool import SCOPES
from evaluation.engine.cache.replay import POLICIES, check_choice, replay, requests_of
from evaluation.engine.cache.trace import RouteTrace
from evaluation.tracing import teacher_forced_trace
from training.model.loading import load_pretrained, load_tokenizer, local_folder
from training.run_folder.router_delta import load_for

EXAMPLE = """example:
  python -m evaluation.benchmark.policies --model data/embedded/model --slots 4,6,8,12,16,24
"""
SHORTEST, LONGEST = 256, 512  # tokens of a request
Regrets = dict[tuple[str, int, str], dict[str, float]]
"""(scope, slots, text) -> policy -> misses / misses of the optimum."""


def main(argv: Sequence[str] | None = None) -> None:
    """Trace, replay, print."""
    args = _parser().parse_args(argv)
    delta = load_for(local_folder(args.model), args.router_delta) if args.router_delta else None
    model, tokenizer = load_pretrained(args.model, router_delta=delta), load_tokenizer(args.model)
    traces = {domain: _trace(model, tokenizer, "test", [domain], args.requests) for domain in DOMAINS}
    profile = _trace(model, tokenizer, "validation", DOMAINS, args.requests)
    texts = traces | {"all domains": one_request(list(traces.values()))}
    found = regrets(texts, profile, sizes=args.slots)
    for scope in SCOPES:
        print(
            "\n".join(markdown(found, scope=scope, layers=profile.layers, num_experts=profile.num_experts)), end="\n\n"
        )


def one_request(traces: Sequence[RouteTrace]) -> RouteTrace:
    """The first two requests of every trace, the first ones of all before the second ones, as a single request."""
    ids_TLK = np.concatenate([trace.expert_ids[trace.request_id == n] for n in range(2) for trace in traces])
    tokens = len(ids_TLK)
    return RouteTrace(
        ids_TLK, phase=np.ones(tokens, np.uint8), request_id=np.zeros(tokens, np.int32), call=np.arange(tokens),
        num_experts=traces[0].num_experts, layer_ids=traces[0].layer_ids,
    )  # fmt: skip


def regrets(texts: dict[str, RouteTrace], profile: RouteTrace, *, sizes: Sequence[int]) -> Regrets:
    """Of every policy on every text; sizes are slots of a layer, a global pool has as many for each layer."""
    for slots in sizes:
        check_choice(profile, policy="lru", cache_scope="per_layer", slots=slots)
    found: Regrets = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for text, trace in progress.track(texts.items(), description="replaying"):
            requests = requests_of(trace)
            for scope in SCOPES:
                for slots in sizes:
                    misses = {
                        policy: replay(
                            trace, policy=policy, cache_scope=scope, requests=requests,
                            slots=slots * (trace.layers if scope == "global" else 1),
                            profile=profile if policy == "static" else None,
                        ).misses
                        for policy in POLICIES
                    }  # fmt: skip
                    found[scope, slots, text] = {name: count / misses["belady"] for name, count in misses.items()}
    return found


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
    pieces = [piece for domain in domains for piece in _pieces(tokenizer, split, domain, requests)]
    return teacher_forced_trace(model, pieces, max_length=LONGEST, progress=f"{split} {' '.join(domains)}")[0]


def _pieces(tokenizer: PreTrainedTokenizerBase, split: str, domain: str, count: int) -> list[npt.NDArray[np.integer]]:
    """`count` pieces of documents, evenly over the split."""
    documents = tokenize((document.text for document in read_corpus(split, [domain])), tokenizer)
    pieces = [document[at : at + LONGEST] for document in documents for at in range(0, len(document), LONGEST)]
    pieces = [piece for piece in pieces if len(piece) >= SHORTEST]
    if not 2 <= count <= len(pieces):
        raise UserError(
            f"--requests {count}: {split} has {len(pieces)} texts of {SHORTEST} tokens in {domain}, 2 at least"
        )
    return [pieces[number * len(pieces) // count] for number in range(count)]


def sizes(text: str) -> list[int]:
    """`4,6` -> [4, 6]."""
    return [int(size) for size in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmark.policies",
        description="Compare all cache policies with the optimum on held-out text of the shipped corpus.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="data/embedded/model", help="folder or hub name (default: %(default)s)")
    parser.add_argument("--router-delta", metavar="DIR", help="use the routers of this delta")
    parser.add_argument(
        "--slots", type=sizes, default="4,6,8,12,16,24", help="sizes, in slots of a layer (default: %(default)s)"
    )
    parser.add_argument("--requests", type=int, default=10, help="requests of each domain (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
