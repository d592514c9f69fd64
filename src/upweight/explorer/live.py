"""Scores for a query that no file has: a method fitted once, with its training gradients kept in the run's store."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upweight.attributors.by_name import build
from upweight.attributors.influence import Influence
from upweight.errors import UpweightError
from upweight.experiment import Experiment
from upweight.scores import Scores
from upweight.task.kinds import BinaryClassification, Classification, Regression

KEPT = 32
"""Answers kept in memory."""


class Live:
    """A method that answers new queries, and the model's predictions.

    The first question fits it, which takes a pass over the training data unless the store has one from before; every
    question after that takes seconds or less. One thread computes at a time, whoever asks: gradients are captured by
    hooks on the one model.

    Args:
        experiment: Its model, task and training data.
        folder: Where training gradients are kept; influence functions only.
        method: As `upweight.attributors.by_name.build` takes it.
        say: Told what takes long.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        method: str,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.experiment, self.folder, self.name, self.say = experiment, folder, method, say
        self._method = build(method, experiment.model, experiment.task, experiment.methods, experiment.l2)
        self._fitted = False
        self._lock = threading.RLock()
        self._answers: OrderedDict[tuple[str, bool], Scores] = OrderedDict()

    @property
    def by_layer(self) -> bool:
        """Whether it can tell the layers apart."""
        return isinstance(self._method, Influence)

    def scores(self, key: str, query: Any, per_layer: bool = False) -> Scores:
        """Scores of one query.

        Args:
            key: A name for the query; a repeated question is answered from memory.
            query: One query in the form of the data, with a batch axis of length 1.
            per_layer: Keep each layer's part.

        Raises:
            UpweightError: The method refuses the experiment or the query.
        """
        with self._lock:
            if (found := self._answers.get((key, per_layer))) is not None:
                self._answers.move_to_end((key, per_layer))
                return found
            self._fit()
            options = {"per_layer": True} if per_layer else {}
            scores = self._method.attribute(query, **options)
            self._answers[(key, per_layer)] = scores
            if len(self._answers) > KEPT:
                self._answers.popitem(last=False)
            return scores

    def _fit(self) -> None:
        if self._fitted:
            return
        self.say(f"fit {self.name} (once; its training gradients are kept in {self.folder})")
        if isinstance(self._method, Influence):
            self._method.fit(self.experiment.train, cache=self.folder)
        else:
            self._method.fit(self.experiment.train)
        self._fitted = True

    @torch.no_grad()
    def predict(self, query: Any) -> tuple[float, float | None] | None:
        """What the model says of one query: the class and its probability, the value and None, or None if unknown.

        Args:
            query: With a batch axis of length 1.
        """
        task = self.experiment.task
        if not isinstance(task, (Classification, BinaryClassification, Regression)):
            return None
        with self._lock:
            outputs, _ = task.forward(self.experiment.model, query)
        if isinstance(task, Classification):
            return _likeliest(outputs[0].float().softmax(-1))
        if isinstance(task, BinaryClassification):
            one = outputs[0].float().sigmoid()
            return _likeliest(torch.stack([1 - one, one]))
        return (float(outputs[0].reshape(-1)[0]), None) if outputs[0].numel() == 1 else None


def _likeliest(probabilities: Tensor) -> tuple[float, float]:
    if probabilities.ndim != 1 or not bool(probabilities.isfinite().all()):
        raise UpweightError(
            f"the model's probabilities are {probabilities.flatten()[:3].tolist()}, expected finite ones, one a class "
            "-> look for overflow in its outputs"
        )
    best = int(probabilities.argmax())
    return best, float(probabilities[best])
