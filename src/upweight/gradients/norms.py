"""Squared norms of per-example gradients, without forming a gradient where its factors tell."""

from __future__ import annotations

import torch
from torch import Tensor

from upweight.gradients.blocks import Block, Factored, Sparse, cast
from upweight.gradients.contraction import tiles
from upweight.gradients.gradients import Gradients


def squared_norms(gradients: Gradients) -> Tensor:
    """``|g_b|^2`` over all layers, [batch], float64."""
    return torch.stack([layer_squared_norms(block) for block in gradients.values()]).sum(0)


def layer_squared_norms(block: Block) -> Tensor:
    """``|g_b|^2`` of one layer, [batch], float64."""
    if isinstance(block, Factored) and block.positions == 1:  # |l r^T|^2 = |l|^2 |r|^2
        left, right = (f[:, :, 0].double().square().sum(-1) for f in (block.left(), block.right()))
        return (left * right).sum(0)
    if isinstance(block, Sparse):  # rows of one id are summed before they are squared
        same = block.ids[:, :, None] == block.ids[:, None]
        rows = block.rows.double()
        return ((rows @ rows.mT) * same).sum((1, 2))
    return torch.cat([cast(block[part], torch.float64).dense().square().sum(1) for part in tiles(block)])
