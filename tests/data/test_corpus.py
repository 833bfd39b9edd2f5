"""What ships: splits that do not overlap, true answers, and tasks built from the test split alone."""

import json
import re
from typing import Any

import pytest

from configs.load import UserError
from data.build_embedded import PAGES, puzzle_pages, split_of
from data.corpus import DOMAINS, EMBEDDED, SPLITS, Document, read_corpus

Corpus = dict[str, list[Document]]
TASKS = ("arithmetic", "letters", "headword", "next_line_prose", "next_line_code")
CHOICES = ("headword", "next_line_prose", "next_line_code")
PERPLEXITIES = tuple(f"perplexity_{domain}" for domain in DOMAINS)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return {split: list(read_corpus(split)) for split in SPLITS}


@pytest.fixture(scope="module")
def test_documents(corpus: Corpus) -> dict[str, Document]:
    return {document.id: document for document in corpus["test"]}


def items(task: str) -> list[dict[str, Any]]:
    lines = (EMBEDDED / "tasks" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_document_is_in_one_split_only(corpus: Corpus) -> None:
    ids = [document.id for split in SPLITS for document in corpus[split]]
    assert len(ids) == len(set(ids))
    assert all(split_of(document.id) == split for split in SPLITS for document in corpus[split])


def test_no_two_splits_hold_the_same_text(corpus: Corpus) -> None:
    texts = {split: {normal(document.text) for document in corpus[split]} for split in SPLITS}
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]


def normal(text: str) -> str:
    return " ".join(text.lower().split())


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_holds_every_domain_in_quantity(corpus: Corpus, split: str) -> None:
    for domain in DOMAINS:
        found = [document for document in corpus[split] if document.domain == domain]
        assert len(found) >= 10
        assert sum(len(document.text) for document in found) > 50_000
        assert all(document.text.strip() and document.id.split("/")[0] == domain for document in found)


def test_training_text_is_nine_tenths_of_the_whole(corpus: Corpus) -> None:
    size = {split: sum(len(document.text) for document in corpus[split]) for split in SPLITS}
    assert 0.85 < size["train"] / sum(size.values()) < 0.95


def test_the_corpus_has_at_most_8_mb() -> None:
    assert sum(path.stat().st_size for path in (EMBEDDED / "corpus").iterdir()) <= 8_000_000


def test_domains_can_be_read_apart(corpus: Corpus) -> None:
    assert list(read_corpus("test", ["code"])) == [d for d in corpus["test"] if d.domain == "code"]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="split 'dev' is not in the corpus; choose one of train, validation, test"):
        next(read_corpus("dev"))


def test_an_unknown_domain_is_refused() -> None:
    with pytest.raises(UserError, match="domain 'poems' is not in the corpus; choose from prose, code, "):
        next(read_corpus("test", ["prose", "poems"]))


def problems_of(documents: list[Document]) -> list[tuple[str, str]]:
    pages = [document for document in documents if document.domain == "puzzles"]
    lines = [line.split(" = ") for page in pages for line in page.text.split("\n")]
    assert all(len(line) == 2 for line in lines)
    return [(question, answer) for question, answer in lines]


def solve(question: str) -> str:
    """The answer, worked out from the words of the question and not by the code that made it."""
    kind, *rest = question.split()
    if kind == "copy":
        return " ".join(rest)
    if kind == "reverse":
        return " ".join(reversed(rest))
    if kind == "sort":
        return " ".join(sorted(rest))
    if kind == "largest":
        return str(max(int(number) for number in rest[1:]))
    if kind == "next":
        first, second, *_, last = (int(number) for number in rest[1:])
        return str(last + second - first)
    a, sign, b = question.split()
    return str(int(a) + int(b) if sign == "+" else int(a) - int(b))


@pytest.mark.parametrize("split", SPLITS)
def test_answers_of_puzzles_are_right(corpus: Corpus, split: str) -> None:
    problems = problems_of(corpus[split])
    assert len(problems) == 30 * PAGES[split]
    assert [question for question, answer in problems if solve(question) != answer] == []


