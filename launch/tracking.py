"""An evaluation at Weights & Biases: its figures as a run's summary, its files as an artifact."""

from pathlib import Path

from evaluation.figures import figures
from evaluation.results import Results
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
            for name, value in figures(one):
                found.setdefault(f"eval/{arm}/{name}", []).append(value)
        run.summary.update({name: sum(values) / len(values) for name, values in found.items()})
    artifact = wandb.Artifact(f"{folder.name}-evaluation".replace("/", "-"), type="evaluation")
    for name in FILES:
        artifact.add_file(str(folder / name))
    run.log_artifact(artifact)
    run.finish()
