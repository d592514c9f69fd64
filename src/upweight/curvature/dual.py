"""The exact damped Gauss-Newton matrix or Fisher, inverted where it is small: on the training data's side.

With ``H = (1/n) S^T S``, where the rows of S [N, p] are the Fisher columns of all training examples (N = n C for the
exact Gauss-Newton matrix of C outputs), and ``K = S S^T`` [N, N], Woodbury's identity gives

    (H + d I)^-1 v  =  (1/d) [v - S^T a],      a = (K + n d I)^-1 S v,
    v^T (H + d I)^-1 g  =  (1/d) [v^T g - a^T S g].

Every number on the right is an inner product of per-example gradients, so nothing with p entries is ever formed but
factors: exact for any number of parameters while N is small. TRAK approximates the same by projecting the gradients
(arXiv 2303.14186).

A model that is sure of its predictions has many columns that are nearly zero. Columns are left out, the lightest
first, as long as that moves no residual by more than ``trace left out / (n d)``, which is kept under rounding and is
part of the residual that is reported.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upweight.budget import memory_text
from upweight.curvature.columns import Columns
from upweight.curvature.gram import GramSolution, GramSystem, heaviest
from upweight.curvature.solvers.base import SolveInfo
from upweight.errors import UpweightError
from upweight.gradients import Gradients
from upweight.gradients.blocks import Dense
from upweight.gradients.norms import squared_norms
from upweight.passes import Kept, Pass

if TYPE_CHECKING:
    from upweight.gradients.gradients import Transposed

NEGLIGIBLE = {torch.float32: 1e-5, torch.float64: 1e-14}
"""Columns may be left out while their trace is below this share of n d: what that may add to a relative residual."""
PROMISED = {torch.float32: 5e-5, torch.float64: 1e-9}
"""Relative residual that is solved for."""
CHECKED = 4
"""Queries of a panel, the worst, whose residual is computed once more without the Gram matrix, whose rounding shows."""
SOURCE_SHARE, COLUMNS_SHARE = 0.25, 0.25
"""Shares of the memory for the columns as they come and for those that are kept."""


@dataclass
class _Built:
    """The Gram matrix of one choice of columns, and what was found from it."""

    columns: Columns
    gram: Tensor
    left_out: float
    spectrum: tuple[Tensor, Tensor] | None = None
    systems: dict[float, GramSystem] = field(default_factory=dict)


class DualCurvature:
    """``H = (1/n) S^T S``, known by the Fisher columns S and inverted through their Gram matrix.

    Args:
        source: Fisher columns of all training examples, the same each time.
        n: number of training examples.
        parameters: number of tracked parameters p.
        memory: bytes that the columns, the Gram matrix, its factor and the solutions may take.

    Cost: one pass over the training data for the columns' norms; ``N^2 / 2`` inner products of gradients; a Cholesky
    factor for each damping; and for each panel of queries about six products with the Gram matrix. Where the columns do
    not stay in memory, each step of the pass costs another pass.

    Fails when: the Gram matrix does not fit the memory. Many examples or classes ask for sampled columns or another
    solver.

    Example:
        >>> import torch, upweight as uw
        >>> from upweight.data import Examples
        >>> from upweight.gradients import Tracker
        >>> from upweight.passes import FisherPass
        >>> x, y = torch.eye(3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
        >>> model, examples = torch.nn.Linear(3, 1, bias=False).double(), Examples((x, y))
        >>> tracker = Tracker(model, uw.Regression(measurement="prediction"), examples)
        >>> source = FisherPass(tracker, examples, batch_size=2, kind="exact", draws=1, seed=0)
        >>> curvature = DualCurvature(source, n=3, parameters=3, memory=1e9)  # H = I / 3
        >>> queries = tracker.query((x, y), [0, 1, 2])
        >>> curvature.inverse(2 / 3) @ queries @ queries.T
        tensor([[1., 0., 0.], [0., 1., 0.], [0., 0., 1.]], dtype=torch.float64)
    """

    def __init__(self, source: Pass[Sequence[Gradients]], n: int, parameters: int, memory: float) -> None:
        self.source = Kept(source, memory * SOURCE_SHARE, lambda columns: sum(g.nbytes for g in columns))
        self.n, self.parameters, self.memory = n, parameters, memory
        norms = []
        self.dtype = torch.float32
        for step in self.source:
            columns = step.load()
            self.dtype = columns[0].dtype
            norms.append(torch.stack([squared_norms(column) for column in columns]))
        self.norms = torch.cat(norms, 1)  # [column, example]
        self._built: _Built | None = None

    def inverse(
        self,
        damping: float,
        l2: float = 0.0,
        spectrum: bool = False,
        dtype: torch.dtype | None = None,
    ) -> DualInverse:
        """``(H + (damping + l2) I)^-1``.

        Args:
            damping: what is added to every eigenvalue.
            l2: coefficient of an L2 term of the training objective over all tracked parameters, which adds as much.
            spectrum: find the Gram matrix's eigenvectors instead of a Cholesky factor: some ten times the time, once,
                after which another damping costs nothing. Pays for a curve of many dampings.
            dtype: precision of the Gram matrix; the model's if None, or float64 where that fails.

        Returns:
            The inverse, to be multiplied with query gradients.

        Raises:
            UpweightError: ``damping + l2`` is not positive, or the Gram matrix does not fit the memory.
        """
        total = damping + l2
        if not total > 0:
            raise UpweightError(
                f"damping + l2 = {total:g}, expected a positive number: {self.norms.numel():,} gradient columns need "
                f"not span {self.parameters:,} parameters -> damping=1e-3 for example"
            )
        built, shift = self._gram(total, dtype or self.dtype), self.n * total
        try:
            system = _factorise(built, shift, spectrum)
        except UpweightError:
            if built.gram.dtype == torch.float64:
                raise
            built = self._gram(total, torch.float64)
            system = _factorise(built, shift, spectrum)
        return DualInverse(self, built.columns, system, damping, l2, built.left_out / shift)

    def _gram(self, total: float, dtype: torch.dtype) -> _Built:
        """The Gram matrix with all columns that this damping asks for: one that was made for a smaller one serves."""
        weights = self.norms.flatten()
        chosen = heaviest(weights, NEGLIGIBLE[self.dtype] * self.n * total)
        built = self._built
        if (
            built is not None
            and built.columns.size >= len(chosen)
            and built.gram.dtype in (dtype, torch.float64)
        ):
            return built
        self._built = None  # two of them need not fit
        self._check_memory(len(chosen), dtype)
        kept = torch.zeros_like(self.norms, dtype=torch.bool)
        kept.view(-1)[chosen] = True
        columns = Columns(self.source, kept, dtype, self.memory * COLUMNS_SHARE)
        left_out = float(weights.sum() - weights[chosen].sum()) if len(chosen) < len(weights) else 0.0
        self._built = _Built(columns, columns.gram(), max(0.0, left_out))
        return self._built

    def _check_memory(self, size: int, dtype: torch.dtype) -> None:
        """Raise if the Gram matrix and a factor of it do not fit the half of the memory that the columns leave."""
        columns, n = self.norms.shape
        gram = size**2 * torch.finfo(dtype).bits // 8
        room = self.memory * (1 - SOURCE_SHARE - COLUMNS_SHARE)
        if 2 * gram <= room:
            return
        sampled = 2 * n**2 * torch.finfo(dtype).bits // 8
        way = (
            f"fisher='sampled' with draws=1 takes {memory_text(sampled)}, "
            if columns > 1 and sampled <= room
            else ""
        )
        raise UpweightError(
            f"the Gram matrix of {size:,} gradient columns ({n:,} examples x {columns}) and its factor take "
            f"{memory_text(2 * gram)}, but {memory_text(room)} are free for it (half of "
            f"memory={memory_text(self.memory)}) -> {way}"
            f"solver='cg' needs none, or memory='{-(-4 * gram >> 20)}MB'"
        )


class DualInverse:
    """``(H + d I)^-1`` with ``d = damping + l2``, as an operator on `Gradients`.

    Attributes:
        solves: how well each panel of right-hand sides was solved.
    """

    def __init__(
        self,
        curvature: DualCurvature,
        columns: Columns,
        system: GramSystem,
        damping: float,
        l2: float,
        neglected: float,
    ) -> None:
        self.curvature, self.columns, self.system = curvature, columns, system
        self.damping, self.l2, self.neglected = damping, l2, neglected
        self.solves: list[SolveInfo] = []

    def __matmul__(self, gradients: Gradients) -> DualQueries:
        """Preconditioned queries."""
        products = self.columns.products(gradients, torch.float64)
        solution, info = self._solve(products, squared_norms(gradients), gradients)
        queries = DualQueries(gradients, solution.value, self, info)
        if info.converged or self.columns.dtype == torch.float64:
            return queries
        try:
            exact = self.curvature.inverse(self.damping, self.l2, dtype=torch.float64)
        except (
            UpweightError
        ):  # no room for a Gram matrix in double precision: what there is, marked unconverged
            return queries
        better = exact @ gradients
        self.solves[-1] = better.solve_info
        return better

    def quadratic(self, gradients: Gradients) -> dict[str, Tensor]:
        """``g^T (H + d I)^-1 g`` of every example, {"": [batch]}."""
        item = 8 * 8  # a solution, its residual and the vectors of the iteration, most in two precisions
        height = max(1, int(self.curvature.memory / 8 / (self.columns.size * item)))
        parts = []
        for a in range(0, gradients.batch, height):
            part = gradients.rows(slice(a, a + height))
            b, norms = self.columns.products(part, torch.float64), squared_norms(part)
            solution, _ = self._solve(b, norms)
            # b^T K'^-1 b up to the square of the error: the second term is what the residual still holds
            explained = (b * solution.value).sum(0) + (solution.value * solution.rest).sum(0)
            parts.append((norms - explained) / (self.damping + self.l2))
        return {"": torch.cat(parts).to(self.curvature.dtype)}

    def _solve(
        self, b: Tensor, squared: Tensor, gradients: Gradients | None = None
    ) -> tuple[GramSolution, SolveInfo]:
        """The solution for ``b = S V^T`` and its residuals; some are checked without the Gram matrix."""
        started = time.perf_counter()
        shift, norms = self.system.shift, squared.sqrt()
        promised = PROMISED[self.curvature.dtype]
        solution = self.system.solve(b, max(0.0, promised / 2 - self.neglected) * shift * norms)
        residual = solution.energy.sqrt() / (shift * norms.clamp_min(1e-300))
        rounding = 0.0
        if gradients is not None:
            worst = residual.argsort(descending=True)[:CHECKED]
            found = self._residual(gradients.rows(worst), solution.value[:, worst])
            rounding = float((found - residual[worst]).clamp_min(0).max())
        residual = (residual + rounding + self.neglected) * (norms > 0)
        info = SolveInfo(
            solver="dual",
            damping=self.damping,
            iterations=solution.steps,
            residual=residual,
            products=0.0,
            seconds=time.perf_counter() - started,
            converged=bool((residual <= promised).all()),
            notes={
                "columns": self.curvature.norms.numel(),
                "columns_kept": self.columns.size,
                "gram_dtype": str(self.columns.dtype).removeprefix("torch."),
                **({"l2": self.l2} if self.l2 else {}),
            },
        )
        self.solves.append(info)
        return solution, info

    def _residual(self, gradients: Gradients, weights: Tensor) -> Tensor:
        """``|v - (H + d I) x| / |v|`` of a few queries [k], with x and every product written out in float64."""
        d, n = self.damping + self.l2, self.curvature.n
        v = {name: block.dense() for name, block in gradients.to(torch.float64).items()}
        explained = self.columns.combine(weights.mT)
        x = {name: (v[name] - explained[name]) / d for name in v}
        image = self.columns.products(
            Gradients({name: Dense(part) for name, part in x.items()}), torch.float64
        )
        curved = self.columns.combine(image.mT / n)
        rest = sum((v[name] - curved[name] - d * x[name]).square().sum(1) for name in v)
        return (torch.as_tensor(rest) / squared_norms(gradients).clamp_min(1e-300)).sqrt()


@dataclass(frozen=True)
class DualQueries:
    """``(H + d I)^-1 v = (1/d) [v - S^T a]`` of some queries, kept as v and a.

    Attributes:
        gradients: v, the query gradients.
        weights: a [N, query], float64.
        inverse: what made them.
        solve_info: how well the systems were solved.
    """

    gradients: Gradients
    weights: Tensor
    inverse: DualInverse
    solve_info: SolveInfo

    def __matmul__(self, train: Transposed) -> Tensor:
        """Inner products [query, train]."""
        columns = self.inverse.columns
        plain = self.gradients.to(columns.dtype) @ train.gradients.to(columns.dtype).T
        return self._combine(plain, columns.products(train.gradients))

    def by_layer(self, train: Transposed) -> dict[str, Tensor]:
        """Inner products [query, train] of each layer."""
        columns = self.inverse.columns
        plain = self.gradients.to(columns.dtype).by_layer(train.gradients.to(columns.dtype).T)
        products = columns.products_by_layer(train.gradients)
        return {name: self._combine(plain[name], products[name]) for name in plain}

    def _combine(self, plain: Tensor, products: Tensor) -> Tensor:
        """``(1/d) [V G^T - a^T S G^T]``: a difference of large numbers, therefore in float64."""
        explained = self.weights.mT @ products.double()
        total = self.inverse.damping + self.inverse.l2
        return ((plain.double() - explained) / total).to(self.inverse.curvature.dtype)


def _factorise(built: _Built, shift: float, spectrum: bool) -> GramSystem:
    if spectrum and built.spectrum is None:
        values, vectors = torch.linalg.eigh(built.gram)
        built.spectrum = values, vectors
    if shift not in built.systems:
        built.systems.clear()  # one factor at a time
        built.systems[shift] = GramSystem(built.gram, shift, built.spectrum)
    return built.systems[shift]
