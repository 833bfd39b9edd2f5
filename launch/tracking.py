"""An evaluation at Weights & Biases: its figures as a run's summary, its files as an artifact."""

from collections.abc import Iterator
from pathlib import Path

from evaluation.results import BASE, Results, Run
from training.run_folder.metrics import start_wandb

FILES = ("results.json", "report.html", "report.md")


def upload(results: Results, folder: Path) -> None:
    """Log what was found of every arm (the mean over seeds) under `eval/ARM/...`, and the files in `folder`; if W&B fails
    with anything, it says so, and the files are where they were."""
    try:
        _upload(results, folder)
    except Exception as error:
        print(f"W&B failed ({type(error).__name__}: {error}); all results are in {folder}")


def _upload(results: Results, folder: Path) -> None:
    import wandb

    run = start_wandb(f"{folder.name}-evaluation", folder, results.reproduce.config)
    for arm, of_arm in results.arms.items():
        found: dict[str, list[float]] = {}
        for one in of_arm.runs:
            for name, value in figures(one, is_base=arm == BASE):
                found.setdefault(f"eval/{arm}/{name}", []).append(value)
        run.summary.update({name: sum(values) / len(values) for name, values in found.items()})
    artifact = wandb.Artifact(f"{folder.name}-evaluation".replace("/", "-"), type="evaluation")
    for name in FILES:
        artifact.add_file(str(folder / name))
    run.log_artifact(artifact)
    run.finish()


def figures(run: Run, *, is_base: bool) -> Iterator[tuple[str, float]]:
    """Name and value of what was measured of one run."""
    if run.quality is not None:
        yield from ((f"task/{name}", task.value) for name, task in run.quality.tasks.items() if task.value is not None)
        if run.quality.mean_perplexity is not None:
            yield "mean_perplexity", run.quality.mean_perplexity
    if run.difference is not None and not is_base:
        changes = {**run.difference.tasks, **run.difference.other}
        yield from ((f"change/{name}", one.difference) for name, one in changes.items() if one.difference is not None)
    if run.routing is not None and run.routing.reuse_rate_mean is not None:
        yield "reuse_rate_mean", run.routing.reuse_rate_mean
    for row in run.replay or []:
        if row.misses is not None and row.accesses:
            yield f"miss_rate/{row.policy}/{row.slots}_slots", row.misses / row.accesses
    for cache in run.decode or []:
        if cache.bytes_read_per_token is not None:
            yield f"bytes_read_per_token/{cache.expert_cache_bytes}_bytes", cache.bytes_read_per_token
