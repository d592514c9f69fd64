"""Content hashes of models and data, so that a result or a cache says what it belongs to."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from upweight._trees import raw_bytes
from upweight.errors import UpweightError

if TYPE_CHECKING:
    from upweight.data import Examples

CHECKED_BYTES = 64 << 20
"""Of larger tensors only evenly spread rows are read to see whether they changed: they may be a file on disk."""
SMALL_BYTES = 1 << 20
"""A model's tensors up to this size are read as bytes, which takes ten times as long as their sum."""

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
    """Where each tensor is, how often it was written to and its sum: a cheap sign of whether a model changed.

    The sum is for writes through ``p.data``, as moving averages do them: torch does not count those. Of small tensors
    it is a checksum, which tells an order from another.
    """
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers())]
    return tuple((t.data_ptr(), hash((t._version, _sum(t)))) for t in tensors)


def _sum(t: Tensor) -> float:
    if _has_bytes(t) and t.nbytes <= SMALL_BYTES:
        return _checksum(t)
    return t.sum().item() if t.is_floating_point() and t.itemsize > 1 else 0


def data_versions(tensors: Iterable[Tensor]) -> Versions:
    """How often each tensor was written to and a checksum of what it holds: a cheap sign of whether data changed.

    The checksum is for writes that torch does not count: through an array that shares the memory. It is left out of
    tensors on other devices, which no array shares.
    """
    return tuple((_writes(t), _checksum(t)) for t in tensors)


def _writes(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _checksum(t: Tensor) -> int:
    if not _has_bytes(t) or t.numel() == 0:
        return 0
    return zlib.crc32(raw_bytes(t[:: -(-t.nbytes // CHECKED_BYTES)] if t.ndim else t))


def _has_bytes(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.layout == torch.strided and not t.is_quantized
