"""What one training example does to a model trained on a subset: removed from it, or added to it.

    J_i [C, p]: Jacobian of example i's outputs     r_i [C], S_i = R_i R_i^T [C, C]: its loss's slope and Hessian there
    H = (1/m) sum_{j in subset} J_j^T S_j J_j + c I                          c: l2 and damping, m: size of the subset
    K_ij = J_i H^-1 J_j^T / m [C, C]: what a pull at the outputs of j does to those of i

    removed:   theta_-i - theta = H^-1 J_i^T z_i / m
    added:     theta - theta_+i = H^-1 J_i^T z_i / m     z_i: the example's pull, see `upweight.attributors.pull`

All of it happens in the space of the outputs: with A = [R_j^T J_j] [M, p],
``H^-1 = (I - A^T (A A^T + m c I)^-1 A) / c``, so that only products of gradients are needed, and the matrix to factor
has a row for every output of the subset.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upweight.attributors.base import Attributor
from upweight.attributors.pull import added, curvature, gradient, removed
from upweight.attributors.streaming import Source
from upweight.curvature.balanced_damping import balanced_damping
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Gradients
from upweight.passes import FisherPass, Kept, Pass, Step
from upweight.task import OutputTask

TILE_ROWS = 2048
"""Outputs whose products with the subset's are held at a time."""
INSIDE, OUTSIDE, QUERIES = 200, 200, 64
"""Examples that a damping is judged by: removed, added, and asked about."""
START, LEAST = 1e-2, 1e-8
"""Where the search for a damping begins and ends, relative to the mean curvature of the subset's outputs."""


@dataclass(frozen=True)
class _Response:
    """What the fit learned: z [n, C], and Y [M, n] with ``scores = (P z - P_S Y) / (m c)`` for ``P = g_q J^T``."""

    pull: Tensor
    through: Tensor


