"""`remoe generate`: plain transformers' tokens under a small budget, all measured, one message for each mistake."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.load import UserError
from evaluation.engine.cache.replay import replay
from evaluation.engine.cache.trace_formats import read_trace
from launch.generate import main

Checkpoint = Callable[..., Path]
PROMPT = "It was a bright cold day – 13 o'clock."


def plain_tokens(folder: Path, new_tokens: int, **options: Any) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options})
    inputs = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    output_BT = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return list(output_BT[0, inputs["input_ids"].shape[1] :].tolist())


def test_tokens_are_plain_transformers_and_the_report_is_complete(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output, trace = checkpoint("qwen2_moe"), tmp_path / "o.json", tmp_path / "t.safetensors"
    main(
        ["--model", str(folder), "--expert-cache", "40%", "--prompt", PROMPT, "--max-new-tokens", "12",
         "--output", str(output), "--route-trace", str(trace), "--seed", "3"]
    )  # fmt: skip
    report = json.loads(output.read_text())
    assert report["token_ids"] == plain_tokens(folder, 12)
    assert report["text"] == AutoTokenizer.from_pretrained(folder).decode(report["token_ids"], skip_special_tokens=True)
    assert 0 < report["hit_rate"]["decode"] < 1
    assert report["misses"] < report["accesses"]
    assert report["token_demand_bytes"] == 3 * 3 * report["config"]["slot_bytes"]
    for name in ("mean_ttft_ms", "mean_tpot_ms", "output_throughput", "peak_rss_bytes", "bytes_read_per_token"):
        assert report[name] > 0
    config = report["config"]
    assert (config["model"], config["expert_cache"], config["seed"]) == (str(folder), "40%", 3)
    assert (config["dtype"], config["slots"], config["cache_policy"]) == ("bfloat16", 14, "decayed")
    replayed = replay(read_trace(trace), policy="decayed", cache_scope="global", slots=14)
    assert (replayed.accesses, replayed.misses) == (report["accesses"], report["misses"])
    assert report["bytes_read_per_token"] == replayed.bytes_read_per_token
    printed = capsys.readouterr().out
    assert f"{100 * report['hit_rate']['decode']:.1f}\N{NO-BREAK SPACE}%" in printed
    assert f"{report['mean_tpot_ms']:,.1f}\N{NO-BREAK SPACE}ms" in printed


def test_one_token_leaves_null_what_it_cannot_measure(checkpoint: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "o.json"
    main(
        ["--model", str(checkpoint("olmoe")), "--expert-cache", "100%", "--prompt", "x", "--max-new-tokens", "1",
         "--output", str(output)]
    )  # fmt: skip
    report = json.loads(output.read_text())
    assert (report["mean_tpot_ms"], report["bytes_read_per_token"], report["hit_rate"]["decode"]) == (None, None, None)


def test_precision_policy_scope_and_prompt_file_are_used(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, output, prompt = checkpoint("olmoe"), tmp_path / "o.json", tmp_path / "p.txt"
    prompt.write_text(PROMPT, encoding="utf-8")
    main(
        ["--model", str(folder), "--expert-cache", "50%", "--prompt-file", str(prompt), "--max-new-tokens", "8",
         "--output", str(output), "--dtype", "float32", "--cache-policy", "lfu", "--cache-scope", "per_layer"]
    )  # fmt: skip
    report = json.loads(output.read_text())
    assert report["token_ids"] == plain_tokens(folder, 8, dtype=torch.float32)
    config = report["config"]
    assert (config["dtype"], config["cache_policy"], config["cache_scope"]) == ("float32", "lfu", "per_layer")


def test_a_router_delta_is_loaded_for_this_model_and_used(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = checkpoint("olmoe"), tmp_path / "o.json"
    asked = []

    def load_for(model_dir: str, delta_dir: str) -> dict[str, torch.Tensor]:
        asked.append((model_dir, delta_dir))
        return {f"model.layers.{layer}.mlp.gate.weight": torch.randn(8, 32) for layer in range(3)}

    monkeypatch.setattr("launch.engine_flags.load_for", load_for)
    main(
        ["--model", str(folder), "--router-delta", "some/delta", "--expert-cache", "50%", "--prompt", PROMPT,
         "--max-new-tokens", "8", "--output", str(output)]
    )  # fmt: skip
    assert asked == [(str(folder), "some/delta")]
    assert json.loads(output.read_text())["token_ids"] != plain_tokens(folder, 8)


def test_a_text_that_a_lever_changed_says_so(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(checkpoint("olmoe")), "--expert-cache", "30%", "--prompt", PROMPT, "--max-new-tokens", "12"]
    main([*given, "--output", str(tmp_path / "exact.json")])
    assert "lever" not in capsys.readouterr().out
    main([*given, "--output", str(tmp_path / "levered.json"), "--lever", "prior:delta=0.5"])
    assert "with prior:delta=0.5: not the text of the model as it was trained" in capsys.readouterr().out
    exact, levered = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("exact", "levered"))
    assert (exact["outputs_are_exact"], levered["outputs_are_exact"]) == (True, False)
    assert (exact["swapped"], exact["lost_weight"]) == (0, 0.0)
    assert levered["swapped"] > 0
    assert levered["misses"] < exact["misses"]
    assert levered["config"]["lever"] == "prior:delta=0.5"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", " \n"], "the prompt is empty"),
        (["--prompt", "ab\udcff"], "the prompt is not UTF-8 text"),
        (["--prompt-file", "{tmp}/none.txt"], r"text file .*none\.txt does not exist"),
        (["--prompt-file", "{tmp}/latin.txt"], r"latin\.txt is not UTF-8 text \(byte 3: .*\); save it as UTF-8"),
        (["--prompt-file", "{tmp}/empty.txt"], r"empty\.txt is empty; write some text into it"),
        (["--prompt", "x", "--output", "{tmp}"], "is a folder; name a file in it"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0; write at least 1"),
        (["--prompt", "x", "--seed", str(2**70)], "--seed is .*; write a number of at most 64 bits"),
        (["--prompt", "x", "--lever", "prior:delta=nan"], "lever prior: delta=nan: .* greater than or equal to 0"),
        (["--prompt", "x", "--output", "/proc/x.json"], "/proc cannot be made or written into"),
        (["--prompt", "x", "--expert-cache", "1KiB"], "too small: .* the smallest that works is 15360 bytes"),
        (["--prompt", "x", "--model", "{tmp}"], "holds no config.json"),
    ],
)
def test_mistakes_are_named(checkpoint: Checkpoint, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    with pytest.raises(UserError, match=words):
        main(["--model", str(checkpoint("olmoe")), "--expert-cache", "100%", "--max-new-tokens", "3", *given])


def test_a_prompt_may_come_through_a_pipe_and_be_longer_than_the_model_was_made_for(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """With a mark of byte order, as some editors write one, which is no part of it."""
    tokens = []
    for number, (source, text) in enumerate([("-", PROMPT), ("/dev/stdin", f"\ufeff{PROMPT}"), ("-", PROMPT * 30)]):
        output = tmp_path / f"{number}.json"
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", "generate", "--model", str(checkpoint("olmoe")), "--expert-cache", "100%",
             "--prompt-file", source, "--max-new-tokens", "4", "--output", str(output)],
            input=text.encode(), capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (b"it was not made for more" in done.stderr) == (number == 2)
        tokens.append(json.loads(output.read_text())["token_ids"])
    assert tokens[0] == tokens[1] == plain_tokens(checkpoint("olmoe"), 4)


def test_stop_strings_beside_the_model_end_the_text(tmp_path: Path) -> None:
    """As plain transformers ends it, which is given the tokenizer for them."""
    folder, output = tmp_path / "m", tmp_path / "o.json"
    shutil.copytree(Path(__file__).parents[2] / "data" / "embedded" / "model", folder)
    tokenizer, whole = AutoTokenizer.from_pretrained(folder), plain_tokens(folder, 12)
    stop = tokenizer.decode(whole[5:6])
    (folder / "generation_config.json").write_text(json.dumps({"stop_strings": [stop]}))
    main(
        [
            "--model",
            str(folder),
            "--expert-cache",
            "50%",
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            "12",
            "--output",
            str(output),
        ]
    )
    found = json.loads(output.read_text())["token_ids"]
    assert found == whole[: len(found)]
    assert len(found) <= 6


def test_a_model_without_tokenizer_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for path in checkpoint("olmoe").iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"the tokenizer of .* makes no tokens of the prompt"):
        main(["--model", str(tmp_path), "--expert-cache", "100%", "--prompt", "x", "--max-new-tokens", "3"])


def test_a_truncated_shard_ends_in_one_line_and_exit_code_2(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for path in checkpoint("olmoe").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "generate", "--model", str(tmp_path), "--expert-cache", "100%",
         "--prompt", "x", "--max-new-tokens", "3"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"error: shard {shard} is truncated" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "remoe generate --model" in capsys.readouterr().out
