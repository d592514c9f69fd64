"""What an audit looks at: outputs, embeddings, influence and probabilities, each computed when first asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from upweight._random import preserved, reseed
from upweight.attributors.base import Attributor
from upweight.attributors.baselines.confident_learning import _check, _predict
from upweight.attributors.baselines.embedding import EmbeddingSimilarity
from upweight.attributors.baselines.forward import Forward
from upweight.attributors.influence import Influence
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.repair.class_posterior import Reference, class_posterior
from upweight.repair.labels import Labels, read_labels
from upweight.repair.neighbours import Neighbours, nearest, votes
from upweight.repair.posterior import Posterior, residual_posterior
from upweight.repair.thresholds import FEWEST
from upweight.task import Task
from upweight.task.outputs import OutputTask

if TYPE_CHECKING:
    from upweight.attributors.baselines.aum import MarginLog
    from upweight.attributors.checkpoints import Checkpoint

OUT_OF_SAMPLE = ("given probabilities", "out-of-fold models", "neighbours' votes")
"""Sources of probabilities that did not see the label they judge."""


class UnavailableError(UpweightError):
    """The model or the data have no such evidence: kinds of issue that need it are left out, if not asked for."""


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
    neighbours: int | None = None
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
        validation: examples whose labels are trusted.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        examples: Examples,
        options: Options,
        validation: Examples | None = None,
    ) -> None:
        self.model, self.task, self.examples, self.options = model, task, examples, options
        self.validation = validation
        # Only to hand on the options.
        plain = Attributor(model, task, None, options.memory, options.batch_size, None, options.progress)
        self.forward = Forward(plain, model, examples)
        shape = task.output_shape(model, self.forward.move(examples.take([0])))
        outputs = shape[-1] if shape else 1
        self.labels: Labels = read_labels(task, examples, outputs)
        # Examples that the model or the task refuse are refused here, before anything is left out for want of them.
        self.losses = as_numbers(self.forward.over(examples, task.train_loss, "loss"))
        self.trusted = None
        if validation is not None:
            self.forward.check(validation)
            self.trusted = read_labels(task, validation, outputs)

    @cached_property
    def influence(self) -> Influence:
        """Influence functions, fitted to the training data."""
        mine = self.options.influence
        if mine is None:
            mine = Influence(self.model, self.task, seed=self.options.seed, **self.options.shared)
        fitted = mine._fitted
        if fitted is None or fitted.fingerprints["train"] != self.examples.fingerprint():
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
    def _embedding(self) -> EmbeddingSimilarity:
        try:
            return EmbeddingSimilarity(self.model, self.task, **self.options.shared).fit(self.examples)
        except UpweightError as error:  # no linear layer, or no room for what it sees
            raise UnavailableError(f"no embeddings: {error}") from error

    @property
    def features(self) -> Tensor:
        """Embeddings [n, d] of length 1: what the last linear layer sees."""
        return self._embedding._features

    @cached_property
    def neighbours(self) -> Neighbours | None:
        """The nearest other examples; None if there are none."""
        return nearest(self.features, self.asked)

    @property
    def asked(self) -> int:
        """How many neighbours: as many as were wished, or half the square root of n, between 10 and 50."""
        if self.options.neighbours is not None:
            return self.options.neighbours
        return min(50, max(10, math.isqrt(self.examples.n) // 2))

    @property
    def has_neighbours(self) -> bool:
        """Whether there are embeddings, and others to be near to."""
        try:
            return self.neighbours is not None
        except UnavailableError:
            return False

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
            return self._out_of_fold[0], OUT_OF_SAMPLE[1]
        if self.votes is not None:
            return self.votes, OUT_OF_SAMPLE[2]
        logits = self.outputs
        logits = np.concatenate([np.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True), "the model itself, which was trained on these labels"

    @cached_property
    def votes(self) -> np.ndarray | None:
        """The neighbours' votes, [n, class]; None where there are no neighbours."""
        if not self.has_neighbours:
            return None
        assert self.neighbours is not None
        return votes(self.neighbours, self.labels.values, self.labels.classes)

    @cached_property
    def reference(self) -> Reference | None:
        """Probabilities of the validation examples from the same source, and their labels; None if not to be had."""
        if self.validation is None or self.trusted is None or self.trusted.kind != "classes":
            return None
        source = self.probabilities[1]
        if source == OUT_OF_SAMPLE[1]:
            parts = self._out_of_fold[1]
            return np.concatenate(parts), np.tile(self.trusted.values, len(parts))
        if source != OUT_OF_SAMPLE[2]:
            return None
        method = self._embedding
        theirs = nearest(self.features, self.asked, method._collect(self.validation, method._forward))
        assert theirs is not None
        return votes(theirs, self.labels.values, self.labels.classes), self.trusted.values

    @cached_property
    def _out_of_fold(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Probabilities [n, class], each by a model that did not see the example, and each model's for validation."""
        options, examples = self.options, self.examples
        assert options.train_fn is not None
        found = np.zeros((examples.n, self.labels.classes))
        held_out: list[np.ndarray] = []
        for learned, rest in folds(self.labels.values, options.folds, options.seed):
            with preserved():
                reseed(options.seed)
                model = options.train_fn(learned, options.seed)
            if not isinstance(model, nn.Module):
                raise UpweightError(
                    f"train_fn returned {type(model).__name__}, expected a model -> return it"
                )
            model = model.eval()
            found[rest] = _predict(model, self.task, examples.take(rest.tolist()), options.progress)
            if self.validation is not None:
                held_out.append(_predict(model, self.task, self.validation, options.progress))
        return found, held_out

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
        return _with(class_posterior(probabilities, self.labels.values, self.reference), suggestion=source)


def folds(given: np.ndarray, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(positions to learn from, positions to judge), with every class in every part.

    Raises:
        UpweightError: the rarest class has fewer examples than there are to be folds.
    """
    from sklearn.model_selection import StratifiedKFold

    rarest = int(np.bincount(given)[np.unique(given)].min())
    if not (isinstance(count, int) and 2 <= count <= rarest):
        raise UpweightError(
            f"folds={count}, expected 2 to {rarest}, the size of the rarest class, so that every fold learns every "
            "class -> fewer folds, or drop the class"
        )
    yield from StratifiedKFold(count, shuffle=True, random_state=seed).split(np.zeros(len(given)), given)


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
