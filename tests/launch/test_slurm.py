"""`launch/slurm.sbatch` submitted to a real Slurm of one node, which the test starts for itself."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = "configs/accelerate/cpu_2_processes.yaml"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = f"/usr/sbin:{os.environ.get('PATH', '')}"
SECONDS = 240  # until a job must have come so far

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(shutil.which(program, path=PATH) is None for program in NEEDED),
        reason="Slurm is not installed; on Debian: apt-get install slurmctld slurmd slurm-client munge",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="starts Slurm's daemons, for which it has to be root"),
]


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands speak to a one-node cluster of the test's own."""
    home = tmp_path_factory.mktemp("slurm")
    (home / "key").write_bytes(os.urandom(128))
    (home / "key").chmod(0o400)
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(home / "slurm.conf")}
    hardware = subprocess.run(["slurmd", "-C"], env=environment, capture_output=True, text=True, check=True).stdout
    (home / "slurm.conf").write_text(configuration(home, node=hardware.splitlines()[0]), encoding="utf-8")
    munged = ["munged", "--foreground", "--force", f"--key-file={home}/key", f"--socket={home}/munge.socket"]
    munged += [f"--pid-file={home}/munged.pid", f"--log-file={home}/munged.log", f"--seed-file={home}/munged.seed"]
    with ExitStack() as daemons:
        for arguments in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            log = daemons.enter_context((home / f"{arguments[0]}.out").open("wb"))
            daemon = daemons.enter_context(subprocess.Popen(arguments, env=environment, stdout=log, stderr=log))
            daemons.callback(daemon.terminate)
        until(lambda: "idle" in slurm_says(["sinfo", "--noheader", "--format=%T"], environment), "the node is up", home)
        yield environment
        subprocess.run(["scancel", "--full", "--user=root"], env=environment, check=False)


