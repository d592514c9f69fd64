"""Ensemble: the mean of a method's scores over checkpoints of one run, or over models of several.

    scores[q, i] = (1/T) sum_t scores_t[q, i] / c_t[q]        c = 1, or the root mean square over i with equal=True

What one trained model says of itself is partly an accident of its seed and of where training stopped; real retraining
has other accidents. The mean over models, and even over checkpoints of a single run, agrees with it better.
TRAK (arXiv 2303.14186) averages over models, SOURCE (arXiv 2405.12186) over segments of a run.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upweight.attributors.by_name import build
from upweight.attributors.checkpoints import Checkpoint, as_checkpoints, load_checkpoint, read_checkpoint
from upweight.errors import UpweightError
from upweight.scores import Scores, SelfInfluence
from upweight.task import Task


class Ensemble:
    """The mean scores of several models of one architecture.

    The unit is that of the method: the mean predicted change over these models. Of checkpoints from early in a run that
    is a change at that time, so take such a mean for its order. With `equal` there is no unit.

    Args:
        model: a model of the architecture, in eval mode. Nothing on it is changed: checkpoints are loaded into copies.
        task: its training loss and what is asked of queries.
        checkpoints: one or more of: a state dict, a file (safetensors, or a torch file, of which only tensors are
            read), a model, or a function without arguments that returns a state dict.
        method: what scores each of them: a name as on the command line (``"ekfac"``, ``"ggn:damping=0.01"``), or a
            function ``(model, task) -> attributor``.
        equal: let all checkpoints count alike for a query, whatever the size of its scores there: each one's are
            divided by their root mean square over the training examples. Better for checkpoints of one run, whose
            gradients differ in size (see docs/methods/ensemble.md); such scores only rank.

    Cost: the method's, for every checkpoint; all of them stay fitted, each with its copy of the model. They share the
    method's memory budget evenly.

    Fails when: the models were trained on different data than is given to `fit`; checkpoints are so early that nothing
    was learned yet.

    Example:
        >>> import torch, upweight as uw
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> weights = [{"weight": torch.tensor([[w]])} for w in (0.0, 0.5)]
        >>> train = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]])
        >>> method = uw.Ensemble(model, uw.Regression(), checkpoints=weights, method="grad-dot")
        >>> method.fit(train).attribute((train[0][:1], train[1][:1])).values.tolist()
        [[0.625, 2.5]]
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        checkpoints: Sequence[Checkpoint],
        method: str | Callable[[nn.Module, Task], Any] = "ekfac",
        equal: bool = False,
    ) -> None:
        if not (isinstance(method, str) or callable(method)):
            raise UpweightError(
                f"method is {type(method).__name__}, expected a name or a function (model, task) -> attributor -> "
                "'ekfac' for example"
            )
        self.model, self.task, self.method, self.equal = model, task, method, equal
        self.checkpoints = as_checkpoints(checkpoints)
        self.members: list[Any] = []
        if isinstance(method, str):
            build(method, model, task)  # an unknown name, or a task it does not go with, is refused at once

    def fit(self, train: Any, *, ids: Sequence[int | str] | None = None) -> Ensemble:
        """Fit the method on every checkpoint.

        Args:
            train: a Dataset, a DataLoader, or ``(inputs, targets)``; the data the models were trained on.
            ids: one id per training example; positions if None.

        Returns:
            Itself.

        Raises:
            UpweightError: a checkpoint is of another architecture or not finite; or what the method refuses.
        """
        self.members = []
        members = [self._member(number) for number in range(len(self.checkpoints))]
        for member in members:  # each keeps what it learned, all at once
            if isinstance(getattr(member, "memory", None), int):
                member.memory = max(1, member.memory // len(members))
        more = {} if ids is None else {"ids": ids}
        self.members = [member.fit(train, **more) for member in members]
        return self

    def attribute(
        self,
        query: Any,
        *,
        per_layer: bool = False,
        out: str | os.PathLike[str] | None = None,
        ids: Sequence[int | str] | None = None,
    ) -> Scores:
        """The mean scores of every training example for every query.

        Args:
            query: queries in the form of the training data.
            per_layer: also keep each layer's part of the scores.
            out: a folder to write finished tiles of the scores to, if the method can; a killed run resumes from it.
            ids: one id per query; positions if None.

        Returns:
            `Scores` [query, train], in the method's unit; without one if they are `equal`.

        Raises:
            UpweightError: not fitted, or what the method refuses.
        """
        self._ready()
        more: dict[str, Any] = {"per_layer": True} if per_layer else {}
        more |= {} if ids is None else {"ids": ids}
        found = []
        for number, member in enumerate(self.members):
            folder = {} if out is None else {"out": Path(out) / f"checkpoint-{number:04d}"}
            found.append(member.attribute(query, **more, **folder))
        sizes = [root_mean_square(s.values) if self.equal else 1.0 for s in found]
        first: Scores = found[0]
        layers = {
            name: mean_of([s.layers[name] / size for s, size in zip(found, sizes, strict=True)])
            for name in first.layers or ()
        }
        values = mean_of([s.values / size for s, size in zip(found, sizes, strict=True)])
        info = self._info([s.info for s in found])
        unit = None if self.equal else first.unit
        return Scores(values, first.query_ids, first.train_ids, unit, info, layers or None)

    def self_influence(self) -> SelfInfluence:
        """The mean self-influence of every training example.

        Raises:
            UpweightError: not fitted, the method has none, or the members are to count alike: then every query has a
                scale of its own, and the self-influences of two examples cannot be compared.
        """
        self._ready()
        if self.equal:
            raise UpweightError(
                "self-influence needs one scale for all examples, but equal=True gives every query its own -> "
                "equal=False"
            )
        found = [member.self_influence() for member in self.members]
        first: SelfInfluence = found[0]
        info = self._info([s.info for s in found])
        return SelfInfluence(mean_of([s.values for s in found]), first.train_ids, first.unit, info)

    def _member(self, number: int) -> Any:
        """The method on a copy of the model that holds a checkpoint."""
        model = copy.deepcopy(self.model)
        load_checkpoint(model, read_checkpoint(self.checkpoints[number], number), number)
        if isinstance(self.method, str):
            return build(self.method, model, self.task)
        return self.method(model, self.task)

    def _ready(self) -> None:
        if not self.members:
            raise UpweightError("not fitted yet -> call fit(train) first")

    def _info(self, infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The last member's evidence, and of each what differs."""
        last = infos[-1]
        differing = [
            {key: value for key, value in info.items() if last.get(key) != value or key == "fingerprints"}
            for info in infos
        ]
        facts = {"ensemble": len(infos), "equal": self.equal, "members": differing}
        return {**last, "method": f"mean of {last['method']}", **facts}


def root_mean_square(values: Tensor) -> Tensor:
    """Root mean square over the training examples, [..., 1]; 1 where all are zero."""
    size = values.square().mean(-1, keepdim=True).sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))


def mean_of(parts: Sequence[Tensor]) -> Tensor:
    """Of tensors of one shape."""
    return torch.stack(list(parts)).mean(0)
