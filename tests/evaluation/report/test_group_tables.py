"""What each kind of text did: beside base, over seeds, and with its task's score where the group is a task."""

from dataclasses import replace

from evaluation.report.group_tables import group_tables
from evaluation.results import GroupDecode, GroupRouting, HitRate, Results
from tests.evaluation.made_results import made_results


def with_groups() -> Results:
    results = made_results(("base", "cache"), cache_seeds=2)
    for arm, rates in (("base", [0.5]), ("cache", [0.4, 0.2])):
        for run, rate in zip(results.arms[arm].runs, rates, strict=True):
            assert run.routing is not None
            run.routing.groups = {
                name: GroupRouting(
                    n_requests=3, n_tokens=600, reuse_rate_mean=1 - rate, lru_miss_rates={"6": rate, "12": rate / 2}
                )
                for name in ("letters", "my chats")
            }
            for row in run.decode or []:
                row.groups["letters"] = GroupDecode(
                    hit_rate=HitRate(prefill=0.1, decode=1 - rate), experts_read_per_token=16 * rate,
                    bytes_read_per_token=1024 * 16 * rate, mean_ttft_ms=20.0, mean_tpot_ms=5.0, n_prompts=2, n_tokens=32,
                )  # fmt: skip
    return results


def test_a_row_for_every_group_and_arm_with_the_change_against_base() -> None:
    table, decoding = (
        replace(table, rows=[[cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in table.rows])
        for table in group_tables(with_groups())
    )
    pairs = [["letters", "base"], ["letters", "cache"], ["my chats", "base"], ["my chats", "cache"]]
    assert [row[:2] for row in table.rows] == [row[:2] for row in decoding.rows] == pairs
    base, tuned, chats, _ = table.rows
    assert base[2:6] == ["0.780", "600", "0.500", "50.0 %"]
    assert tuned[4] == "0.700 ± 0.141\n+40.0 ± 28.3 %"
    assert tuned[5] == "30.0 ± 14.1 %\n−40.0 ± 28.3 %"
    assert chats[2] == "–", "no task of that name has a score"
    base, tuned, chats, _ = decoding.rows
    assert base[2:] == ["10.0 %", "50.0 %", "8.0", "8.00 KiB", "20.0 ms", "5.0 ms"]
    assert tuned[4].endswith("\n−40.0 ± 28.3 %")
    assert chats[2:] == ["–"] * 6, "its prompts were not decoded"


def test_results_without_groups_have_no_rows() -> None:
    assert all(table.rows == [] for table in group_tables(made_results()))
