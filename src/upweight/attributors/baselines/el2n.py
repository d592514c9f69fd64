"""EL2N: how far predictions are from the labels early in training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upweight.attributors.baselines.trajectory import Trajectory
from upweight.attributors.checkpoints import Checkpoint
from upweight.task import Task


class EL2N(Trajectory):
    """Each training example's error norm, averaged over early checkpoints or models, a baseline.

    ``scores[query, i] = mean_t |softmax(z_t(x_i)) - onehot(y_i)|_2``, the same for every query; between 0 and sqrt(2),
    no unit. For `BinaryClassification` the softmax is that of the two classes.

    Args:
        model: the trained model, in eval mode, whose architecture the checkpoints share. Nothing on it is changed.
        task: `Classification` or `BinaryClassification`.
        checkpoints: the early models (after a few epochs of one run or, better, of several runs with other seeds):
            state dicts, files, models, or functions without arguments that return a state dict.
        memory: unused; accepted so that all attributors can be made alike.
        batch_size: examples per forward pass; 256 if None. Scores do not depend on it.
        autocast: dtype for `torch.autocast` in the forward pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: one forward pass over the training data for each checkpoint; one copy of the model.

    Fails when: the checkpoints are late ones, which have memorised the labels; or there is one alone, whose chance
    shows.

    Source: *Deep Learning on a Data Diet: Finding Important Examples Early in Training* (arXiv 2107.07075).

    Example:
        >>> import torch, upweight as uw
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> early = [{"weight": torch.zeros(2, 1)}, {"weight": torch.tensor([[0.0], [100.0]])}]
        >>> method = uw.EL2N(model, uw.Classification(), checkpoints=early)
        >>> method.fit((torch.ones(2, 1), torch.tensor([0, 1]))).self_influence().values
        tensor([1.0607, 0.3536])
    """

    _name = "el2n"
    _needs = "the predicted probabilities with the label"

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        checkpoints: Sequence[Checkpoint],
        memory: int | str = "auto",
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(model, task, checkpoints, memory, batch_size, autocast, progress)

    @staticmethod
    def _of_outputs(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.ndim == 1:  # (1 - p, p) against (1 - y, y): both entries are off by |p - y|
            return math.sqrt(2) * (outputs.sigmoid() - targets).abs()
        return (outputs.softmax(1) - F.one_hot(targets, outputs.shape[1])).norm(dim=1)
