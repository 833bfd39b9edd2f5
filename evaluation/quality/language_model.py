"""Models as lm-evaluation-harness asks them, resident or paged: its Hugging Face model with batches that fit.

The harness's own class makes the logits of every position of a batch and takes as many requests at once as it is told.
Here logits are made of scored positions only, some at a time, and a batch is as large as memory allows.
Letters: B requests, S positions of the longest.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar
from weakref import finalize

import torch
from lm_eval.api.instance import Instance  # type: ignore[import-untyped, unused-ignore]
from lm_eval.api.registry import register_model  # type: ignore[import-untyped, unused-ignore]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped, unused-ignore]
from lm_eval.models.utils import normalize_gen_kwargs  # type: ignore[import-untyped, unused-ignore]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-untyped, unused-ignore]
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.load import UserError
from evaluation.engine.engine import Engine
from evaluation.engine.loading import load
from evaluation.engine.memory.division import Call
from evaluation.engine.options import EngineOptions
from evaluation.quality.batches import Answers, batches_that_fit, process_index
from evaluation.quality.log_probabilities import log_probabilities
from training.model.loading import load_tokenizer, local_folder
from training.run_folder.router_delta import load_for
from training.sharding.layerwise import input_device

HARNESS_KEYS = (
    "add_bos_token", "chat_template_args", "enable_thinking", "max_length", "prefix_token_id", "think_end_token", "truncation",
)  # fmt: skip
CONTEXT_TOKENS = 256
"""Tokens that have memory of their own under a budget: most requests are no longer, and a longer one takes slots from the
experts while it runs. What an engine sets aside unless told otherwise is meant for conversations."""

Tokens = tuple[int, ...]
T = TypeVar("T")


class BatchedLM(HFLM):
    """A loaded model, its requests in batches of at most `batch_size`; None: as many as memory allows.

    Args:
        engine: pages the experts of `model`; None if all of them are in memory.
        answers: where they are kept; None: nowhere.
        harness: other arguments of the harness's class, such as `max_length` and `chat_template_args`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, engine: Engine | None = None,
        batch_size: int | None = None, answers: Answers | None = None, **harness: Any,
    ) -> None:  # fmt: skip
        length = int(model.config.get_text_config().max_position_embeddings)
        logger = logging.getLogger("lm_eval.models.huggingface")
        level, logger.level = logger.level, logging.ERROR  # it warns of models that are loaded already
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, **{"max_length": length, **harness})
        logger.level = level
        self._device = input_device(model)
        self._engine, self._most, self._answers = engine, batch_size, answers or Answers()

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats, in disjoint windows, the windows of all texts in common batches."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids, prefix = self.tok_encode(request.args[0]), self.prefix_token_id
            for window in get_rolling_token_windows(ids, prefix, max_seq_len=self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += log_likelihood
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): log-likelihood of the continuation, and whether greedy decoding says it.

        Requests that differ in their last token only, as choices of one letter do, are one row of a batch.
        """
        rows: dict[Tokens, list[int]] = {}
        for number, (_texts, context, continuation) in enumerate(requests):
            rows.setdefault(tuple([*context, *continuation][-self.max_length - 1 : -1]), []).append(number)
        longest_first = sorted(rows, key=lambda row: (-len(row), row))
        bar = tqdm(
            total=len(requests),
            desc="Running loglikelihood requests",
            disable=disable_tqdm or process_index() > 0,
            leave=False,
        )
        batches = [
            [(row, [requests[number][2] for number in rows[row]]) for row in batch]
            for batch in self._batches(longest_first, _scoring_call)
        ]
        found = self._answers.of(
            [["loglikelihood", batch] for batch in batches],
            lambda place: self._scored(batches[place]),
            engine=self._engine,
            answered=lambda place: bar.update(sum(len(of_row) for _, of_row in batches[place])),
        )
        bar.close()
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        numbers = itertools.chain.from_iterable(rows[row] for batch in batches for row, _ in batch)
        for number, (log_likelihood, is_greedy) in zip(numbers, itertools.chain.from_iterable(found), strict=True):
            answers[number] = log_likelihood, is_greedy
            if (texts := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[number])
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts that the harness's class generates, its batches as large as memory allows."""
        bar = tqdm(
            total=len(requests),
            desc="Running generate_until requests",
            disable=disable_tqdm or process_index() > 0,
            leave=False,
        )
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        in_order = sorted(
            range(len(requests)), key=lambda n: (str(requests[n].args[1]), -len(prompts[n]), requests[n].args[0])
        )
        batches: list[Sequence[int]] = []
        for _settings, alike in itertools.groupby(in_order, key=lambda n: str(requests[n].args[1])):
            numbers = list(alike)
            new_tokens = int(normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)["max_gen_toks"])
            lengths = {number: min(len(prompts[number]), self.max_length - new_tokens) for number in numbers}
            batches += self._batches(numbers, partial(_generating_call, lengths=lengths, new_tokens=new_tokens))

        def texts_of(place: int) -> list[str]:
            self.batch_size_per_gpu = len(batches[place])
            asked = [requests[number] for number in batches[place]]
            return list(super(BatchedLM, self).generate_until(asked, disable_tqdm=True))

        found = self._answers.of(
            [["generate_until", [(prompts[n], requests[n].args[1]) for n in batch]] for batch in batches],
            texts_of,
            engine=self._engine,
            answered=lambda place: bar.update(len(batches[place])),
        )
        bar.close()
        text_of = dict(zip(itertools.chain.from_iterable(batches), itertools.chain.from_iterable(found), strict=True))
        return [text_of[number] for number in range(len(requests))]

    def _batches(self, longest_first: Sequence[T], call_of: Callable[[int, T], Call]) -> Iterator[Sequence[T]]:
        for batch in batches_that_fit(longest_first, call_of, engine=self._engine, most=self._most):
            self.batch_sizes["largest"] = max(len(batch), self.batch_sizes.get("largest", 0))
            yield batch

    @torch.no_grad()
    def _scored(self, batch: Sequence[tuple[Tokens, list[list[int]]]]) -> list[tuple[float, bool]]:
        """One forward call over rows of tokens: for each its continuations' answers, one after the other."""
        ids_BS = pad_sequence([torch.tensor(row) for row, _ in batch], batch_first=True)
        spots: list[int] = []
        tokens: list[int] = []
        owners: list[int] = []
        count = 0
        for number, (row, continuations) in enumerate(batch):
            for continuation in continuations:
                end = number * ids_BS.shape[1] + len(row)
                spots += range(end - len(continuation), end)
                tokens += continuation
                owners += [count] * len(continuation)
                count += 1
        log_p, is_best = log_probabilities(self.model, ids_BS, torch.tensor(spots), torch.tensor(tokens))
        owner_of = torch.tensor(owners)
        sums = torch.zeros(count, dtype=torch.float32).index_add_(0, owner_of, log_p)
        missed = torch.zeros(count).index_add_(0, owner_of, (~is_best).float())
        return list(zip(sums.tolist(), (missed == 0).tolist(), strict=True))


