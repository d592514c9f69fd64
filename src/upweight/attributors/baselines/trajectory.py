"""Scores averaged over checkpoints of a training run, or over the early models of several runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upweight.attributors.baselines.blind import QueryBlind
from upweight.attributors.baselines.forward import Forward, classifier
from upweight.attributors.checkpoints import Checkpoint, as_checkpoints, load_checkpoint, read_checkpoint
from upweight.data import Examples
from upweight.fingerprint import model_fingerprint
from upweight.task import Task


class Trajectory(QueryBlind):
    """The mean over checkpoints of a function of outputs and labels; a subclass says which in `_of_outputs`."""

    _needs = ""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        checkpoints: Sequence[Checkpoint] | None,
        memory: int | str,
        batch_size: int | None,
        autocast: torch.dtype | None,
        progress: bool,
    ) -> None:
        super().__init__(
            model, task, memory=memory, batch_size=batch_size, autocast=autocast, progress=progress
        )
        self._task = classifier(task, type(self).__name__, self._needs)
        self.checkpoints = as_checkpoints(checkpoints) if checkpoints is not None else []
        self._marks: list[str] = []

    @staticmethod
    def _of_outputs(outputs: Tensor, targets: Tensor) -> Tensor:
        """One number an example, [batch], of logits [batch, class] or [batch]."""
        raise NotImplementedError

    def _score(self, examples: Examples, forward: Forward) -> Tensor:
        def score(model: nn.Module, batch: Any) -> Tensor:
            return self._of_outputs(*self._task.forward(model, batch))

        work, total = copy.deepcopy(self.model), torch.zeros(examples.n, dtype=torch.float64)
        self._marks = []
        for number, checkpoint in enumerate(self.checkpoints):
            load_checkpoint(work, read_checkpoint(checkpoint, number), number)
            self._marks.append(model_fingerprint(work))
            what = f"{self._name}, checkpoint {number + 1} of {len(self.checkpoints)}"
            total += Forward(self, work, examples).over(examples, score, what)
        return (total / len(self.checkpoints)).to(forward.dtype)

    def _facts(self) -> dict[str, Any]:
        return {"checkpoints": list(self._marks)}
