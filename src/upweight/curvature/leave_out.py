"""Examples left out of a structured curvature: its eigenbasis stays, their own part leaves the eigenvalues.

EK-FAC's eigenvalues are a sum over examples, so that other weights on some of them are other eigenvalues:

    Lambda = (1/n) sum_i lambda_i,      lambda_i = sum_c (Q_B^T G_ic Q_A)^2
    Lambda' = Lambda + (1/n) sum_i delta_i lambda_i >= 0      for weights 1 + delta_i >= 0 (removal: delta = -1)
    (H' + damping I)^-1 g = Q [ Q^T g / (Lambda' + damping) ]

with G_ic the gradients of the columns of the Fisher that was fitted. No leverage can reach 1, whatever is left out.

Layer by layer:

* EK-FAC: exactly the curvature that fitting without these examples gives in this eigenbasis.
* K-FAC: its eigenvalues are products, not that sum; what would be less than 0 is put to 0.
* Diagonal: the same with squared gradients, where the eigenbasis is that of the parameters: exact.
* Exact blocks: exact, by Woodbury for one example and by another eigendecomposition for a group.

The eigenbasis's own dependence on an example is left out, and so are the products of two coordinates of one gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from upweight.curvature.curvature import Inverse
from upweight.curvature.left_out_block import LeftOutBlock
from upweight.curvature.operators import Diagonal, Full, Kronecker, LayerCurvature, rounding_noise
from upweight.errors import UpweightError
from upweight.gradients import Gradients
from upweight.gradients.blocks import Block, Dense, Sparse
from upweight.gradients.contraction import TILE_BYTES, tiles


@dataclass(frozen=True)
class Weighted:
    """Examples whose weight of 1 changes.

    Attributes:
        columns: the Fisher columns of each, one `Gradients` [members, p] a column.
        change: by how much its weight changes, [members].
    """

    columns: Sequence[Gradients]
    change: Tensor


class LeftOut:
    """``(H' + damping I)^-1`` for the changed weights of each member alone, or of all of them together.

    Args:
        sides: the members: one side, or those that go and those that take their place, in the same order.
        inverse: the damped inverse of the structured curvature of all n examples.
        n: number of training examples.
        ids: the members' ids, for the error.

    Raises:
        UpweightError: when solving, without any damping, where an example holds all of an eigenvalue.
    """

    def __init__(self, sides: Sequence[Weighted], inverse: Inverse, n: int, ids: Sequence[Any]) -> None:
        self.sides, self.inverse, self.n, self.ids = sides, inverse, n, list(ids)

    def rows(self, rows: slice) -> LeftOut:
        """The same for some of the members."""
        sides = [Weighted([c.rows(rows) for c in side.columns], side.change[rows]) for side in self.sides]
        return LeftOut(sides, self.inverse, self.n, self.ids[rows])

    # Each alone --------------------------------------------------------------------------------------------------

    def solve_rotated(self, gradients: Gradients) -> Gradients:
        """``Q^T (H'_i + damping I)^-1 g_i`` of every member: to be multiplied with `rotated` vectors."""
        return self._by_layer(gradients, self._solve_each)

    def solve(self, gradients: Gradients) -> Gradients:
        """``(H'_i + damping I)^-1 g_i`` of every member."""
        solved = self.solve_rotated(gradients)
        return self._by_layer(solved, lambda name, block: back(self._layer(name), block))

    # All together ------------------------------------------------------------------------------------------------

    def solve_group(self, gradients: Gradients) -> Gradients:
        """``(H' + damping I)^-1 g`` of any vectors, for the changes of all members together."""
        return self._by_layer(gradients, self._solve_group)

    def _solve_group(self, name: str, block: Block) -> Block:
        layer, damping = self._layer(name), self.inverse.damping[name]
        if isinstance(layer, Full):
            return self._block(name).solve_group(block)
        return layer_with(layer, self._group_values[name]).precondition(block, damping)

    @cached_property
    def _group_values(self) -> dict[str, Tensor]:
        """Lambda' of all but the exact blocks, in the shape of Lambda."""
        out = {}
        for name, layer in self.inverse.curvature.layers.items():
            if isinstance(layer, Full):
                continue
            total = torch.zeros_like(layer.eigenvalues).flatten()
            for side in self.sides:
                for rows in self._tiles(name, len(side.change)):
                    total += side.change[rows].to(total) @ squares(layer, self._columns(side, name, rows))
            moved = layer.eigenvalues.flatten() + total / self.n
            out[name] = self._checked(moved[None], name, "the group")[0].reshape(layer.eigenvalues.shape)
        return out

    # Layers ------------------------------------------------------------------------------------------------------

    def _solve_each(self, name: str, block: Block) -> Block:
        layer, damping = self._layer(name), self.inverse.damping[name]
        if isinstance(layer, Full):
            return self._block(name).solve_each(block)
        if isinstance(layer, Diagonal) and (kept := self._looked_up(name, layer, block)) is not None:
            return kept
        parts = []
        for rows in self._tiles(name, len(block)):
            solved = layer.coordinates(block[rows])
            parts.append(solved / (self._values(name, layer, rows) + damping))
        return Dense(torch.cat(parts))

    def _values(self, name: str, layer: LayerCurvature, rows: slice) -> Tensor:
        """Lambda' of every member of a tile, [rows, numel]."""
        moved = layer.eigenvalues.flatten()[None]
        for side in self.sides:
            change = side.change[rows, None].to(moved) / self.n
            moved = moved + change * squares(layer, self._columns(side, name, rows))
        return self._checked(moved, name, lambda row: f"example {self.ids[rows.start + row]}")

    def _looked_up(self, name: str, layer: Diagonal, block: Block) -> Sparse | None:
        """An embedding's rows, never the table; None where the members' rows are not the gradients' own."""
        if len(self.sides) > 1 or not isinstance(block, Sparse):
            return None
        (side,) = self.sides
        columns = [column[name] for column in side.columns]
        if not all(isinstance(c, Sparse) and torch.equal(c.ids, block.ids) for c in columns):
            return None
        same = (block.ids[:, :, None] == block.ids[:, None, :]).to(block.rows)  # a row may be looked up twice
        own = torch.stack([(same @ c.rows).square_() for c in columns if isinstance(c, Sparse)]).sum(0)
        before = layer.values.reshape(block.table)[block.ids]  # [members, position, width]
        moved = before + side.change[:, None, None].to(before) / self.n * own
        moved = self._checked(moved, name, lambda row: f"example {self.ids[row]}")
        return Sparse(block.ids, block.rows / (moved + self.inverse.damping[name]), block.table)

    def _block(self, name: str) -> LeftOutBlock:
        layer = self._layer(name)
        assert isinstance(layer, Full)
        rows = [
            torch.stack([column[name].dense() for column in side.columns], 1) @ layer.vectors
            for side in self.sides
        ]  # [members, column, numel]
        changes = [side.change for side in self.sides]
        return LeftOutBlock(layer, self.inverse.damping[name], rows, changes, self.n, name, self.ids)

    def _checked(self, moved: Tensor, name: str, who: str | Callable[[int], str]) -> Tensor:
        """No less than 0: what is, is rounding, or K-FAC's. Without damping nothing may be 0."""
        moved = moved.clamp_min(0)
        damping = self.inverse.damping[name]
        smallest = (moved + damping).flatten(1).amin(1)
        low = smallest <= rounding_noise(self._layer(name).eigenvalues, damping)
        if bool(low.any()):
            row = int(smallest.argmin())
            raise UpweightError(
                f"damping={damping:g} leaves layer {name} singular without {who if isinstance(who, str) else who(row)}"
                f" (smallest damped eigenvalue {float(smallest[row]):.1e}) -> use damping='auto' or a larger number"
            )
        return moved

    # Helpers -----------------------------------------------------------------------------------------------------

    def _layer(self, name: str) -> LayerCurvature:
        return self.inverse.curvature.layers[name]

    def _by_layer(self, gradients: Gradients, work: Callable[[str, Block], Block]) -> Gradients:
        return Gradients({name: work(name, block) for name, block in gradients.items()}, gradients.router)

    def _columns(self, side: Weighted, name: str, rows: slice) -> list[Block]:
        return [column[name][rows] for column in side.columns]

    def _tiles(self, name: str, members: int) -> list[slice]:
        """Members whose coordinates, and what they are made of, fit into a tile."""
        values = self._layer(name).eigenvalues
        step = max(1, TILE_BYTES // (4 * values.numel() * values.element_size()))
        return [slice(a, min(a + step, members)) for a in range(0, members, step)]


# One layer -----------------------------------------------------------------------------------------------------------


def rotated(inverse: Inverse, gradients: Gradients) -> Gradients:
    """``Q^T v``: vectors in the eigenbasis of every Kronecker-factored layer, others as they are.

    ``rotated(inverse, v) @ left_out.solve_rotated(g).T`` are the products ``v^T (H'_i + damping I)^-1 g_i``, and no
    training gradient is ever rotated back.
    """
    layers = inverse.curvature.layers
    blocks: dict[str, Block] = {}
    for name, block in gradients.items():
        layer = layers[name]
        blocks[name] = Dense(layer.coordinates(block)) if isinstance(layer, Kronecker) else block
    return Gradients(blocks, gradients.router)


def squares(layer: LayerCurvature, columns: Sequence[Block]) -> Tensor:
    """``lambda_i = sum_c (Q^T s_ic)^2`` of every example [batch, numel]."""
    if isinstance(layer, Kronecker):
        return layer.squares(columns)
    return torch.stack([column.dense().square() for column in columns]).sum(0)


def back(layer: LayerCurvature, block: Block) -> Block:
    """Out of a Kronecker-factored layer's eigenbasis."""
    if not isinstance(layer, Kronecker):
        return block
    return Dense(torch.cat([layer.back(block[part].dense()) for part in tiles(block)]))


def layer_with(layer: LayerCurvature, values: Tensor) -> LayerCurvature:
    """The same eigenbasis with other eigenvalues."""
    if isinstance(layer, Kronecker):
        return Kronecker(layer.basis, values)
    assert isinstance(layer, Diagonal)
    return Diagonal(values)
