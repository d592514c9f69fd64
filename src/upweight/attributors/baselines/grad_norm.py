"""The size of a training example's gradient as a score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from upweight.attributors.baselines.blind import QueryBlind
from upweight.attributors.baselines.forward import Forward
from upweight.attributors.streaming import Source
from upweight.data import Examples
from upweight.gradients.select import ParameterFilter
from upweight.task import Task


class GradNorm(QueryBlind):
    """Each training example's squared gradient norm, a baseline.

    ``scores[query, i] = |grad l_i|^2``, the same for every query; no unit. It is `GradDot`'s self-influence, and what
    influence functions' self-influence tends to, times n and the damping, when the damping grows without bound.

    Args:
        model: a trained model in eval mode. Nothing on it is changed.
        task: its training loss.
        parameters: which parameters to track: None for all trainable ones, ``"last_layer"`` for the last linear layer,
            a regular expression, or a function of the name.
        memory: bytes to stay within (an int, or ``"2GB"``); ``"auto"`` is half of what is free.
        batch_size: examples per forward pass; chosen from the memory budget if None. Scores do not depend on it.
        autocast: dtype for `torch.autocast` in the forward pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: one pass over the training data (forward and backward).

    Fails when: the model has memorised its labels (gradients of wrong ones vanish too).

    Source: the squared form of the GraNd score, *Deep Learning on a Data Diet* (arXiv 2107.07075).

    Example:
        >>> import torch, upweight as uw
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> train = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0], [2.0]])
        >>> uw.GradNorm(model, uw.Regression()).fit(train).self_influence().values.tolist()
        [25.0, 4.0]
    """

    _name = "grad-norm"

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
        super().__init__(
            model, task, memory=memory, batch_size=batch_size, autocast=autocast, progress=progress
        )
        self.parameters = parameters
        self._coverage: dict[str, Any] = {}

    def _score(self, examples: Examples, forward: Forward) -> Tensor:
        source = Source(self, self.model, examples, keep=0)  # one pass: nothing is read again
        coverage = source.tracker.coverage
        shares = {"parameters": coverage.parameters, "squared_gradient_norm": coverage.squared_norm}
        self._coverage = {"coverage": shares, "layers": coverage.layers, "batch_size": source.batch_size}
        return source.squared_norms()

    def _facts(self) -> dict[str, Any]:
        return self._coverage
