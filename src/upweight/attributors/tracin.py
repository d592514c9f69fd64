"""TracIn: gradient inner products, summed over checkpoints of the training run.

    scores[q, i] = sum_t eta_t <grad m_q(theta_t), grad l_i(theta_t)>

Positive: a *proponent*; training on the example made the query better. The scores only rank: checkpoints stand in for
the steps between them. "Estimating Training Data Influence by Tracing Gradient Descent" (arXiv 2002.08484).
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from upweight._autocast import without_autocast
from upweight.attributors.base import Attributor
from upweight.attributors.checkpoints import (
    Checkpoint,
    as_checkpoints,
    load_checkpoint,
    read_checkpoint,
)
from upweight.attributors.evidence import shared_info
from upweight.attributors.projection import Projection
from upweight.attributors.streaming import Source, add_layers
from upweight.budget import KEEP_SHARE
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.fingerprint import model_fingerprint
from upweight.gradients.select import ParameterFilter
from upweight.scores import Scores, SelfInfluence
from upweight.task import Task


class TracIn(Attributor):
    """Gradient inner products at checkpoints of the training run, weighted by their learning rates.

    ``scores[query, train] = sum_t eta_t <grad m_q(theta_t), grad l_i(theta_t)>``, positive for proponents; no unit,
    the scores only rank.

    Args:
        model: the trained model, in eval mode, whose architecture the checkpoints share. Nothing on it is changed:
            checkpoints are loaded into a copy.
        task: its training loss and what is asked of queries.
        checkpoints: one or more of: a state dict, a file (safetensors, or a torch file, of which only tensors are
            read), or a function without arguments that returns a state dict (to have one at a time in memory).
        learning_rates: the learning rate at each checkpoint, or one number for all.
        parameters: which parameters to track: None for all trainable ones, ``"last_layer"`` for the last linear layer,
            a regular expression, or a function of the name.
        projection: numbers to keep of each gradient (a seeded random projection, whose inner products are right on
            average, with a relative error of about ``1/sqrt(projection)``), or None for exact inner products. Projected
            training gradients are small enough to be kept, so that new queries cost no pass over the training data.
        seed: of the projection.
        memory: bytes to stay within (an int, or ``"2GB"``); ``"auto"`` is half of what is free.
        batch_size: examples per forward pass; chosen from the memory budget if None. Scores do not depend on it.
        autocast: dtype for `torch.autocast` in the forward pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: for every checkpoint, what `GradDot` costs; one copy of the model.

    Fails when: the checkpoints are late ones, where gradients have vanished; the run was one of Adam, whose steps are
    not gradients; a few examples with large gradients come first for every query.

    Example:
        >>> import torch, upweight as uw
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> weights = [{"weight": torch.tensor([[w]])} for w in (0.0, 0.5)]
        >>> train = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]])
        >>> method = uw.TracIn(model, uw.Regression(), checkpoints=weights, learning_rates=[0.1, 0.1])
        >>> method.fit(train).attribute((train[0][:1], train[1][:1])).values.tolist()
        [[0.125, 0.5]]
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        checkpoints: Sequence[Checkpoint],
        learning_rates: Sequence[float] | float,
        parameters: ParameterFilter = None,
        projection: int | None = None,
        seed: int = 0,
        memory: int | str = "auto",
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(model, task, parameters, memory, batch_size, autocast, progress)
        self.checkpoints = as_checkpoints(checkpoints)
        self.learning_rates = _rates(learning_rates, len(self.checkpoints))
        if projection is not None and not (isinstance(projection, int) and projection >= 1):
            raise UpweightError(
                f"projection={projection!r}, expected a number of dimensions >= 1 -> 512, or None for exact products"
            )
        self.projection, self.seed = projection, seed
        self._copy: nn.Module | None = None
        self._sources: list[Source] = []
        self._marks: list[str] = []

    @without_autocast()
    def fit(self, train: Any, *, ids: Sequence[int | str] | None = None) -> TracIn:
        """Load every checkpoint once, check that it fits the model, and trace it; no pass over the data yet.

        Args:
            train: a Dataset, a DataLoader, or ``(inputs, targets)``; the data the model was trained on.
            ids: one id per training example; positions if None.

        Returns:
            Itself.

        Raises:
            UpweightError: a checkpoint is of another architecture or not finite; or what is wrong with the model, the
                task or the data, in one line.
        """
        examples = Examples(train, ids)
        self._copy = copy.deepcopy(self.model)
        self._sources, self._marks = [], []
        for number in range(len(self.checkpoints)):
            work = self._load(number)
            self._sources.append(Source(self, work, examples, self._projection(number), self._keep()))
            self._marks.append(model_fingerprint(work))
        self._remember(examples)
        return self

    @without_autocast()
    def attribute(
        self,
        query: Any,
        *,
        per_layer: bool = False,
        out: str | os.PathLike[str] | None = None,
        ids: Sequence[int | str] | None = None,
    ) -> Scores:
        """Score every training example for every query.

        Args:
            query: queries in the form of the training data.
            per_layer: also keep each layer's part of the scores (without a projection only, which mixes layers).
            out: a folder to write finished tiles of the scores to; a killed run resumes from it.
            ids: one id per query; positions if None.

        Returns:
            `Scores` [query, train], without a unit.

        Raises:
            UpweightError: not fitted, or the queries do not fit the model.
        """
        examples, _ = self._ready()
        if per_layer and self.projection is not None:
            raise UpweightError(
                "per_layer=True needs each layer's own gradient, which projection= mixes -> projection=None"
            )
        started = time.perf_counter()
        queries = Examples(query, ids)
        total, layers = torch.zeros(queries.n, examples.n, dtype=self._sources[0].dtype), None
        for number, (rate, source) in enumerate(zip(self.learning_rates, self._sources)):
            self._return_to(number)
            folder = None if out is None else Path(out) / f"checkpoint-{number:04d}"
            values, parts = source.inner_products(queries, per_layer, folder, self._settings(number))
            total += rate * values
            layers = add_layers(layers, parts, rate)
        info = self._info() | {
            "queries": queries.fingerprint(),
            "attribute_seconds": round(time.perf_counter() - started, 3),
        }
        return Scores(total, queries.ids, examples.ids, None, info, layers)

    @without_autocast()
    def self_influence(self) -> SelfInfluence:
        """``sum_t eta_t |grad l_i(theta_t)|^2``: large for examples that pulled at the model all through training."""
        examples, _ = self._ready()
        total = torch.zeros(examples.n, dtype=self._sources[0].dtype)
        for number, (rate, source) in enumerate(zip(self.learning_rates, self._sources)):
            self._return_to(number)
            total += rate * source.squared_norms()
        return SelfInfluence(total, examples.ids, None, self._info())

    def _load(self, number: int) -> nn.Module:
        """The copy of the model, holding a checkpoint."""
        assert self._copy is not None
        load_checkpoint(self._copy, read_checkpoint(self.checkpoints[number], number), number)
        return self._copy

    def _return_to(self, number: int) -> None:
        """Load a checkpoint again; raise if it is no longer what it was at the fit."""
        if model_fingerprint(self._load(number)) != self._marks[number]:
            raise UpweightError(f"checkpoint {number} changed since fit -> fit again")

    def _projection(self, number: int) -> Projection | None:
        if self.projection is None:
            return None
        # Signs of its own for every checkpoint: their errors then average out over the sum.
        seed = f"{self.seed}/{number}"
        return Projection(self.projection, seed, self._keep())

    def _keep(self) -> float:
        """Bytes that one checkpoint's training gradients, and its projection, may each keep."""
        return self.memory * KEEP_SHARE / len(self.checkpoints) / (1 if self.projection is None else 2)

    def _settings(self, number: int) -> dict[str, Any]:
        return {
            "method": "tracin",
            "checkpoint": self._marks[number],
            "projection": None if self.projection is None else [self.projection, self.seed, number],
        }

    def _info(self) -> dict[str, Any]:
        examples, fingerprints = self._ready()
        last = self._sources[-1]
        info = shared_info(
            "tracin", self, last.tracker.coverage, fingerprints, examples.n, last.batch_size, last.dtype
        )
        marks = zip(self._marks, self.learning_rates)
        return info | {
            "checkpoints": [{"fingerprint": mark, "learning_rate": rate} for mark, rate in marks],
            "projection": self.projection,
            "seed": self.seed,
        }


def _rates(rates: Sequence[float] | float, count: int) -> list[float]:
    listed = (
        [float(np.asarray(rates))] * count if np.ndim(rates) == 0 else [float(r) for r in np.asarray(rates)]
    )
    if len(listed) != count:
        raise UpweightError(f"{len(listed)} learning rates for {count} checkpoints -> give one for each")
    if wrong := [r for r in listed if not (math.isfinite(r) and r > 0)]:
        raise UpweightError(f"learning rate {wrong[0]}, expected finite numbers > 0 -> the optimiser's own")
    return [float(r) for r in listed]
