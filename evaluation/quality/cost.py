"""What asking tasks costs, said before it starts: requests, tokens, and bytes read at most under a budget."""

import math
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from evaluation.engine.engine import Engine
from evaluation.engine.memory.division import Call
from evaluation.quality.batches import batches_that_fit
from evaluation.quality.prompts import build_requests
from evaluation.quality.tasks import LoadedTasks, QualityArguments

SAMPLED = 200
"""Requests of a task that are tokenized; the rest are taken to be as long."""
NEW_TOKENS = 256
"""What a task that says nothing may generate, as the harness has it."""


@dataclass(frozen=True)
class Cost:
    """Of one task, or of one group that was named, for one model.

    Attributes:
        new_tokens: generated at most.
        read_bytes: of experts at most: each once a call. None if all are in memory.
        read_seconds: that takes at the measured speed of the device; None where it was not worth measuring.
    """

    name: str
    requests: int
    prompt_tokens: int
    new_tokens: int
    read_bytes: int | None
    read_seconds: float | None = None


def costs(
    tasks: LoadedTasks, args: QualityArguments, tokenizer: PreTrainedTokenizerBase, engine: Engine | None
) -> list[Cost]:
    """The costs of everything that is asked; builds all requests, computes nothing."""
    of_name: dict[str, list[Cost]] = {}
    for name, task in tasks.tasks.items():
        limit = args.limit if args.limit is None else min(args.limit, len(task.eval_docs))
        requests = build_requests(task, args, tokenizer, limit=limit)
        of_name.setdefault(tasks.group_of.get(name, name), []).append(_cost(name, requests, args, tokenizer, engine))
    speed = None if engine is None else engine.bytes_per_second
    return [_sum(name, found, speed) for name, found in of_name.items()]


def _sum(name: str, found: list[Cost], bytes_per_second: float | None) -> Cost:
    read = [cost.read_bytes for cost in found if cost.read_bytes is not None]
    requests, prompt_tokens = sum(cost.requests for cost in found), sum(cost.prompt_tokens for cost in found)
    read_bytes = sum(read) if read else None
    seconds = read_bytes / bytes_per_second if read_bytes is not None and bytes_per_second else None
    return Cost(name, requests, prompt_tokens, sum(cost.new_tokens for cost in found), read_bytes, seconds)


def _cost(
    name: str, requests: list[Any], args: QualityArguments, tokenizer: PreTrainedTokenizerBase, engine: Engine | None
) -> Cost:
    sample = requests[:: max(1, len(requests) // SAMPLED)]
    texts = ["".join(part for part in request.args if isinstance(part, str)) for request in sample]
    of_sample = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]] if texts else []
    lengths = sorted((of_sample * math.ceil(len(requests) / max(1, len(sample))))[: len(requests)], reverse=True)
    new = 0
    if requests and requests[0].request_type == "generate_until":
        settings = {**requests[0].args[1], **args.gen_kwargs}
        new = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or NEW_TOKENS)

    def call_of(batch: int, length: int) -> Call:
        return Call(batch, batch * length, length + new, keeps=new > 0)

    read_bytes = None
    if engine is not None:
        everything, demand = engine.demand.all_experts, engine.demand.token_experts
        batches = [len(batch) for batch in batches_that_fit(lengths, call_of, engine=engine, most=args.batch_size)]
        experts = sum(everything + max(0, new - 1) * min(everything, demand * batch) for batch in batches)
        read_bytes = experts * engine.expert_bytes
    return Cost(name, len(requests), sum(lengths), new * len(requests), read_bytes)
