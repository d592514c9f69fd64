"""The Neumann series of the damped inverse, over all the data or over mini-batches (LiSSA)."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from upweight.curvature.solvers.base import LinearOperator, Preconditioner, Solution
from upweight.curvature.solvers.common import (
    Callback,
    System,
    batch_size_of,
    check_options,
    largest_eigenvalue,
    largest_of_batches,
    minibatches,
    negative_curvature,
)
from upweight.errors import UpweightError

RTOL, MAX_ITER = 1e-3, 5000
CHECKS_WITHOUT_GAIN = 3  # full-data checks after which a stochastic run is taken to have reached its noise


class Lissa:
    """Sum the Neumann series ``scale * sum_j (I - scale (H + damping I))^j B`` term by term.

    ``x_0 = 0,  x_{j+1} = x_j + scale (b - (H_j + damping I) x_j)``, so that J iterations sum J terms. Over all the data
    an eigenvalue s of H + damping I is inverted as ``(1 - (1 - scale s)^J) / s``: large ones soon, small ones after
    ``1 / (scale s)`` terms.

    Args:
        depth: J, exactly; None to go on until the residual is below `rtol`, or for 5000 terms.
        rtol: relative residual to reach.
        batch_size: examples per H_j, in shuffled epochs; None for all of them, which is deterministic.
        scale: None for 0.9 over the largest eigenvalue of H + damping I, found by 20 power iterations (with
            mini-batches: the largest of five of them, so that hardly a step overshoots).
        repeats: independent stochastic runs to average.
        seed: of the mini-batches and the power iteration. The global random state is left alone.
        callback: called after every iteration with its number and the largest residual (nan between checks of a
            stochastic run).

    Cost: one product per right-hand side and term, B/n of one with mini-batches of B, and then one full product per
    check of the residual. Storage: three [p, k] blocks.

    Fails when: the condition number is large: it takes about as many terms as the condition number, where conjugate
    gradients take its square root. Mini-batches end in noise of the order of ``scale``. Divergence, by negative
    curvature or a `scale` above 2 over the largest eigenvalue, is an error.

    Source: "Second-Order Stochastic Optimization for Machine Learning in Linear Time" (JMLR 18, 2017); for
    influence, "Understanding Black-box Predictions via Influence Functions" (arXiv 1703.04730).

    Example:
        >>> Lissa(depth=100, batch_size=32).depth
        100
    """

    name = "lissa"

    def __init__(
        self,
        *,
        depth: int | None = None,
        rtol: float = RTOL,
        batch_size: int | None = None,
        scale: float | None = None,
        repeats: int = 1,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> None:
        check_options("lissa", depth=depth, rtol=rtol, batch_size=batch_size, scale=scale, repeats=repeats)
        self.depth, self.rtol, self.batch_size, self.scale = depth, rtol, batch_size, scale
        self.repeats, self.seed, self.callback = repeats, seed, callback

    def solve(
        self,
        operator: LinearOperator,
        b: Tensor,
        damping: float,
        preconditioner: Preconditioner | None = None,
    ) -> Solution:
        """The sum for b [p, k]; a preconditioner is ignored: `Astra` is the form that uses one.

        Raises:
            UpweightError: the series diverges, or bad input.
        """
        system = System(self.name, operator, b, damping)
        generator = torch.Generator().manual_seed(self.seed)
        batch_size = batch_size_of(operator, self.batch_size)
        scale, largest = self._scale(system, batch_size, generator)
        if batch_size is None:
            x, terms = self._full(system, scale)
        else:
            runs = [self._sampled(system, scale, batch_size, generator) for _ in range(self.repeats)]
            x, terms = (
                sum((x for x, _ in runs), torch.zeros_like(system.b)) / len(runs),
                max(t for _, t in runs),
            )
        notes = {"scale": scale, "largest_eigenvalue": largest, "batch_size": batch_size or operator.examples}
        advice = "raise the depth, the batch size or the damping, or use solver='cg'"
        return system.solution(x, self.rtol, terms, notes, advice)

    def _scale(
        self, system: System, batch_size: int | None, generator: torch.Generator
    ) -> tuple[float, float | None]:
        """The scale, and the largest eigenvalue of H + damping I if it was looked for."""
        if self.scale is not None:
            return self.scale, None
        if batch_size is None:
            largest = largest_eigenvalue(system.product, system.b, generator)
        else:
            largest = largest_of_batches(system, batch_size, generator)
        if largest < 0 or (largest == 0 and system.damping == 0):
            raise negative_curvature(self.name, largest, system.damping)
        return 0.9 / largest, largest

    def _full(self, system: System, scale: float) -> tuple[Tensor, int]:
        """All the data each time: every right-hand side stops at its own time unless the depth is fixed."""
        b = system.b
        out, columns, eps = (
            torch.zeros_like(b),
            torch.arange(b.shape[1], device=b.device),
            torch.finfo(b.dtype).eps,
        )
        x, r = torch.zeros_like(b), b
        lowest = torch.linalg.vector_norm(b, dim=0)
        last = self.depth or MAX_ITER
        for term in range(1, last + 1):
            x = x + scale * r
            if term == last or not len(columns):
                break
            r = b[:, columns] - system.product(x)
            residual = torch.linalg.vector_norm(r, dim=0)
            self._report(term, residual)
            # |I - scale A| <= 1 for any scale that converges: no residual may grow by more than rounding.
            noise = 100 * eps * torch.linalg.vector_norm(x, dim=0) / scale
            if not bool((residual <= 1.5 * lowest + noise).all()):
                raise _diverged(term, float((residual / lowest).max()), scale)
            lowest = torch.minimum(lowest, residual)
            done = residual <= self.rtol
            if self.depth is None and bool(done.any()):
                out[:, columns[done]] = x[:, done]
                columns, x, r, lowest = columns[~done], x[:, ~done], r[:, ~done], lowest[~done]
                if not len(columns):
                    return out, term
        out[:, columns] = x
        return out, last

    def _sampled(
        self, system: System, scale: float, batch_size: int, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """Mini-batches: the residual is checked now and then, by all the data."""
        b, operator = system.b, system.operator
        every = max(50, operator.examples // batch_size)
        x, last = torch.zeros_like(b), self.depth or MAX_ITER
        best, idle, term = float("inf"), 0, 0
        for term, batch in enumerate(islice(minibatches(operator.examples, batch_size, generator), last), 1):
            rest = operator.sampled_product(x, batch).add_(x, alpha=system.damping).sub_(b)
            x = x.sub_(rest, alpha=scale)
            # The same bound on the iterates themselves: term * scale * |b|, doubled for scales between 1/s and 2/s.
            length = float(torch.linalg.vector_norm(x, dim=0).amax()) if x.numel() else 0.0
            if not length <= 2 * term * scale:
                raise _diverged(term, length / scale, scale)
            if self.depth is not None or term % every:
                self._report(term, None)
                continue
            residual = torch.linalg.vector_norm(b - system.product(x), dim=0)
            self._report(term, residual)
            worst = float(residual.amax()) if residual.numel() else 0.0
            idle = 0 if worst < 0.9 * best else idle + 1
            best = min(best, worst)
            if worst <= self.rtol or idle == CHECKS_WITHOUT_GAIN:
                break
        return x, term

    def _report(self, term: int, residual: Tensor | None) -> None:
        if self.callback is not None:
            self.callback(term, float("nan") if residual is None else float(residual.max()))


def _diverged(term: int, growth: float, scale: float) -> UpweightError:
    return UpweightError(
        f"lissa diverged: grown {growth:.1e}-fold at term {term} with scale={scale:.2e}, above 2 over the largest "
        "eigenvalue or on negative curvature -> leave scale=None, raise the damping or the batch size, or use "
        "curvature='ggn'"
    )
