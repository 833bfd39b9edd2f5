"""What steps gave: their metrics, and whether all numbers are finite. An accelerator is waited for here and nowhere else."""

import math
import time
from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from configs.load import UserError
from training.model.packed_experts import packed_matrices
from training.objective.objective import Objective
from training.run import Run

TOLD_TO_STOP = "told to stop"
BEFORE, NOT_SAVED = "stopped before the step", "stopped, and nothing of that step is saved"


def read_steps(run: Run, *, told: int = 0) -> dict[str, float]:
    """The metrics of the last step, by their names in `metrics.jsonl`, and how often any process was told to stop.

    The numbers of all steps since the last reading are brought over in one go, and looked at: all have to be finite. A step
    changes weights before it is looked at, but they are not saved before.
    """
    taken, run.taken = run.taken, []
    last = taken[-1]
    shared = _summed(run, last.shares, told)
    checked = [_flat([*(share.loss for share in one.shares), one.norm, one.tokens, one.norms_P]) for one in taken]
    everything = [*shared.values(), *checked]
    parts = _flat(everything).cpu().split([tensor.numel() for tensor in everything])
    tokens = 0
    for one, part in zip(taken, parts[len(shared) :], strict=True):
        losses, (norm, of_step, *norms) = part[: len(one.shares)].tolist(), part[len(one.shares) :].tolist()
        for index, loss in enumerate(losses):
            check_loss(run, loss, step=one.step, micro_batch=index, when=NOT_SAVED)
        check_gradients(run, norms, norm, step=one.step, when=NOT_SAVED)
        tokens += int(of_step)
    run.num_tokens += tokens
    found = {key: part.view(tensor.shape) for (key, tensor), part in zip(shared.items(), parts, strict=False)}
    return {
        **_metrics(run, found),
        "train/learning_rate": last.learning_rate,
        "train/grad_norm": norm,
        "train/num_tokens": run.num_tokens,
        "time/tokens_per_second": tokens / (time.perf_counter() - taken[0].began),
    }


def check_loss(run: Run, loss: float, *, step: int, micro_batch: int, when: str) -> None:
    if math.isfinite(loss):
        return
    if bad := _not_finite(run):
        raise UserError(f"loss is {loss}, because {bad} of the model holds numbers that are not finite")
    raise UserError(
        f"loss is {loss} at step {step}, process {run.accelerator.process_index}, micro-batch {micro_batch}: {when}. "
        "Lower learning_rate; resume_from_checkpoint=auto resumes from the last save"
    )


def check_gradients(run: Run, norms_P: list[float], norm: float, *, step: int, when: str) -> None:
    bad = next((name for name, one in zip(run.trained, norms_P, strict=True) if not math.isfinite(one)), None)
    if bad or not math.isfinite(norm):
        raise UserError(
            f"gradient of {bad or 'all tensors together'} is not finite at step {step}: {when}. "
            "Lower learning_rate; resume_from_checkpoint=auto resumes from the last save"
        )


def _not_finite(run: Run) -> str | None:
    """The first frozen weight that holds a NaN or an infinity; of a sharded one, this process's part is looked at."""
    packed = {id(each.packed) for module in run.model.modules() for each in packed_matrices(module)}  # of no numbers
    for name, parameter in run.model.named_parameters():
        if name in run.trained or id(parameter) in packed:
            continue
        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
        if not part.isfinite().all():
            return name
    return None


def _summed(run: Run, shares: list[Objective], told: int) -> dict[str, Tensor]:
    """What the metrics of a step are made of, added over micro-batches and processes."""
    own = {key: torch.stack([share.terms[key] for share in shares]).sum(0) for key in shares[0].terms}
    own |= {key: torch.stack([getattr(s, key) for s in shares]).sum(0) for key in ("reuse_L", "load_LE", "hits_C")}
    own[TOLD_TO_STOP] = torch.full((), told, device=run.accelerator.device)
    return sum_over_processes(run.accelerator, own)


def _metrics(run: Run, total: dict[str, Tensor]) -> dict[str, float]:
    reuse_L, load_LE, hits_C = (total.pop(key) for key in ("reuse_L", "load_LE", "hits_C"))
    metrics = {TOLD_TO_STOP: float(total.pop(TOLD_TO_STOP))}
    metrics |= {f"train/{key}": float(value) for key, value in total.items()}
    metrics["moe/reuse_rate_mean"] = float(reuse_L.mean())
    metrics |= {f"moe/layer_{layer}/reuse_rate": float(rate) for layer, rate in enumerate(reuse_L)}
    metrics["moe/cv_mean"] = float((load_LE.std(-1, correction=0) / load_LE.mean(-1)).mean())
    metrics["moe/dead_expert_frac_mean"] = float((load_LE == 0).double().mean())
    if run.args.is_in_the_loop:
        return metrics | {"cache/in_the_loop/hit_rate": float(hits_C)}
    slots = run.args.cache_slots if run.args.rewards_cache else []
    return metrics | {f"cache/lru/C{n}/hit_rate": float(rate) for n, rate in zip(slots, hits_C, strict=True)}


def sum_over_processes(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor added over all processes, in float64 and in one exchange."""
    parts = accelerator.reduce(_flat(tensors.values()), "sum").split([tensor.numel() for tensor in tensors.values()])
    return {key: part.view(tensor.shape) for (key, tensor), part in zip(tensors.items(), parts, strict=True)}


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])
