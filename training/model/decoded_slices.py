"""Weights of a quantised checkpoint as lazy slices of the model that was quantised: a matrix is decoded when it is loaded."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from configs.load import UserError
from training.model.lazy_weights import lazy_slices
from training.model.number_formats.formats import NumberFormat, Stored, as_tensor
from training.model.number_formats.found import BESIDE, format_of
from training.model.shards import AGAIN, StoredTensor, read_bytes

BESIDE_WEIGHT = re.compile(r"(?P<weight>.+\.weight)(?P<ending>_scale_inv|_scale|_packed|_zero_point|_shape)")


class DecodedSlice:
    """What transformers' loader needs of a lazy slice."""

    def __init__(
        self, stored: Mapping[str, StoredTensor], numbers: NumberFormat, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self._stored, self._numbers, self._shape, self._dtype = stored, numbers, shape, dtype

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        """A precision to compute in: it is not to be dequantised."""
        return "BF16"

    def __getitem__(self, _: Any) -> Tensor:
        """The whole matrix, of which the loader takes everything."""
        out = torch.empty(self._shape, dtype=self._dtype)
        try:
            self._numbers.decode({ending: read_bytes(tensor) for ending, tensor in self._stored.items()}, out)
        except ValueError as error:
            raise UserError(f"{next(iter(self._stored.values())).name}: {error}; {AGAIN}") from error
        return out


def decoded_slices(tensors: Mapping[str, StoredTensor], *, dtype: torch.dtype) -> dict[str, Any]:
    """Slices by the names that tensors have in a checkpoint that is not quantised; but for shapes nothing is read yet.

    Args:
        dtype: of what is decoded.

    Raises:
        UserError: a matrix is in no format that is known.
    """
    quantised: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        if match := BESIDE_WEIGHT.fullmatch(name):
            quantised.setdefault(match["weight"], {})[match["ending"]] = tensor
    for weight, stored in quantised.items():
        if weight in tensors:
            stored[""] = tensors[weight]
    apart = {tensor.name for stored in quantised.values() for tensor in stored.values()}
    modules = {weight.removesuffix(".weight") for weight in quantised}
    apart |= {name for name in tensors if name.endswith(BESIDE) and name.rpartition(".")[0] in modules}
    plain = lazy_slices({name: tensor for name, tensor in tensors.items() if name not in apart})
    return {**plain, **{weight: _decoded(weight, stored, dtype) for weight, stored in quantised.items()}}


def _decoded(weight: str, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> DecodedSlice:
    try:
        shape = _shape(stored)
        numbers = format_of({shape: {ending: Stored(tensor.dtype, tensor.shape) for ending, tensor in stored.items()}})
    except ValueError as error:
        raise UserError(f"{weight} cannot be decoded: {error}") from error
    wanted = numbers.tensors(*shape)
    return DecodedSlice({ending: stored[ending] for ending in wanted}, numbers, shape, dtype)


def _shape(stored: Mapping[str, StoredTensor]) -> tuple[int, int]:
    """Rows and columns: said beside packed integers, else by how many numbers there are."""
    if "_shape" in stored:
        rows, columns = as_tensor(read_bytes(stored["_shape"]), stored["_shape"].dtype).tolist()
        return rows, columns
    numbers = stored.get("", stored.get("_packed"))
    if numbers is None or len(numbers.shape) != 2 or numbers.dtype not in ("F8_E4M3", "U8"):
        raise ValueError(f"beside {next(iter(stored.values())).name} there are no numbers that it is the scale of")
    return numbers.shape[0], numbers.shape[1] * (2 if numbers.dtype == "U8" else 1)
