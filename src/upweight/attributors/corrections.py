"""Corrections of first-order influence, as what they do to the training gradients and to the scale of the scores.

* ``"rescaled"`` (RIF): the curvature without the example that is removed, ``(1/n) v^T (H - H_i / n + dI)^-1 g_i``.
  First-order influence misses a factor of about ``1 / (1 - h_i)`` for an example of leverage h_i. Exact for the removal
  of one example from a quadratic objective. "Rescaled Influence Functions: Accurate Data Attribution in High Dimension"
  (arXiv 2506.06656). A Kronecker-factored curvature leaves the example out of its eigenvalues (see
  `upweight.curvature.leave_out`).
* ``"relative"``: ``v^T x_i / |x_i|`` with ``x_i = (H + dI)^-1 g_i``, and ``"relative-loss"``:
  ``v^T x_i / sqrt(g_i^T x_i)``, so that examples that move every prediction do not come first everywhere. No unit; an
  example without a gradient scores 0. "RelatIF: Identifying Explanatory Training Examples via Relative Influence"
  (arXiv 2003.11630).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from upweight.attributors.fitted import CALIBRATED
from upweight.attributors.reweighted import Reweighted, Side, dense_damped, many_at_once
from upweight.budget import BATCH_BYTES
from upweight.curvature import Inverse
from upweight.curvature.leave_out import rotated
from upweight.errors import UpweightError
from upweight.gradients import Gradients
from upweight.gradients.rowwise import paired
from upweight.passes import Pass, Step

if TYPE_CHECKING:
    from upweight.attributors.fitted import Fitted
    from upweight.attributors.influence import Influence

Corrected: TypeAlias = "tuple[Any, Tensor | float]"
"""Training gradients, and what their inner products are multiplied by: a number, or one an example [batch]."""

ROWS_SHARE = 0.05
"""Share of the memory budget for the preconditioned rows of the curvature."""
CORRECTIONS = ("rescaled", "relative", "relative-loss")


def check_correction(correction: str | None, blocks: bool = False) -> None:
    """Raise unless it is known, and known of a curvature of blocks."""
    if correction is not None and correction not in CORRECTIONS:
        raise UpweightError(f"correction={correction!r} is unknown -> use None or one of {list(CORRECTIONS)}")
    if correction == "rescaled" and blocks:
        raise UpweightError(
            "correction='rescaled' takes an example out of one matrix over all layers, expected blocks=False -> use "
            "curvature='ekfac', or no correction"
        )


class Correction:
    """What a correction makes of one step of the training gradients.

    Args:
        method: whose correction it is.
        fitted: what its fit learned.
        inverse: the damped inverse of the curvature.
    """

    def __init__(self, method: Influence, fitted: Fitted, inverse: Any) -> None:
        self.method, self.fitted = method, fitted
        self.plain = inverse
        self.inverse = many_at_once(inverse, list(fitted.tracker.layers)) if method.correction else inverse
        if method.correction and fitted.index is not None:
            raise UpweightError(
                f"correction={method.correction!r} needs the gradients, which an index does not keep -> cache with "
                "precision='float32'"
            )
        if method.correction == "relative" and method.curvature == "datainf":
            raise UpweightError(
                "correction='relative' divides by the size of a step that curvature='datainf' never forms -> "
                "correction='relative-loss', or another curvature"
            )
        self._damped: Tensor | None = None
        if method.correction == "rescaled":
            self._check_rescalable()
            if method.curvature == "hessian":
                self._damped = dense_damped(method, fitted)

    def __call__(self, step: Any) -> Iterator[Corrected]:
        """Gradients whose inner products with `queries` are n times the scores, and what to multiply these by.

        In parts, one after the other: a structured curvature's are as long as the parameters.
        """
        loaded = step.load()
        if self.method.correction == "rescaled":
            parts = self._left_out(step, loaded) if self.structured else self._rescaled(step, loaded)
            yield from ((corrected, 1.0) for _, corrected in parts)
        else:
            yield loaded, self._scale(loaded)

    def queries(self, gradients: Gradients) -> Gradients:
        """What a query's gradients are multiplied by: the damped inverse, unless the training gradients have it."""
        if self.method.correction == "rescaled" and self.structured:
            return rotated(self.inverse, gradients)
        return self.plain @ gradients

    @property
    def structured(self) -> bool:
        """Whether the curvature is known by its eigenvalues, layer by layer."""
        return isinstance(self.inverse, Inverse)

    def over(self, training: Any) -> Pass[Iterable[Corrected]]:
        """A pass whose steps load what the correction makes of them."""
        return _CorrectedPass(self, training)

    def own(self, step: Any) -> dict[str, Tensor]:
        """N times the self-influence of every example of a step, [batch], in parts that add up."""
        loaded = step.load()
        if not isinstance(loaded, Gradients):
            return {"": loaded.self_influence}
        if self.method.correction is None:
            return dict(self.inverse.quadratic(loaded))
        if self.method.correction == "rescaled":
            if self.structured:
                pairs = [paired(own, solved) for own, solved in self._left_out(step, loaded)]
            else:
                pairs = [paired(self.inverse @ own, other) for own, other in self._rescaled(step, loaded)]
            return {"": torch.cat(pairs)}
        return {"": self._quadratic(loaded) * self._scale(loaded)}

    def _scale(self, loaded: Gradients) -> Tensor | float:
        if self.method.correction is None:
            return 1.0
        if self.method.correction == "relative":
            few, squares = self._rows(), []
            for a in range(0, loaded.batch, few):
                solved = self.inverse @ loaded.rows(slice(a, a + few))
                squares.append(paired(solved, solved))
            return self.fitted.examples.n * _inverse_root(torch.cat(squares))
        return self.fitted.examples.n * _inverse_root(self._quadratic(loaded))

    def _left_out(self, step: Any, loaded: Gradients) -> Iterator[tuple[Gradients, Gradients]]:
        """``Q^T g_i`` and ``Q^T (H_-i + dI)^-1 g_i`` of a few examples after the other."""
        fitted, few = self.fitted, self._rows()
        for a in range(0, step.stop - step.start, fitted.batch_size):
            batch = loaded.rows(slice(a, a + fitted.batch_size))
            positions = range(step.start + a, step.start + a + batch.batch)
            side = Side(fitted.examples, positions, -torch.ones(batch.batch))
            left_out = Reweighted(self.method, fitted, self.inverse, [side]).left_out
            for b in range(0, batch.batch, few):
                rows = slice(b, min(b + few, batch.batch))
                part = batch.rows(rows)
                yield rotated(self.inverse, part), left_out.rows(rows).solve_rotated(part)

    def _rescaled(self, step: Any, loaded: Gradients) -> Iterator[tuple[Gradients, Gradients]]:
        """``g_i`` and what its inner products with preconditioned queries are taken of, a few examples at a time.

        Their rows of the curvature are held preconditioned, each as long as a gradient.
        """
        fitted = self.fitted
        rows = max(1, self._rows() // max(1, fitted.fisher[1]))
        for a in range(0, step.stop - step.start, rows):
            part = loaded.rows(slice(a, a + rows))
            positions = range(step.start + a, step.start + a + part.batch)
            side = Side(fitted.examples, positions, -torch.ones(part.batch))
            changed = Reweighted(self.method, fitted, self.inverse, [side], self._damped)
            yield part, changed.correct_each(part)

    def _rows(self) -> int:
        """Examples whose gradients may be formed, twice, at a time."""
        numel = sum(layer.numel for layer in self.fitted.tracker.layers.values())
        size = numel * torch.finfo(self.fitted.dtype).bits // 8
        return max(1, int(min(BATCH_BYTES, self.method.memory * ROWS_SHARE) / (2 * size)))

    def _check_rescalable(self) -> None:
        if self.method.curvature not in CALIBRATED:
            raise UpweightError(
                f"correction='rescaled' needs a curvature in the loss's unit, curvature={self.method.curvature!r} is "
                "not -> use curvature='ggn', 'hessian' or 'ekfac'"
            )

    def _quadratic(self, loaded: Gradients) -> Tensor:
        return torch.stack(list(self.inverse.quadratic(loaded).values())).sum(0)


class _CorrectedPass:
    def __init__(self, correction: Correction, training: Any) -> None:
        self.correction, self.training = correction, training

    def __iter__(self) -> Iterator[Step[Iterable[Corrected]]]:
        for step in self.training:
            yield Step(step.start, step.stop, lambda s=step: self.correction(s))


def _inverse_root(squares: Tensor) -> Tensor:
    """``1 / sqrt``, and 0 where an example has no gradient."""
    return torch.where(squares > 0, squares.clamp_min(torch.finfo(squares.dtype).tiny).rsqrt(), 0.0)
