"""Cached tokens are those of `tokenize`, never of other rows or another tokenizer, never in the way; bad rows are counted."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from configs.load import UserError
from data import token_cache
from data.batches import DataArguments, PackedRows, tokenize
from data.token_cache import Documents, left_out_text, training_documents
from training.model.loading import load_tokenizer

TEXTS = ["The sea was calm.", "def f(x):\n    return x\n", "\N{GREEK SMALL LETTER ALPHA}"]
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
BAD = ['{"other": 1}', "{no json", '{"conversations": ["x"]}']


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer("data/embedded/tokenizer")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "remoe" / "tokens"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts are really tokenized, by call."""
    calls: list[int] = []

    def counting(texts: list[str], *args: Any) -> list[np.ndarray]:
        calls.append(len(texts))
        return tokenize(texts, *args)

    monkeypatch.setattr(token_cache, "tokenize", counting)
    return calls


def data(folder: Path, rows: list[Any], **others: Any) -> DataArguments:
    """A JSONL file of these rows: texts, objects, or lines as they are."""
    lines = [row if isinstance(row, str) and row in BAD else json.dumps({"text": row} if isinstance(row, str) else row)
             for row in rows]  # fmt: skip
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return DataArguments(train_file=str(folder / "data.jsonl"), **others)


def same(found: Documents, expected: list[np.ndarray]) -> bool:
    return len(found) == len(expected) and all(
        np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(found, expected, strict=True)
    )


def test_tokens_come_back_as_they_were_and_are_made_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, calls: list[int]
) -> None:
    args = data(tmp_path, TEXTS)
    for _ in range(2):
        assert same(training_documents(args, tokenizer), tokenize(TEXTS, tokenizer))
    assert calls == [3]


def test_chunks_change_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "CHUNK", 2)
    assert same(training_documents(data(tmp_path, [*TEXTS, ""]), tokenizer), tokenize(TEXTS, tokenizer))
    assert calls == [2, 1]


def test_other_texts_other_orders_and_other_tokenizers_are_made_anew(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, calls: list[int]
) -> None:
    training_documents(data(tmp_path, TEXTS), tokenizer)
    for texts in (TEXTS[:2], TEXTS[::-1], ["".join(TEXTS)]):
        assert same(training_documents(data(tmp_path, texts), tokenizer), tokenize(texts, tokenizer))
    tokenizer.add_tokens(["calm"])
    assert same(training_documents(data(tmp_path, TEXTS), tokenizer), tokenize(TEXTS, tokenizer))
    assert len(calls) == 5


def test_what_of_a_chat_is_learnt_and_its_template_make_other_entries(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, calls: list[int]
) -> None:
    (whole,) = training_documents(data(tmp_path, [CHAT]), tokenizer)
    (masked,) = training_documents(data(tmp_path, [CHAT], assistant_only_loss=True), tokenizer)
    assert (whole >= 0).all()
    assert (masked < 0).any()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<", "[")
    (other,) = training_documents(data(tmp_path, [CHAT]), tokenizer)
    assert tokenizer.decode(other[1:-1]) == tokenizer.decode(whole[1:-1]).replace("<", "[")
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("damage", ["short", "no lengths", "no json"])
def test_a_damaged_entry_is_made_anew(
    damage: str, home: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, calls: list[int]
) -> None:
    args = data(tmp_path, TEXTS)
    training_documents(args, tokenizer)
    (entry,) = home.iterdir()
    if damage == "short":
        os.truncate(entry / token_cache.IDS, 8)
    elif damage == "no lengths":
        (entry / token_cache.LENGTHS).unlink()
    else:
        (entry / token_cache.ABOUT).write_text("{")
    for _ in range(2):
        assert same(training_documents(args, tokenizer), tokenize(TEXTS, tokenizer))
    assert calls == [3, 3]


def test_a_home_that_cannot_be_written_is_no_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert same(training_documents(data(tmp_path, TEXTS), tokenizer), tokenize(TEXTS, tokenizer))


def test_a_failure_half_way_leaves_nothing_behind(
    home: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "CHUNK", 2)
    monkeypatch.setattr(
        token_cache, "tokenize", lambda texts, _: tokenize(texts, tokenizer) if len(texts) > 1 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        training_documents(data(tmp_path, TEXTS), tokenizer)
    assert not list(home.iterdir())


def test_what_another_process_made_first_is_kept(
    home: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears while this one is still tokenizing."""
    args = data(tmp_path, TEXTS)

    def racing(texts: list[str], _: Any) -> list[np.ndarray]:
        monkeypatch.setattr(token_cache, "tokenize", tokenize)
        assert same(training_documents(args, tokenizer), tokenize(TEXTS, tokenizer))
        return tokenize(texts, tokenizer)

    monkeypatch.setattr(token_cache, "tokenize", racing)
    found = training_documents(args, tokenizer)
    assert same(found, tokenize(TEXTS, tokenizer))
    assert len(list(home.iterdir())) == 1


def test_no_text_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="the data set holds no text; check dataset_name"):
        training_documents(data(tmp_path, ["", ""]), tokenizer)


def test_bad_rows_are_counted_and_named_and_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    args = data(tmp_path, [TEXTS[0], BAD[0], TEXTS[1], BAD[1], BAD[2], CHAT])
    for _ in range(2):  # from the cache too
        with pytest.raises(UserError) as caught:
            training_documents(args, tokenizer)
        said = str(caught.value)
        assert said.startswith("3 of 6 rows cannot be used; ")
        assert re.findall(r"data\.jsonl, line (\d+): (\w+)", said) == [("2", "needs"), ("4", "not"), ("5", "turn")]
        assert said.endswith("write skip_bad_rows=true to leave them out")


def test_bad_rows_are_left_out_when_that_is_asked_for(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    args = data(tmp_path, [TEXTS[0], BAD[0], TEXTS[1], *BAD * 5], skip_bad_rows=True)
    documents = training_documents(args, tokenizer)
    assert same(documents, tokenize(TEXTS[:2], tokenizer))
    assert documents.left_out == 16
    assert left_out_text(documents).startswith("16 of 18 rows cannot be used\n")
    assert left_out_text(documents).endswith("\n  and 6 more")


def test_rows_are_packed_from_the_file_as_from_memory(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = TEXTS * 5
    ours = PackedRows(training_documents(data(tmp_path, texts), tokenizer), max_length=8, seed=3)
    theirs = PackedRows(tokenize(texts, tokenizer), max_length=8, seed=3)
    for found, expected in zip(ours.batch(range(20)), theirs.batch(range(20)), strict=True):
        assert found.equal(expected)


def test_documents_are_a_sequence(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    documents, expected = training_documents(data(tmp_path, TEXTS), tokenizer), tokenize(TEXTS, tokenizer)
    assert np.array_equal(documents[-1], expected[-1])
    assert [d.tolist() for d in documents[1:]] == [d.tolist() for d in expected[1:]]
    with pytest.raises(IndexError):
        documents[3]
