"""Which tasks are asked, and how: names, groups and patterns, examples, chat templates, metrics, prompts as text."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.load import UserError, load
from evaluation.quality.differences import summarize
from evaluation.quality.prompts import task_pieces
from evaluation.quality.scores import run_tasks
from evaluation.quality.tasks import QualityArguments, load_tasks
from training.model.loading import load_pretrained, load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval and datasets warn about their own insides
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FUNCTIONS = """
def question(doc):
    return f"Q: {doc['q']}\\nA:"


def last_word(resps, docs):
    return [[text.split()[-1] if text.split() else "" for text in answers] for answers in resps]
"""
YAMLS = {
    "asked": "task: asked\ntag: mine\noutput_type: generate_until\ndoc_to_text: !function own.question\ndoc_to_target: a\n"
    "target_delimiter: ' '\nfewshot_split: examples\ngeneration_kwargs: {until: ['\\n'], max_gen_toks: 4}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\nfilter_list:\n"
    "  - {name: whole, filter: [{function: take_first}]}\n"
    "  - {name: last, filter: [{function: custom, filter_fn: !function own.last_word}, {function: take_first}]}\n",
    "chosen": "task: chosen\ntag: mine\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: [' tea', ' a cup']\n"
    "doc_to_target: label\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "longer": "task: longer\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: [' tea', ' a cup']\ntest_split: many\n"
    "doc_to_target: label\nmetric_list: [{metric: acc}]\n",
    "read": "task: read\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: q\n"
    "metric_list: [{metric: word_perplexity}]\n",
}  # fmt: skip
GROUP = (
    "group: both\ntask: [chosen, longer]\n"
    "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks as people write them: functions in a file, filters, a tag, a group whose tasks differ in size."""
    items = [{"q": f"we drink number {n}", "a": "tea", "label": n % 2} for n in range(9)]
    for name, of_split in (("test", items[:3]), ("many", items), ("examples", items[5:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(i) + "\n" for i in of_split), encoding="utf-8")
    files = ", ".join(f"{name}: {tmp_path}/{name}.jsonl" for name in ("test", "many", "examples"))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{{files}}}}}\ntest_split: test\n"
    (tmp_path / "own.py").write_text(FUNCTIONS, encoding="utf-8")
    for name, text in YAMLS.items():
        own = data.replace("test_split: test\n", "") if "test_split" in text else data
        (tmp_path / f"{name}.yaml").write_text(own + text, encoding="utf-8")
    (tmp_path / "both.yaml").write_text(GROUP, encoding="utf-8")
    return tmp_path


def arguments(folder: Path, *tasks: str, **how: Any) -> QualityArguments:
    return QualityArguments(include_path=[str(folder)], tasks=list(tasks), **how)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (["mine"], ["asked", "chosen"]), (["both"], ["chosen", "longer"]), (["ch*", "read"], ["chosen", "read"]),
        (["chosen", "both", "chosen"], ["chosen", "longer"]),
    ],
)  # fmt: skip
def test_tags_groups_and_patterns_are_names_too(folder: Path, asked: list[str], found: list[str]) -> None:
    assert sorted(load_tasks(arguments(folder, *asked)).tasks) == found


def test_several_folders_and_the_harness_own_tasks_can_be_asked_together(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "copy.yaml").write_text(
        (folder / "read.yaml").read_text("utf-8").replace("task: read", "task: copy"), "utf-8"
    )
    args = QualityArguments(include_path=[str(folder), str(other)], tasks=["read", "copy"])
    assert list(load_tasks(args).tasks) == ["read", "copy"]
    with pytest.raises(UserError, match=r"task 'arc_easy' cannot be used: .*write quality.offline=false"):
        load_tasks(arguments(folder, "read", "arc_easy"))  # known, and no test has its data


def test_groups_have_a_row_of_their_own_by_the_harness_weights(folder: Path, model_dir: Any) -> None:
    model = str(model_dir("qwen2_moe"))
    scores = run_tasks(load_pretrained(model), load_tokenizer(model), arguments(folder, "both"))
    found = summarize(scores).tasks
    assert list(found) == ["chosen", "chosen (acc_norm)", "longer", "both"]
    assert found["both"].n == 12
    assert found["both"].value == pytest.approx((3 * found["chosen"].value + 9 * found["longer"].value) / 12)
    assert {name: of.of_group for name, of in found.items()} == {
        "chosen": "both", "chosen (acc_norm)": "both", "longer": "both", "both": None,
    }  # fmt: skip
    args = arguments(folder, "both")
    pieces = task_pieces(load_tasks(args), args, load_tokenizer(model), tokens=50, per_task=4, with_answers=False)
    assert {name: len(of) for name, of in pieces.items()} == {"both": 4}
    args = arguments(folder, "both", "longer")
    assert load_tasks(args).group_of == {"chosen": "both"}, "what is named itself is a row of its own"


