"""Proof that a run trained its routers and nothing else: names, gradients at step 1, and hashes of frozen tensors."""

import hashlib
import math
import statistics
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from configs.load import UserError

NOISE = 1e-6
"""A gradient that is this much smaller than the others' is what float32 rounds to."""


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digests(tensors: Iterable[tuple[str, Tensor]], trained: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> SHA-256 of every tensor that is not in `trained` or tied to one that is."""
    trained_memory = {tensor.data_ptr() for tensor in trained.values()}
    return {name: tensor_sha256(t) for name, t in tensors if name not in trained and t.data_ptr() not in trained_memory}


def frozen_sha256(tensors: Iterable[tuple[str, Tensor]], trained: Mapping[str, Tensor]) -> str:
    """One SHA-256 over names and bytes of every tensor that `digests` gives."""
    return combined(digests(tensors, trained))


def combined(digest_of: Mapping[str, str]) -> str:
    """One SHA-256 over names and digests."""
    return hashlib.sha256("\n".join(f"{name} {digest_of[name]}" for name in sorted(digest_of)).encode()).hexdigest()


def check_gradients(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, float]:
    """Gradient norm of every trained tensor after the first backward pass.

    Raises:
        UserError: a trained tensor has no finite, non-zero gradient, or one that is noise beside the others', or another
            tensor has any.
    """
    for name, parameter in model.named_parameters():
        if name not in trained and parameter.grad is not None:
            norm = float(parameter.grad.norm())
            raise UserError(f"frozen tensor {name} has a gradient (norm {norm:.3g}); only {len(trained)} may train")
    norms = {}
    for name, tensor in trained.items():
        norm_or_none = None if tensor.grad is None else float(tensor.grad.norm())
        if not norm_or_none or not math.isfinite(norm_or_none):
            raise UserError(
                f"trained tensor {name} has gradient {norm_or_none} at the first step: it would not be trained. "
                "Check that the objective has a term that reaches it"
            )
        norms[name] = norm_or_none
    usual = statistics.median(norms.values()) if norms else 0.0
    for name, norm in norms.items():
        if norm < NOISE * usual:
            raise UserError(
                f"trained tensor {name} has a gradient of norm {norm:.3g} at the first step, others of {usual:.3g}: that is "
                "rounding noise, by which it would be trained. Check that the objective has a term that reaches it"
            )
    return norms
