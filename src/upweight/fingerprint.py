"""Content hashes of models and data, so that a result or a cache says what it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from upweight._trees import raw_bytes
from upweight.errors import UpweightError

if TYPE_CHECKING:
    from upweight.data import Examples

SUMMED_BYTES = 64 << 20
"""Larger tensors are not read as a whole to see whether they changed: they may be a file in the place of memory."""

Versions = tuple[tuple[int, int], ...]


class Origin:
    """The model and the training data that something was fitted on, and whether they are still what they were.

    Attributes:
        examples: the training data.
        fingerprints: of the model and of the training data ("train").
    """

    def __init__(self, model: nn.Module, examples: Examples) -> None:
        self.model, self.examples = model, examples
        self.fingerprints = {"model": model_fingerprint(model), "train": examples.fingerprint()}
        self._versions = model_versions(model)

    def check(self) -> None:
        """Raise if the model or the data changed."""
        versions = model_versions(self.model)
        if versions != self._versions:
            if model_fingerprint(self.model) != self.fingerprints["model"]:
                raise UpweightError("the model's weights changed since fit -> fit again")
            self._versions = versions
        if self.examples.fingerprint() != self.fingerprints["train"]:
            raise UpweightError("the training data changed since fit -> fit again")


def model_fingerprint(model: nn.Module) -> str:
    """Hash of every parameter's and buffer's name, shape, dtype and values."""
    digest = hashlib.blake2b(digest_size=16)
    state = model.state_dict()
    hidden = {name: tensor for name, tensor in model.named_buffers() if name not in state}  # not persistent
    for name, tensor in (state | hidden).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def model_versions(model: nn.Module) -> Versions:
    """A cheap sign of whether a model changed: see `versions_of`."""
    return versions_of((*model.parameters(), *model.buffers()))


def versions_of(tensors: Iterable[Tensor], summed_bytes: float = float("inf")) -> Versions:
    """Where each tensor is, how often it was written to and its sum: a cheap sign of whether it changed.

    The sum is for writes that torch does not count: through ``p.data``, as moving averages do them, and through an
    array that shares its memory.

    Args:
        tensors: in one order.
        summed_bytes: leave the sum of larger ones out.
    """

    def version(t: Tensor) -> tuple[int, int]:
        if t.layout != torch.strided:
            return 0, t._version
        float8 = t.is_floating_point() and t.itemsize == 1
        countable = not (float8 or t.is_quantized or t.is_meta) and t.nbytes <= summed_bytes
        return t.data_ptr(), hash((t._version, t.sum().item() if countable else 0))

    return tuple(version(t.detach()) for t in tensors)
