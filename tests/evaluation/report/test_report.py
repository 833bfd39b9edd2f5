"""Both reports from made-up results: the numbers are the results', and a damaged file is refused in clear words."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from configs.load import UserError
from evaluation.report import plots
from evaluation.report.documents import markdown, page, write_report
from evaluation.report.drawing import KNOWN_COLOURS, OTHER_COLOURS, colours
from evaluation.report.numbers import CHANGE, COUNT, PERCENT, RATE, bytes_text
from evaluation.report.quality_tables import differences_table, values_table
from evaluation.report.sections import sections
from evaluation.report.summary import all_runs, decode_budgets, frontier, frontier_budgets
from evaluation.report.tables import Table, balance_table, decode_table, headline_table, miss_tables
from evaluation.report.wording import headline
from evaluation.results import MachineLoad, Results, TaskDifference, TaskValue
from launch.report import main
from tests.evaluation.made_results import ARMS, changed, made_results

FIGURES = [
    plots.frontier_figure,
    plots.miss_rate_figure,
    plots.reuse_figure,
    plots.training_figure,
    plots.quality_figure,
    plots.decode_figure,
]


@pytest.fixture
def results() -> Results:
    return made_results()


@pytest.fixture(scope="module")
def whole_page() -> str:
    """The page of the untouched results; drawing it takes a second."""
    return page(made_results())


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def words_of(results: Results) -> tuple[str, str]:
    """Both reports without the pictures."""
    return plain(markdown(results)), plain(re.sub(r"<svg.*?</svg>", "", page(results), flags=re.DOTALL))


def row_of(table: Table, *first: str) -> list[str]:
    """The row that starts with these words, second lines included."""
    return next(
        [plain(cell) for cell in row]
        for row in table.rows
        if [cell.split("\n")[0] for cell in row[: len(first)]] == [*first]
    )


def test_write_report_writes_both_files_into_a_new_folder(results: Results, whole_page: str, tmp_path: Path) -> None:
    write_report(results, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.md"]
    assert (tmp_path / "new/report.md").read_text(encoding="utf-8") == markdown(results)
    assert (tmp_path / "new/report.html").read_text(encoding="utf-8") == whole_page


def test_the_command_rebuilds_the_report_beside_its_results(results: Results, whole_page: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results.model_dump(by_alias=True)), encoding="utf-8")
    main([str(tmp_path / "results.json")])
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == whole_page
    main([str(tmp_path / "results.json"), "--output", str(tmp_path / "elsewhere")])
    assert (tmp_path / "elsewhere/report.md").is_file()


CHANGES: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("routing", "reuse_rate_mean"), 0.6781, "0.678"),
    (("routing", "nll"), 2.7182, "2.718"),
    (("routing", "load_cv_per_layer", 3), 7.239, "7.24"),
    (("quality", "mean_perplexity"), 77.314, "77.31"),
    (("quality", "tasks", "letters", "value"), 0.9137, "0.914"),
    (("quality", "perplexity", "prose", "word_perplexity"), 4321.5, "4,321.50"),
    (("replay", 1, "misses"), 123456, "12.9 %"),
    (("replay", 1, "misses_without_first_touches"), 111111, "11.6 %"),
    (("replay", 1, "policy_regret"), 3.217, "3.22"),
    (("decode", 1, "tpot_ms"), [80.15, 87.65, 99.15], "80.2 to 99.2"),
    (("decode", 2, "ttft_ms"), [None, 301.25, 301.25], "301.2 to 301.2"),
    (("decode", 1, "bytes_read_per_token"), 3 * 2**20, "3.00 MiB"),
    (("decode", 2, "hit_rate", "decode"), 0.9871, "98.7 %"),
]


def test_a_changed_result_changes_what_both_reports_say(results: Results) -> None:
    before = words_of(results)
    for place, value, _ in CHANGES:
        changed(results, "arms", "base", "runs", 0, *place, value=value)
    after = words_of(results)
    for place, _, shown in CHANGES:
        assert [shown in text for text in before] == [False, False], f"{shown} is no proof: it stands there already"
        assert [shown in text for text in after] == [True, True], f"{place} should read {shown}"


def test_what_was_not_measured_is_a_dash_and_never_a_zero(results: Results) -> None:
    base = results.arms["base"].runs[0]
    base.decode[1].tpot_ms = base.decode[1].mean_tpot_ms = base.decode[1].hit_rate.prefill = None
    base.decode[1].hit_rate.decode = 0.5
    base.routing = None
    base.quality.tasks["letters"].stderr = None
    for row in base.replay:
        row.policy_regret = None
    assert row_of(headline_table(results), "base")[1] == "–"
    assert row_of(headline_table(results), "base")[-1] == "–"
    assert row_of(headline_table(results), "remoe")[-1].count("\n") == 1, "no change against an unknown base"
    assert row_of(balance_table(results), "base")[1:] == ["–"] * 7
    assert row_of(values_table(results), "letters")[4] == "0.780"
    assert row_of(miss_tables(results)[2], "base", "lru")[2:] == ["–"] * 7
    assert [plain(cell) for cell in decode_table(results).rows[4][2:4]] == ["–", "50.0 %"]


def test_a_run_with_nothing_measured_still_gives_a_report(results: Results) -> None:
    empty = dict.fromkeys(("history", "quality", "difference", "routing", "replay", "lru_curves", "decode"))
    for arm in results.arms.values():
        arm.runs = [run.model_copy(update=empty) for run in arm.runs]
    assert all(figure(results) is None for figure in FIGURES)
    assert "<svg" not in page(results)
    assert "No arm's mean perplexity was compared with base" in markdown(results)
    assert "Not measured in this run." in markdown(results)


def test_base_alone_gives_a_report_that_says_so() -> None:
    alone = made_results(("base",))
    assert "no tuned arm" in markdown(alone)
    assert "No tuned arm was compared with base" in page(alone)
    assert plots.miss_rate_figure(alone) is not None
    assert plots.quality_figure(alone) is None


def test_the_headline_table_gives_mean_and_deviation_over_seeds_and_their_number(results: Results) -> None:
    for run, rate, misses in zip(results.arms["cache"].runs, (0.4, 0.5, 0.6), (240000, 288000, 336000), strict=True):
        run.routing.reuse_rate_mean = rate
        run.replay[1].misses = misses
    results.arms["base"].runs[0].routing.reuse_rate_mean = 0.4
    results.arms["base"].runs[0].replay[1].misses = 480000
    row = row_of(headline_table(results), "cache")
    assert row[:3] == ["cache\nn = 3", "0.500 ± 0.100\n+25.0 ± 25.0 %", "30.0 ± 5.0 %\n−40.0 ± 10.0 %"]
    assert row_of(headline_table(results), "remoe")[1].count("±") == 0, "one seed has no deviation"


def test_the_headline_names_the_best_arm_its_gain_and_its_cost(results: Results) -> None:
    for run in results.arms["cache"].runs:
        run.difference.tasks["next_line_prose"].p = 0.001
    sentence = plain(headline(results))
    assert "The best arm, cache (3 seeds), needs 25.9 ± 0.9 % fewer expert loads than base with 6 LRU slots" in sentence
    assert "22.9 ± 0.8 % fewer with 12, at +0.93 ± 0.04 % mean perplexity" in sentence
    assert "but next_line_prose falls by 1.9 ± 0.1 pt" in sentence
    assert headline_table(results).marked == "cache"
    assert "| **cache<br>n = 3** |" in markdown(results)
    for run in results.arms["cache"].runs:
        run.difference.tasks["next_line_prose"].p = 0.03
    assert plain(headline(results)).endswith(
        "; no task falls beyond chance, and no loss larger than 3.6 pt (next_line_prose) can be hidden in so few items."
    )


def test_the_headline_says_when_no_arm_is_within_the_limit() -> None:
    results = made_results(("base", "remoe"))
    assert plain(headline(results)) == (
        "No arm keeps mean perplexity within +1 % of base: the cheapest, remoe, is at +1.62 %."
    )
    assert headline_table(results).marked is None


def test_the_headline_does_not_praise_an_arm_that_needs_more_loads() -> None:
    results = made_results(("base", "ce_only"))
    results.arms["ce_only"].runs[0].replay[1].misses = 600000
    assert "No arm within the limit saves loads at every size" in headline(results)
    assert re.search(r"10\.\d % more expert loads than base with 6", plain(headline(results)))


def test_an_interval_that_excludes_zero_is_starred(results: Results) -> None:
    tasks = results.arms["remoe"].runs[0].difference.tasks
    tasks["arithmetic"] = TaskDifference(difference=-0.03, low=-0.05, high=-0.01)
    tasks["letters"] = TaskDifference(difference=-0.03, low=-0.07, high=0.01)
    table = differences_table(results)
    assert row_of(table, "task", "arithmetic")[3] == "−3.0 pt\n[−5.0, −1.0] *"
    assert row_of(table, "task", "letters")[3] == "−3.0 pt\n[−7.0, +1.0]"


def test_a_decode_whose_tokens_differ_from_the_resident_model_is_told(results: Results) -> None:
    assert "in memory" not in decode_table(results).note
    rows = results.arms["base"].runs[0].decode
    rows[0].tokens_equal_resident = rows[1].tokens_equal_resident = True
    assert "Every token is the one of the same model" in decode_table(results).note
    rows[1].tokens_equal_resident = False
    assert "In 1 of 2 decodes tokens differ" in decode_table(results).note


def test_how_times_were_taken_is_told(results: Results) -> None:
    assert "2 repeats of every prompt, the models taking turns at each." in decode_table(results).note
    for run in all_runs(results):
        for row in run.decode:
            row.tpot_ms = None
    assert "means of 2 repeats, the models taking turns at each cache size" in decode_table(results).note
    for run in all_runs(results):
        for row in run.decode:
            row.repeats = None
    assert "turns" not in decode_table(results).note


def test_a_change_of_a_time_is_given_only_where_it_shows(results: Results) -> None:
    size = decode_budgets(results)[1]
    base, remoe, ce_only = (results.arms[arm].runs[0].decode[1] for arm in ("base", "remoe", "ce_only"))
    base.tpot_ms = [10.0, 20.0, 10.0, 20.0, 10.0, 20.0, 10.0, 20.0]
    remoe.tpot_ms = [9.0, 18.0, 9.0, 18.0, 8.0, 16.0, 9.5, 19.0]
    ce_only.tpot_ms = [9.0, 18.0, 9.0, 18.0, 8.0, 16.0, 9.5, 201.0]
    assert size == base.expert_cache_bytes
    assert row_of(headline_table(results), "base")[-1] == "15.0 ms\n10.0 to 20.0"
    assert row_of(headline_table(results), "remoe")[-1] == "12.8 ms\n8.0 to 19.0\n−10.0 % [−20.0, −5.0]"
    assert row_of(headline_table(results), "ce_only")[-1] == "12.8 ms\n8.0 to 201.0\nno difference that shows"
    assert "10.0 % [" in plain(markdown(results))


def test_how_busy_the_machine_was_stands_beside_the_times(results: Results) -> None:
    assert "processors' time" not in markdown(results)
    results.machine_load = MachineLoad(
        load_average_before=0.4, load_average_after=1.2, stolen_share=0.02, others_share=0.01
    )
    for text in words_of(results):
        text = text.replace("&#39;", "'")
        assert "other processes had 1.0 % of the processors' time and the hypervisor took 2.0 %" in text
        assert "(load average 0.40 before, 1.20 after)." in text
        assert "times say little" not in text
    results.machine_load.others_share = 0.5
    for table in (headline_table(results), decode_table(results)):
        assert "the machine was busy with other work, more than 10.0 %: times say little." in plain(table.note)


def test_the_policies_of_decode_and_replay_are_named(results: Results) -> None:
    for text in words_of(results):
        assert text.count("decayed, one pool for all layers") >= 3
        assert "LRU misses are replayed" in text
    results.arms["base"].runs[0].decode[0].cache_policy = "lru"
    assert "decayed, one pool for all layers and lru, one pool for all layers" in decode_table(results).note


def test_the_frontier_as_a_picture_is_small_and_sharp_at_700_pixels(results: Results, tmp_path: Path) -> None:
    plots.write_frontier(results, tmp_path / "new" / "frontier.png")
    content = (tmp_path / "new" / "frontier.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") == 1400
    assert len(content) < 150_000
    for arm in results.arms.values():
        for run in arm.runs:
            run.difference = None
    with pytest.raises(UserError, match="these results have no frontier"):
        plots.write_frontier(results, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("figure", FIGURES)
def test_every_arm_is_named_and_drawn_in_its_colour_in_every_figure(
    results: Results, figure: Callable[[Results], str | None]
) -> None:
    drawn = figure(results)
    assert drawn is not None
    for arm in ARMS:
        if figure is plots.training_figure and arm == "base":
            continue  # base is not trained
        assert re.search(rf">(?:{arm}(?: \(n = \d\))?|{arm}, no difference)</text>", drawn), arm
        assert drawn.count(colours(results)[arm]) >= 2, f"{arm}: the legend and at least one mark"


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_follows_the_results(results: Results, figure: Callable[[Results], str | None]) -> None:
    other = deepcopy(results)
    measured = other.arms["cache"].runs[0]
    measured.lru_curves.per_layer.misses[9] = 1  # a size that no table has
    measured.routing.reuse_rate_per_layer[2] = 0.9
    measured.history[3]["train/loss"] = 5.0
    measured.difference.tasks["letters"].high = 0.2
    measured.decode[2].tpot_ms = [1.0]
    measured.decode[1].bytes_read_per_token *= 0.5
    assert figure(results) == figure(deepcopy(results)), "the same results give the same picture"
    assert figure(other) != figure(results)


def test_every_panel_of_the_frontier_shows_its_own_cache_size(results: Results) -> None:
    sizes = frontier_budgets(results)
    assert [size / results.model.token_demand_bytes for size in sizes] == [1, 2, 4], "from one demand up"
    for row in range(1, 4):
        other = deepcopy(results)
        other.arms["cache"].runs[0].decode[row].bytes_read_per_token *= 0.5
        assert plots.frontier_figure(other) != plots.frontier_figure(results)
    results.arms["remoe"].runs[0].difference = None
    assert list(frontier(results, sizes[0])) == ["base", "ce_only", "cache"]


def test_the_frontier_is_a_table_too_one_row_per_cache_size_and_arm(results: Results) -> None:
    (shown,) = [section for section in sections(results) if section.title == "Quality against bytes per token"]
    sizes, arms = frontier_budgets(results), list(results.arms)
    assert [row[1] for row in shown.folded[0].rows] == arms * len(sizes)
    cells = shown.folded[0].rows[arms.index("cache")]
    assert cells[0] == "1.27\xa0MiB"
    assert cells[2] == "690\xa0±\xa010\xa0KiB"
    assert cells[3].startswith("+")
    assert shown.absent not in markdown(results)


def test_a_figure_leaves_matplotlibs_settings_alone(results: Results) -> None:
    before = dict(matplotlib.rcParams)
    plots.miss_rate_figure(results)
    assert dict(matplotlib.rcParams) == before


def test_a_figure_without_some_of_the_values_is_still_drawn(results: Results) -> None:
    measured = results.arms["base"].runs[0]
    measured.routing.reuse_rate_per_layer = [None, 0.3, None, 0.4]
    measured.replay = [row for row in measured.replay if row.policy != "belady"]
    measured.decode[0].tpot_ms = measured.decode[0].mean_tpot_ms = None
    assert all("nan" not in (figure(results) or "missing: nan") for figure in FIGURES)


def test_the_arms_we_ship_have_colours_of_their_own() -> None:
    assert len({KNOWN_COLOURS[arm] for arm in ("base", "ce_only", "remoe", "cache", "cache_miss")}) == 5
    assert not set(KNOWN_COLOURS.values()) & set(OTHER_COLOURS)


def test_an_unknown_arm_has_a_colour_of_its_own(results: Results) -> None:
    results.arms["a<b"] = results.arms.pop("remoe")
    assert len(set(colours(results).values())) == 4
    text = page(results)
    assert "a<b" not in text
    assert "a&lt;b" in text


def test_the_page_fetches_nothing(whole_page: str) -> None:
    targets = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", whole_page)
    assert targets, "figures refer to their own markers"
    assert [target for target in targets if not target.startswith("#")] == []
    assert not re.search(r"<(?:script|link|iframe|img|object|embed)\b|@import|url\((?!#)", whole_page)


def test_ids_in_the_page_are_unique(whole_page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', whole_page)
    assert all(re.fullmatch(r"[mp][0-9a-f]+", name) for name in ids)
    assert len(ids) == len(set(ids))


def test_markdown_tables_are_rectangular_and_names_are_not_markup(results: Results) -> None:
    results.arms["base"].runs[0].quality.tasks["a|b*c"] = TaskValue(
        metric="acc", value=0.5, stderr=0.1, n=10, chance=0.25
    )
    text = markdown(results)
    assert r"a\|b\*c" in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 14
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_both_reports_have_every_section_the_definitions_and_the_way_to_reproduce(
    results: Results, whole_page: str
) -> None:
    for text in (markdown(results), whole_page):
        for section in sections(results):
            assert section.title in text
        for words in (
            "remoe run configs/run/demo.yaml",
            "abc123",
            "Example CPU",
            "learning_rate: 0.002",
            "First touch",
            "300",
        ):
            assert words.replace("_", "\\_") in text or words in text
    results.reproduce.commit = None
    assert "not run from a git checkout" in markdown(results)


def test_numbers_are_written_with_sign_unit_and_no_negative_zero() -> None:
    assert plain(CHANGE.text(-0.123)) == "−12.3 %"
    assert plain(CHANGE.text(0.5)) == "+50.0 %"
    assert plain(CHANGE.text(-0.0001)) == "0.0 %"
    assert (plain(PERCENT.text(None)), RATE.text(0.12345), COUNT.text(1234567)) == ("–", "0.123", "1,234,567")
    assert [plain(bytes_text(size)) for size in (12.0, 2048.0, 663552.0, 1327104.0, 5e8, 3e9)] == [
        "12 B", "2.00 KiB", "648 KiB", "1.27 MiB", "477 MiB", "2.79 GiB"
    ]  # fmt: skip
