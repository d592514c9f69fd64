"""Eigendecomposition of the symmetric factors of a curvature, with an error that says what is wrong and where."""

from __future__ import annotations

import torch
from torch import Tensor

from upweight.errors import UpweightError


class NotFiniteError(UpweightError):
    """A matrix to be decomposed has values that are not finite."""


def eigh(matrix: Tensor, what: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eigenvalues [.., k] (ascending, clamped at 0) and eigenvectors [.., k, k] of symmetric matrices [.., k, k].

    Runs in `dtype` (float32 for float32 models), in float64 if that fails, and with a small jitter as a last resort.

    Args:
        matrix: positive semi-definite up to rounding.
        what: the layer and factor, for error messages.
        dtype: dtype of the first attempt and of the result.

    Raises:
        NotFiniteError: the matrix is not finite.
        UpweightError: no attempt succeeds.
    """
    symmetric = (matrix + matrix.mT) / 2
    if not bool(torch.isfinite(symmetric).all()):
        bad = int((~torch.isfinite(symmetric)).sum())
        raise NotFiniteError(
            f"{what} has {bad} values that are not finite -> look for exploding gradients in this layer"
        )
    width = symmetric.shape[-1]
    scale = (
        symmetric.diagonal(dim1=-2, dim2=-1)
        .mean(-1)
        .clamp_min(torch.finfo(torch.float32).tiny)[..., None, None]
    )
    scaled = symmetric / scale  # unit mean eigenvalue: nothing under- or overflows in float32
    jitter = 1e-8 * torch.eye(width, dtype=scaled.dtype, device=scaled.device)
    attempts = [scaled.to(dtype), scaled.double(), scaled.double() + jitter.double()]
    for attempt in attempts:
        try:
            values, vectors = torch.linalg.eigh(attempt)
        except RuntimeError:  # LAPACK did not converge
            continue
        if bool(torch.isfinite(values).all() and torch.isfinite(vectors).all()):
            # Row by row, as a file gives them back: products with them then round alike after a run is resumed.
            return (values * scale[..., 0].to(values.dtype)).clamp_min(0).to(dtype), vectors.to(
                dtype
            ).contiguous()
    raise UpweightError(
        f"the eigendecomposition of {what} ({width} x {width}, values {float(symmetric.min()):.2e} to "
        f"{float(symmetric.max()):.2e}) did not converge -> train in float64, or leave the layer out with parameters="
    )
