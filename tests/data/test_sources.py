"""Text from local files, chats and data sets; a bad line is named with its file and number."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from configs.load import UserError
from data.batches import IGNORE_LABEL, Chat, DataArguments, PackedRows, tokenize
from data.corpus import read_corpus
from data.sources import document_of, read_text, training_rows

CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


@pytest.fixture
def chatting(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=CHAT_TEMPLATE)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return texts_of(DataArguments(train_file=str(path)), tokenizer)


def texts_of(args: DataArguments, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [document_of(row, args, tokenizer).text for row in training_rows(args)]


def test_the_shipped_corpus_is_read_by_split_and_domain(tokenizer: PreTrainedTokenizerFast) -> None:
    args = DataArguments(dataset_split="validation", domains=["code", "puzzles"])
    expected = [document.text for document in read_corpus("validation", ["code", "puzzles"])]
    assert texts_of(args, tokenizer) == expected


def test_paragraphs_of_a_text_file_are_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\nstill one\n\ntwo\n\n  \n\n\n\nthree\n", encoding="utf-8")
    assert texts(path, tokenizer) == ["one\nstill one", "two", "three"]


def test_a_jsonl_line_is_text_or_a_chat(tmp_path: Path, chatting: PreTrainedTokenizerFast) -> None:
    rows = [
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]},
        {"conversations": [{"from": "gpt", "value": "a"}]},
    ]
    found = texts(write_lines(tmp_path / "a.jsonl", rows), chatting)
    assert found == ["plain", "<user>hi<assistant>yes", "<system>s<user>q", "<assistant>a"]


PARTS_TEMPLATE = (
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}{% for message in messages %}<{{ message.role }}>"
    "{{ message.content }}{% for call in message.tool_calls or [] %}{{ call.function.name }}"
    "({{ call.function.arguments.at }}){% endfor %}{% endfor %}"
)
TIDE = {"type": "function", "function": {"name": "tide", "description": "d", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "tide", "arguments": '{"at": "noon"}'}}
HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]}, "<user>ab"),
        ({"messages": HI, "text": "another text"}, "<user>hi<assistant>yes"),
        ({"messages": json.dumps(HI)}, "<user>hi<assistant>yes"),
        ({"messages": HI, "tools": [TIDE]}, "[tide]<user>hi<assistant>yes"),
        ({"messages": HI, "tools": json.dumps([TIDE])}, "[tide]<user>hi<assistant>yes"),
        ({"messages": HI, "tools": []}, "<user>hi<assistant>yes"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "<assistant>tide(noon)"),
        ({"system": "kind", "conversations": [{"from": "human", "value": "hi"}]}, "<system>kind<user>hi"),
        (
            {"system": "kind", "conversations": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "a"}]},
            "<system>s<assistant>a",
        ),
        ({"messages": None, "text": "plain"}, "plain"),
    ],
)
def test_rows_are_brought_into_one_form_and_nothing_is_lost(
    row: dict[str, Any], expected: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [row])
    assert texts(path, with_template(tokenizer, PARTS_TEMPLATE)) == [expected]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_of_windows_is_read_as_on_unix(
    mark: str, end: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    lines = ["first", "still first", "", "second", "  ", "\t", "third", ""]
    (tmp_path / "a.txt").write_bytes((mark + end.join(lines)).encode())
    assert texts(tmp_path / "a.txt", tokenizer) == ["first\nstill first", "second", "third"]
    assert read_text(tmp_path / "a.txt") == "\n".join(lines)
    (tmp_path / "a.jsonl").write_bytes(f'{mark}{{"text": "a"}}{end}{{"text": "b"}}'.encode())
    assert texts(tmp_path / "a.jsonl", tokenizer) == ["a", "b"]


def test_line_ends_inside_a_json_string_do_not_end_the_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    assert texts(write_lines(tmp_path / "a.jsonl", rows), tokenizer) == ["a\u2028b\x85c", "d"]


def test_blank_lines_of_a_jsonl_file_are_skipped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}', encoding="utf-8")
    assert texts(path, tokenizer) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ('{"text": 3}', "line 2: needs a field text, messages"),
        ('{"other": "x"}', "line 2: needs a field text, messages"),
        ('["text"]', "line 2: needs a field text, messages"),
        ('{"messages": []}', "line 2: needs a field text, messages"),
        ('{"conversations": [{"from": "robot", "value": "x"}]}', "line 2: turn 1 of conversations needs from (one of"),
        ('{"conversations": [{"value": "x"}]}', "line 2: turn 1 of conversations needs from (one of"),
        ('{"conversations": ["x"]}', 'line 2: turn 1 of conversations is no object but "x"'),
        ('{"conversations": 7}', "line 2: conversations must be a list of turns that is not empty, found 7"),
        ('{"messages": {"role": ["user"], "content": ["hi"]}}', "line 2: messages must be a list of turns"),
        ('{"messages": "hi"}', "line 2: messages is text that is no JSON: 'hi'"),
        ('{"messages": ["hi", "yes"]}', 'line 2: turn 1 of messages is no object but "hi"'),
        ('{"messages": [{"role": "user", "content": "hi"}, null]}', "line 2: turn 2 of messages is no object but null"),
        ('{"messages": [{"role": "user", "content": null}]}', "line 2: turn 1 of messages needs a role and a content"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "line 2: turn 1 of messages holds"),
        ('{"messages": [{"role": "assistant", "tool_calls": ["f"]}]}', "line 2: turn 1 of messages holds a tool call"),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}',
            "line 2: turn 1 of messages: arguments is text that is no JSON: '{'",
        ),
        ('{"text": "the sea \\ud83d was calm"}', "line 2: holds half a character at place 8, a lone surrogate"),
        (f'{{"text": {"9" * 5000}}}', "line 2: not JSON that can be read (Exceeds the limit"),
        ("[" * 100_000, "line 2: not JSON that can be read (maximum recursion depth"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path, chatting: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"a.jsonl, {message}")):
        texts(path, chatting)


def test_a_chat_needs_a_tokenizer_with_a_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(UserError, match=r"line 1: the chat cannot be .*give a tokenizer with a chat_template"):
        texts(path, tokenizer)


def test_another_kind_of_file_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"a\.csv must end in \.jsonl or \.txt"):
        texts(tmp_path / "a.csv", tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty; write some text into it"),
        (b" \n\n", "is empty; write some text into it"),
        (b"caf\xe9", "is not UTF-8 text (byte 3: "),
        (b'{"text": "a"}\ncaf\xe9', "is not UTF-8 text (byte 17: "),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_unreadable_file_is_refused(
    name: str, content: bytes | None, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        texts(tmp_path / name, tokenizer)
    assert str(tmp_path / name) in str(caught.value)


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" grüße\n", encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == " grüße\n"


def test_a_local_hugging_face_data_set_is_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    args = DataArguments(dataset_name=str(tmp_path / "set"))
    assert texts_of(args, tokenizer) == ["a", "b"]


def test_a_data_set_that_is_not_there_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    args = DataArguments(dataset_name=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"data set .*nowhere \(train\) cannot be loaded"):
        texts_of(args, tokenizer)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    with pytest.raises(UserError, match=r"is a file; write train_file=.*rows\.jsonl"):
        texts_of(DataArguments(dataset_name=str(tmp_path / "rows.jsonl")), tokenizer)


# learning what the assistant says alone

CHAT = [
    {"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and"}, {"role": "assistant", "content": "no."},
]  # fmt: skip
ASKING = CHAT_TEMPLATE + "{% if add_generation_prompt %}<assistant>{% endif %}"


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template=template, eos_token=tokenizer.eos_token
    )


def test_of_a_chat_only_what_the_assistant_says_is_a_label(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CHAT}, {"text": "plain text is learnt as a whole"}])
    asking = with_template(tokenizer, ASKING)
    args = DataArguments(train_file=str(path), assistant_only_loss=True)
    documents = tokenize(texts_of(args, asking), asking)
    rows = PackedRows(documents, max_length=len(documents[0]), seed=0)
    found = {}
    for row in range(rows.rows_per_epoch):
        batch = rows.batch([row])
        assert (batch.input_ids_BS >= 0).all(), "what is not learnt is read all the same"
        for document in batch.document_ids_BS.unique().tolist():
            here = (batch.document_ids_BS == document) & (batch.labels_BS != IGNORE_LABEL)
            found[document] = found.get(document, "") + asking.decode(batch.labels_BS[here])
    assert found[0] == f"yesno.{asking.eos_token}"
    assert set(found.get(1, "")) <= set("plain text is learnt as a whole")


def test_without_that_the_whole_chat_is_learnt(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path, asking = write_lines(tmp_path / "a.jsonl", [{"messages": CHAT}]), with_template(tokenizer, ASKING)
    (document,) = tokenize(texts_of(DataArguments(train_file=str(path)), asking), asking)
    assert (document >= 0).all()


def learnt(messages: list[dict[str, str]], template: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    path, asking = write_lines(folder / "a.jsonl", [{"messages": messages}]), with_template(tokenizer, template)
    (document,) = tokenize(texts_of(DataArguments(train_file=str(path), assistant_only_loss=True), asking), asking)
    return str(asking.decode(document[1:-1][document[1:-1] >= 0]))


MARKED = (
    "{{ messages | length }}{% for message in messages %}<{{ message['role'] }}>{% generation %}"
    "{{ message['content'] if message['role'] == 'assistant' }}{% endgeneration %}"
    "{{ message['content'] if message['role'] != 'assistant' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (ASKING, CHAT[1:], "yesno."),  # the assistant speaks first
        (ASKING.replace("<assistant>{% endif", "<assistant><think>\n{% endif"), CHAT, "yesno."),
        (ASKING.replace("<assistant>{% endif", "<assistant><think>\n\n</think>\n\n{% endif"), CHAT, "yesno."),
        (MARKED, CHAT, "yesno."),
        (MARKED, CHAT[1:], "yesno."),
    ],
)
def test_the_assistant_is_found_where_templates_write_more_or_less(
    template: str, messages: list[dict[str, str]], expected: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert learnt(messages, template, tmp_path, tokenizer) == expected


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (ASKING, CHAT[:1], r"a\.jsonl, line 1: no turn of the assistant"),
        (MARKED, CHAT[:1], r"a\.jsonl, line 1: no turn of the assistant"),
        (
            "{{ messages | length }}" + ASKING,
            CHAT,
            r"line 1: the chat template writes turn 2 differently once the chat goes on, .*assistant_only_loss=false",
        ),
        (
            CHAT_TEMPLATE + "{% if add_generation_prompt %}<machine>{% endif %}",
            CHAT,
            "what the chat template writes to ask for turn 2 is not what it writes before an answer",
        ),
    ],
)
def test_chats_in_which_the_assistant_cannot_be_found_are_refused(
    template: str, messages: list[dict[str, str]], words: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    args = DataArguments(train_file=str(path), assistant_only_loss=True)
    with pytest.raises(UserError, match=words):
        texts_of(args, with_template(tokenizer, template))


def test_a_tokenizer_that_does_not_tell_where_tokens_come_from_is_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
    with pytest.raises(UserError, match="does not tell which characters its tokens come from"):
        tokenize([Chat("ab", [(0, 1)])], tokenizer)


def test_a_configuration_of_a_data_set_can_be_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for name in ("one", "two"):
        write_lines(tmp_path / "set" / f"{name}.jsonl", [{"text": name}])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    args = {"dataset_name": str(tmp_path / "set")}
    assert texts_of(DataArguments(**args, dataset_config_name="two"), tokenizer) == ["two"]
    with pytest.raises(UserError, match=r"(?s)cannot be loaded: .*write one as dataset_config_name"):
        texts_of(DataArguments(**args), tokenizer)


def test_a_data_set_that_cannot_be_made_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "a"}\n{"text": ')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match=r"data set .* cannot be loaded"):
        texts_of(DataArguments(dataset_name=str(tmp_path / "set")), tokenizer)
    (tmp_path / "file").write_text("")
    write_lines(tmp_path / "set" / "train.jsonl", [{"text": "a"}])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"data set .* cannot be loaded"):
        texts_of(DataArguments(dataset_name=str(tmp_path / "set")), tokenizer)
