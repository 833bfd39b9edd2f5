"""Text of a wanted length: beginnings of real documents, domains in turn, and pieces spread over a split."""

from typing import Any

import pytest

from configs.load import UserError
from data.batches import tokenize
from data.corpus import DOMAINS, EMBEDDED, read_corpus
from data.pieces import document_beginnings, spread_pieces
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


def test_pieces_are_spread_over_a_domain_and_end_inside_their_documents(tokenizer: Any) -> None:
    found = spread_pieces(tokenizer, "test", ["glosses"], tokens=16, at_least=17, every=64, per_domain=3)
    documents = tokenize((document.text for document in read_corpus("test", ["glosses"])), tokenizer)
    places = [(n, at) for n, document in enumerate(documents) for at in range(0, len(document), 64)]
    whole = [(n, at) for n, at in places if at + 16 < len(documents[n])]
    for piece, (n, at) in zip(found, (whole[i * len(whole) // 3] for i in range(3)), strict=True):
        assert piece.tolist() == documents[n][at : at + 16].tolist()


def test_a_piece_may_be_shorter_where_its_document_ends(tokenizer: Any) -> None:
    found = spread_pieces(tokenizer, "test", ["glosses"], tokens=512, at_least=256, every=512, per_domain=20)
    assert {len(piece) for piece in found} > {512}
    assert min(map(len, found)) >= 256
    with pytest.raises(UserError, match=r"test has .* pieces of 512 tokens in glosses, 100000 were asked for"):
        spread_pieces(tokenizer, "test", ["glosses"], tokens=512, at_least=256, every=512, per_domain=100_000)
