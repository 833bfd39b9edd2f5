"""Text in pieces is the text: no half characters, no beginning of a stop string, nothing lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from evaluation.server.choice import UNFINISHED, Detokenizer, StopStrings
from tests.evaluation.server.conftest import SHIPPED

TOKENIZER = AutoTokenizer.from_pretrained(SHIPPED)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=60))
def test_pieces_of_any_tokens_are_what_they_decode_to_together(ids: list[int]) -> None:
    assert "".join(pieces(TOKENIZER, ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters=UNFINISHED), max_size=40).filter(
        lambda text: not any(name in text for name in TOKENIZER.all_special_tokens)  # their text is never shown
    )
)
def test_a_character_comes_when_it_is_complete(text: str) -> None:
    """Characters that the tokenizer never saw are several tokens of a byte each."""
    came = pieces(TOKENIZER, TOKENIZER(text)["input_ids"])
    assert "".join(came) == text
    assert not any(UNFINISHED in piece for piece in came)
    assert came[-1] == "", "nothing is left to the end"


def test_bytes_that_are_no_character_are_shown_at_the_end() -> None:
    ids = TOKENIZER("é漢")["input_ids"][:-1]
    came = pieces(TOKENIZER, ids)
    assert "".join(came) == f"é{UNFINISHED}"
    assert came[-1] == UNFINISHED


def test_spaces_that_a_decoder_writes_by_what_is_before_are_kept() -> None:
    """The way of SentencePiece: a word's mark is a space, but not at the beginning; bytes are spelled out."""
    words = ["▁the", "▁sea", "▁", "was", "<0xE2>", "<0x82>", "<0xAC>", "<s>"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    ids = [7, 0, 1, 2, 3, 7, 4, 5, 6, 1]
    came = pieces(tokenizer, ids)
    assert "".join(came) == tokenizer.decode(ids, skip_special_tokens=True)
    assert came == ["", "the", " sea", " ", "was", "", "", "", "€", " sea", ""]


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


@given(STOPS, st.lists(st.text("abc", max_size=3), max_size=12))
def test_text_ends_before_the_first_stop_string(stops: list[str], parts: list[str]) -> None:
    filtered, shown, came = StopStrings(stops), "", ""
    for part in parts:
        came += part
        shown += filtered.push(part)
        starts = [came.find(stop) for stop in stops if stop in came]
        if starts:
            assert (shown, filtered.stopped) == (came[: min(starts)], True)
            assert (filtered.push("more"), filtered.flush()) == ("", "")
            return
        held = came[len(shown) :]
        assert came.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops), "only what may become a stop is held"
        assert not any(came.endswith(stop[:k]) and k > len(held) for stop in stops for k in range(1, len(stop)))
    assert not filtered.stopped
    assert shown + filtered.flush() == came


@pytest.mark.parametrize("parts", [["one st", "op two"], ["one ", "s", "t", "o", "p"], ["one stop"]])
def test_a_stop_string_may_come_in_pieces(parts: list[str]) -> None:
    filtered = StopStrings(["never", "stop"])
    assert "".join(map(filtered.push, parts)) == "one "
    assert filtered.stopped
