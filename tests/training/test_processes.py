"""Training as processes: two against one, and killed at any moment against never stopped. Slow: every run starts Python."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evaluation.export.quantised_folder import write_quantised
from tests.conftest import byte_tokenizer, small_config

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = ROOT / "configs" / "accelerate" / "cpu_2_processes.yaml"
pytestmark = pytest.mark.slow

Values = Callable[..., dict[str, Any]]


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "training.train", str(config), *arguments]


def written(values: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def finish(arguments: list[str], *, use_cpu: bool = True) -> str:
    environment = os.environ | {"ACCELERATE_USE_CPU": str(use_cpu)}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """Without what depends on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def routers(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "router_delta" / "router_delta.safetensors")


@pytest.mark.parametrize("objective", ["remoe", "cache_miss"])
def test_two_processes_do_what_one_with_twice_the_accumulation_does(
    objective: str, train_values: Values, tmp_path: Path
) -> None:
    rows = {"per_device_train_batch_size": 2, "max_steps": 8, "objective": objective}
    alone = {**train_values(), **rows, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "one")}
    both = {**train_values(), **rows, "output_dir": str(tmp_path / "two")}
    finish(command(written(alone, tmp_path / "alone")))
    finish(command(written(both, tmp_path / "both"), "--accelerate-config", str(TWO_PROCESSES)))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["train/global_step"] for line in two] == list(range(1, 9))
    for before, after in zip(one, two, strict=True):
        assert after == pytest.approx(before, abs=1e-5)
        assert after["train/num_tokens"] == before["train/num_tokens"]
    ours, theirs = routers(tmp_path / "one"), routers(tmp_path / "two")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-6)


SHARDED = ["fsdp2", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_cpu_offload", "deepspeed_zero3_nvme"]


@pytest.mark.parametrize("launcher", SHARDED)
def test_sharded_weights_change_neither_losses_nor_routers_nor_what_resuming_gives(
    launcher: str, train_values: Values, tmp_path: Path
) -> None:
    """The shipped configuration on two CPU processes; the second half of the run starts from a checkpoint."""
    if "deepspeed" in launcher and shutil.which("c++") is None:
        pytest.skip("DeepSpeed compiles its communication, and there is no C++ compiler")
    shipped = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{launcher}.yaml").read_text(encoding="utf-8"))
    on_cpu = {**shipped, "num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
    if launcher == "deepspeed_zero3_nvme":
        needs_libaio()
        on_cpu = with_nvme(on_cpu, tmp_path)
        train_values = partial(train_values, model_name_or_path=str(model_worth_swapping(tmp_path / "model")))
    accelerate_config = tmp_path / "accelerate.yaml"
    accelerate_config.write_text(yaml.safe_dump(on_cpu), encoding="utf-8")
    rows = {"per_device_train_batch_size": 2, "objective": "remoe", "resume_from_checkpoint": "auto"}
    alone = {**train_values(), **rows, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "one")}
    both = written({**train_values(), **rows, "output_dir": str(tmp_path / "two")}, tmp_path / "both")
    finish(command(written(alone, tmp_path / "alone")))
    shown = finish(command(both, "--accelerate-config", str(accelerate_config)))
    held = {"fsdp2": "fsdp2", "deepspeed_zero2": "replicated"}.get(launcher, "zero3")
    assert f"weights {held}; 2 processes" in shown
    assert_same_course(tmp_path / "one", tmp_path / "two", steps=4)
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    whole = {name: tensor.clone() for name, tensor in routers(tmp_path / "two").items()}
    shown = finish(command(both, "--accelerate-config", str(accelerate_config)))
    assert "resumed from" in shown
    assert_same_course(tmp_path / "one", tmp_path / "two", steps=4)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in routers(tmp_path / "two").items())
    assert not list((tmp_path / "nvme").glob("*")), "nothing of the weights stays on the disk"
    proofs = [json.loads((tmp_path / run / "proof.json").read_text(encoding="utf-8")) for run in ("one", "two")]
    assert len({p[key] for p in proofs for key in ("frozen_sha256_before", "frozen_sha256_after")}) == 1


