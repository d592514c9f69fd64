"""Gradient similarity: training examples whose gradient points the same way as the query's.

    GradDot   scores[q, i] = <grad m_q, grad l_i>
    GradCos   scores[q, i] = <grad m_q, grad l_i> / (|grad m_q| |grad l_i|)

Positive: a *proponent*; a step of gradient descent on the training example would make the query better. Both only
rank: the unit is None.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from upweight._autocast import without_autocast
from upweight.attributors.base import Attributor
from upweight.attributors.evidence import shared_info
from upweight.attributors.streaming import Source, squared_norms
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Dense, Factored, Gradients, Sparse
from upweight.gradients.blocks import Block
from upweight.gradients.select import ParameterFilter
from upweight.scores import Scores, SelfInfluence
from upweight.task import Task


class GradDot(Attributor):
    """Inner products of gradients.

    ``scores[query, train] = <grad m_q, grad l_i>``, positive for proponents; no unit, the scores only rank. It is what
    influence functions tend to, times n and the damping, when the damping grows without bound.

    Args:
        model: a trained model in eval mode. Nothing on it is changed.
        task: its training loss and what is asked of queries.
        parameters: which parameters to track: None for all trainable ones, ``"last_layer"`` for the last linear layer,
            a regular expression, or a function of the name.
        memory: bytes to stay within (an int, or ``"2GB"``); ``"auto"`` is half of what is free.
        batch_size: examples per forward pass; chosen from the memory budget if None. Scores do not depend on it.
        autocast: dtype for `torch.autocast` in the forward pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: one pass over the training data (forward and backward) per panel of queries.

    Fails when: a few training examples with large gradients come first for every query; `GradCos` divides them out.

    Source: the single-checkpoint form of *Estimating Training Data Influence by Tracing Gradient Descent*
    (arXiv 2002.08484).

    Example:
        >>> import torch, upweight as uw
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> train = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0], [1.0]])
        >>> query = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0]])
        >>> scores = uw.GradDot(model, uw.Regression()).fit(train).attribute(query)
        >>> scores.values.tolist(), scores.unit
        ([[2.0, 1.0]], None)
    """

    _name = "grad-dot"

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        parameters: ParameterFilter = None,
        memory: int | str = "auto",
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(model, task, parameters, memory, batch_size, autocast, progress)
        self._source: Source | None = None

    @without_autocast()
    def fit(self, train: Any, *, ids: Sequence[int | str] | None = None) -> GradDot:
        """Trace the model on the training data; no pass over it yet.

        Args:
            train: a Dataset, a DataLoader, or ``(inputs, targets)``; the data the model was trained on.
            ids: one id per training example; positions if None.

        Returns:
            Itself.

        Raises:
            UpweightError: what is wrong with the model, the task or the data, in one line.
        """
        examples = Examples(train, ids)
        self._source = Source(self, self.model, examples, self._transform)
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
            per_layer: also keep each layer's part of the scores.
            out: a folder to write finished tiles of the scores to; a killed run resumes from it.
            ids: one id per query; positions if None.

        Returns:
            `Scores` [query, train], without a unit.

        Raises:
            UpweightError: not fitted, or the queries do not fit the model.
        """
        source = self._fitted_source()
        started = time.perf_counter()
        queries = Examples(query, ids)
        values, layers = source.inner_products(queries, per_layer, out, {"method": self._name})
        info = self._info(source) | {
            "queries": queries.fingerprint(),
            "attribute_seconds": round(time.perf_counter() - started, 3),
        }
        return Scores(values, queries.ids, source.examples.ids, None, info, layers)

    @without_autocast()
    def self_influence(self) -> SelfInfluence:
        """``|grad l_i|^2``: large for examples that still pull at the model. One pass over the training data."""
        source = self._fitted_source()
        return SelfInfluence(source.squared_norms(), source.examples.ids, None, self._info(source))

    def _transform(self, gradients: Gradients) -> Gradients:
        return gradients

    def _fitted_source(self) -> Source:
        self._ready()
        assert self._source is not None
        return self._source

    def _info(self, source: Source) -> dict[str, Any]:
        examples, fingerprints = self._ready()
        coverage = source.tracker.coverage
        return shared_info(
            self._name, self, coverage, fingerprints, examples.n, source.batch_size, source.dtype
        )


class GradCos(GradDot):
    """Cosines of gradients.

    ``scores[query, train] = <grad m_q, grad l_i> / (|grad m_q| |grad l_i|)``, between -1 and 1, positive for
    proponents, and 0 where a gradient is zero; no unit, the scores only rank. Examples with large gradients get no
    advantage, so mislabeled ones do not crowd out the rest; for the same reason there is no self-influence.

    Arguments and cost are those of `GradDot`.

    Fails when: the model is so sure of an example that its gradient is rounding noise (in float32, at a loss below
    about 1e-3): the noise is normalised to a full-sized direction. Use a model in float64 there.

    Example:
        >>> import torch, upweight as uw
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> train = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0], [1.0]])
        >>> query = torch.tensor([[4.0, 3.0]]), torch.tensor([[1.0]])
        >>> uw.GradCos(model, uw.Regression()).fit(train).attribute(query).values.tolist()
        [[0.8, 0.0]]
    """

    _name = "grad-cos"

    @without_autocast()
    def self_influence(self) -> SelfInfluence:
        """Refused: an example's cosine with itself is 1, whatever the example.

        Raises:
            UpweightError: always.
        """
        self._ready()
        raise UpweightError(
            "GradCos has no self-influence: the cosine of a gradient with itself is 1 for every example -> use "
            "GradDot or Influence, whose self-influence tells examples apart"
        )

    def _transform(self, gradients: Gradients) -> Gradients:
        return normalised(gradients)


def normalised(gradients: Gradients) -> Gradients:
    """Every example's gradient divided by its norm over all layers; zero gradients stay zero."""
    # First by the largest number in it, so that squares of tiny gradients do not vanish.
    largest = torch.stack([_numbers(b).abs().flatten(1).amax(1) for b in gradients.values()]).amax(0)
    gradients = _divided(gradients, torch.where(largest > 0, largest, 1.0))
    norms = squared_norms(gradients).sqrt()
    return _divided(gradients, torch.where(norms > 0, norms, 1.0))


def _divided(gradients: Gradients, divisors: Tensor) -> Gradients:
    """Every example's gradient over its number: divisors [batch]."""
    return Gradients({n: _divided_block(b, divisors) for n, b in gradients.items()}, gradients.router)


def _divided_block(block: Block, divisors: Tensor) -> Block:
    if isinstance(block, Factored):
        pieces = tuple(replace(p, rows=p.rows / divisors[:, None, None]) for p in block.pieces)
        return replace(block, pieces=pieces)
    if isinstance(block, Sparse):
        return replace(block, rows=block.rows / divisors[:, None, None])
    return Dense(block.dense() / divisors[:, None])


def _numbers(block: Block) -> Tensor:
    """The numbers of a block that its gradient is proportional to, [batch, ...]."""
    if isinstance(block, Factored):
        return torch.cat([piece.rows.flatten(1) for piece in block.pieces], 1)
    return block.rows if isinstance(block, Sparse) else block.dense()
