"""Quality: scores agree with a forward pass by hand, and paired intervals with closed forms."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from configs.load import UserError
from evaluation.quality.differences import differences, summarize
from evaluation.quality.scores import TaskScores, TextScores, run_tasks
from evaluation.quality.tasks import QualityArguments, load_tasks
from evaluation.results import TaskDifference
from training.model.loading import load_pretrained, load_tokenizer

MakeModelDir = Callable[[str], Path]
pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval and datasets warn about their own insides

TASKS = {
    "words": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
    "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]\n",
    "choice": "output_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: choices\ndoc_to_target: label\n"
    "target_delimiter: ''\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
}
ITEMS = {
    "words": [{"text": "we drink hot tea"}, {"text": "of a cup"}],
    "choice": [{"prompt": "we drink", "choices": [" tea", " cups of it", " zzz", " !"], "label": n} for n in range(4)],
}


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    for name, items in ITEMS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        data = (
            f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / name}.jsonl}}}}\ntest_split: test\n"
        )
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{data}{TASKS[name]}", encoding="utf-8")
    return tmp_path


def log_likelihood(model: torch.nn.Module, context: list[int], ids: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *ids]])).logits[0]
    picked = logits.float().log_softmax(-1)[len(context) - 1 : -1]
    return float(picked[torch.arange(len(ids)), torch.tensor(ids)].sum())


def test_scores_are_those_of_a_forward_pass_by_hand(
    model_dir: MakeModelDir, task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(model_dir("qwen2_moe"))
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    capsys.readouterr()
    scores = run_tasks(model, tokenizer, QualityArguments(include_path=str(task_folder), tasks=["words", "choice"]))
    drawn = capsys.readouterr().err
    assert "Running loglikelihood requests" in drawn
    assert "\n" not in drawn, "a bar that is full stays on the terminal"
    texts = [tokenizer(item["text"])["input_ids"] for item in ITEMS["words"]]
    expected = [log_likelihood(model, [tokenizer.eos_token_id], ids) for ids in texts]
    assert scores["words"].values == pytest.approx(expected, rel=1e-4)
    assert scores["words"].tokens.tolist() == [len(ids) for ids in texts]
    assert scores["words"].words.tolist() == [4, 3]
    prompt = tokenizer("we drink")["input_ids"]
    likelihoods = [log_likelihood(model, prompt, tokenizer(c)["input_ids"]) for c in ITEMS["choice"][0]["choices"]]
    assert scores["choice"].values.tolist() == [float(np.argmax(likelihoods) == n) for n in range(4)]
    assert scores["choice"].chance == 0.25


def test_summary_has_perplexity_per_token_and_per_word() -> None:
    scores = {
        "perplexity_a": TextScores(np.array([-6.0, -2.0]), tokens=np.array([3.0, 1.0]), words=np.array([1.0, 1.0])),
        "perplexity_b": TextScores(np.array([-4.0]), tokens=np.array([1.0]), words=np.array([1.0])),
        "choice": TaskScores("acc", np.array([1.0, 0.0, 1.0, 1.0]), 0.25),
    }
    summary = summarize(scores)
    assert dict(summary.perplexity["a"]) == pytest.approx(
        {"perplexity": np.exp(2), "word_perplexity": np.exp(4), "n": 2}
    )
    assert summary.mean_perplexity == pytest.approx(np.exp((2 + 4) / 2))
    assert dict(summary.tasks["choice"]) == pytest.approx(
        {
            "metric": "acc",
            "value": 0.75,
            "stderr": 0.25,
            "n": 4,
            "chance": 0.25,
            "is_rate": True,
            "higher_is_better": True,
            "of_group": None,
        }
    )


def test_one_item_has_a_value_and_no_error_or_interval() -> None:
    one = {"t": TaskScores("acc", np.array([1.0]), 0.25)}
    assert (summarize(one).tasks["t"].value, summarize(one).tasks["t"].stderr) == (1.0, None)
    found = differences(one, one).tasks["t"]
    assert (found.difference, found.low, found.high) == (0.0, None, None)


def paired(before: list[float], after: list[float]) -> TaskDifference:
    base, tuned = ({"t": TaskScores("f1", np.array(values), 0.0)} for values in (before, after))
    return differences(base, tuned).tasks["t"]


def test_difference_of_means_is_paired() -> None:
    before, after = [0.9, 0.1, 0.8, 0.2, 0.7, 0.3], [0.9, 0.2, 0.9, 0.4, 0.7, 0.3]
    found, test = paired(before, after), stats.ttest_rel(after, before)
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, test.pvalue))
    unpaired = stats.ttest_ind(after, before).confidence_interval(0.95)
    assert found.high - found.low < unpaired.high - unpaired.low


def test_difference_of_answers_has_the_interval_of_bonett_and_price_and_mcnemars_p() -> None:
    before, after = [1.0] * 20 + [0.0] * 20, [1.0] * 19 + [0.0] + [1.0] * 5 + [0.0] * 15
    found = paired(before, after)
    up, down = 6 / 42, 2 / 42  # 5 gained, 1 lost, one added to each, two items
    half = 1.959964 * np.sqrt((up + down - (up - down) ** 2) / 42)
    assert found.difference == pytest.approx(4 / 40)
    assert (found.low, found.high) == pytest.approx((up - down - half, up - down + half))
    assert found.p == pytest.approx(2 * sum(stats.binom.pmf(k, 6, 0.5) for k in (0, 1)))


def test_answers_that_all_stay_leave_room_for_a_change() -> None:
    few, many = (paired([1.0] * n, [1.0] * n) for n in (10, 1000))
    assert (few.difference, few.p) == (0.0, 1.0)
    assert few.low < many.low < 0 < many.high < few.high


def test_interval_of_answers_covers_the_truth_as_often_as_it_says() -> None:
    draw, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        kind = draw.choice(4, size=100, p=[0.05, 0.02, 0.5, 0.43])  # gained, lost, right, wrong
        before, after = np.isin(kind, (1, 2)).astype(float), np.isin(kind, (0, 2)).astype(float)
        found = paired(before.tolist(), after.tolist())
        covered += found.low <= 0.03 <= found.high
    assert 0.93 <= covered / 1000 <= 0.985


def test_group_is_weighed_by_task_and_its_error_is_that_of_its_tasks() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.random(50), draw.random(200)
    values, weights = np.concatenate([a, b]), (0.5, 0.5)
    group = TaskScores("f1", values, 0.0, sizes=(50, 200), weights=weights)
    shift = np.concatenate([draw.normal(0.1, 0.1, 50), draw.normal(0.2, 0.1, 200)])
    shifted = TaskScores("f1", values + shift, 0.0, sizes=(50, 200), weights=weights)
    value = summarize({"g": group}).tasks["g"]
    assert value.value == pytest.approx((a.mean() + b.mean()) / 2)
    assert value.stderr == pytest.approx(np.hypot(stats.sem(a), stats.sem(b)) / 2)
    found = differences({"g": group}, {"g": shifted})
    (change,) = [*found.tasks.values(), *found.other.values()]
    assert change.difference == pytest.approx((shift[:50].mean() + shift[50:].mean()) / 2)
    error = np.hypot(stats.sem(shift[:50]), stats.sem(shift[50:])) / 2
    assert change.high - change.low == pytest.approx(2 * error * stats.t.ppf(0.975, 248))


def test_metric_that_is_no_mean_has_a_paired_bootstrap() -> None:
    draw = np.random.default_rng(0)
    before = draw.normal(-3, 1, 200)
    after = before - 0.1 + draw.normal(0, 0.01, 200)

    def perplexity(items: list[float]) -> float:
        return float(np.exp(-np.mean(items)))

    base, tuned = (
        {"t": TaskScores("perplexity", values, None, perplexity(values), False, list(values), perplexity)}
        for values in (before, after)
    )
    found = differences(base, tuned).other["t"]
    assert found.low < found.difference < found.high
    assert found.difference == pytest.approx(perplexity(after) - perplexity(before))
    assert found.high - found.low < 0.4 * found.difference  # the spread between items cancels


def test_perplexity_difference_covers_a_known_shift() -> None:
    draw = np.random.default_rng(1)
    tokens = draw.integers(20, 60, 200).astype(float)
    loss = 3 * tokens + draw.normal(0, 30, 200)
    shift = 0.01 * tokens + draw.normal(0, 0.1, 200)
    base = {"perplexity_a": TextScores(-loss, tokens, tokens)}
    tuned = {"perplexity_a": TextScores(-loss - shift, tokens, tokens)}
    found = differences(base, tuned).perplexity
    assert found["a"].relative == pytest.approx(np.expm1(shift.sum() / tokens.sum()))
    assert found["a"].low < np.expm1(0.01) < found["a"].high
    assert found["a"].high - found["a"].low < 0.002  # the spread of losses between items cancels in pairs
    assert dict(found["mean"]) == pytest.approx(dict(found["a"]))


def test_unknown_task_is_refused_with_the_known_ones(model_dir: MakeModelDir, task_folder: Path) -> None:
    folder = str(model_dir("qwen2_moe"))
    arguments = QualityArguments(include_path=str(task_folder), tasks=["wrods"])
    with pytest.raises(UserError, match=r"'wrods' is neither in .*choice, words, nor among the \d+ of"):
        run_tasks(load_pretrained(folder), load_tokenizer(folder), arguments)


OTHERS = {
    # choices in the YAML, as boolq has them
    "boolq_like": "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: ['no', 'yes']\ndoc_to_target: label\n"
    "metric_list: [{metric: acc}]\n",
    # four choices in an object, as arc and openbookqa have them
    "object": "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: '{{choices.text}}'\ndoc_to_target: label\n"
    "metric_list: [{metric: acc}]\n",
    "without_metrics": "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: ['no', 'yes']\ndoc_to_target: label\n",
    "f1_first": "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: ['no', 'yes']\ndoc_to_target: label\n"
    "metric_list: [{metric: f1, aggregation: f1}, {metric: acc}]\n",
    "lambada_like": "output_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: answer\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]\n",
    "two_filters": "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: answer\n"
    "generation_kwargs: {until: ['\\n'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\nfilter_list:\n"
    "  - {name: strict, filter: [{function: take_first}]}\n"
    "  - {name: loose, filter: [{function: regex, regex_pattern: '(\\w+)'}, {function: take_first}]}\n",
    "bits": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: q\nmetric_list: [{metric: bits_per_byte}]\n",
}
OTHER_ITEMS = [
    {
        "q": "we drink",
        "label": n % 2,
        "answer": " tea",
        "choices": {"text": [" tea", " a", " b", " c"], "label": list("ABCD")},
    }
    for n in range(5)
]


@pytest.fixture
def other_tasks(tmp_path: Path) -> Path:
    """Tasks as others write them, in a file of another name than the task."""
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in OTHER_ITEMS), encoding="utf-8")
    for number, (name, how) in enumerate(OTHERS.items()):
        where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (tmp_path / f"{number}.yaml").write_text(f"task: {name}\n{where}{how}", encoding="utf-8")
    return tmp_path


def test_tasks_as_people_write_them_are_reported_by_the_harness_own_names_and_values(
    model_dir: MakeModelDir, other_tasks: Path
) -> None:
    folder = str(model_dir("qwen2_moe"))
    arguments = QualityArguments(include_path=str(other_tasks), tasks=list(OTHERS))
    scores = run_tasks(load_pretrained(folder), load_tokenizer(folder), arguments)
    summary = summarize(scores)
    about = {name: (task.metric, task.n, task.chance) for name, task in summary.tasks.items()}
    assert about == {
        "boolq_like": ("acc", 5, 0.5), "object": ("acc", 5, 0.25), "without_metrics": ("acc", 5, 0.5),
        "without_metrics (acc_norm)": ("acc_norm", 5, 0.5),
        "f1_first": ("f1", 5, None), "f1_first (acc)": ("acc", 5, 0.5),
        "lambada_like": ("perplexity", 5, None), "lambada_like (acc)": ("acc", 5, 0.0),
        "two_filters": ("exact_match,strict", 5, 0.0), "two_filters (exact_match,loose)": ("exact_match,loose", 5, 0.0),
    }  # fmt: skip
    perplexity = summary.tasks["lambada_like"]
    assert not perplexity.higher_is_better
    assert not perplexity.is_rate
    assert perplexity.stderr is None
    assert perplexity.value == pytest.approx(np.exp(-scores["lambada_like"].values.mean()))
    assert summary.perplexity["bits"].word_perplexity is None
    assert summary.perplexity["bits"].perplexity == pytest.approx(
        np.exp(-scores["bits"].values.sum() / scores["bits"].tokens.sum())
    )
    found = differences(scores, scores)
    assert set(found.other) == {"lambada_like"}
    unchanged = {"difference": 0.0, "low": 0.0, "high": 0.0, "p": None}
    assert dict(found.other["lambada_like"]) == dict(found.tasks["f1_first"]) == unchanged
    assert found.tasks["boolq_like"].low < 0


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("doc_to_choice: options\ndoc_to_target: label\n", r"task 'broken' cannot be used: "),
        (
            "doc_to_choice: ['a', 'b']\ndoc_to_target: gold\n",
            r"'broken' cannot be used: .*'gold', which is none of \['a', 'b'\]",
        ),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_before_a_model_runs(other_tasks: Path, how: str, words: str) -> None:
    data = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {other_tasks}/items.jsonl}}}}\ntest_split: test\n"
    )
    text = f"task: broken\n{data}output_type: multiple_choice\ndoc_to_text: q\n{how}"
    (other_tasks / "broken.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        load_tasks(QualityArguments(include_path=str(other_tasks), tasks=["broken"]))


def test_a_task_without_its_data_is_refused_before_a_model_runs(other_tasks: Path) -> None:
    (other_tasks / "items.jsonl").unlink()
    with pytest.raises(UserError, match="task 'bits' cannot be used: "):
        load_tasks(QualityArguments(include_path=str(other_tasks), tasks=["bits"]))
