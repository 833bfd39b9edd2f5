"""One choice of an answer while it grows: its text, its log probabilities, and when it ends."""

from collections.abc import Set

import torch
from transformers import PreTrainedTokenizerBase

from evaluation.server.text import UNFINISHED, Detokenizer, StopStrings
from evaluation.server.work import Delta, TokenLogprob, Work

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class Choice:
    """The answer in row `index` of a request.

    Attributes:
        tokens: how many have come, the one that ends the text included.
        finish_reason: `stop` or `length` once it is over, else None.
    """

    def __init__(
        self, index: int, tokenizer: PreTrainedTokenizerBase, *, work: Work, max_new_tokens: int, end_ids: Set[int]
    ) -> None:
        self.index, self.tokens = index, 0
        self.finish_reason: str | None = None
        self._tokenizer, self._max_new_tokens, self._end_ids = tokenizer, max_new_tokens, end_ids
        self._top = work.top_logprobs
        self._detokenizer, self._stops = Detokenizer(tokenizer), StopStrings(work.stops)
        self._decoded_length = self._shown_length = 0
        self._pending: list[TokenLogprob] = []

    def push(self, token_id: int, scores_V: torch.Tensor | None) -> Delta | None:
        """Take one more token, chosen by these scores over the vocabulary; returns None if nothing can be shown yet."""
        self.tokens += 1
        if token_id in self._end_ids:
            return self._finish("", "stop")
        if self._top is not None:
            assert scores_V is not None, "log probabilities need scores"
            self._pending.append(self._logprob(token_id, scores_V, self._top))
        piece = self._detokenizer.push(token_id)
        self._decoded_length += len(piece)
        text = self._stops.push(piece)
        if self._stops.stopped or self.tokens == self._max_new_tokens:
            return self._finish(text, "length")
        return self._delta(text)

    def _finish(self, text: str, reason: str) -> Delta:
        text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        self.finish_reason = "stop" if self._stops.stopped else reason
        delta = self._delta(text)
        assert delta is not None, "the end is always shown"
        return delta

    def _delta(self, text: str) -> Delta | None:
        self._shown_length += len(text)
        over = self.finish_reason is not None and not self._stops.stopped
        certain = [item for item in self._pending if over or item.text_offset < self._shown_length]
        self._pending = self._pending[len(certain) :]
        if not text and not certain and self.finish_reason is None:
            return None
        return Delta(self.index, text, certain, self.finish_reason)

    def _logprob(self, token_id: int, scores_V: torch.Tensor, alternatives: int) -> TokenLogprob:
        logprobs_V = torch.log_softmax(scores_V.float(), dim=-1).clamp_min(LOWEST_LOGPROB)
        best = torch.topk(logprobs_V, alternatives)
        top = [(self._token(i), p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        return TokenLogprob(self._token(token_id), logprobs_V[token_id].item(), top, self._decoded_length)

    def _token(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))


def utf8(token: str) -> list[int] | None:
    """A token's bytes; None if it is a part of a character, which its text does not tell."""
    return None if UNFINISHED in token else list(token.encode())