class OutputSpace:
    """The effect of every training example on a model that was trained on a subset of them.

    Args:
        method: its task (an `OutputTask`) and options.
        model: trained on the subset.
        examples: all training data.
        inside: [n], whether an example is in the subset.
        l2: the training's.
        damping: added to it; None for the one at which examples inside and outside matter alike.

    Attributes:
        size: m, examples of the subset.
        damping: the one that was used.
        balance: of a damping that was found: the ratio of removals to additions there.
    """

    def __init__(
        self,
        method: Attributor,
        model: torch.nn.Module,
        examples: Examples,
        inside: Tensor,
        l2: float,
        damping: float | None,
    ) -> None:
        self.examples, self.inside, self.l2 = examples, inside, l2
        assert isinstance(method.task, OutputTask)
        self.task = method.task
        self.source = Source(_with_task(method, jacobian_of(method.task)), model, examples, keep=0)
        self.tracker = self.source.tracker
        self.outputs, self.targets = self._forward()
        self.width = self.outputs[0].numel()
        self.size = int(inside.sum())
        self._check_memory(method.memory)
        size = min(self.source.batch_size, max(1, TILE_ROWS // self.width))
        columns = FisherPass(self.tracker, examples, size, "exact", 1, 0)
        self.jacobian: Pass[Gradients] = Kept(_Rows(columns), method.memory / 4, lambda g: g.nbytes)
        self._root = self.task.hessian_root(self.outputs[inside])  # R [m, C, columns]
        subset = Gradients.concatenate([rows for _, rows in self._subset()])
        gram = self._gram(subset)
        self.damping, self.balance = (damping, None) if damping is not None else self._balanced(gram, subset)
        self._response = self._respond(gram, subset)

    @property
    def shift(self) -> float:
        """``c = l2 + damping``."""
        return self.l2 + self.damping

    def scores(self, queries: Gradients) -> Tensor:
        """The change of the queries' measurements without each example minus with it, [query, n] in float64."""
        pull, through = self._response.pull, self._response.through
        left = queries.to(torch.float64)
        direct = torch.empty(queries.batch, self.examples.n, dtype=torch.float64)
        subset = torch.empty(queries.batch, self.size, self.width, dtype=torch.float64)
        place = 0
        for step in self.jacobian:
            products = (left @ step.load().to(torch.float64).T).cpu().unflatten(1, (-1, self.width))
            rows = slice(step.start, step.stop)
            direct[:, rows] = torch.einsum("qic,ic->qi", products, pull[rows])
            mine = products[:, self.inside[rows]]
            subset[:, place : place + mine.shape[1]] = mine
            place += mine.shape[1]
        return (direct - subset.flatten(1) @ through) / (self.size * self.shift)

    def _gram(self, subset: Gradients) -> Tensor:
        """``A A^T`` [M, M], a few rows ``R^T J J^T R`` after the other."""
        columns = self._root.shape[2]
        gram = torch.empty(self.size * columns, self.size * columns, dtype=torch.float64)
        for place, rows in self._subset():
            half = self._weighed(rows, subset).unflatten(0, (-1, self.width))
            full = torch.einsum("icd,ick->idk", self._root[place : place + len(half)], half).flatten(0, 1)
            gram[place * columns : place * columns + len(full)] = full
        return gram

    def _factor(self, gram: Tensor, shift: float) -> Tensor:
        """L, lower triangular, with ``L L^T = A A^T + m c I``."""
        shifted = gram.clone()
        shifted.diagonal().add_(self.size * shift)
        return torch.linalg.cholesky(shifted)  # reads one triangle: rounding need not be symmetric

    def _respond(self, gram: Tensor, subset: Gradients) -> _Response:
        factor = self._factor(gram, self.shift)
        pull = torch.empty(self.examples.n, self.width, dtype=torch.float64)
        through = torch.empty(len(factor), self.examples.n, dtype=torch.float64)
        for step in self.jacobian:
            rows, here = step.load(), slice(step.start, step.stop)
            solved = self._solved(factor, self._weighed(rows, subset))
            pull[here] = self._pull(torch.arange(step.start, step.stop), self._own(rows), solved, self.shift)
            through[:, here] = torch.einsum("kic,ic->ki", solved, pull[here])
        through = torch.linalg.solve_triangular(factor.mT, through, upper=True)
        through = through.unflatten(0, (-1, self._root.shape[2]))
        return _Response(pull, torch.einsum("jcd,jdi->jci", self._root, through).flatten(0, 1))

    def _balanced(self, gram: Tensor, subset: Gradients) -> tuple[float, float]:
        """The damping at which a sample of removals and one of additions change other examples alike."""
        generator = torch.Generator().manual_seed(0)
        mixed = lambda where: (p := where.nonzero()[:, 0])[torch.randperm(len(p), generator=generator)]  # noqa: E731
        removals, others = mixed(self.inside)[:INSIDE], mixed(~self.inside)
        asked = others[
            : min(QUERIES, len(others) // 2)
        ]  # the model has not seen them, as it has not seen queries
        additions = others[len(asked) : len(asked) + OUTSIDE]
        if len(removals) < 2 or len(asked) < 1:
            raise UpweightError(
                "the damping is found by comparing examples inside a subset with those outside, and here are "
                f"{self.size} of {self.examples.n} inside -> smaller subsets, or damping="
            )
        changed = torch.cat([removals, additions])
        rows, questions = self._at(changed), self._at(asked)
        slope = gradient(self.task, self.outputs[asked], self.targets[asked])
        asks = lambda products: torch.einsum("qck,qc->qk", products.unflatten(0, (-1, self.width)), slope)  # noqa: E731
        direct = asks(self._products(questions, rows).flatten(1)).unflatten(1, (-1, self.width))
        from_questions, from_rows = asks(self._weighed(questions, subset)), self._weighed(rows, subset)
        own = self._own(rows)

        def ratio(damping: float) -> float:
            shift = self.l2 + damping
            factor = self._factor(gram, shift)
            solved = self._solved(factor, from_rows)
            pull = self._pull(changed, own, solved, shift)
            asking = torch.linalg.solve_triangular(factor, from_questions.T, upper=False)
            through = torch.einsum("kic,ic->ki", solved, pull)
            effects = (torch.einsum("qic,ic->qi", direct, pull) - asking.T @ through).abs()
            return float(effects[:, : len(removals)].mean() / effects[:, len(removals) :].mean())

        scale = float(gram.diagonal().mean()) / self.size
        return balanced_damping(ratio, START * scale, LEAST * scale)

    def _pull(self, positions: Tensor, own: Tensor, solved: Tensor, shift: float) -> Tensor:
        """``z`` [k, C] of these examples, of ``J_i J_i^T`` [k, C, C] and ``L^-1 A J_i^T`` [M, k, C]."""
        kernel = (own - torch.einsum("kia,kib->iab", solved, solved)) / (self.size * shift)  # K_ii
        outputs, targets, inside = self.outputs[positions], self.targets[positions], self.inside[positions]
        out = gradient(self.task, outputs, targets)
        if bool(inside.any()):
            out[inside] = removed(out[inside], curvature(self.task, outputs[inside]), kernel[inside])
        if not bool(inside.all()):
            ids = [self.examples.ids[p] for p in positions[~inside].tolist()]
            out[~inside] = added(self.task, outputs[~inside], targets[~inside], kernel[~inside], ids)
        return out

    def _solved(self, factor: Tensor, weighed: Tensor) -> Tensor:
        """``L^-1 A J_i^T`` [M, k, C], of ``J_i A^T`` [k C, M]."""
        return torch.linalg.solve_triangular(factor, weighed.T, upper=False).unflatten(1, (-1, self.width))

    def _at(self, positions: Tensor) -> Gradients:
        """Jacobians of these examples, in their order."""
        found, places = [], []
        for step in self.jacobian:
            loaded = step.load()
            here = ((positions >= step.start) & (positions < step.stop)).nonzero()[:, 0]
            if len(here):
                first = (positions[here, None] - step.start) * self.width
                found.append(
                    loaded.rows((first + torch.arange(self.width)).flatten().to(self.tracker.device))
                )
                places.append(here)
        back = torch.cat(places).argsort()[:, None] * self.width + torch.arange(self.width)
        return Gradients.concatenate(found).rows(back.flatten().to(self.tracker.device))

    def _subset(self) -> Iterator[tuple[int, Gradients]]:
        """(its first place in the subset, Jacobian) of the subset's examples, a step after the other."""
        place = 0
        for step in self.jacobian:
            loaded, mine = step.load(), self.inside[step.start : step.stop]
            if bool(mine.any()):
                picked = mine[:, None].expand(-1, self.width).flatten().nonzero()[:, 0]
                yield place, loaded.rows(picked.to(self.tracker.device))
                place += int(mine.sum())

    def _weighed(self, rows: Gradients, subset: Gradients) -> Tensor:
        """``J_i A^T`` [k C, M]."""
        return torch.einsum("kjc,jcd->kjd", self._products(rows, subset), self._root).flatten(1)

    def _products(self, rows: Gradients, subset: Gradients) -> Tensor:
        """``J_i J_j^T`` as [rows, j, C], float64."""
        products = rows.to(torch.float64) @ subset.to(torch.float64).T
        return products.cpu().unflatten(1, (-1, self.width))

    def _own(self, rows: Gradients) -> Tensor:
        """``J_i J_i^T`` [batch, C, C]."""
        left = rows.to(torch.float64)
        products = (left @ left.T).cpu().unflatten(0, (-1, self.width)).unflatten(2, (-1, self.width))
        return products.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def _forward(self) -> tuple[Tensor, Tensor]:
        """All outputs [n, ...] and targets, real numbers in float64."""
        outputs, targets = [], []
        with torch.no_grad():
            for rows in self.examples.batches(self.source.batch_size):
                with self.tracker.quietly():
                    found = self.task.forward(self.tracker.model, self.tracker.move(rows.batch))
                for tensor, parts in zip(found, (outputs, targets), strict=True):
                    parts.append(
                        tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.cpu()
                    )
        return torch.cat(outputs), torch.cat(targets)

    def _check_memory(self, memory: int) -> None:
        rows = self.size * self.width
        needed = 8 * (2 * rows * rows + rows * self.examples.n + 3 * rows * TILE_ROWS)
        if needed > memory:
            raise UpweightError(
                f"{self.size} examples of {self.width} outputs need {needed / 2**30:.1f} GiB here, memory is "
                f"{memory / 2**30:.1f} GiB -> memory= if there is more, smaller subsets, or Ensemble with "
                "method='ekfac'"
            )


class _Rows:
    """Jacobians whose rows are example after example, each with its outputs in order."""

    def __init__(self, columns: FisherPass) -> None:
        self.columns = columns

    def __iter__(self) -> Iterator[Step[Gradients]]:
        for step in self.columns:
            yield Step(step.start, step.stop, lambda s=step: self._load(s))

    def _load(self, step: Step[Sequence[Gradients]]) -> Gradients:
        columns = list(step.load())
        order = torch.arange(len(columns) * columns[0].batch).view(len(columns), -1).T.flatten()
        return Gradients.concatenate(columns).rows(order.to(self.columns.tracker.device))


def _with_task(method: Attributor, task: OutputTask) -> Any:
    """The method with another task."""
    made = copy.copy(method)
    made.task = task
    return made


def jacobian_of(task: OutputTask) -> OutputTask:
    """The task, whose "Fisher columns" are the outputs themselves: one gradient an output."""
    made = copy.copy(task)

    def eye(outputs: Tensor) -> Tensor:
        flat = outputs.reshape(len(outputs), -1)
        return torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device).expand(len(flat), -1, -1)

    made.hessian_root = eye  # on the instance, it hides the class's
    return made
