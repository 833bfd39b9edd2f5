"""Tasks of lm-evaluation-harness answered in steps: every request has a cache of its own, and levers act on every token.

In one pass over a prompt levers have no say, and a pass over many tokens at once shows another cache than one by one.
Letters: B requests, S tokens of the longest, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.load import UserError
from evaluation.engine.levers.drop import Drop
from evaluation.engine.levers.prior import Prior
from evaluation.engine.stats import ReadCounts
from evaluation.frontier.steps import CacheKind, cached, stepped
from evaluation.quality.batches import Answers
from evaluation.quality.language_model import BatchedLM, Tokens


class StepLM(BatchedLM):
    """A model in memory that is asked as if it were served from a cache, one token after the other."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, levers: Sequence[Prior | Drop],
        cache: CacheKind, answers: Answers,
    ) -> None:  # fmt: skip
        super().__init__(model, tokenizer, answers=answers)
        self._levers, self._cache = levers, cache

    @torch.no_grad()
    def _scored(self, batch: Sequence[tuple[Tokens, list[list[int]]]]) -> list[tuple[float, bool]]:
        """For each row its continuations' answers, one after the other."""
        spots: dict[int, list[tuple[int, int, int]]] = {}  # position -> row, next token, number of the answer
        count = 0
        for row, (tokens, continuations) in enumerate(batch):
            for continuation in continuations:
                for place, token in enumerate(continuation, start=len(tokens) - len(continuation)):
                    spots.setdefault(place, []).append((row, token, count))
                count += 1
        # what is read last has nothing after it: one more column
        ids_BS = pad_sequence([torch.tensor([*tokens, 0]) for tokens, _ in batch], batch_first=True).to(self._device)
        sums, missed = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)
        with cached(self.model, len(batch), self._levers, self._cache, ReadCounts()):
            for step, logits_BV in stepped(self.model, ids_BS):
                if step not in spots:
                    continue
                rows, tokens_n, owners = torch.tensor(spots[step]).T
                log_p_nV = logits_BV[rows.to(logits_BV.device)].float().log_softmax(-1).cpu()
                sums.index_add_(0, owners, log_p_nV.gather(1, tokens_n[:, None]).squeeze(1).double())
                missed[owners[log_p_nV.argmax(-1) != tokens_n]] = True
        return list(zip(sums.tolist(), (~missed).tolist(), strict=True))

    @torch.no_grad()
    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor | None = None, **settings: Any
    ) -> Tensor:
        """[B, S]: prompts, which are padded on the left, and what greedy decoding makes of them."""
        if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
            raise UserError(f"{settings}: tasks of a frontier are answered by greedy decoding; write do_sample: false")
        assert attention_mask is not None, "the harness gives one"
        lengths, new = attention_mask.sum(1).tolist(), max_length - context.shape[1]
        ids_BS = torch.zeros(len(context), max(lengths) + new, dtype=torch.long, device=self._device)
        for row, length in enumerate(lengths):
            ids_BS[row, :length] = context[row, context.shape[1] - length :]
        with cached(self.model, len(context), self._levers, self._cache, ReadCounts()):
            for step, logits_BV in stepped(self.model, ids_BS):
                best_B = logits_BV.argmax(-1)
                for row, length in enumerate(lengths):
                    if length <= step + 1 < length + new:
                        ids_BS[row, step + 1] = best_B[row]
        written = torch.stack([ids_BS[row, length : length + new] for row, length in enumerate(lengths)])
        return torch.cat([context.to(self._device), written], dim=1)