def _scoring_call(batch: int, row: Tokens) -> Call:
    return Call(batch, batch * len(row), len(row), keeps=False)


def _generating_call(batch: int, first: int, *, lengths: Mapping[int, int], new_tokens: int) -> Call:
    return Call(batch, batch * lengths[first], lengths[first] + new_tokens)


@register_model("remoe")
class PagedLM(BatchedLM):
    """`--model remoe`: a checkpoint whose experts stay on disk, within a budget of bytes.

    `batch_size` is found; a number above 1, or `max_batch_size`, bounds it. Under `accelerate launch` every process has an
    engine of its own and answers a share of the batches.

    Args:
        pretrained: folder of the checkpoint, or its hub name.
        router_delta: folder with tuned routers for exactly this model.
        options: fields of `EngineOptions`, such as `memory_budget=8GiB`, and arguments of the harness's class.

    Raises:
        UserError: see `EngineOptions` and `load`.
    """

    def __init__(
        self, pretrained: str, router_delta: str | None = None, batch_size: int | str | None = None,
        max_batch_size: int | None = None, device: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        engine_keys = {field.name for field in fields(EngineOptions)} - {"record_trace", "warn", "prompt_tokens"}
        if unknown := sorted(set(options) - engine_keys - set(HARNESS_KEYS)):
            raise UserError(
                f"--model_args {unknown[0]} is not known; the engine takes {', '.join(sorted(engine_keys))}, the harness "
                f"{', '.join(HARNESS_KEYS)}"
            )
        engine_options = {key: options.pop(key) for key in engine_keys & set(options)}
        if device in (None, "cuda", "cuda:0"):  # what the harness says of itself
            device = "cpu" if "memory_budget" in engine_options else "auto"
        model_dir = local_folder(pretrained)
        routers = load_for(model_dir, router_delta) if router_delta else None
        self._open = ExitStack()
        chosen = {"device": device, "context_tokens": CONTEXT_TOKENS, **engine_options}
        paged = load(model_dir, EngineOptions(**chosen, warn=False), router_delta=routers)
        model, engine = self._open.enter_context(paged)
        finalize(self, self._open.close)
        bounds = [int(size) for size in (batch_size, max_batch_size) if size is not None and str(size).isdigit()]
        if bounds and bounds[0] == 1 and batch_size is not None:  # what the harness says of itself
            del bounds[0]
        super().__init__(
            model, load_tokenizer(model_dir), engine=engine, batch_size=min(bounds, default=None), **options
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model: its budget, and what the experts cost so far."""
        engine = self._engine
        assert engine is not None, "made with one"
        stats, division = engine.stats(), engine.division
        return {
            "model_dtype": str(self.model.dtype),
            "memory_budget": division and division.budget_bytes,
            "expert_cache_bytes": engine.pool_bytes,
            "token_demand_bytes": engine.token_demand_bytes,
            "is_exact": engine.is_exact,
            "lever": engine.options.lever,
            "products": engine.options.products,
            "largest_batch": self.batch_sizes.get("largest"),
            "hit_rate": stats.hit_rate,
            "bytes_read": stats.bytes_read_by_phase,
            "tokens": stats.tokens,
        }
