"""Corrections of first-order influence, as what they do to the training gradients and to the scale of the scores.

* ``"rescaled"`` (RIF): the curvature without the example that is removed, ``(1/n) v^T (H - H_i / n + dI)^-1 g_i``.
  First-order influence misses a factor of about ``1 / (1 - h_i)`` for an example of leverage h_i. Exact for the removal
  of one example from a quadratic objective. "Rescaled Influence Functions: Accurate Data Attribution in High Dimension"
  (arXiv 2506.06656).
* ``"relative"``: ``v^T x_i / |x_i|`` with ``x_i = (H + dI)^-1 g_i``, and ``"relative-loss"``:
  ``v^T x_i / sqrt(g_i^T x_i)``, so that examples that move every prediction do not come first everywhere. No unit; an
  example without a gradient scores 0. "RelatIF: Identifying Explanatory Training Examples via Relative Influence"
  (arXiv 2003.11630).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upweight.attributors.fitted import CALIBRATED
from upweight.attributors.reweighted import Reweighted, Side, dense_damped, many_at_once
from upweight.errors import UpweightError
from upweight.gradients import Gradients
from upweight.gradients.rowwise import paired
from upweight.passes import Pass, Step

if TYPE_CHECKING:
    from upweight.attributors.fitted import Fitted
    from upweight.attributors.influence import Influence

ROWS_SHARE = 0.05
"""Share of the memory budget for the preconditioned rows of the curvature."""
CORRECTIONS = ("rescaled", "relative", "relative-loss")


def check_correction(correction: str | None) -> None:
    """Raise unless it is known."""
    if correction is not None and correction not in CORRECTIONS:
        raise UpweightError(f"correction={correction!r} is unknown -> use None or one of {list(CORRECTIONS)}")


class Correction:
    """What a correction makes of one step of the training gradients.

    Args:
        method: whose correction it is.
        fitted: what its fit learned.
        inverse: the damped inverse of the curvature.
    """

    def __init__(self, method: Influence, fitted: Fitted, inverse: Any) -> None:
        self.method, self.fitted = method, fitted
        self.inverse = many_at_once(inverse, list(fitted.tracker.layers)) if method.correction else inverse
        if method.correction and fitted.index is not None:
            raise UpweightError(
                f"correction={method.correction!r} needs the gradients, which an index does not keep -> cache with "
                "precision='float32'"
            )
        self._damped: Tensor | None = None
        if method.correction == "rescaled":
            self._check_rescalable()
            if method.curvature == "hessian":
                self._damped = dense_damped(method, fitted)

    def __call__(self, step: Any) -> tuple[Any, Tensor | float]:
        """The gradients whose inner products with preconditioned queries are scores, and what to multiply these by."""
        loaded = step.load()
        if self.method.correction is None:
            return loaded, 1.0
        if self.method.correction == "rescaled":
            return self._rescaled(step, loaded), 1.0
        if self.method.correction == "relative":
            solved = self.inverse @ loaded
            return loaded, self.fitted.examples.n * _inverse_root(paired(solved, solved))
        return loaded, self.fitted.examples.n * _inverse_root(self._quadratic(loaded))

    def over(self, training: Any) -> Pass[tuple[Any, Tensor | float]]:
        """A pass whose steps load what the correction makes of them."""
        return _Corrected(self, training)

    def own(self, step: Any) -> dict[str, Tensor]:
        """N times the self-influence of every example of a step, [batch], in parts that add up."""
        loaded = step.load()
        if not isinstance(loaded, Gradients):
            return {"": loaded.self_influence}
        if self.method.correction is None:
            return dict(self.inverse.quadratic(loaded))
        if self.method.correction == "rescaled":
            return {"": paired(self.inverse @ loaded, self._rescaled(step, loaded))}
        quadratic, scale = self._quadratic(loaded), self(step)[1]
        return {"": quadratic * scale}

    def _rescaled(self, step: Any, loaded: Gradients) -> Gradients:
        """A few examples at a time: their rows of the curvature are held preconditioned, each as long as a gradient."""
        fitted = self.fitted
        size = (
            sum(layer.numel for layer in fitted.tracker.layers.values()) * torch.finfo(fitted.dtype).bits // 8
        )
        rows = max(1, int(self.method.memory * ROWS_SHARE / (size * max(1, fitted.fisher[1]))))
        parts = []
        for a in range(0, step.stop - step.start, rows):
            part = loaded.rows(slice(a, a + rows))
            side = Side(
                fitted.examples, range(step.start + a, step.start + a + part.batch), -torch.ones(part.batch)
            )
            parts.append(
                Reweighted(self.method, fitted, self.inverse, [side], self._damped).correct_each(part)
            )
        return Gradients.concatenate(parts)

    def _check_rescalable(self) -> None:
        if self.method.curvature not in CALIBRATED:
            raise UpweightError(
                f"correction='rescaled' needs a curvature in the loss's unit, curvature={self.method.curvature!r} is "
                "not -> use curvature='ggn', 'hessian' or 'ekfac'"
            )

    def _quadratic(self, loaded: Gradients) -> Tensor:
        return torch.stack(list(self.inverse.quadratic(loaded).values())).sum(0)


class _Corrected:
    def __init__(self, correction: Correction, training: Any) -> None:
        self.correction, self.training = correction, training

    def __iter__(self) -> Iterator[Step[tuple[Any, Tensor | float]]]:
        for step in self.training:
            yield Step(step.start, step.stop, lambda s=step: self.correction(s))


def _inverse_root(squares: Tensor) -> Tensor:
    """``1 / sqrt``, and 0 where an example has no gradient."""
    return torch.where(squares > 0, squares.clamp_min(torch.finfo(squares.dtype).tiny).rsqrt(), 0.0)