def test_metrics_and_filters_are_chosen_by_name(folder: Path, model_dir: Any) -> None:
    model = str(model_dir("qwen2_moe"))
    how = {"metrics": {"asked": "exact_match,last", "chosen": ["acc_norm"]}}
    scores = run_tasks(load_pretrained(model), load_tokenizer(model), arguments(folder, "mine", **how))
    assert {name: found.metric for name, found in summarize(scores).tasks.items()} == {
        "asked": "exact_match,last", "chosen": "acc_norm",
    }  # fmt: skip
    with pytest.raises(UserError, match="'chosen' has no metric 'f1'; it has acc,none, acc_norm,none"):
        run_tasks(load_pretrained(model), load_tokenizer(model), arguments(folder, "chosen", metrics={"chosen": "f1"}))
    with pytest.raises(UserError, match="metrics names task 'other', which is not asked"):
        load_tasks(arguments(folder, "chosen", metrics={"other": "acc"}))


def test_examples_and_chat_template_are_in_the_prompts(folder: Path, model_dir: Any) -> None:
    tokenizer = load_tokenizer(str(model_dir("qwen2_moe")))
    tokenizer.chat_template = CHAT
    args = arguments(folder, "asked", num_fewshot=1, apply_chat_template=True, system_instruction="Be brief.")
    (prompt, *rest) = task_pieces(load_tasks(args), args, tokenizer, tokens=500, per_task=2, with_answers=False)[
        "asked"
    ]
    text = tokenizer.decode(prompt)
    assert len(rest) == 1
    assert text.startswith("<system>Be brief.\n<user>Q: we drink number ")
    assert text.endswith("\n<user>Q: we drink number 0\nA:\n<assistant>")
    assert "<assistant>tea" in text
    with_answer = task_pieces(load_tasks(args), args, tokenizer, tokens=500, per_task=2, with_answers=True)["asked"][0]
    assert tokenizer.decode(with_answer) == text + " tea"
    (cut, _) = task_pieces(load_tasks(args), args, tokenizer, tokens=6, per_task=2, with_answers=False)["asked"]
    assert cut.tolist() == prompt.tolist()[-6:]


def test_prompts_of_choices_end_with_the_right_one_and_texts_begin_at_their_beginning(
    folder: Path, model_dir: Any
) -> None:
    tokenizer = load_tokenizer(str(model_dir("qwen2_moe")))
    args = arguments(folder, "chosen", "read")
    found = task_pieces(load_tasks(args), args, tokenizer, tokens=500, per_task=10, with_answers=True)
    texts = {name: [tokenizer.decode(ids) for ids in of_task] for name, of_task in found.items()}
    assert texts["chosen"] == [f"we drink number {n} {(' tea', ' a cup')[n % 2]}" for n in range(3)]
    begun = task_pieces(load_tasks(args), args, tokenizer, tokens=3, per_task=10, with_answers=False)["read"]
    assert [ids.tolist() for ids in begun] == [tokenizer(f"we drink number {n}")["input_ids"][:3] for n in range(3)]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("quality.tasks=[]", "tasks names none"),
        ("quality.limit=0", "limit"),
        ("quality.metrics={a: 3}", r"metrics.a is 3; write a metric, or a list"),
        ("quality.include_path=nowhere", "include_path nowhere is no folder"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(key: str, words: str) -> None:
    from evaluation.arguments import EvaluationArguments

    with pytest.raises(UserError, match=words):
        load_tasks(load(EvaluationArguments, None, [key]).quality)


def test_code_of_a_model_is_only_run_if_that_is_confirmed(folder: Path) -> None:
    text = (folder / "read.yaml").read_text("utf-8").replace("task: read", "task: run\nunsafe_code: true")
    (folder / "run.yaml").write_text(text, "utf-8")
    with pytest.raises(
        UserError, match=r"'run' runs code that a model wrote; write quality.confirm_run_unsafe_code=true"
    ):
        load_tasks(arguments(folder, "run"))
    assert list(load_tasks(arguments(folder, "run", confirm_run_unsafe_code=True)).tasks) == ["run"]