def configuration(home: Path, *, node: str) -> str:
    return f"""
ClusterName=test
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmUser=root
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
JobRequeue=1
ReturnToService=2
{node} NodeAddr=127.0.0.1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def slurm_says(arguments: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False).stdout


def until(condition: Callable[[], bool], what: str, home: Path) -> None:
    ends = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > ends:
            logs = [f"{log.name}:\n{log.read_text(errors='replace')[-1500:]}" for log in home.glob("*.out")]
            pytest.fail(f"{SECONDS} s passed before {what}\n" + "\n".join(logs))
        time.sleep(0.05)


def test_a_job_that_is_told_to_stop_requeues_resumes_and_ends_like_one_that_never_was(
    slurm: dict[str, str], train_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = {**train_values(), "max_steps": 60, "save_steps": 1000, "logging_steps": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    whole, told = (f"output_dir={tmp_path / name}" for name in ("whole", "told"))
    train = [sys.executable, "-m", "training.train", str(tmp_path / "config.yaml")]
    subprocess.run([*train, whole, "--accelerate-config", TWO_PROCESSES], cwd=ROOT, check=True)

    environment = {**slurm, "ACCELERATE_CONFIG": TWO_PROCESSES, "PROCESSES_PER_NODE": "2", "VENV": sys.prefix}
    log = tmp_path / "job.out"
    submit = ["sbatch", "--parsable", f"--output={log}", "launch/slurm.sbatch", str(tmp_path / "config.yaml"), told]
    job = subprocess.run(submit, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    lines = tmp_path / "told" / "metrics.jsonl"
    until(lambda: lines.exists() and lines.read_bytes().count(b"\n") >= 5, "five steps are logged", tmp_path)
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], env=slurm, check=True)
    until(lambda: " JobState=PENDING " in of_job(job, slurm), "the job is back in the queue", tmp_path)
    time.sleep(3)  # until the credential of its first run is older than its requeueing, or Slurm refuses the second
    until(lambda: ended(job, slurm, hurried=True), "the job has ended", tmp_path)

    said = log.read_text(encoding="utf-8")
    assert " JobState=COMPLETED " in of_job(job, slurm), said
    assert " Restarts=1 " in of_job(job, slurm)
    assert "told was told to stop (SIGUSR1) after step" in said
    assert f"remoe {job}: told to stop, goes back into the queue" in said
    assert "told: resumed from" in said
    assert steps(tmp_path / "told") == list(range(1, 61))
    for name in ("checkpoint-60/trained", "router_delta/router_delta"):
        assert len({(tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("whole", "told")}) == 1, name


def ended(job: str, environment: dict[str, str], *, hurried: bool = False) -> bool:
    """Not while it waits to run again, which takes two minutes if it is not hurried."""
    if hurried and " JobState=PENDING " in of_job(job, environment):
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=environment, check=False)
    return any(f" JobState={state} " in of_job(job, environment) for state in ("COMPLETED", "FAILED", "CANCELLED"))


def of_job(job: str, environment: dict[str, str]) -> str:
    return " ".join(slurm_says(["scontrol", "show", "job", job], environment).split())


def steps(run_dir: Path) -> list[int]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["train/global_step"] for line in lines]


def test_a_job_without_a_configuration_says_how_to_submit_one(slurm: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "job.out"
    submit = ["sbatch", "--parsable", f"--output={log}", "launch/slurm.sbatch"]
    job = subprocess.run(submit, cwd=ROOT, env=slurm, capture_output=True, text=True, check=True).stdout.strip()
    until(lambda: ended(job, slurm), "the job has ended", tmp_path)
    assert "submit from the root of the repository: sbatch" in log.read_text(encoding="utf-8")


LOOP = """
train: {train}
evaluation: {evaluation}
output_dir: {out}
arms: {{cache: {{objective: cache, max_steps: 60, save_steps: 1000, logging_steps: 1}}}}
accelerate_config: {accelerate}
"""
MEASURED = """
dtype: float32
quality: {tasks: [letters, headword, perplexity_puzzles], limit: 200}
routing: {requests_per_domain: 4, max_length: 64}
replay: {policies: [lru], slots: [6, 12]}
decode: {prompts_per_domain: 1, prompt_tokens: 24, max_new_tokens: 4, demands: [1.0], repeats: 1}
"""


def test_the_whole_chain_goes_on_where_it_was_told_to_stop(
    slurm: dict[str, str], train_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    own = {"model_name_or_path": "data/embedded/model", "dataset_name": "embedded", "cache_slots": [6]}
    values = {key: value for key, value in {**train_values(), **own}.items() if key != "train_file"}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    (tmp_path / "evaluation.yaml").write_text(MEASURED, encoding="utf-8")
    whole, told = chain("whole", slurm, tmp_path), chain("told", slurm, tmp_path)

    lines, log = tmp_path / "told" / "cache-seed0" / "metrics.jsonl", tmp_path / "told.out"
    until(lambda: ended(whole, slurm), "the undisturbed job has ended", tmp_path)
    tell_to_stop(told, lambda: lines.exists() and lines.read_bytes().count(b"\n") >= 5, slurm, tmp_path)
    tell_to_stop(told, lambda: "cache, seed 0: EOR" in log.read_text("utf-8", "replace"), slurm, tmp_path)
    until(lambda: ended(told, slurm, hurried=True), "the job has ended", tmp_path)
    said = log.read_text("utf-8", "replace")
    assert "was told to stop (SIGUSR1) after step" in said
    assert "resumed from" in said

    found = {}
    for name, job, restarts in (("whole", whole, 0), ("told", told, 2)):
        assert " JobState=COMPLETED " in of_job(job, slurm), said
        assert f" Restarts={restarts} " in of_job(job, slurm)
        assert (tmp_path / name / "report.html").is_file()
        found[name] = json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))["arms"]
    for arm in ("base", "cache"):
        (one,), (other,) = (found[name][arm]["runs"] for name in ("whole", "told"))
        for part in ("quality", "difference", "routing", "replay", "seed"):
            assert one[part] == other[part], (arm, part)


def chain(name: str, environment: dict[str, str], home: Path) -> str:
    """Submit training, evaluation and report as one job; returns its number."""
    given = {key: home / f"{key}.yaml" for key in ("train", "evaluation")}
    config = home / f"{name}.yaml"
    config.write_text(LOOP.format(out=home / name, accelerate=TWO_PROCESSES, **given), encoding="utf-8")
    submit = ["sbatch", "--parsable", f"--output={home / name}.out", "launch/command.sbatch", "run", str(config)]
    submitted = subprocess.run(
        submit, cwd=ROOT, env={**environment, "VENV": sys.prefix}, capture_output=True, text=True, check=True
    )
    return submitted.stdout.strip()


def tell_to_stop(job: str, begun: Callable[[], bool], environment: dict[str, str], home: Path) -> None:
    """Send the job what Slurm sends before its time is over, once it has begun what is to be broken off."""
    until(begun, "what is to be broken off has begun", home)
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], env=environment, check=True)
    until(lambda: " JobState=PENDING " in of_job(job, environment), "the job is back in the queue", home)
    time.sleep(3)  # until the credential of its first run is older than its requeueing, or Slurm refuses the second
    until(
        lambda: ended(job, environment, hurried=True) or " JobState=RUNNING " in of_job(job, environment),
        "it runs",
        home,
    )
