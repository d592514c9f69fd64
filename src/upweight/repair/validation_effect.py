"""What relabelling or removing each training example is predicted to do to the mean validation measurement.

To first order, with v = (H + damping I)^-1 (mean gradient of the validation measurements):

    removal of i           +(1/n) v . g_i
    relabelling i          +(1/n) v . (g_i - g~_i)      g~_i: its gradient with the other label

One inverse, and one pass over the training data for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from upweight.attributors.base import explained_by_form
from upweight.attributors.fitted import CALIBRATED, spread
from upweight.attributors.influence import Influence
from upweight.curvature.dense import as_gradients
from upweight.data import Examples
from upweight.gradients import Gradients
from upweight.gradients.rowwise import weighted_sum
from upweight.progress import progress_bar
from upweight.repair.evidence import as_numbers
from upweight.repair.labels import with_labels

SAMPLE = 64
"""Validation examples from which the standard error of a mean effect is estimated."""


class ValidationEffect:
    """Predicted changes of the mean validation measurement, as the measurement itself moves.

    Args:
        method: influence functions, fitted.
        validation: what is measured.
    """

    def __init__(self, method: Influence, validation: Examples) -> None:
        self.method, self.validation = method, validation
        self.fitted = method._ready()
        self.preconditioned = self.fitted.curvature.inverse(method.damping) @ self._mean_gradient()
        self._removal: np.ndarray | None = None

    @property
    def unit(self) -> str | None:
        """The measurement's, if the curvature is one whose scores have a unit."""
        return self.method.task.unit if self.method.curvature in CALIBRATED else None

    def removal(self) -> np.ndarray:
        """Of removing each training example, [n]."""
        if self._removal is None:
            steps = ((step.start, step.stop, step.load) for step in self.fitted.training)
            self._removal = self._products(steps, "effects of removal")
        return self._removal

    def relabelling(self, given: np.ndarray, suggested: np.ndarray) -> np.ndarray:
        """Of giving each training example its suggested label, [n]; 0 where that is the given one."""
        changed = given != suggested
        if not changed.any():
            return np.zeros(len(given))
        examples, tracker = self.fitted.examples, self.fitted.tracker

        def gradients(rows: Any) -> Callable[[], Gradients]:
            batch = with_labels(rows.batch, suggested[rows.start : rows.stop])
            return lambda: tracker.train(batch, examples.ids[rows.start : rows.stop])

        steps = (
            (rows.start, rows.stop, gradients(rows))
            for rows in examples.batches(self.fitted.batch_size)
            if changed[rows.start : rows.stop].any()
        )
        relabelled = self._products(steps, "effects of relabelling")
        return np.where(changed, self.removal() - relabelled, 0.0)

    def standard_error(self) -> np.ndarray:
        """Of `removal` as an estimate for all queries of the validation set's kind, [n]; NaN for a single one."""
        positions = spread(self.validation.n, SAMPLE)
        if len(positions) < 2:
            return np.full(self.fitted.examples.n, np.nan)
        batch = self.validation.take(positions)
        sample = Examples(tuple(batch) if isinstance(batch, list) else batch)
        values = self.method.attribute(sample).values.double()
        return as_numbers(values.std(0)) / math.sqrt(self.validation.n)

    def _products(self, steps: Any, what: str) -> np.ndarray:
        """``(1/n) v . g`` of every example of the steps, as the measurement moves; 0 for the others."""
        n, sign = self.fitted.examples.n, self.method.task.orientation
        found = np.zeros(n)
        with progress_bar(what, n, self.method.progress) as advance:
            for start, stop, load in steps:
                found[start:stop] = sign * as_numbers((self.preconditioned @ load().T)[0]) / n
                advance(stop - start)
        return found

    def _mean_gradient(self) -> Gradients:
        """Mean oriented gradient of the validation measurements, one row."""
        total, like = None, None
        n = self.validation.n
        for rows in self.validation.batches(self.fitted.batch_size):
            ids = self.validation.ids[rows.start : rows.stop]
            g = explained_by_form(
                rows.batch, self.fitted.signature, lambda b=rows.batch, i=ids: self.fitted.tracker.query(b, i)
            )
            like = weighted_sum(g, torch.full((1, g.batch), 1 / n, dtype=g.dtype, device=self._device()))
            total = like.dense() if total is None else total + like.dense()
        assert total is not None and like is not None
        return as_gradients(total, like)

    def _device(self) -> torch.device:
        return self.fitted.tracker.device