def test_no_question_of_the_test_split_is_seen_in_training(corpus: Corpus) -> None:
    questions = {split: {question for question, _ in problems_of(corpus[split])} for split in SPLITS}
    assert not questions["test"] & questions["train"]
    assert not questions["test"] & questions["validation"]
    assert not questions["validation"] & questions["train"]


def test_puzzles_are_made_the_same_way_every_time(corpus: Corpus) -> None:
    made = next(page for page in puzzle_pages() if split_of(page.id) == "train")
    assert made in corpus["train"]


@pytest.mark.parametrize("task", [*TASKS, *PERPLEXITIES])
def test_a_task_has_enough_items_and_all_are_from_test_documents(
    task: str, test_documents: dict[str, Document]
) -> None:
    found = items(task)
    assert len(found) >= 300
    assert {item["document"] for item in found} <= set(test_documents)
    assert len({json.dumps(item, sort_keys=True) for item in found}) == len(found)


@pytest.mark.parametrize("task", ["arithmetic", "letters"])
def test_questions_are_from_the_page_and_have_the_right_answer(
    task: str, test_documents: dict[str, Document], corpus: Corpus
) -> None:
    seen_in_training = {question for question, _ in problems_of(corpus["train"])}
    for item in items(task):
        *solved, question = item["prompt"].split("\n")
        question = question.removesuffix(" =")
        assert solve(question) == item["answer"]
        assert (question.split()[0] in ("copy", "reverse", "sort")) == (task == "letters")
        assert question not in seen_in_training
        assert "\n".join([*solved, f"{question} = {item['answer']}"]) in test_documents[item["document"]].text


@pytest.mark.parametrize("task", CHOICES)
def test_choices_differ_and_the_label_is_spread_evenly(task: str) -> None:
    found = items(task)
    assert all(len(set(item["choices"])) == 4 for item in found)
    counts = [sum(item["label"] == label for item in found) for label in range(4)]
    assert min(counts) > len(found) / 4 * 0.6


@pytest.mark.parametrize("task", ["next_line_prose", "next_line_code"])
def test_only_the_labelled_line_follows_the_context(task: str, test_documents: dict[str, Document]) -> None:
    for item in items(task):
        text = test_documents[item["document"]].text
        lines = "\n".join(line for line in text.split("\n") if line.strip())
        follows = [item["prompt"] + choice in lines for choice in item["choices"]]
        assert follows == [n == item["label"] for n in range(4)]
        assert all(choice in lines for choice in item["choices"])  # distractors are from the same document


def test_only_the_labelled_word_has_the_definition(test_documents: dict[str, Document]) -> None:
    entries = {parse(line) for d in test_documents.values() if d.domain == "glosses" for line in d.text.split("\n")}
    words = {word for _, word in entries}
    for item in items("headword"):
        definition = item["prompt"].removesuffix(" ->")
        choices = [choice.removeprefix(" ") for choice in item["choices"]]
        assert [(definition, word) in entries for word in choices] == [n == item["label"] for n in range(4)]
        assert set(choices) <= words
        page = test_documents[item["document"]].text.split("\n")
        assert (definition, choices[item["label"]]) in {parse(line) for line in page}


def parse(line: str) -> tuple[str, str]:
    """`(definition, word)` of an entry `word (noun): definition` or `definition -> word`."""
    if " -> " in line:
        definition, word = line.rsplit(" -> ", 1)
    else:
        match = re.match(r"(.+?) \((?:noun|verb|adjective|adverb)\): (.*)", line)
        assert match is not None, line
        word, definition = match.groups()
    return definition, word


@pytest.mark.parametrize("domain", DOMAINS)
def test_perplexity_passages_are_pieces_of_their_domain(domain: str, test_documents: dict[str, Document]) -> None:
    for item in items(f"perplexity_{domain}"):
        document = test_documents[item["document"]]
        assert document.domain == domain
        assert item["text"] in document.text + "\n"
        assert len(item["text"]) >= 300
