"""Proof that a run trained its routers and nothing else: names, gradients at step 1, and hashes of frozen tensors."""

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from configs.load import UserError


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    digest = hashlib.sha256(head)
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frozen_sha256(model: nn.Module, trained: Collection[str]) -> str:
    """One SHA-256 over the names and bytes of every saved tensor that is not in `trained` or tied to one that is."""
    tensors = model.state_dict()
    trained_memory = {tensors[name].data_ptr() for name in trained}
    index = {name: tensor_sha256(t) for name, t in tensors.items() if t.data_ptr() not in trained_memory}
    return hashlib.sha256("\n".join(f"{name} {index[name]}" for name in sorted(index)).encode()).hexdigest()


def check_gradients(model: nn.Module, trained: Collection[str]) -> dict[str, float]:
    """Gradient norm of every trained tensor after the first backward pass.

    Raises:
        UserError: a trained tensor has no finite, non-zero gradient, or another one has any.
    """
    norms = {}
    for name, parameter in model.named_parameters():
        norm = None if parameter.grad is None else float(parameter.grad.norm())
        if name not in trained:
            if norm is not None:
                raise UserError(f"frozen tensor {name} has a gradient (norm {norm:.3g}); only {len(trained)} may train")
            continue
        if norm is None or norm == 0 or norm != norm or norm == float("inf"):
            raise UserError(
                f"trained tensor {name} has gradient {norm} at the first step: it would not be trained. "
                "Check that the objective has a term that reaches it"
            )
        norms[name] = norm
    return norms
