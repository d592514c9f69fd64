"""`Gradients`: the per-example gradients of a batch, layer by layer, with ``@`` for all inner products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upweight.errors import UpweightError
from upweight.gradients.blocks import Block, Dense, Rotated, Rows, cast, concatenate

if TYPE_CHECKING:
    from upweight.gradients.contraction import Router


@dataclass(frozen=True)
class Transposed:
    """``gradients.T``: the right operand of ``@``."""

    gradients: Gradients


class Gradients(Mapping[str, Block]):
    """Per-example gradients [batch, parameters], held per layer as the factors they are made of.

    ``a @ b.T`` is the matrix of all inner products, [a's batch, b's batch], by the cheapest exact route of each layer
    (see `upweight.gradients.contraction`). ``dense()`` is the matrix itself, for small models and for tests.

    Args:
        blocks: {layer name: block}; all blocks hold the same examples.
        router: what chooses the route; a default one that only takes exact routes if None.
    """

    def __init__(self, blocks: Mapping[str, Block], router: Router | None = None) -> None:
        self.blocks = dict(blocks)
        self.router = router
        lengths = {len(block) for block in self.blocks.values()}
        if len(lengths) != 1:
            raise UpweightError(
                f"layers hold {sorted(lengths)} examples, expected one number -> report this bug"
            )
        self.batch = lengths.pop()

    def __getitem__(self, key: str) -> Block:
        return self.blocks[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def rows(self, rows: Rows) -> Gradients:
        """The examples of a slice, or at these positions [k]."""
        return Gradients({name: block[rows] for name, block in self.blocks.items()}, self.router)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the gradients."""
        return next(iter(self.blocks.values()))[0:1].dense().dtype

    def to(self, dtype: torch.dtype) -> Gradients:
        """The same gradients in another precision."""
        return Gradients({name: cast(block, dtype) for name, block in self.blocks.items()}, self.router)

    def with_router(self, router: Router) -> Gradients:
        """The same gradients, contracted by another router."""
        return Gradients(self.blocks, router)

    def __matmul__(self, other: Transposed) -> Tensor:
        """Inner products [batch, other's batch], summed over layers."""
        total: Tensor | None = None
        for part in self.by_layer(other).values():
            total = part if total is None else total.add_(part)
        assert total is not None  # a Gradients holds at least one layer
        return total

    def by_layer(self, other: Transposed) -> dict[str, Tensor]:
        """Inner products [batch, other's batch] of each layer."""
        from upweight.gradients.contraction import Router  # the router knows blocks, not containers

        router = self.router or Router()
        if set(self.blocks) != set(other.gradients.blocks):
            raise UpweightError("the two gradients hold different layers -> capture both with one tracker")
        return {
            name: router.contract(name, block, other.gradients[name]) for name, block in self.blocks.items()
        }

    def dense(self) -> Tensor:
        """[batch, parameters], layers side by side. Holds everything at once: for small models and tests."""
        return torch.cat([block.dense() for block in self.blocks.values()], 1)

    @property
    def nbytes(self) -> int:
        """Bytes the blocks hold."""
        return sum(block.nbytes for block in self.blocks.values())

    @staticmethod
    def concatenate(parts: list[Gradients]) -> Gradients:
        """All examples of several batches, in order."""
        if len(parts) == 1:
            return parts[0]
        names = parts[0].blocks
        return Gradients({name: concatenate([p[name] for p in parts]) for name in names}, parts[0].router)

    @staticmethod
    def gather(parts: Iterable[Gradients], total: int) -> Gradients:
        """All examples of several batches, `total` of them, in order.

        Dense and rotated blocks are written to where they stay as they come, so that no batch is held twice.
        """
        placed: dict[str, Dense | Rotated] = {}
        waiting: dict[str, list[Block]] = {}
        start = 0
        router = None
        for part in parts:
            router = part.router
            for name, block in part.items():
                if isinstance(block, (Dense, Rotated)) and name not in waiting:
                    if name not in placed:
                        if part.batch == total:
                            return part
                        room = block.values.new_empty(total, block.values.shape[1])
                        placed[name] = replace(block, values=room)
                    kept = placed[name]
                    if isinstance(kept, Rotated) and not kept.meets(block):
                        kept = placed[name] = Dense(kept.dense())
                    same = isinstance(kept, Rotated) or isinstance(block, Dense)
                    kept.values[start : start + len(block)] = block.values if same else block.dense()
                elif name in placed:
                    kept = placed[name] = Dense(placed[name].dense())
                    kept.values[start : start + len(block)] = block.dense()
                else:
                    waiting.setdefault(name, []).append(block)
            start += part.batch
        whole: dict[str, Block] = {name: concatenate(blocks) for name, blocks in waiting.items()}
        return Gradients({**whole, **placed}, router)