@pytest.mark.parametrize(
    ("launcher", "family", "kind", "as_stored"),
    [
        ("fsdp2", "qwen3_moe_blocks", "fp8", True),
        ("deepspeed_zero3", "gpt_oss_blocks", "mxfp4", True),
        ("deepspeed_zero3_cpu_offload", "deepseek_v3_blocks", "int4", False),
        ("deepspeed_zero3_nvme", "qwen3_moe_blocks", "int8", True),
    ],
)
def test_quantised_experts_are_sharded_as_they_are(
    launcher: str, family: str, kind: str, as_stored: bool, checkpoint: Any, train_values: Values, tmp_path: Path
) -> None:
    """As stored, or rounded while they are loaded; two processes against one."""
    if "deepspeed" in launcher and shutil.which("c++") is None:
        pytest.skip("DeepSpeed compiles its communication, and there is no C++ compiler")
    folder = Path(shutil.copytree(checkpoint(family), tmp_path / "plain"))
    byte_tokenizer().save_pretrained(folder)
    if as_stored:
        write_quantised(folder, tmp_path / "q", kind)
        folder = tmp_path / "q"
    shipped = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{launcher}.yaml").read_text(encoding="utf-8"))
    on_cpu = {**shipped, "num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
    if launcher == "deepspeed_zero3_nvme":
        needs_libaio()
        on_cpu = with_nvme(on_cpu, tmp_path)
    accelerate_config = tmp_path / "accelerate.yaml"
    accelerate_config.write_text(yaml.safe_dump(on_cpu), encoding="utf-8")
    model = {"model_name_or_path": str(folder), "experts": None if as_stored else kind, "max_steps": 2}
    rows = {**train_values(), **model, "per_device_train_batch_size": 2, "objective": "remoe"}
    finish(
        command(
            written({**rows, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "one")}, tmp_path / "a")
        )
    )
    both = written({**rows, "output_dir": str(tmp_path / "two")}, tmp_path / "b")
    shown = finish(command(both, "--accelerate-config", str(accelerate_config)))
    assert f" in {dict(fp8='FP8', mxfp4='MXFP4').get(kind, kind)}, largest layer" in shown
    assert "; 2 processes, " in shown
    assert_same_course(tmp_path / "one", tmp_path / "two", steps=2)
    proofs = [json.loads((tmp_path / run / "proof.json").read_text(encoding="utf-8")) for run in ("one", "two")]
    assert len({p[key] for p in proofs for key in ("frozen_sha256_before", "frozen_sha256_after")}) == 1


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("launcher", ["single_gpu", "multi_gpu", *SHARDED])
def test_gpus_train_as_a_cpu_does(launcher: str, bf16: bool, train_values: Values, tmp_path: Path) -> None:
    """The shipped configurations on CUDA devices, one or two, as they are but for how many there are."""
    if not torch.cuda.is_available():
        pytest.skip(f"{launcher} needs a CUDA device, this machine has none")
    if launcher == "deepspeed_zero3_nvme":
        needs_libaio()
    processes = 1 if launcher == "single_gpu" else min(2, torch.cuda.device_count())
    model = str(model_without_ties(tmp_path / "model"))
    values = {**train_values(model_name_or_path=model), "objective": "remoe", "bf16": bf16}
    alone = {**values, "gradient_accumulation_steps": processes, "output_dir": str(tmp_path / "cpu")}
    cpu = ["--accelerate-config", str(ROOT / "configs" / "accelerate" / "cpu.yaml")]
    finish(command(written(alone, tmp_path / "alone"), *cpu))
    shipped = ["--accelerate-config", str(ROOT / "configs" / "accelerate" / f"{launcher}.yaml")]
    shipped += [] if launcher == "single_gpu" else ["--num_processes", str(processes)]
    there = written({**values, "output_dir": str(tmp_path / "gpu")}, tmp_path / "gpus")
    finish(command(there, *shipped), use_cpu=False)
    for expected, found in zip(metrics(tmp_path / "cpu"), metrics(tmp_path / "gpu"), strict=True):
        compared = ["train/loss"] if bf16 else list(expected)  # rounding differs, and with it what is chosen
        assert [found[key] for key in compared] == pytest.approx(
            [expected[key] for key in compared], abs=0.05 if bf16 else 1e-3
        )
    for name, tensor in routers(tmp_path / "cpu").items():
        torch.testing.assert_close(routers(tmp_path / "gpu")[name], tensor, rtol=0, atol=0.05 if bf16 else 1e-3)


