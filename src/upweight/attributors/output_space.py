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
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upweight.attributors.base import Attributor
from upweight.attributors.pull import added, gradient
from upweight.attributors.streaming import Source
from upweight.curvature.balanced_damping import balanced_damping, log_ratio
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Gradients
from upweight.passes import FisherPass, Kept, Pass, Step
from upweight.task import OutputTask

TILE_ROWS = 2048
"""Outputs whose products with the subset's are held at a time."""
CHANGED, QUERIES = (200, 1000, 4000), 64
"""Examples that a damping is judged by: as many removed, and as many added, as have 4,000 outputs, but at least 200 and
at most 1,000; and those that are asked about."""
START, LEAST = 1e-2, 1e-8
"""Where the search for a damping begins and ends, relative to the mean curvature of the subset's outputs."""
MOST_CONDITIONED = 1e11
"""Largest curvature relative to c: errors grow with it, from 1e-16."""


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
        keep: bytes of Jacobians that may stay in memory.
        others: models of other subsets that share the memory.

    Attributes:
        size: m, examples of the subset.
        damping: the one that was used.
        balance: of a damping that was found: the ratio of removals to additions there, and its standard error.
        largest: eigenvalue of ``A A^T``, m times that of the curvature.
    """

    def __init__(
        self,
        method: Attributor,
        model: torch.nn.Module,
        examples: Examples,
        inside: Tensor,
        l2: float,
        damping: float | None,
        keep: float = 0,
        others: int = 0,
    ) -> None:
        self.examples, self.inside, self.l2 = examples, inside, l2
        assert isinstance(method.task, OutputTask)
        self.task = method.task
        self.source = Source(_with_task(method, jacobian_of(method.task)), model, examples, keep=0)
        self.tracker = self.source.tracker
        self.size = int(inside.sum())
        self.width = math.prod(self.tracker.output_shape or ())
        self._check_memory(method.memory, others)
        self.outputs, self.targets = self._forward()
        size = min(self.source.batch_size, max(1, TILE_ROWS // self.width))
        columns = FisherPass(self.tracker, examples, size, "exact", 1, 0)
        self.jacobian: Pass[Gradients] = Kept(_Rows(columns), keep, lambda g: g.nbytes)
        self._root = self.task.hessian_root(self.outputs[inside])  # R [m, C, columns]
        subset = Gradients.concatenate([rows for _, rows in self._subset()])
        gram = self._gram(subset)
        self.largest = largest_eigenvalue(gram)
        self.damping, self.balance = (damping, None) if damping is not None else self._balanced(gram, subset)
        self._response = self._respond(gram, subset)

    @property
    def shift(self) -> float:
        """``c = l2 + damping``."""
        return self.l2 + self.damping

    def scores(self, queries: Gradients) -> Tensor:
        """How much worse the queries get without each example than with it, [query, n] in float64."""
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
        factor, failed = torch.linalg.cholesky_ex(
            shifted
        )  # reads one triangle: rounding need not be symmetric
        if bool(failed) or self.largest > MOST_CONDITIONED * self.size * shift:
            most = self.largest / self.size
            raise UpweightError(
                f"the curvature goes up to {most:.3g}, l2 and damping are {shift:.3g} together: too little for double "
                f"precision -> damping={2 * most / MOST_CONDITIONED:.1g} or above, or standardised inputs"
            )
        return factor

    def _respond(self, gram: Tensor, subset: Gradients) -> _Response:
        factor = self._factor(gram, self.shift)
        pull = torch.empty(self.examples.n, self.width, dtype=torch.float64)
        through = torch.empty(len(factor), self.examples.n, dtype=torch.float64)
        for step in self.jacobian:
            rows, here = step.load(), slice(step.start, step.stop)
            positions = torch.arange(step.start, step.stop)
            pull[here], through[:, here] = self._pull(
                factor, positions, self._own(rows), self._weighed(rows, subset), self.shift
            )
        through = torch.linalg.solve_triangular(factor.mT, through, upper=True)
        through = through.unflatten(0, (-1, self._root.shape[2]))
        return _Response(pull, torch.einsum("jcd,jdi->jci", self._root, through).flatten(0, 1))

    def _balanced(self, gram: Tensor, subset: Gradients) -> tuple[float, tuple[float, float]]:
        """The damping at which a sample of removals and one of additions change other examples alike."""
        removals, additions, asked = self._sample()
        if len(removals) < 2 or len(asked) < 1:
            raise UpweightError(
                "the damping is found by comparing examples inside a subset with those outside, and here are "
                f"{self.size} of {self.examples.n} inside -> smaller subsets, or damping="
            )
        changed = torch.cat([removals, additions])
        rows, questions = self._at(changed), self._at(asked)
        slope = gradient(self.task, self.outputs[asked], self.targets[asked])

        def asks(products: Tensor) -> Tensor:
            """What products of the questions' outputs [q C, k] come to in their measurements, [q, k]."""
            return torch.einsum("qck,qc->qk", products.unflatten(0, (-1, self.width)), slope)

        direct = asks(self._products(questions, rows).flatten(1)).unflatten(1, (-1, self.width))
        from_questions, from_rows = asks(self._weighed(questions, subset)), self._weighed(rows, subset)
        own = self._own(rows)

        def ratio(damping: float) -> tuple[float, float]:
            factor = self._factor(gram, self.l2 + damping)
            pull, through = self._pull(factor, changed, own, from_rows, self.l2 + damping)
            asking = torch.linalg.solve_triangular(factor, from_questions.T, upper=False)
            effects = (torch.einsum("qic,ic->qi", direct, pull) - asking.T @ through).abs().mean(0)
            return log_ratio(effects[: len(removals)], effects[len(removals) :])

        scale = float(gram.diagonal().mean()) / self.size
        least = max(LEAST * scale, 2 * self.largest / self.size / MOST_CONDITIONED)
        least = max(0.0, least - self.l2)  # the l2 may do alone
        return balanced_damping(ratio, START * scale, least)

    def _sample(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of examples to remove, of others to add, and of unseen ones to ask about, as queries would be."""
        generator = torch.Generator().manual_seed(0)

        def mixed(where: Tensor) -> Tensor:
            positions = where.nonzero()[:, 0]
            return positions[torch.randperm(len(positions), generator=generator)]

        least, most, outputs = CHANGED
        count = min(most, max(least, outputs // self.width))
        removals, others = mixed(self.inside)[:count], mixed(~self.inside)
        asked = others[: min(QUERIES, len(others) // 2)]
        return removals, others[len(asked) : len(asked) + count], asked

    def _pull(
        self, factor: Tensor, positions: Tensor, own: Tensor, weighed: Tensor, shift: float
    ) -> tuple[Tensor, Tensor]:
        """``z`` [k, C] of these examples, and what goes through the subset, ``L^-1 A J_i^T z`` [M, k].

        The z of a removed example is all but infinite where the model does what the example alone says. So it stays in
        two parts, ``z = r + R v``: R v is of the subset, where ``H^-1 J_i^T R`` needs no difference of large numbers.

        Args:
            factor: L [M, M].
            positions: of the examples [k].
            own: ``J_i J_i^T`` [k, C, C].
            weighed: ``J_i A^T`` [k C, M].
            shift: c.
        """
        mc = self.size * shift
        solved = torch.linalg.solve_triangular(factor, weighed.T, upper=False).unflatten(1, (-1, self.width))
        kernel = (own - torch.einsum("kia,kib->iab", solved, solved)) / mc  # K_ii
        outputs, targets, inside = self.outputs[positions], self.targets[positions], self.inside[positions]
        pull = gradient(self.task, outputs, targets)
        if not bool(inside.all()):
            ids = [self.examples.ids[p] for p in positions[~inside].tolist()]
            pull[~inside] = added(self.task, outputs[~inside], targets[~inside], kernel[~inside], ids)
        through = torch.einsum("kic,ic->ki", solved, pull)
        if bool(inside.any()):
            places = (self.inside.cumsum(0) - 1)[positions[inside]]
            root = self._root[places]
            units = self._units(factor, places)  # L^-1 E_i [M, k, columns]
            left = mc * torch.einsum("kia,kib->iab", units, units)  # I - R^T K R
            bent = root.mT @ (kernel[inside] @ pull[inside, :, None])
            through[:, inside] -= mc * torch.einsum(
                "kic,ic->ki", units, torch.linalg.solve(left, bent)[..., 0]
            )
        return pull, through

    def _units(self, factor: Tensor, places: Tensor) -> Tensor:
        """``L^-1`` of the unit vectors of these examples of the subset, [M, k, columns]."""
        columns = self._root.shape[2]
        rows = (places[:, None] * columns + torch.arange(columns)).flatten()
        units = factor.new_zeros(len(factor), len(rows))
        units[rows, torch.arange(len(rows))] = 1
        return torch.linalg.solve_triangular(factor, units, upper=False).unflatten(1, (-1, columns))

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
        """``J_i J_i^T`` [k, C, C], a few examples at a time: the products with the others are thrown away."""
        few = max(1, TILE_ROWS // (4 * self.width)) * self.width
        found = []
        for a in range(0, rows.batch, few):
            left = rows.rows(slice(a, a + few)).to(torch.float64)
            products = (left @ left.T).cpu().unflatten(0, (-1, self.width)).unflatten(2, (-1, self.width))
            found.append(products.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        return torch.cat(found)

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

    def _check_memory(self, memory: int, others: int) -> None:
        rows, n = self.size * self.width, self.examples.n
        tile = max(TILE_ROWS, self.width * (self.examples.preferred_batch_size or 1))
        numbers = 3 * rows * rows + 2 * rows * n + 4 * rows * tile + 3 * n * self.width
        held = others * 8 * (rows + self.width) * n  # what each of them has learned
        needed = 8 * numbers + rows * self.source.example_bytes + held
        if needed > memory:
            beside = f" beside {others} other models" if others else ""
            raise UpweightError(
                f"{self.size} examples of {self.width} outputs need {needed / 2**20:,.0f} MB here{beside}, memory is "
                f"{memory / 2**20:,.0f} MB -> memory= if there is more, smaller subsets, or Ensemble with "
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


def largest_eigenvalue(matrix: Tensor, steps: int = 20) -> float:
    """Of a symmetric positive matrix, by power iteration: somewhat below the truth."""
    vector = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    size = 0.0
    for _ in range(steps):
        vector = matrix @ (vector / vector.norm())
        size = float(vector.norm())
        if size == 0:
            break
    return size
