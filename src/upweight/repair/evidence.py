"""What an audit looks at: outputs, embeddings, influence and probabilities, each computed when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from upweight.attributors.base import Attributor
from upweight.attributors.baselines.confident_learning import _check, _out_of_fold
from upweight.attributors.baselines.embedding import EmbeddingSimilarity
from upweight.attributors.baselines.forward import Forward
from upweight.attributors.influence import Influence
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.repair.labels import Labels, read_labels
from upweight.repair.neighbours import Neighbours, nearest, votes
from upweight.repair.posterior import (
    FEWEST,
    Posterior,
    class_posterior,
    residual_posterior,
)
from upweight.task import Task
from upweight.task.outputs import OutputTask

if TYPE_CHECKING:
    from upweight.attributors.baselines.aum import MarginLog
    from upweight.attributors.checkpoints import Checkpoint

OUT_OF_SAMPLE = ("given probabilities", "out-of-fold models", "neighbours' votes")
"""Sources of probabilities that did not see the label they judge."""


@dataclass(frozen=True)
class Options:
    """What the user gave besides model, task and data; see `audit`."""

    influence: Influence | None = None
    probabilities: Tensor | np.ndarray | None = None
    train_fn: Callable[..., nn.Module] | None = None
    folds: int = 3
    checkpoints: Sequence[Checkpoint] | None = None
    learning_rates: Sequence[float] | float | None = None
    log: MarginLog | None = None
    neighbours: int = 20
    seed: int = 0
    batch_size: int | None = None
    memory: int | str = "auto"
    progress: bool = True

    @property
    def shared(self) -> dict[str, Any]:
        """What every attributor takes."""
        return {"memory": self.memory, "batch_size": self.batch_size, "progress": self.progress}


class Evidence:
    """One model on its training data.

    Args:
        model: the trained model.
        task: its task.
        examples: the training data.
        options: see `audit`.
    """

    def __init__(self, model: nn.Module, task: Task, examples: Examples, options: Options) -> None:
        self.model, self.task, self.examples, self.options = model, task, examples, options
        plain = Attributor(
            model, task, None, options.memory, options.batch_size, None, options.progress
        )  # for its options
        self.forward = Forward(plain, model, examples)
        shape = task.output_shape(model, self.forward.move(examples.take([0])))
        self.labels: Labels = read_labels(task, examples, shape[-1] if shape else 1)

    @cached_property
    def influence(self) -> Influence:
        """Influence functions, fitted to the training data."""
        mine = self.options.influence
        if mine is None:
            mine = Influence(self.model, self.task, seed=self.options.seed, **self.options.shared)
        fitted = mine._fitted
        if fitted is None or fitted.examples.fingerprint() != self.examples.fingerprint():
            return mine.fit(self.examples)
        return mine

    @cached_property
    def self_influence(self) -> np.ndarray:
        """[n]."""
        return as_numbers(self.influence.self_influence().values)

    @cached_property
    def outputs(self) -> np.ndarray:
        """The model's outputs, [n, outputs], of a task that looks at outputs."""
        task = self.task
        assert isinstance(task, OutputTask)

        def flat(model: nn.Module, batch: Any) -> Tensor:
            outputs = task.forward(model, batch)[0]
            return outputs.reshape(len(outputs), -1)

        return as_numbers(self.forward.over(self.examples, flat, "outputs")).reshape(self.examples.n, -1)

    @cached_property
    def features(self) -> Tensor:
        """Embeddings [n, d] of length 1: what the last linear layer sees."""
        return EmbeddingSimilarity(self.model, self.task, **self.options.shared).fit(self.examples)._features

    @cached_property
    def neighbours(self) -> Neighbours | None:
        """The nearest other examples; None if there are none."""
        return nearest(self.features, self.options.neighbours)

    @cached_property
    def probabilities(self) -> tuple[np.ndarray, str]:
        """Probabilities of the classes [n, class], and where they come from."""
        options, labels = self.options, self.labels
        if options.probabilities is not None:
            found = np.asarray(torch.as_tensor(options.probabilities).detach().cpu().double())
            if found.ndim == 1 and labels.classes == 2:
                found = np.stack([1 - found, found], 1)
            check_probabilities(found, labels, self.examples)
            return found, OUT_OF_SAMPLE[0]
        if options.train_fn is not None:
            found = _out_of_fold(
                self.examples,
                self.task,
                labels.values,
                options.train_fn,
                options.folds,
                options.seed,
                options.progress,
            )
            return found, OUT_OF_SAMPLE[1]
        try:
            neighbours = self.neighbours
        except UpweightError:  # no linear layer, or no room for its inputs
            neighbours = None
        if neighbours is not None:
            return votes(neighbours, labels.values, labels.classes), OUT_OF_SAMPLE[2]
        logits = self.outputs
        logits = np.concatenate([np.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True), "the model itself, which was trained on these labels"

    @cached_property
    def posterior(self) -> Posterior | None:
        """The chance that each label is wrong; None for a task without labels."""
        if self.labels.kind == "none":
            return None
        if self.labels.kind == "numbers":
            predicted = self.outputs[:, 0]
            found = residual_posterior(self.labels.values - predicted, predicted)
            return _with(found, suggestion="the model itself, which was trained on these labels")
        probabilities, source = self.probabilities
        if self.examples.n < FEWEST:
            nobody = np.zeros(self.examples.n)
            p = probabilities[np.arange(len(nobody)), probabilities.argmax(1)]
            info = {"calibration": f"none: {self.examples.n} examples are fewer than {FEWEST}"}
            return _with(Posterior(nobody, probabilities.argmax(1), p, info), suggestion=source)
        return _with(class_posterior(probabilities, self.labels.values), suggestion=source)


def check_probabilities(found: np.ndarray, labels: Labels, examples: Examples) -> None:
    """Raise unless they are probabilities of every class for every example."""
    if found.ndim != 2 or found.shape != (examples.n, labels.classes):
        raise UpweightError(
            f"probabilities have shape {found.shape}, expected ({examples.n}, {labels.classes}) -> one row an example, "
            "one column a class"
        )
    # The check of confident learning also wants an example of every class, which a vote does not need.
    _check(found, np.append(labels.values, np.arange(labels.classes)), examples)


def as_numbers(values: Tensor) -> np.ndarray:
    """As float64 on the CPU."""
    return values.detach().double().cpu().numpy()


def _with(posterior: Posterior, **facts: str) -> Posterior:
    return Posterior(posterior.wrong, posterior.suggested, posterior.probability, {**posterior.info, **facts})
