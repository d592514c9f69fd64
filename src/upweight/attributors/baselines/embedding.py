"""Similarity of what the last layer sees: no gradients, no labels, no curvature."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upweight.attributors.baselines.baseline import Baseline
from upweight.attributors.baselines.forward import Forward
from upweight.attributors.baselines.labels import class_labels
from upweight.attributors.last_layer import last_linear
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients.tap import Tap
from upweight.task import Task
from upweight.task.outputs import OutputTask, split_batch


class EmbeddingSimilarity(Baseline):
    """Cosines of the features that the last linear layer sees, a baseline.

    ``scores[query, i] = <f_q, f_i> / (|f_q| |f_i|)``, between -1 and 1, and 0 where a feature vector is zero; no unit.
    Features at several positions of an example (tokens) are averaged, over the task's mask if it has one.

    Args:
        model: a trained model in eval mode. Nothing on it is changed.
        task: its training loss, in which the last linear layer is found.
        neighbours: how many nearest training examples the self score asks.
        memory: bytes to stay within (an int, or ``"2GB"``); ``"auto"`` is half of what is free.
        batch_size: examples per forward pass; 256 if None. Scores do not depend on it.
        autocast: dtype for `torch.autocast` in the forward pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: one forward pass over the training data, whose features are kept; queries cost a forward pass each. The self
    score compares all pairs of training examples, a block at a time.

    Fails when: features of all examples have a large common part, so that every cosine is near 1.

    Example:
        >>> import torch, upweight as uw
        >>> x, y = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
        >>> method = uw.EmbeddingSimilarity(torch.nn.Linear(2, 2), uw.Classification()).fit((x, y))
        >>> method.attribute((torch.tensor([[4.0, 3.0]]), y[:1])).values
        tensor([[0.8000, 0.6000]])
    """

    _name = "embedding-similarity"
    _weight = ""
    _features = torch.zeros(0)

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        neighbours: int = 10,
        memory: int | str = "auto",
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(
            model, task, memory=memory, batch_size=batch_size, autocast=autocast, progress=progress
        )
        if not (isinstance(neighbours, int) and neighbours >= 1):
            raise UpweightError(f"neighbours={neighbours!r}, expected a whole number from 1 up -> 10")
        self.neighbours = neighbours

    def _learn(self, examples: Examples) -> None:
        self._weight = last_linear(self.model, self.task, examples, self.autocast)[0]
        width = self.model.get_parameter(self._weight).shape[1]
        needed = examples.n * width * torch.finfo(self._forward.dtype).bits // 8
        if needed > self.memory:
            raise UpweightError(
                f"the features of {examples.n} training examples take {needed / 2**30:.2g} GiB, expected at most "
                f"{self.memory / 2**30:.2g} -> raise memory=, or fit on a part of the data"
            )
        self._features = self._collect(examples, self._forward)

    def _compare(self, queries: Examples) -> Tensor:
        return self._collect(queries, self._forward) @ self._features.T

    def _own(self) -> Tensor:
        """Disagreement of the nearest neighbours: the share of them, the example left out, with another label."""
        examples, _ = self._ready()
        labels = class_labels(self.task, examples, self._forward.batch_size, "neighbours agree or disagree")
        if examples.n <= self.neighbours:
            raise UpweightError(
                f"{examples.n} training examples have no {self.neighbours} neighbours each, expected more examples -> "
                "neighbours=1 at least fits two"
            )
        values = []
        block = max(1, int(self.memory / 8 / (8 * examples.n)))
        for start in range(0, examples.n, block):
            cosines = self._features[start : start + block] @ self._features.T
            rows = torch.arange(len(cosines))
            cosines[rows, rows + start] = -torch.inf
            nearest = cosines.topk(self.neighbours, dim=1).indices
            values.append((labels[nearest] != labels[start : start + len(cosines), None]).double().mean(1))
        return torch.cat(values).to(self._forward.dtype)

    def _collect(self, examples: Examples, forward: Forward) -> Tensor:
        """Features [n, d] of length 1, or 0."""
        found = forward.over(examples, self._of_batch, "features").reshape(examples.n, -1)
        return F.normalize(found, dim=1, eps=torch.finfo(found.dtype).tiny)

    def _of_batch(self, model: nn.Module, batch: Any) -> Tensor:
        """What the last linear layer sees of every example, [batch, d]."""
        count = len(split_batch(batch)[2]) if isinstance(self.task, OutputTask) else None
        # A gradient is recorded, though never asked for: only so does the tap see the layer.
        names = {id(model.get_parameter(self._weight)): self._weight}
        with torch.inference_mode(False), torch.enable_grad(), Tap(names) as tap:
            losses = self.task.train_loss(model, batch)
        seen = [use.x for use in tap.uses if use.x is not None]
        count = len(losses) if losses.ndim else count
        if not seen or seen[-1].ndim < 2 or len(seen[-1]) != count:
            shape = tuple(seen[-1].shape) if seen else "none"
            raise UpweightError(
                f"the last linear layer {self._weight} sees an input of shape {shape} for {count} examples, expected "
                "[batch, ..., features] -> use GradDot, which needs no features"
            )
        features = seen[-1].to(torch.promote_types(seen[-1].dtype, torch.float32))
        if features.ndim == 2:
            return features
        positions = features.flatten(1, -2)  # [batch, position, d]
        mask = self.task.mask(batch) if self.task.mask is not None else None
        if mask is None or mask.shape != positions.shape[:2]:
            return positions.mean(1)
        weights = mask.to(positions.dtype)[..., None]
        return (weights * positions).sum(1) / weights.sum(1).clamp_min(1)

    def _facts(self) -> dict[str, Any]:
        return {
            "features_of": self._weight,
            "self_score": f"disagreement of {self.neighbours} nearest neighbours",
        }