def model_without_ties(folder: Path) -> Path:
    """The token that ends a text is embedded as zeros, to which all experts are equal: devices choose different ones."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(small_config("qwen2_moe"), dtype=torch.float32)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def model_worth_swapping(folder: Path) -> Path:
    """DeepSpeed leaves in memory what is smaller than a mebibyte a process."""
    config = small_config("qwen2_moe")
    config.update({"hidden_size": 64, "num_experts": 32, "moe_intermediate_size": 256})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert all(p.nbytes >= 2 << 20 for name, p in model.named_parameters() if ".experts." in name)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def with_nvme(launcher: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same with the disk in this folder, and without what may not stand beside DeepSpeed's own file."""
    shipped = json.loads((ROOT / launcher["deepspeed_config"]["deepspeed_config_file"]).read_text(encoding="utf-8"))
    shipped["zero_optimization"]["offload_param"]["nvme_path"] = str(folder / "nvme")
    (folder / "deepspeed.json").write_text(json.dumps(shipped), encoding="utf-8")
    without = {key: value for key, value in launcher.items() if key != "mixed_precision"}
    file = {"deepspeed_config_file": str(folder / "deepspeed.json")}
    return {**without, "deepspeed_config": {**launcher["deepspeed_config"], **file}}


def needs_libaio() -> None:
    if not Path("/usr/include/libaio.h").exists():
        pytest.skip("offload to disk needs libaio's headers; on Debian: apt-get install libaio-dev")


def assert_same_course(one: Path, two: Path, *, steps: int) -> None:
    """Losses to 1e-5, routers to 1e-6."""
    before, after = metrics(one), metrics(two)
    assert [line["train/global_step"] for line in after] == list(range(1, steps + 1))
    for expected, found in zip(before, after, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    for name, tensor in routers(one).items():
        torch.testing.assert_close(routers(two)[name], tensor, rtol=0, atol=1e-6)


def test_accelerate_launch_starts_the_same_training(train_values: Values, tmp_path: Path) -> None:
    values = train_values(output_dir=str(tmp_path / "run"))
    config = written(values, tmp_path / "config")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(TWO_PROCESSES)]
    shown = finish([*launch, "-m", "training.train", str(config), "max_steps=2"])
    assert shown.count("; 2 processes, 96 tokens a step") == 1  # the main process speaks, the other is silent
    assert [line["train/global_step"] for line in metrics(tmp_path / "run")] == [1, 2]


def test_a_disk_to_offload_to_that_accelerate_does_not_pass_on_is_missed(train_values: Values, tmp_path: Path) -> None:
    """What accelerate's documentation names, and its launcher drops."""
    if shutil.which("c++") is None:
        pytest.skip("DeepSpeed compiles its communication, and there is no C++ compiler")
    needs_libaio()
    shipped = yaml.safe_load((ROOT / "configs/accelerate/deepspeed_zero3_cpu_offload.yaml").read_text(encoding="utf-8"))
    shipped["deepspeed_config"].update(offload_param_device="nvme", offload_param_nvme_path=str(tmp_path / "nvme"))
    on_cpu = {**shipped, "num_processes": 1, "use_cpu": True, "mixed_precision": "no"}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(on_cpu), encoding="utf-8")
    config = written(train_values(), tmp_path / "config")
    arguments = command(config, "--accelerate-config", str(tmp_path / "accelerate.yaml"))
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: no nvme_path to offload to: accelerate does not pass on offload_param_nvme_path" in done.stderr


