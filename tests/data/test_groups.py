"""Own text by name: files, chats and data sets, pieces evenly over it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from configs.load import UserError
from data.groups import own_pieces, source_of

CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


@pytest.fixture
def chatting(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template=CHAT_TEMPLATE, eos_token="<|endoftext|>"
    )


def test_files_chats_and_the_corpus_are_groups(chatting: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("\n\n".join(f"note {n}" for n in range(10)), encoding="utf-8")
    chats = [{"messages": [{"role": "user", "content": f"hello {n}"}]} for n in range(3)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    groups = {
        "notes": f"{tmp_path}/notes.txt", "chats": {"train_file": f"{tmp_path}/chats.jsonl"},
        "code": {"dataset_name": "embedded", "dataset_split": "test", "domains": ["code"]},
    }  # fmt: skip
    found = own_pieces(chatting, groups, tokens=40, per_group=5)
    texts = {name: [chatting.decode(ids, skip_special_tokens=True) for ids in of] for name, of in found.items()}
    assert texts["notes"] == [f"note {n}" for n in (0, 2, 4, 6, 8)]
    assert texts["chats"] == [f"<user>hello {n}" for n in range(3)], "fewer than asked for are all there are"
    assert [len(ids) for ids in found["code"]] == [40] * 5


def test_long_documents_are_cut_into_pieces_far_apart(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x".join(str(n % 10) for n in range(200)), encoding="utf-8")
    (found,) = own_pieces(tokenizer, {"long": f"{tmp_path}/long.txt"}, tokens=20, per_group=100).values()
    ids = [tokenizer.eos_token_id, *tokenizer((tmp_path / "long.txt").read_text("utf-8"))["input_ids"]]
    assert [piece.tolist() for piece in found] == [ids[at : at + 20] for at in range(0, 400 - 20, 80)]


@pytest.mark.parametrize("given", [3, {"file": "x.txt"}, ["a.txt"]])
def test_what_is_no_source_is_refused(given: Any) -> None:
    with pytest.raises(UserError, match=r"group mine is .*write a .txt or .jsonl file"):
        source_of("mine", given)


def test_a_file_that_is_not_there_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):
        own_pieces(tokenizer, {"mine": "nowhere.txt"}, tokens=8, per_group=1)
