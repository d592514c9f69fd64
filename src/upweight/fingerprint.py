"""Content hashes of models, so that a result or a cache says what it belongs to."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from upweight._trees import raw_bytes


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


def model_versions(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Where each tensor is, how often it was written to and its sum: a cheap sign of whether a model changed.

    The sum is for writes through ``p.data``, as moving averages do them: torch does not count those.
    """
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers())]
    sums = [t.sum().item() if t.is_floating_point() and t.itemsize > 1 else 0 for t in tensors]
    return tuple((t.data_ptr(), hash((t._version, total))) for t, total in zip(tensors, sums, strict=True))
