"""One choice of an answer while it grows: its text, its log probabilities, and when it ends.

Only text that is certain is given out, so that nothing has to be taken back.
"""

from collections.abc import Sequence, Set

import torch
from transformers import PreTrainedTokenizerBase

from evaluation.server.work import Delta, TokenLogprob, Work

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The character that a decoder writes for bytes that are no whole character yet."""


class Choice:
    """The answer in row `index` of a request.

    Attributes:
        tokens: how many have come, the one that ends the text included.
        finish_reason: `stop` or `length` once it is over, else None.
    """

    def __init__(
        self, index: int, tokenizer: PreTrainedTokenizerBase, *, work: Work, max_new_tokens: int, end_ids: Set[int],
        begins: int = 0,
    ) -> None:  # fmt: skip
        self.index, self.tokens = index, 0
        self.finish_reason: str | None = None
        self._tokenizer, self._max_new_tokens, self._end_ids = tokenizer, max_new_tokens, end_ids
        self._top = work.top_logprobs
        self._detokenizer, self._stops = Detokenizer(tokenizer), StopStrings(work.stops)
        self._decoded_length = self._shown_length = begins  # characters before it
        self._pending: list[TokenLogprob] = []

    def push(self, token_id: int, scores_V: torch.Tensor | None) -> Delta | None:
        """Take one more token, chosen by these scores over the vocabulary; returns None if nothing can be shown yet."""
        self.tokens += 1
        if token_id in self._end_ids:
            return self._finish("", "stop")
        if self._top is not None:
            assert scores_V is not None, "log probabilities need scores"
            self._pending.append(
                token_logprob(self._tokenizer, token_id, scores_V, self._top, text_offset=self._decoded_length)
            )
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


def token_logprob(
    tokenizer: PreTrainedTokenizerBase, token_id: int, scores_V: torch.Tensor | None, top: int, *, text_offset: int
) -> TokenLogprob:
    """The log probability of a token by scores over the vocabulary, and the `top` largest ones; without scores none."""
    token = str(tokenizer.decode([token_id]))
    if scores_V is None:
        return TokenLogprob(token, None, [], text_offset)
    logprobs_V = torch.log_softmax(scores_V.float(), dim=-1).clamp_min(LOWEST_LOGPROB)
    best = torch.topk(logprobs_V, top)
    tops = [(str(tokenizer.decode([i])), p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return TokenLogprob(token, logprobs_V[token_id].item(), tops, text_offset)


def utf8(token: str) -> list[int] | None:
    """A token's bytes; None if it is a part of a character, which its text does not tell."""
    return None if UNFINISHED in token else list(token.encode())


class Detokenizer:
    """Gives token by token the text that `tokenizer.decode(all_ids, skip_special_tokens=True)` gives in the end.

    tokenizers' `DecodeStream` does the same, but keeps bytes at the end that never became a character to itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._given: list[int] = []  # the tokens of the last piece: some decoders write a token by what is before it
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text this token completes; empty while a character lacks bytes."""
        self._pending.append(token_id)
        piece = self._piece()
        if not piece or piece.endswith(UNFINISHED):
            return ""
        self._given, self._pending = self._pending, []
        return piece

    def flush(self) -> str:
        """The rest at the end: a replacement character for bytes that never became one."""
        piece, self._pending = self._piece(), []
        return piece

    def _piece(self) -> str:
        return self._decode(self._given + self._pending)[len(self._decode(self._given)) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    Attributes:
        stopped: whether one was found; then no more text comes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that can be shown now."""
        if self.stopped:
            return ""
        self._held += text
        starts = [self._held.find(stop) for stop in self._stops if stop in self._held]
        if starts:
            self.stopped = True
            return self._held[: min(starts)]
        shown = len(self._held) - self._maybe_stop_length()
        text, self._held = self._held[:shown], self._held[shown:]
        return text

    def flush(self) -> str:
        """The text that was held back, once it is certain that no more comes."""
        text, self._held = "" if self.stopped else self._held, ""
        return text

    def _maybe_stop_length(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        ends = (self._held[-length:] for length in range(len(self._held), 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)
