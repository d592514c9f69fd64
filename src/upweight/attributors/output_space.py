"""What one training example does to a model trained on a subset: removed from it, or added to it.

    J_i [C, p]: Jacobian of example i's outputs     r_i [C], S_i = R_i R_i^T [C, C]: its loss's slope and Hessian there
    H = (1/m) sum_{j in subset} J_j^T S_j J_j + c I                          c: l2 and damping, m: size of the subset
    K_ij = J_i H^-1 J_j^T / m [C, C]: what a pull at the outputs of j does to those of i

    removed:   theta_-i - theta = H^-1 J_i^T z_i / m     z_i = (I - S_i K_ii)^-1 r_i
    added:     theta - theta_+i = H^-1 J_i^T z_i / m     z_i = r_i(f_i - K_ii z_i)

Both are exact where the model is linear in its parameters and the others' losses are quadratic: an example that is
removed takes its own curvature with it, one that is added is fitted until its loss resists (`added` solves for that).
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

from upweight._ids import Id
from upweight.attributors.base import Attributor
from upweight.attributors.streaming import Source
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Gradients
from upweight.passes import FisherPass, Kept, Pass, Step
from upweight.task import OutputTask

TILE_ROWS = 2048
"""Outputs whose products with the subset's are held at a time."""
MOST_STEPS, HALVINGS = 100, 30
ACCURACY = 1e-10
"""Of the outputs of an added example, relative to their size."""


def jacobian_of(task: OutputTask) -> OutputTask:
    """The task, whose "Fisher columns" are the outputs themselves: one gradient an output."""
    made = copy.copy(task)

    def eye(outputs: Tensor) -> Tensor:
        flat = outputs.reshape(len(outputs), -1)
        return torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device).expand(len(flat), -1, -1)

    made.hessian_root = eye  # on the instance, it hides the class's
    return made


def removed(slope: Tensor, hessian: Tensor, own: Tensor) -> Tensor:
    """``z = (I - S K)^-1 r`` [batch, C], of r [batch, C], S and K [batch, C, C]."""
    eye = torch.eye(slope.shape[1], dtype=slope.dtype, device=slope.device)
    return torch.linalg.solve(eye - hessian @ own, slope)


