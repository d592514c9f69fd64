"""The training loss as a score: what a method must beat to be worth its gradients."""

from __future__ import annotations

from torch import Tensor

from upweight.attributors.baselines.blind import QueryBlind
from upweight.attributors.baselines.forward import Forward
from upweight.data import Examples


class Loss(QueryBlind):
    """Each training example's own loss, a baseline.

    ``scores[query, i] = l_i``, the same for every query; no unit. As a self score it is the strongest simple detector
    of mislabeled examples while the model has not memorised them.

    Args:
        model: a trained model in eval mode. Nothing on it is changed.
        task: its training loss.
        memory: unused; accepted so that all attributors can be made alike.
        batch_size: examples per forward pass; 256 if None. Scores do not depend on it.
        autocast: dtype for `torch.autocast` in the forward pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: one forward pass over the training data.

    Fails when: the model has memorised its labels (the losses of wrong ones vanish too), or has learned nothing.

    Example:
        >>> import torch, upweight as uw
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> train = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [0.0]])
        >>> method = uw.Loss(model, uw.Regression()).fit(train)
        >>> method.self_influence().values.tolist(), method.self_influence().top_k(1).ids
        ([0.5, 2.0, 0.0], [1])
    """

    _name = "loss"

    def _score(self, examples: Examples, forward: Forward) -> Tensor:
        return forward.over(examples, self.task.train_loss, "loss")
