"""What removing, changing or reweighting training examples does, as methods of `Influence`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from upweight._autocast import without_autocast
from upweight.attributors import effects
from upweight.attributors.group import GroupEffect

if TYPE_CHECKING:
    from upweight.attributors.influence import Influence


class TrainingSetChanges:
    """Predicted effects of changes of the training set."""

    @without_autocast()
    def removal(self, ids: Any, query: Any, *, convention: str = "sum") -> GroupEffect:
        """The predicted effect of removing these training examples together, on every query's measurement.

        First order (the sum of their scores), rescaled (RIF, the sum of what each does alone) and Newton (with the
        curvature without the whole group) side by side, each with the measurement's own second-order bend.

        Args:
            ids: of the training examples to remove.
            query: queries in the form of the training data, or a `Functional` (or a list of them).
            convention: ``"sum"``: the objective without them still divides by n, so that the regulariser keeps its
                weight against each example's loss times n; ``"mean"``: it divides by the number that is left, as
                ordinary retraining with weight decay does. Only with an `l2` are they different.

        Returns:
            `GroupEffect`, [query] each.

        Raises:
            UpweightError: not fitted, unknown ids, a curvature that only ranks, or one that is singular without them.

        Example:
            >>> import torch, upweight as uw
            >>> _ = torch.manual_seed(0)
            >>> x = torch.randn(30, 2, dtype=torch.float64)
            >>> y = x @ torch.ones(2, 1, dtype=torch.float64) + torch.randn(30, 1)
            >>> model = torch.nn.Linear(2, 1, bias=False).double()
            >>> _ = model.weight.data.copy_(torch.linalg.lstsq(x, y).solution.T)
            >>> method = uw.Influence(model, uw.Regression(), curvature="ggn", damping=0.0).fit((x, y))
            >>> predicted = method.removal([3, 5, 7], (x[:1], y[:1])).effect("newton")
            >>> keep = [i for i in range(30) if i not in (3, 5, 7)]
            >>> other = torch.linalg.lstsq(x[keep], y[keep]).solution
            >>> real = ((x[:1] @ other - y[:1]) ** 2 - (model(x[:1]) - y[:1]) ** 2) / 2
            >>> bool((predicted - real).abs() < 1e-12)
            True
        """
        return effects.removal(_influence(self), ids, query, convention)

    @without_autocast()
    def change(self, ids: Any, to: Any, query: Any) -> GroupEffect:
        """The predicted effect of replacing training examples: relabelled, or with other inputs.

        Args:
            ids: of the training examples to replace.
            to: what takes their place, in the ids' order and the training data's form.
            query: queries in the form of the training data, or a `Functional` (or a list of them).

        Returns:
            `GroupEffect`, [query] each.

        Raises:
            UpweightError: not fitted, unknown ids, another number of replacements, or a curvature that only ranks.
        """
        return effects.change(_influence(self), ids, to, query)

    @without_autocast()
    def reweight(self, weights: Any, query: Any, *, convention: str = "sum") -> GroupEffect:
        """The predicted effect of giving training examples other weights than 1: 0 removes one, 2 counts it twice.

        Args:
            weights: one a training example, or {id: weight} for those that change.
            query: queries in the form of the training data, or a `Functional` (or a list of them).
            convention: whether the objective divides by n (``"sum"``) or by the sum of the weights (``"mean"``).

        Returns:
            `GroupEffect`, [query] each.

        Raises:
            UpweightError: not fitted, unknown ids, a negative weight, or a curvature that only ranks.
        """
        return effects.reweight(_influence(self), weights, query, convention)


def _influence(method: TrainingSetChanges) -> Influence:
    return cast("Influence", method)
