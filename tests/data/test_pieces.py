"""Prompts are the beginnings of real documents, of one length, domains in turn."""

from typing import Any

import pytest

from configs.load import UserError
from data.corpus import DOMAINS, EMBEDDED, read_corpus
from data.pieces import document_beginnings
from training.model.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(EMBEDDED / "tokenizer"))


def test_lengths_and_turns(tokenizer: Any) -> None:
    rows = document_beginnings(tokenizer, "test", tokens=32, count=6)
    assert [len(row) for row in rows] == [32] * 6
    assert len({tuple(row) for row in rows}) == 6
    texts = {domain: [d.text for d in read_corpus("test", [domain])] for domain in DOMAINS}
    for row, domain in zip(rows, [*DOMAINS, *DOMAINS], strict=False):
        assert any(text.startswith(tokenizer.decode(row)) for text in texts[domain])


def test_more_than_there_are_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"the test split has only .* documents to offer with 6000 tokens"):
        document_beginnings(tokenizer, "test", tokens=6000, count=400)
