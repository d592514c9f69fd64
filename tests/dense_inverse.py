"""A damped inverse as one dense matrix over all layers, for tests: what any solver must agree with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from upweight.gradients import Gradients
from upweight.gradients.blocks import Dense


@dataclass(frozen=True)
class DenseInverse:
    """``M^-1`` for M [p, p] in the order of `Gradients.dense`."""

    matrix: Tensor

    def __matmul__(self, gradients: Gradients) -> Gradients:
        solved = torch.linalg.solve(self.matrix, gradients.dense().T).T
        widths = [block.dense().shape[1] for block in gradients.values()]
        return Gradients({name: Dense(v) for name, v in zip(gradients, solved.split(widths, 1), strict=True)})

    def quadratic(self, gradients: Gradients) -> dict[str, Tensor]:
        return {"": ((self @ gradients).dense() * gradients.dense()).sum(1)}
