"""Packed rows: every token once an epoch, edges of documents kept, and a row that is a function of its index."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from configs.load import UserError
from data.batches import IGNORE_LABEL, Batch, DataArguments, PackedRows, tokenize


def documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose tokens tell where they are from: 1000 * document + position."""
    return [1000 * n + np.arange(length, dtype=np.int32) for n, length in enumerate(lengths, start=1)]


def packed(lengths: list[int], *, max_length: int = 8, seed: int = 0) -> PackedRows:
    return PackedRows(documents(lengths), max_length=max_length, seed=seed)


lengths_of_documents = st.lists(st.integers(2, 30), min_size=1, max_size=12).filter(lambda found: sum(found) >= 8)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_of_documents, epoch=st.integers(0, 2), seed=st.integers(0, 5))
def test_an_epoch_holds_no_token_twice_and_misses_less_than_a_row(lengths: list[int], epoch: int, seed: int) -> None:
    rows = packed(lengths, seed=seed)
    first = epoch * rows.rows_per_epoch
    ids = rows.batch(range(first, first + rows.rows_per_epoch)).input_ids_BS.flatten().tolist()
    everything = {int(token) for document in documents(lengths) for token in document}
    assert len(set(ids)) == len(ids)
    assert set(ids) <= everything
    assert len(everything) - len(ids) < 8


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_of_documents, row=st.integers(0, 40), seed=st.integers(0, 5))
def test_labels_and_positions_stop_at_a_documents_edge(lengths: list[int], row: int, seed: int) -> None:
    ids, labels, positions, document_ids = (part[0].tolist() for part in packed(lengths, seed=seed).batch([row]))
    for t in range(8):
        starts = t == 0 or ids[t] // 1000 != ids[t - 1] // 1000
        ends = t == 7 or ids[t] // 1000 != ids[t + 1] // 1000
        assert positions[t] == (0 if starts else positions[t - 1] + 1)
        assert labels[t] == (IGNORE_LABEL if ends else ids[t + 1])
        assert starts or ids[t] == ids[t - 1] + 1
        assert t == 0 or (document_ids[t] != document_ids[t - 1]) == starts
        assert document_ids[t] >= 0


def test_a_row_does_not_depend_on_what_was_read_before() -> None:
    one, other = packed([5, 9, 30, 2, 17]), packed([5, 9, 30, 2, 17])
    expected = {row: one.batch([row]) for row in range(20)}
    for row in [19, 0, 7, 13, 8, 7]:
        assert equal(other.batch([row]), expected[row])


def test_a_batch_is_its_rows_stacked() -> None:
    rows = packed([5, 9, 30, 2, 17])
    batch = rows.batch([3, 11])
    assert all(equal(Batch(*(t[n : n + 1] for t in batch)), rows.batch([row])) for n, row in enumerate([3, 11]))
    assert all(tensor.shape == (2, 8) and tensor.dtype == torch.long for tensor in batch)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    lengths = [5, 9, 30, 2, 17, 22]
    rows = packed(lengths)
    n = rows.rows_per_epoch
    first, second = rows.batch(range(n)), rows.batch(range(n, 2 * n))
    assert not torch.equal(first.input_ids_BS, second.input_ids_BS)
    assert not torch.equal(first.input_ids_BS, packed(lengths, seed=1).batch(range(n)).input_ids_BS)


def test_a_document_of_the_length_of_a_row_may_go_on_in_another_row() -> None:
    rows = packed([24])
    batch = rows.batch([0, 1, 2])
    assert sorted(batch.input_ids_BS[:, 0].tolist()) == [1000, 1008, 1016]
    assert batch.position_ids_BS.tolist() == [list(range(8))] * 3
    assert (batch.labels_BS[:, -1] == IGNORE_LABEL).all()


def test_rows_of_a_long_document_are_not_read_in_order() -> None:
    starts = packed([800]).batch(range(100)).input_ids_BS[:, 0]
    assert (starts.diff() != 8).float().mean() > 0.9


def test_too_little_text_for_one_row_is_refused() -> None:
    with pytest.raises(UserError, match="the data has 7 tokens, fewer than one row of max_length=8; give more text"):
        packed([3, 4])


def test_a_row_without_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length=1 leaves no pair of neighbouring tokens; write at least 2"):
        DataArguments(max_length=1)


def test_texts_have_the_end_of_text_token_on_both_sides(tokenizer: PreTrainedTokenizerFast) -> None:
    found = tokenize(["ab", "", "c"], tokenizer)
    assert [document.tolist()[:1] + document.tolist()[-1:] for document in found] == [[0, 0], [0, 0]]
    assert [tokenizer.decode(document[1:-1]) for document in found] == ["ab", "c"]


def test_special_tokens_are_written_once_by_a_tokenizer_that_adds_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(
        single=f"{tokenizer.eos_token} $A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, 0)]
    )
    adding = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)
    assert adding("a")["input_ids"].count(0) == 2
    assert tokenize(["aaa"], adding)[0].tolist().count(0) == 2


def test_no_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="the data set holds no text; check dataset_name"):
        tokenize(["", ""], tokenizer)


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="has no eos_token; set one in its tokenizer_config"):
        tokenize(["a"], without)


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
