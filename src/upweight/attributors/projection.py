"""Seeded random projections of per-example gradients: few numbers whose inner products are right on average."""

from __future__ import annotations

import hashlib
from math import sqrt

import torch
from torch import Tensor

from upweight.budget import BATCH_BYTES
from upweight.gradients import Dense, Gradients
from upweight.gradients.contraction import TILE_BYTES, tiles

CHUNK = 1 << 22
"""Signs that are drawn at a time."""


class Projection:
    """``g -> P^T g`` with P [parameters, dimension] of independent signs over ``sqrt(dimension)``.

    Inner products keep their expectation, ``E <P^T v, P^T g> = <v, g>``, and have a variance of at most
    ``(|v|^2 |g|^2 + <v, g>^2) / dimension``. The matrix depends on the seed, the layers' order and their sizes alone;
    it is drawn in chunks, and remembered as far as the memory allows.

    Args:
        dimension: numbers kept of a gradient.
        seed: of the signs.
        memory: bytes of the matrix that may be remembered.
    """

    def __init__(self, dimension: int, seed: int | str, memory: float) -> None:
        self.dimension, self.seed, self.memory = dimension, seed, memory
        self.rows = max(1, CHUNK // dimension)
        # The whole matrix is read, and turned from signs to numbers, once a tile: few examples would pay it alone.
        self.formed = int(max(TILE_BYTES, min(BATCH_BYTES, memory)))
        self._kept: dict[tuple[int, int, int], Tensor] = {}
        self._used = 0

    def __call__(self, gradients: Gradients) -> Gradients:
        """Projected gradients, as one layer named ``projection``."""
        total: Tensor | None = None
        for number, block in enumerate(gradients.values()):
            parts = [self._project(number, block[rows].dense()) for rows in tiles(block, self.formed)]
            projected = torch.cat(parts)
            total = projected if total is None else total + projected
        assert total is not None  # there is at least one layer
        return Gradients({"projection": Dense(total)}, gradients.router)

    def _project(self, layer: int, gradients: Tensor) -> Tensor:
        width = gradients.shape[1]
        total = gradients.new_zeros(len(gradients), self.dimension)
        for start in range(0, width, self.rows):
            stop = min(start + self.rows, width)
            signs = self.signs(layer, start, stop).to(gradients.device, gradients.dtype)
            total += gradients[:, start:stop] @ signs
        return total / sqrt(self.dimension)

    def signs(self, layer: int, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a layer's part of P, times ``sqrt(dimension)``: [rows, dimension] in int8."""
        key = (layer, start, stop)
        signs = self._kept.get(key)
        if signs is None:
            signs = self._drawn(layer, start, stop)
            if self._used + signs.nbytes <= self.memory:
                self._kept[key] = signs
                self._used += signs.nbytes
        return signs

    def _drawn(self, layer: int, start: int, stop: int) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{layer}/{start}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        shape = stop - start, self.dimension
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