def test_two_machines_do_what_two_processes_of_one_do(train_values: Values, tmp_path: Path) -> None:
    """The shipped configuration, both machines this one; each is started by itself, as on a cluster."""
    config = written({**train_values(), "objective": "remoe"}, tmp_path / "config")
    shipped = yaml.safe_load((ROOT / "configs" / "accelerate" / "multi_node.yaml").read_text(encoding="utf-8"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    on_cpu = {**shipped, "num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
    (tmp_path / "machines.yaml").write_text(yaml.safe_dump(on_cpu), encoding="utf-8")
    launch = ["--accelerate-config", str(tmp_path / "machines.yaml"), "--main_process_port", str(port)]
    train = command(config, f"output_dir={tmp_path / 'machines'}", *launch)
    with subprocess.Popen([*train, "--machine_rank", "1"], cwd=ROOT) as second:
        finish([*train, "--machine_rank", "0"])
    assert second.returncode == 0
    finish(command(config, f"output_dir={tmp_path / 'processes'}", "--accelerate-config", str(TWO_PROCESSES)))
    assert metrics(tmp_path / "machines") == metrics(tmp_path / "processes")
    ours, theirs = routers(tmp_path / "machines"), routers(tmp_path / "processes")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("arguments", [[], ["max_steps=2"]])
def test_the_local_script_trains_on_what_there_is(arguments: list[str], train_values: Values, tmp_path: Path) -> None:
    script = ["bash", str(ROOT / "launch" / "local.sh")]
    environment = {**os.environ, "VENV": sys.prefix}
    if not arguments:
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, "launch/local.sh CONFIG [key=value ...]" in done.stderr) == (2, True)
        return
    config = written(train_values(), tmp_path / "config")
    subprocess.run([*script, str(config), *arguments], env=environment, check=True)
    assert [line["train/global_step"] for line in metrics(tmp_path / "run")] == [1, 2]
    again = subprocess.run(
        [*script, str(config), *arguments], env=environment, capture_output=True, text=True, check=True
    )
    assert "run: resumed from" in again.stdout


def test_a_mistake_under_two_processes_ends_with_its_message(train_values: Values, tmp_path: Path) -> None:
    config = written(train_values(model_name_or_path="/nowhere/model"), tmp_path / "config")
    done = subprocess.run(
        command(config, "--accelerate-config", str(TWO_PROCESSES)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: /nowhere/model does not exist" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_again_and_again_equals_one_that_never_was(
    processes: int, train_values: Values, tmp_path: Path, exhaustive: bool
) -> None:
    """SIGKILL at moments of the clock, wherever the run may be then: starting, computing or saving; 20 with --exhaustive."""
    values = {**train_values(), "max_steps": 120, "save_steps": 5, "logging_steps": 1, "resume_from_checkpoint": "auto"}
    extra = [] if processes == 1 else ["--accelerate-config", str(TWO_PROCESSES)]
    finish(command(written({**values, "output_dir": str(tmp_path / "whole")}, tmp_path / "a"), *extra))
    killed = written({**values, "output_dir": str(tmp_path / "killed")}, tmp_path / "b")
    draw = random.Random(processes)
    for lines in sorted(draw.sample(range(1, 110), 20)) if exhaustive else (3, 20, 44, 70):
        moment = draw.random() * 0.04
        run_until(command(killed, *extra), tmp_path / "killed" / "metrics.jsonl", lines=lines, moment=moment)
    finish(command(killed, *extra))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    for name in ("checkpoint-120/trained", "checkpoint-120/optimizer", "router_delta/router_delta"):
        same = [(tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("whole", "killed")]
        assert same[0] == same[1], name


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_where_it_was(
    processes: int, train_values: Values, tmp_path: Path
) -> None:
    """SIGUSR1 to one of the processes, between two checkpoints; batch systems send it before they end a job."""
    values = {
        **train_values(),
        "max_steps": 60,
        "save_steps": 1000,
        "logging_steps": 1,
        "resume_from_checkpoint": "auto",
    }
    extra = [] if processes == 1 else ["--accelerate-config", str(TWO_PROCESSES)]
    finish(command(written({**values, "output_dir": str(tmp_path / "whole")}, tmp_path / "a"), *extra))
    config = written({**values, "output_dir": str(tmp_path / "told")}, tmp_path / "b")
    with subprocess.Popen(command(config, *extra), cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        lines = tmp_path / "told" / "metrics.jsonl"
        while not lines.exists() or lines.read_bytes().count(b"\n") < 5:
            assert process.poll() is None, "the run ended before it could be told"
            time.sleep(0.002)
        trainers = [process.pid] if processes == 1 else [child.pid for child in workers_of(process.pid)]
        os.kill(trainers[-1], signal.SIGUSR1)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 2
    assert "error: told was told to stop (SIGUSR1) after step" in said
    assert len(metrics(tmp_path / "told")) < 60
    finish(command(config, *extra))
    assert metrics(tmp_path / "told") == metrics(tmp_path / "whole")
    same = [(tmp_path / run / "checkpoint-60" / "trained.safetensors").read_bytes() for run in ("whole", "told")]
    assert same[0] == same[1]


def workers_of(launcher: int) -> list[psutil.Process]:
    """The training processes below a launcher: those that have no children of the same kind."""
    below = psutil.Process(launcher).children(recursive=True)
    return [process for process in below if not process.children() and "training.train" in " ".join(process.cmdline())]


def run_until(arguments: list[str], metrics_file: Path, *, lines: int, moment: float) -> None:
    """Start a run in a process group of its own and kill all of it `moment` seconds after so many lines were written."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not metrics_file.exists() or metrics_file.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
