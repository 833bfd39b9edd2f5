"""Where a run's numbers go: `metrics.jsonl` always, Weights & Biases as a copy of it, a progress bar for the person.

Rank 0 only. `metrics.jsonl` is the truth; on resume it is cut back to the checkpoint, so that it never holds a step twice.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs.files import write_text
from training.arguments import TrainArguments

Metrics = Mapping[str, float | int]
LINE_SECONDS = 60.0


class Tracker:
    """Writes one JSON line a logged step; `global_step` is how many optimizer steps were done."""

    def __init__(self, args: TrainArguments, *, step: int, wandb_id: str | None, active: bool) -> None:
        self.path, self.wandb_id = Path(args.output_dir) / "metrics.jsonl", wandb_id
        self.wandb_run: Any = None
        self._file: Any = None
        self._said = time.monotonic()
        self._bar = tqdm(total=args.max_steps, initial=step, disable=not active, desc=args.run_name, unit="step")
        if not active:
            return
        _cut_back(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        if args.report_to == "wandb":
            with self._only_the_copy_is_lost():
                self.wandb_run = _start_wandb(args, run_id=wandb_id)
                self.wandb_id = str(self.wandb_run.id)

    def log(self, step: int, metrics: Metrics) -> None:
        if self._file is None:
            return
        line = {"train/global_step": step, **metrics}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        with self._only_the_copy_is_lost():
            if self.wandb_run is not None:
                self.wandb_run.log(line, step=step)

    def advance(self, step: int, metrics: Metrics) -> None:
        """Move the bar, which shows loss, reuse rate and the time left; once a minute say the same in a line that stays."""
        numbers = {"loss": f"{metrics['train/loss']:.4f}", "reuse": f"{metrics['moe/reuse_rate_mean']:.3f}"}
        self._bar.set_postfix(numbers, refresh=False)
        self._bar.update(step - self._bar.n)
        if not self._bar.disable and time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            said = ", ".join(f"{name} {number}" for name, number in numbers.items())
            tqdm.write(f"{time.strftime('%H:%M:%S')}  {self._bar.desc}: step {step} of {self._bar.total}, {said}")

    def flush(self) -> None:
        """Bring every line to disk, before a checkpoint that counts on them."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()
        with self._only_the_copy_is_lost():
            if self.wandb_run is not None:
                self.wandb_run.finish()

    @contextmanager
    def _only_the_copy_is_lost(self) -> Iterator[None]:
        """Let training go on whatever W&B fails with, the death of its own service included."""
        try:
            yield
        except Exception as error:
            print(f"W&B failed ({type(error).__name__}: {error}); training goes on, all metrics are in {self.path}")
            self.wandb_run = None


def _cut_back(path: Path, step: int) -> None:
    """Drop every line after `step`, and a last line that was cut off by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            if json.loads(line)["train/global_step"] <= step:
                kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))


def _start_wandb(args: TrainArguments, *, run_id: str | None) -> Any:
    return start_wandb(str(args.run_name), args.output_dir, asdict(args), run_id=run_id)


def start_wandb(name: str, folder: str | Path, config: Mapping[str, Any], *, run_id: str | None = None) -> Any:
    """A run at Weights & Biases, its files in `folder`; with the id of an earlier one that goes on.

    Offline unless a login exists or WANDB_MODE says otherwise; prints the line that uploads an offline run.
    """
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
    where: dict[str, Any] = {"project": "remoe", "name": name, "dir": str(folder), "id": run_id}
    run = wandb.init(**where, config=dict(config), mode=mode, resume="allow")
    if mode == "offline":
        print(f"W&B runs offline; upload it later with: wandb sync {Path(run.dir).parent}")
    return run
