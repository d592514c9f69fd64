"""Representer points: the true-class logit as a sum over the training examples.

    alpha_i = -(1 / (l2 n)) dl_i/dz_i     W = sum_i alpha_i f_i^T     scores[q, i] = alpha_i[y_q] <f_i, f_q>

with f the features that the last layer sees, a constant 1 included where it has a bias, and W its weights, a minimum of
``(1/n) sum_i l_i + (l2/2) |W|^2``. Positive: a *proponent*; it raises the logit of the query's true class. The scores
of a query add up to that logit; they are shares of it, and no removal effects, so the unit is None. "Representer Point
Selection for Explaining Deep Neural Networks" (arXiv 1811.09720).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upweight._autocast import without_autocast
from upweight.attributors.base import Attributor, explained_by_form
from upweight.attributors.evidence import shared_info
from upweight.attributors.last_layer import last_linear
from upweight.attributors.stationary import minimise, objective_gradient
from upweight.budget import batch_size_for
from upweight.data import Examples, signature
from upweight.errors import UpweightError
from upweight.gradients import Factored, Tracker
from upweight.progress import progress_bar
from upweight.scores import Scores, SelfInfluence
from upweight.task import BinaryClassification, Classification, OutputTask, Task, split_batch

MOST_LOST = 1e-3
"""Largest difference between the model's outputs and its last layer's, relative to the largest output."""


@dataclass(frozen=True)
class _Fit:
    """What `fit` learned: W [C, d], training features F [n, d], alpha [n, C] and labels [n], all float64."""

    weight: Tensor
    features: Tensor
    alpha: Tensor
    targets: Tensor
    batch_size: int
    signature: list[str]
    notes: dict[str, Any]


class Representer(Attributor):
    """L2 representer points of the last layer.

    ``scores[query, train] = alpha_i[y_q] <f_i, f_q>``, positive for proponents; no unit. Scores are about the logit of
    the query's true class (signed by the class for `BinaryClassification`), whatever measurement the task names, and
    add up to it over the training examples.

    Args:
        model: a trained classifier in eval mode whose outputs are those of a linear layer. Nothing on it is changed:
            the last layer is refitted beside it.
        task: `Classification` or `BinaryClassification`.
        l2: the penalty of ``(1/n) sum_i l_i + (l2/2) |W|^2``, over the bias too.
        refit: fit the last layer to the minimum of that objective, in float64 and starting from the model's own. With
            False the model's own weights must be there already.
        layer: the last linear layer's name; found by watching the model if None.
        tolerance: largest distance from the minimum, as the relative size ``|gradient| / (l2 |W|)``, which is also the
            relative error of ``W = sum_i alpha_i f_i^T``.
        max_iter: Newton steps of the refit.
        memory: bytes to stay within (an int, or ``"2GB"``); ``"auto"`` is half of what is free.
        batch_size: examples per forward pass; chosen from the memory budget if None. Scores do not depend on it.
        autocast: dtype for `torch.autocast` in the forward pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: the fit takes one forward pass over the training data, keeps its features (n numbers a feature) and refits a
    convex problem on them; queries cost a forward pass each.

    Fails when: the last layer is not at its minimum (refit it), or the refitted layer decides unlike the model's own;
    ``info["refit"]["same_decisions"]`` is the share of training examples on which the two agree.

    Example:
        >>> import torch, upweight as uw
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(20, 3)
        >>> y = (x[:, 0] > 0).long()
        >>> method = uw.Representer(torch.nn.Linear(3, 2), uw.Classification(), l2=0.1).fit((x, y))
        >>> scores = method.attribute((x[:2], y[:2]))
        >>> logits = method.logits((x[:2], y[:2])).gather(1, y[:2, None])[:, 0]
        >>> torch.allclose(scores.values.sum(1), logits), scores.unit
        (True, None)
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        l2: float = 1e-2,
        refit: bool = True,
        layer: str | None = None,
        tolerance: float = 1e-6,
        max_iter: int = 100,
        memory: int | str = "auto",
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(model, task, None, memory, batch_size, autocast, progress)
        if not isinstance(task, (Classification, BinaryClassification)):
            raise UpweightError(
                f"task is {type(task).__name__}, expected Classification or BinaryClassification: representer points "
                "explain a class's logit -> use GradDot or Influence for other tasks"
            )
        if not (isinstance(l2, (int, float)) and math.isfinite(l2) and l2 > 0):
            raise UpweightError(
                f"l2={l2!r}, expected a finite number > 0: without it alpha is infinite -> 1e-2"
            )
        if not tolerance > 0:
            raise UpweightError(f"tolerance={tolerance}, expected > 0 -> 1e-6 is the default")
        if max_iter < 1:
            raise UpweightError(f"max_iter={max_iter}, expected at least 1 -> 100 is the default")
        self._task: OutputTask = task
        self.l2, self.refit, self.layer = float(l2), refit, layer
        self.tolerance, self.max_iter = tolerance, max_iter
        self._fit: _Fit | None = None
        self._tracker: Tracker | None = None

    @without_autocast()
    def fit(self, train: Any, *, ids: Sequence[int | str] | None = None) -> Representer:
        """Collect the features of the training data, and refit the last layer on them.

        Args:
            train: a Dataset, a DataLoader, or ``(inputs, targets)``; the data the model was trained on.
            ids: one id per training example; positions if None.

        Returns:
            Itself.

        Raises:
            UpweightError: the last layer is not (and with ``refit=True`` does not get) stationary, the model's outputs
                are not a linear layer's, the features do not fit the memory; or what is wrong with the model, the task
                or the data, in one line.
        """
        started = time.perf_counter()
        examples = Examples(train, ids)
        names = self._layer_names(examples)
        if frozen := [name for name in names if not self.model.get_parameter(name).requires_grad]:
            raise UpweightError(
                f"the last layer's {', '.join(frozen)} is frozen, expected trainable -> requires_grad_(True)"
            )
        self._tracker = tracker = Tracker(
            self.model, self.task, examples, lambda name: name in names, self.autocast
        )
        rows = len(tracker.parameters[names[0]])
        probe = tracker.train(examples.take([0]), examples.ids[:1])
        chosen = batch_size_for(float(max(1, probe.nbytes)), examples.n, self.memory)
        size = examples.preferred_batch_size or self.batch_size or chosen
        own = torch.cat([tracker.parameters[name].detach().double().reshape(rows, -1) for name in names], 1)
        self._check_memory(examples.n, own)
        form = signature(examples.take([0]))
        features, targets = self._collect(examples, size, form, own, "features")
        weight, notes = self._stationary(features, targets, own)
        alpha = -self._output_gradients(features, targets, weight) / (self.l2 * examples.n)
        notes["fit_seconds"] = round(time.perf_counter() - started, 3)
        self._fit = _Fit(weight, features, alpha, targets, size, form, notes)
        self._remember(examples)
        return self

    @without_autocast()
    def attribute(self, query: Any, *, ids: Sequence[int | str] | None = None) -> Scores:
        """Score every training example for every query.

        Args:
            query: queries in the form of the training data.
            ids: one id per query; positions if None.

        Returns:
            `Scores` [query, train], without a unit; a query's row adds up to its true class's refitted logit.

        Raises:
            UpweightError: not fitted, or the queries do not fit the model.
        """
        (examples, _), fit = self._ready(), self._fit
        assert fit is not None
        started = time.perf_counter()
        queries = Examples(query, ids)
        features, targets = self._collect(queries, fit.batch_size, fit.signature, None, "scores")
        # alpha_i[y_q] as [query, train]
        pull = (
            fit.alpha[:, targets.long()].T
            if self._classes > 1
            else torch.outer(_signs(targets), fit.alpha[:, 0])
        )
        values = pull * (features @ fit.features.T)
        info = self._info() | {
            "queries": queries.fingerprint(),
            "attribute_seconds": round(time.perf_counter() - started, 3),
        }
        return Scores(self._rounded(values), queries.ids, examples.ids, None, info)

    @without_autocast()
    def self_influence(self) -> SelfInfluence:
        """``alpha_i[y_i] |f_i|^2``: what an example adds to its own logit; large for mislabeled ones."""
        (examples, _), fit = self._ready(), self._fit
        assert fit is not None
        own = (
            fit.alpha.gather(1, fit.targets.long()[:, None])[:, 0]
            if self._classes > 1
            else _signs(fit.targets) * fit.alpha[:, 0]
        )
        values = own * fit.features.square().sum(1)
        return SelfInfluence(self._rounded(values), examples.ids, None, self._info())

    @without_autocast()
    def logits(self, query: Any) -> Tensor:
        """Outputs [query, class] of the model with its refitted last layer, of which scores are the shares."""
        self._ready()
        fit = self._fit
        assert fit is not None
        features, _ = self._collect(Examples(query), fit.batch_size, fit.signature, None, "logits")
        return self._rounded(features @ fit.weight.T)

    @property
    def _classes(self) -> int:
        assert self._fit is not None
        return len(self._fit.weight)

    def _rounded(self, values: Tensor) -> Tensor:
        assert self._tracker is not None
        return values.to("cpu", self._tracker.dtype)

    def _layer_names(self, examples: Examples) -> tuple[str, ...]:
        """The last layer's weight, and its bias if it has one."""
        if self.layer is None:
            return last_linear(self.model, self.task, examples, self.autocast)
        found = dict(self.model.named_modules()).get(self.layer)
        if not isinstance(found, nn.Linear):
            linear = [name for name, m in self.model.named_modules() if isinstance(m, nn.Linear)]
            raise UpweightError(
                f"layer={self.layer!r} is no linear layer of the model, whose last ones are {linear[-3:]} -> name one "
                "of them, or leave it None"
            )
        prefix = f"{self.layer}." if self.layer else ""
        return (f"{prefix}weight",) if found.bias is None else (f"{prefix}weight", f"{prefix}bias")

    def _check_memory(self, n: int, own: Tensor) -> None:
        needed = 8 * n * own.shape[1]
        if needed > self.memory:
            raise UpweightError(
                f"the features of {n} training examples take {needed / 2**30:.2g} GiB, expected at most "
                f"{self.memory / 2**30:.2g} -> raise memory=, or fit on a part of the data"
            )

    def _collect(
        self, examples: Examples, size: int, form: list[str], own: Tensor | None, what: str
    ) -> tuple[Tensor, Tensor]:
        """Features [n, d] and targets [n], float64; given the layer's own weights, its outputs must be the model's."""
        tracker = self._tracker
        assert tracker is not None
        features, targets = [], []
        with progress_bar(what, examples.n, self.progress) as advance:
            for rows in examples.batches(size):
                ids = examples.ids[rows.start : rows.stop]
                gradients = explained_by_form(
                    rows.batch, form, lambda b=rows.batch, i=ids: tracker.train(b, i)
                )
                features.append(_features(gradients[next(iter(gradients))]))
                targets.append(split_batch(rows.batch)[2].reshape(-1).to(tracker.device, torch.float64))
                if own is not None and rows.start == 0:
                    self._check_outputs(rows.batch, features[0] @ own.T)
                advance(len(rows))
        return torch.cat(features), torch.cat(targets)

    def _check_outputs(self, batch: Any, ours: Tensor) -> None:
        tracker = self._tracker
        assert tracker is not None
        with torch.no_grad():
            outputs = self._task.forward(self.model, tracker.move(batch))[0].double().reshape(len(ours), -1)
        same = outputs.shape == ours.shape
        difference = (
            float((outputs - ours).abs().max()) / max(float(outputs.abs().max()), 1e-30) if same else 1.0
        )
        if difference > (MOST_LOST if self.autocast is None else 3e-2):
            raise UpweightError(
                f"the model's outputs differ from its last linear layer's (relative difference {difference:.1e}): "
                "something comes after it, so a logit is no sum over the training examples -> use GradDot or Influence"
            )

    def _stationary(self, features: Tensor, targets: Tensor, own: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The last layer's weights at the minimum, and evidence of it; raise if they are not there."""

        def losses(weight: Tensor) -> Tensor:
            return self._task.loss(*self._outputs(features @ weight.T, targets))

        if self.refit:
            weight, steps = minimise(losses, self.l2, own, self.tolerance / 10, self.max_iter)
        else:
            weight, steps = own, 0
        gradient = objective_gradient(losses, self.l2, weight)
        distance = float(gradient.norm()) / (self.l2 * float(weight.norm()) or 1.0)
        if not distance <= self.tolerance:
            way_out = (
                "raise max_iter, l2 or the tolerance"
                if self.refit
                else "let it be refitted (refit=True), or give the l2 it was trained with"
            )
            raise UpweightError(
                f"the last layer is not at the minimum of its objective with l2={self.l2:g} after {steps} steps: "
                f"relative gradient {distance:.1e}, expected at most {self.tolerance:g} -> {way_out}"
            )
        same = _decisions(features @ weight.T) == _decisions(features @ own.T)
        evidence = {
            "refitted": self.refit,
            "steps": steps,
            "gradient_norm": float(gradient.norm()),
            "relative_gradient": distance,
            "same_decisions": float(same.double().mean()),
        }
        return weight, {"refit": evidence}

    def _output_gradients(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """``dl_i/dz_i`` [n, C]."""
        with torch.inference_mode(False), torch.enable_grad():
            outputs = (features @ weight.T).detach().clone().requires_grad_(True)
            loss = self._task.loss(*self._outputs(outputs, targets)).sum()
            return torch.autograd.grad(loss, outputs)[0]

    def _outputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        binary = isinstance(self._task, BinaryClassification)
        return self._task.check_outputs(outputs, targets if binary else targets.long())

    def _info(self) -> dict[str, Any]:
        (examples, fingerprints), fit, tracker = self._ready(), self._fit, self._tracker
        assert fit is not None and tracker is not None
        shared = shared_info(
            "representer", self, tracker.coverage, fingerprints, examples.n, fit.batch_size, tracker.dtype
        )
        # The logit of the true class, whatever the task measures: higher is better.
        return shared | {"higher_is_better": True, "measurement": "logit", "l2": self.l2, **fit.notes}


def _features(block: object) -> Tensor:
    """What the last layer sees of every example, [batch, d], float64."""
    if not isinstance(block, Factored) or block.positions != 1 or block.groups != 1:
        raise UpweightError(
            "the last linear layer is used at several positions of an example or in another way than x @ W.T, expected "
            "one feature vector an example -> use GradDot or Influence"
        )
    return block.right()[0, :, 0].double()


def _signs(targets: Tensor) -> Tensor:
    """+1 for class 1, -1 for class 0."""
    return 2 * targets - 1


def _decisions(outputs: Tensor) -> Tensor:
    return outputs.argmax(1) if outputs.shape[1] > 1 else outputs[:, 0] > 0
