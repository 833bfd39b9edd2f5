"""Cached tokens are those of `tokenize`, never of other texts or another tokenizer, and never in the way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from configs.load import UserError
from data import token_cache
from data.batches import Chat, tokenize
from data.token_cache import cached_tokens
from training.model import load_tokenizer

TEXTS = ["The sea was calm.", "def f(x):\n    return x\n", "\N{GREEK SMALL LETTER ALPHA}"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("data/embedded/tokenizer")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts are really tokenized, by call."""
    calls: list[int] = []

    def counting(texts: Sequence[str], *args: Any) -> list[np.ndarray]:
        calls.append(len(texts))
        return tokenize(texts, *args)

    monkeypatch.setattr(token_cache, "tokenize", counting)
    return calls


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def test_tokens_come_back_as_they_were_and_are_made_once(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    first, second = cached_tokens(iter(TEXTS), tokenizer), cached_tokens(TEXTS, tokenizer)
    assert same(first, tokenize(TEXTS, tokenizer))
    assert same(second, first)
    assert calls == [3]


def test_other_texts_other_orders_and_other_tokenizers_are_made_anew(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    cached_tokens(TEXTS, tokenizer)
    for texts in (TEXTS[:2], TEXTS[::-1], ["".join(TEXTS)]):
        assert same(cached_tokens(texts, tokenizer), tokenize(texts, tokenizer))
    tokenizer.add_tokens(["calm"])
    assert same(cached_tokens(TEXTS, tokenizer), tokenize(TEXTS, tokenizer))
    assert len(calls) == 5


def test_a_damaged_file_is_made_anew(
    home: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_tokens(TEXTS, tokenizer)
    (path,) = (home / "remoe" / "tokens").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    calls = counted(monkeypatch)
    assert same(cached_tokens(TEXTS, tokenizer), tokenize(TEXTS, tokenizer))
    assert same(cached_tokens(TEXTS, tokenizer), tokenize(TEXTS, tokenizer))
    assert calls == [3]


def test_a_home_that_cannot_be_written_is_no_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert same(cached_tokens(TEXTS, tokenizer), tokenize(TEXTS, tokenizer))


def test_no_text_is_refused_as_without_a_cache(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="holds no text"):
        cached_tokens([], tokenizer)


def test_what_of_a_chat_is_learnt_makes_another_entry(tokenizer: PreTrainedTokenizerBase) -> None:
    text = TEXTS[1]
    for chat in (text, Chat(text, [(4, 8)]), Chat(text, [(4, 9)])):
        for _ in range(2):
            assert same(cached_tokens([chat], tokenizer), tokenize([chat], tokenizer))
    assert (cached_tokens([Chat(text, [(4, 8)])], tokenizer)[0] < 0).any()