def added(task: OutputTask, outputs: Tensor, targets: Tensor, own: Tensor, ids: Sequence[Id]) -> Tensor:
    """``z = r(f - K z)`` [batch, C]: the loss's gradient where its pull on the outputs and theirs on it agree.

    Newton's method on ``g - f + K r(g) = 0``, with steps halved until they help.

    Args:
        task: whose loss it is.
        outputs: f [batch, ...] without the example.
        targets: its targets.
        own: K [batch, C, C].
        ids: names of the examples, for an error.
    """
    shape = outputs.shape
    start = outputs.reshape(len(outputs), -1)
    now = start.clone()
    eye = torch.eye(start.shape[1], dtype=start.dtype, device=start.device)

    def off(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope = gradient(task, g.view(shape), targets)
        difference = g - start + (own @ slope[..., None])[..., 0]
        return slope, difference, difference.norm(dim=1)

    slope, difference, size = off(now)
    enough = ACCURACY * (1 + start.norm(dim=1) + own.flatten(1).norm(dim=1))
    for _ in range(MOST_STEPS):
        if bool((size <= enough).all()):
            return slope
        step = torch.linalg.solve(eye + own @ curvature(task, now.view(shape)), difference)
        scale = torch.ones_like(size)
        found = off(now - step)
        for _ in range(HALVINGS):
            worse = (found[2] > size) & (size > enough)
            if not bool(worse.any()):
                break
            scale = torch.where(worse, scale / 2, scale)
            found = off(now - scale[:, None] * step)
        now, (slope, difference, size) = now - scale[:, None] * step, found
    worst = int((size / enough).argmax())
    raise UpweightError(
        f"what adding example {ids[worst]} does to its own outputs was not found in {MOST_STEPS} steps -> a larger "
        "damping, or a look at its input and target"
    )


def gradient(task: OutputTask, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss's gradient in the outputs, [batch, C]."""
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(task.loss(leaf, targets).sum(), leaf)
    return slope.reshape(len(slope), -1)


def curvature(task: OutputTask, outputs: Tensor) -> Tensor:
    """The loss's Hessian in the outputs, [batch, C, C]."""
    root = task.hessian_root(outputs)
    return root @ root.mT


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
        shift: c above 0, the training's l2 and the damping.
    """

    def __init__(
        self, method: Attributor, model: torch.nn.Module, examples: Examples, inside: Tensor, shift: float
    ) -> None:
        self.examples, self.inside, self.shift = examples, inside, shift
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
        self._response = self._fit()

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

    def _fit(self) -> _Response:
        inside = self.inside
        root = self.task.hessian_root(self.outputs[inside])  # R [m, C, columns]
        subset = Gradients.concatenate([rows for _, rows in self._subset()])
        weigh = lambda products: torch.einsum("kjc,jcd->kjd", products, root).flatten(1)  # noqa: E731 - (G R) [k, M]
        gram = torch.empty(root.shape[0] * root.shape[2], root.shape[0] * root.shape[2], dtype=torch.float64)
        for place, rows in self._subset():  # A A^T, a few rows R^T J J^T R after the other
            half = weigh(self._products(rows, subset)).unflatten(0, (-1, self.width))
            mine = root[place : place + len(half)]
            full = torch.einsum("icd,ick->idk", mine, half).flatten(0, 1)
            gram[place * root.shape[2] : place * root.shape[2] + len(full)] = full
        gram.diagonal().add_(self.size * self.shift)
        factor = torch.linalg.cholesky(gram)  # LAPACK reads one triangle: rounding need not be symmetric
        del gram
        scale = 1 / (self.size * self.shift)
        pull = torch.empty(self.examples.n, self.width, dtype=torch.float64)
        through = torch.empty(len(factor), self.examples.n, dtype=torch.float64)
        for step in self.jacobian:
            rows, here = step.load(), slice(step.start, step.stop)
            solved = torch.linalg.solve_triangular(factor, weigh(self._products(rows, subset)).T, upper=False)
            solved = solved.unflatten(1, (-1, self.width))  # B_i [M, batch, C]
            own = scale * (self._own(rows) - torch.einsum("kia,kib->iab", solved, solved))
            pull[here] = self._pull(here, own)
            through[:, here] = torch.einsum("kic,ic->ki", solved, pull[here])
        through = torch.linalg.solve_triangular(factor.mT, through, upper=True)
        through = torch.einsum("jcd,jdi->jci", root, through.unflatten(0, (-1, root.shape[2]))).flatten(0, 1)
        return _Response(pull, through)

    def _pull(self, here: slice, own: Tensor) -> Tensor:
        """Z [batch, C]."""
        outputs, targets, inside = self.outputs[here], self.targets[here], self.inside[here]
        slope = gradient(self.task, outputs, targets)
        out = torch.empty_like(slope)
        out[inside] = removed(slope[inside], curvature(self.task, outputs[inside]), own[inside])
        if not bool(inside.all()):
            ids = [self.examples.ids[here.start + k] for k in (~inside).nonzero()[:, 0].tolist()]
            out[~inside] = added(self.task, outputs[~inside], targets[~inside], own[~inside], ids)
        return out

    def _subset(self) -> Iterator[tuple[int, Gradients]]:
        """(its first place in the subset, Jacobian) of the subset's examples, a step after the other."""
        place = 0
        for step in self.jacobian:
            loaded, mine = step.load(), self.inside[step.start : step.stop]
            if bool(mine.any()):
                picked = mine[:, None].expand(-1, self.width).flatten().nonzero()[:, 0]
                yield place, loaded.rows(picked.to(self.tracker.device))
                place += int(mine.sum())

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
