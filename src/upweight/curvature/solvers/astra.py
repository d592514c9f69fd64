"""Stochastic refinement of a preconditioner's answer (ASTRA)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

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

GROWTH = 1e3  # far above what momentum overshoots by on its way to a solution


class Astra:
    """Start from EK-FAC's answer and correct it by preconditioned stochastic steps with momentum.

    ``x_0 = M^-1 b,  v_{j+1} = momentum v_j - step M^-1 ((H_j + damping I) x_j - b),  x_{j+1} = x_j + v_{j+1}``, where
    ``M^-1`` is the preconditioner, EK-FAC's damped inverse, and H_j the curvature of a mini-batch. Its fixed point does
    not depend on the preconditioner; with ``iterations=0`` it is the preconditioner's own answer.

    The paper's step, a tenth of the damping, belongs to a preconditioner that is not divided by the damping. Here the
    step is found: half of one over the largest eigenvalue of ``M^-1 (H + damping I)``, by 20 power iterations.

    Args:
        iterations: steps.
        batch_size: examples per step, in shuffled epochs; None for all of them, which is deterministic and stops at
            `rtol`.
        momentum: of the steps; 0 is the plain preconditioned series.
        step: None to find it.
        average: the share of last iterates to average in a stochastic run, which takes out most of its noise.
        rtol: relative residual above which it warns.
        seed: of the mini-batches and the power iteration. The global random state is left alone.
        callback: called after every iteration with its number and the largest residual (nan in a stochastic run).

    Cost: per right-hand side and step, B/n of a product with mini-batches of B, and one application of the
    preconditioner; two full products to measure what was gained. Storage: four [p, k] blocks.

    Fails when: the preconditioner is far too large in some directions: they converge slowly. Noise
    of mini-batches bounds what can be reached; with products over all the data, conjugate gradients with the same
    preconditioner get there in fewer. Divergence is an error.

    Source: "Better Training Data Attribution via Better Inverse Hessian-Vector Products" (arXiv 2507.14740).

    Example:
        >>> Astra(iterations=200, batch_size=128).momentum
        0.9
    """

    name = "astra"

    def __init__(
        self,
        *,
        iterations: int = 300,
        batch_size: int | None = 256,
        momentum: float = 0.9,
        step: float | None = None,
        average: float = 0.5,
        rtol: float = 1e-2,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> None:
        check_options("astra", batch_size=batch_size, step=step, rtol=rtol)
        if iterations < 0:
            raise UpweightError(
                f"astra got iterations={iterations}, expected at least 0 -> 300 is the default"
            )
        if not (0 <= momentum < 1 and 0 <= average <= 1):
            raise UpweightError(
                f"astra got momentum={momentum!r}, average={average!r}, expected 0 <= momentum < 1 and 0 <= average "
                "<= 1 -> leave them at their defaults"
            )
        self.iterations, self.batch_size, self.momentum, self.step = iterations, batch_size, momentum, step
        self.average, self.rtol, self.seed, self.callback = average, rtol, seed, callback

    def solve(
        self,
        operator: LinearOperator,
        b: Tensor,
        damping: float,
        preconditioner: Preconditioner | None = None,
    ) -> Solution:
        """The refined solution for b [p, k].

        Raises:
            UpweightError: no preconditioner, divergence, or bad input.
        """
        if preconditioner is None:
            raise UpweightError(
                "astra refines the answer of a preconditioner and got none -> pass EK-FAC, or use solver='lissa'"
            )
        system = System(self.name, operator, b, damping)
        generator = torch.Generator().manual_seed(self.seed)
        batch_size = batch_size_of(operator, self.batch_size)
        x = preconditioner @ system.b
        if not bool(torch.isfinite(x).all()):
            raise UpweightError("the preconditioner gave numbers that are not finite -> raise its damping")
        start = torch.linalg.vector_norm(system.b - system.product(x), dim=0)
        notes = {
            "start_residual": float(start.max()) if start.numel() else 0.0,
            "batch_size": batch_size or operator.examples,
        }
        done = 0
        if self.iterations and b.numel():
            notes["step"] = self._step(system, preconditioner, batch_size, generator)
            x, done = self._refine(system, preconditioner, x, notes["step"], batch_size, generator)
        residual = torch.linalg.vector_norm(system.b - system.product(x), dim=0)
        if done and not bool((residual <= 2 * start.clamp_min(0.5 * self.rtol)).all()):
            raise _diverged(done, float((residual / start).max()), notes["step"])
        advice = "raise the iterations, the batch size or the damping, or use solver='cg'"
        return system.solution(x, self.rtol, done, notes, advice, residual)

    def _step(
        self, system: System, M: Preconditioner, batch_size: int | None, generator: torch.Generator
    ) -> float:
        if self.step is not None:
            return self.step
        if batch_size is None:
            largest = largest_eigenvalue(system.product, system.b, generator, M)
        else:
            largest = largest_of_batches(system, batch_size, generator, M)
        if largest <= 0:
            raise negative_curvature(self.name, largest, system.damping)
        return 0.5 / largest

    def _refine(
        self,
        system: System,
        M: Preconditioner,
        x: Tensor,
        step: float,
        batch_size: int | None,
        generator: torch.Generator,
    ) -> tuple[Tensor, int]:
        """The last iterate, or the mean of the last ones, and how many steps were taken."""
        operator, b = system.operator, system.b
        batches: Iterator[list[int] | None] = repeat(None)
        if batch_size is not None:
            batches = minibatches(operator.examples, batch_size, generator)
        first_averaged = self.iterations - int(self.average * self.iterations)
        velocity, mean, averaged, limit = torch.zeros_like(x), torch.zeros_like(x), 0, None
        for done in range(self.iterations):
            batch = next(batches)
            product = operator.product(x) if batch is None else operator.sampled_product(x, batch)
            r = b - product - system.damping * x
            worst = float(torch.linalg.vector_norm(r, dim=0).max())
            limit = limit or GROWTH * max(worst, 1.0)
            if not worst <= limit:
                raise _diverged(done, worst * GROWTH / limit, step)
            if self.callback is not None:
                self.callback(done, worst if batch is None else float("nan"))
            if batch is None and worst <= self.rtol:
                return x, done
            velocity = self.momentum * velocity + step * (M @ r)
            x = x + velocity
            if batch is not None and done >= first_averaged:
                averaged += 1
                mean = mean + (x - mean) / averaged
        return (mean if averaged else x), self.iterations


def _diverged(iteration: int, growth: float, step: float) -> UpweightError:
    return UpweightError(
        f"astra diverged: its residual is {growth:.1e} times that of its start after {iteration} iterations with "
        f"step={step:.2e} -> leave step=None, raise the damping or the batch size, or use curvature='ggn'"
    )
