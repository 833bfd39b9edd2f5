"""Every side serves the legs of an order, ours and the transformers ones with the very same tokens; the meter counts."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmark.order import COLD, WARM, Leg, Order
from evaluation.benchmark.sides.serving import Meter, process_io
from evaluation.benchmark.sides.side import open_side
from evaluation.benchmark.sides.transformers_sides import accelerate_device_map
from evaluation.engine.store.experts import ExpertStore
from evaluation.export.gguf_file import write_gguf
from tests.evaluation.benchmark.conftest import TINY

LEGS = [Leg(COLD, [300, 301, 302, 303, 304], 12), Leg(WARM, [700, 5, 701, 6], 12)]
Made = tuple[Path, dict[str, Any]]


def order_for(side: str, folder: Path, tmp_path: Path) -> Order:
    (tmp_path / "offload").mkdir(exist_ok=True)
    return Order(
        side, str(folder), LEGS, threads=1, expert_cache="40%", gguf=str(tmp_path / "m.gguf"), resident_bytes=0,
        offload_dir=str(tmp_path / "offload"),
    )  # fmt: skip


def tokens(side: str, folder: Path, tmp_path: Path) -> list[list[int]]:
    with open_side(order_for(side, folder, tmp_path)) as serving:
        return [serving.request(leg).token_ids for leg in LEGS]


def test_transformers_sides_give_our_tokens(made_model: Made, tmp_path: Path) -> None:
    ours = tokens("remoe", made_model[0], tmp_path)
    assert [len(ids) for ids in ours] == [12, 12]
    assert tokens("resident", made_model[0], tmp_path) == ours
    assert tokens("accelerate", made_model[0], tmp_path) == ours


def test_a_budget_for_everything_gives_the_same_tokens(made_model: Made, tmp_path: Path) -> None:
    order = replace(order_for("remoe", made_model[0], tmp_path), expert_cache=None, memory_budget="200MiB")
    with open_side(order) as serving:
        ours = [serving.request(leg).token_ids for leg in LEGS]
        assert serving.settings["memory_budget"] == "200MiB"
    assert ours == tokens("resident", made_model[0], tmp_path)


def test_llamacpp_serves_the_same_legs(made_model: Made, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the bench extra is not installed")
    write_gguf(made_model[0], tmp_path / "m.gguf")
    theirs = tokens("llamacpp", made_model[0], tmp_path)
    assert [len(ids) for ids in theirs] == [12, 12]
    assert [ids[0] for ids in theirs] == [ids[0] for ids in tokens("resident", made_model[0], tmp_path)]


def test_our_figures_are_of_the_leg_alone(made_model: Made, tmp_path: Path) -> None:
    with open_side(order_for("remoe", made_model[0], tmp_path)) as serving:
        serving.begin_cold()
        cold = serving.request(LEGS[0]).engine
        warm = serving.request(LEGS[1]).engine
    assert cold is not None
    assert warm is not None
    for figures in (cold, warm):
        assert 0 < figures["hit_rate"]["decode"] < 1
        assert 0 < figures["reuse_rate_mean"] < 1
        assert 0 < figures["misses_per_token"] < TINY.layers * TINY.top_k
        missed_bytes = figures["misses_per_token"] * figures["expert_bytes"]
        assert figures["counted_bytes_read_per_token"] == pytest.approx(missed_bytes)
        assert figures["missed_bytes_per_token"] == pytest.approx(missed_bytes)
    assert cold["first_touches"] > warm["first_touches"]  # the warm leg found experts that it had not read itself


def test_what_is_read_ahead_in_vain_did_not_have_to_be_read(made_model: Made, tmp_path: Path) -> None:
    order = replace(order_for("remoe", made_model[0], tmp_path), prefetch=2)
    with open_side(order) as serving:
        serving.begin_cold()
        figures = serving.request(LEGS[0]).engine
    assert figures is not None
    missed_bytes = figures["misses_per_token"] * figures["expert_bytes"]
    assert figures["missed_bytes_per_token"] == pytest.approx(missed_bytes)
    assert figures["counted_bytes_read_per_token"] > missed_bytes


def test_accelerate_keeps_the_first_layers_in_memory(made_model: Made) -> None:
    folder = str(made_model[0])
    store = ExpertStore(folder)
    names, sizes, other_bytes = list(store.module_bytes), list(store.module_bytes.values()), store.resident_bytes
    enough_for_one = accelerate_device_map(folder, other_bytes + sizes[0])
    assert [name for name, device in enough_for_one.items() if device == "disk"] == [names[1]]
    assert set(accelerate_device_map(folder, other_bytes + sum(sizes)).values()) == {"cpu"}
    nothing = accelerate_device_map(folder, 0)
    assert [name for name, device in nothing.items() if device == "disk"] == names
    assert "model.layers.0.self_attn" in nothing
    assert "model.layers.0" not in nothing


def test_llamacpp_s_process_has_no_torch_to_carry() -> None:
    modules = "evaluation.benchmark.sides.side, evaluation.benchmark.sides.llamacpp_side"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[4], check=False).returncode == 0


def test_figures_by_hand() -> None:
    meter = Meter(start_io={"rchar": 100, "read_bytes": 10})
    meter.token_ids = [7, 8, 9]
    meter.token_seconds = [1.0, 1.5, 2.5]
    meter.token_io = [{"rchar": n, "read_bytes": m} for n, m in ((150, 20), (170, 50), (190, 120))]
    result = meter.result()
    assert (result.ttft_ms, result.tpot_ms, result.itl_ms) == (1000, 750, [500, 1000])
    assert result.output_throughput == pytest.approx(3 / 2.5)
    assert result.prefill_io == {"rchar": 50, "read_bytes": 10}
    assert result.decode_io == {"rchar": 40, "read_bytes": 100}
    assert result.bytes_read_per_token == 50


def test_one_token_has_no_time_per_output_token() -> None:
    meter = Meter()
    meter.tokens([5])
    result = meter.result()
    assert (result.tpot_ms, result.bytes_read_per_token, result.itl_ms) == (None, None, [])


def test_reads_are_counted_where_they_happen(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    before = process_io()
    descriptor = os.open(file, os.O_RDONLY)
    os.read(descriptor, 1 << 20)
    os.close(descriptor)
    assert process_io()["rchar"] - before["rchar"] >= 1 << 20
