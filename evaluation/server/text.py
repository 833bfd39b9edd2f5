"""Makes text of tokens, piece by piece; only text that is certain is given out, so that nothing has to be taken back."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The character that a decoder writes for bytes that are no whole character yet."""


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
