"""Examples left out of a small exact block ``H = (1/n) sum_i S_i^T S_i``: exact, and positive whatever is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from upweight.curvature.operators import Full, damped_inverse, rounding_noise
from upweight.errors import UpweightError
from upweight.gradients.blocks import Block, Dense


class LeftOutBlock:
    """``(H + (1/n) sum delta S^T S + damping I)^-1`` for each member alone, or for all together. In float64.

    A block really is the sum of its examples' parts, so that what is left without some of them is never negative but
    for rounding: leverages are held at most at ``top / (top + damping)``, which is what they can be at most.

    Args:
        layer: the block of all n examples.
        damping: of this layer.
        rows: the members' S in the block's eigenbasis, [members, c, numel] a side.
        changes: by how much their weights change, [members] a side.
        n: number of training examples.
        name: the layer's, for the error.
        ids: the members', for the error.
    """

    def __init__(
        self,
        layer: Full,
        damping: float,
        rows: Sequence[Tensor],
        changes: Sequence[Tensor],
        n: int,
        name: str,
        ids: Sequence[Any],
    ) -> None:
        self.layer, self.damping, self.name, self.ids = layer, damping, name, ids
        self.vectors = layer.vectors.double()
        damped_inverse(layer.values, damping)  # raises where the block of all examples is singular
        self.damped = layer.values.double() + damping  # [numel]
        self.noise = rounding_noise(layer.values, damping)
        sizes = [(c.double() / n).to(r.device)[:, None, None] for c, r in zip(changes, rows, strict=True)]
        self.removed = torch.cat(
            [r.double() * (-s).clamp_min(0).sqrt() for r, s in zip(rows, sizes, strict=True)], 1
        )
        self.added = torch.cat(
            [r.double() * s.clamp_min(0).sqrt() for r, s in zip(rows, sizes, strict=True)], 1
        )

    def solve_each(self, block: Block) -> Block:
        """Every member's vector, with its own change alone."""
        vectors = (block.dense().double() @ self.vectors)[:, None]  # [members, 1, numel]
        solved = self._without(vectors)
        if bool(self.added.any()):
            others = self._without(self.added)  # [members, c, numel]
            middle = self.added @ others.mT
            middle = middle + torch.eye(middle.shape[1]).to(middle)
            solved = solved - torch.linalg.solve(middle, self.added @ solved.mT).mT @ others
        return self._formed(solved[:, 0], block)

    def solve_group(self, block: Block) -> Block:
        """Any vectors, with the changes of all members together."""
        removed, added = self.removed.flatten(0, 1), self.added.flatten(0, 1)
        moved = (self.damped - self.damping).diag() + added.mT @ added - removed.mT @ removed
        values, vectors = torch.linalg.eigh((moved + moved.mT) / 2)
        damped = values.clamp_min(0) + self.damping
        if float(damped.min()) <= self.noise:
            raise self._singular(float(damped.min()), "the group")
        turned = block.dense().double() @ self.vectors @ vectors
        return self._formed(turned / damped @ vectors.mT, block)

    def _without(self, vectors: Tensor) -> Tensor:
        """``(H - removed + damping I)^-1`` of every member's vectors [members, k, numel], by Woodbury."""
        root = self.damped.sqrt()
        whitened = self.removed / root
        leverages, turn = torch.linalg.eigh(whitened @ whitened.mT)  # [members, c]
        left = 1 - leverages.clamp(0, 1 - self.damping / float(self.damped.max()))
        lowest = left.amin(1)
        if self.damping == 0 and float(lowest.min()) <= 10 * torch.finfo(self.layer.values.dtype).eps:
            raise self._singular(0.0, f"example {self.ids[int(lowest.argmin())]}")
        turned = turn.mT @ whitened  # [members, c, numel]
        x = vectors / root
        return (x + ((x @ turned.mT) / left[:, None]) @ turned) / root

    def _formed(self, vectors: Tensor, like: Block) -> Block:
        return Dense((vectors @ self.vectors.mT).to(like.dense().dtype))

    def _singular(self, smallest: float, who: str) -> UpweightError:
        return UpweightError(
            f"damping={self.damping:g} leaves layer {self.name} singular without {who} (smallest damped eigenvalue "
            f"{smallest:.1e}) -> use damping='auto' or a larger number"
        )
