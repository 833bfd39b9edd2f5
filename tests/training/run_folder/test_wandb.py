"""A real offline Weights & Biases run, read back from its file: config, history, one run id over a resume."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from training.arguments import TrainArguments
from training.loop import train

BLOCK = 32768
pytestmark = [
    pytest.mark.slow,  # each run starts the program that writes the file
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


def records(run_dir: Path) -> list[Any]:
    """What the offline runs below `run_dir` hold, oldest first: protobuf messages in the blocks of a LevelDB log.

    The service writes in intervals, and may do so after a run has finished: it is waited for until it is gone.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()
    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for message in _messages(path.read_bytes()):
            record = Record()
            record.ParseFromString(message)
            found.append(record)
    assert found, "nothing was written"
    assert found[-1].HasField("exit"), "the file has no end"
    return found


def _messages(content: bytes) -> Iterator[bytes]:
    position, message = 7, b""  # after the file's own header
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        message += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield message
            message = b""


def history(found: list[Any]) -> dict[int, dict[str, Any]]:
    """Step -> logged values; the later one where a step was logged twice."""
    steps: dict[int, dict[str, Any]] = {}
    for record in found:
        if record.HasField("history"):
            values = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
            steps[record.history.step.num] = values
    return steps


def test_an_offline_run_holds_config_and_the_metrics_of_the_jsonl(
    train_args: Callable[..., TrainArguments], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    args = train_args(report_to="wandb", max_steps=2)
    train(args)
    assert "wandb sync " in capsys.readouterr().out
    train(train_args(report_to="wandb", max_steps=2, output_dir=args.output_dir, resume_from_checkpoint="auto"))

    found = records(Path(args.output_dir))
    runs = [record.run for record in found if record.HasField("run")]
    assert len({run.run_id for run in runs}) == 1  # the resumed process goes on with the same run
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert (config["objective"], config["max_steps"]) == ("remoe", 2)

    lines = (Path(args.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = history(found)
    for line in map(json.loads, lines):
        assert {k: v for k, v in logged[line["train/global_step"]].items() if not k.startswith("_")} == line
