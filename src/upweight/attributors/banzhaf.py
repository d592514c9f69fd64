"""Banzhaf influence: what an example does, averaged over models that were trained on random subsets of the data.

    scores[q, i] = (1/T) sum_t Delta_t[q, i] / c_t[q]        c = 1, or the root mean square over i with equal=True
    Delta_t[q, i]: how much worse the query gets without example i than with it, for the model of subset t

Influence functions ask what happens to one model when an example is missing from *all* of the data. What a linear
datamodel is fitted to, and the LDS asks, is what happens when an example is missing from random *halves* of it: the
data Banzhaf value (arXiv 2205.15466, eq. 4), which takes thousands of retrained models to estimate by sampling. Here a
model trained on each of a few subsets tells the effect of every example at once: of those it was trained on if they
were removed, of the others if they were added (see `upweight.attributors.output_space`).
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upweight._autocast import without_autocast
from upweight._ids import positions_of
from upweight.attributors.base import Attributor
from upweight.attributors.checkpoints import Checkpoint, as_checkpoints, load_checkpoint, read_checkpoint
from upweight.attributors.ensemble import mean_of, root_mean_square
from upweight.attributors.evidence import shared_info
from upweight.attributors.output_space import OutputSpace
from upweight.budget import KEEP_SHARE
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.fingerprint import model_fingerprint
from upweight.gradients.select import ParameterFilter
from upweight.progress import progress_bar
from upweight.scores import Scores, SelfInfluence
from upweight.task import OutputTask, Task


class BanzhafInfluence(Attributor):
    """The effect of every example, averaged over models trained on random subsets: data Banzhaf values by influence.

    The unit is that of the measurement: how much worse a query is predicted to get when the example is removed from a
    subset, or not added to it. The objective keeps dividing by the subset's size m, so that the regulariser keeps its
    weight against each example's loss. With `equal` there is no unit, the scores only rank.

    Args:
        model: a model of the architecture, in eval mode. Nothing on it is changed: checkpoints are loaded into copies.
        task: `Classification`, `BinaryClassification`, `Regression`, or another `OutputTask`.
        checkpoints: the models, each trained on its subset to the end: state dicts, files, models, or functions
            without arguments that return a state dict.
        subsets: for each of them, the ids of the examples it was trained on.
        l2: the coefficient of ``(1/m) sum_i l_i + (l2/2) |theta|^2`` that they were trained with.
        damping: added to it; ``"auto"`` finds, for each model, the one at which examples inside and outside its subset
            matter alike (see `upweight.curvature.balanced_damping`).
        equal: let all models count alike for a query, whatever the size of its scores there: each one's are divided by
            their root mean square over the training examples. Better for ranking: one model that is far off on a query
            would otherwise decide (see docs/methods/banzhaf.md).
        parameters: which parameters to track, as in `Influence`.
        memory: bytes to stay within (an int, or ``"2GB"``); ``"auto"`` is half of what is free.
        batch_size: examples per forward pass; chosen from the memory budget if None. Scores do not depend on it.
        autocast: dtype for `torch.autocast` in the forward pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: for every model one backward pass an output over the data, twice, and the Cholesky factor of a matrix with a
    row for every output of its subset, one fewer for a softmax (718 examples of ten classes: half a minute, and one
    more to find the damping); queries cost one such pass each.
    Memory grows with the square of the subset's outputs. Parameters cost little.

    Fails when: a model is not near a minimum of its objective; its outputs are many (language models).

    Source: *Data Banzhaf: A Robust Data Valuation Framework for Machine Learning* (arXiv 2205.15466) for the value;
    *Rescaled Influence Functions* (arXiv 2506.06656) for the removals.

    Example:
        >>> import torch, upweight as uw
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(8, 2).double(), torch.randn(8, 1).double()
        >>> def trained(ids):  # ridge regression with l2 = 0.1
        ...     a = x[ids]
        ...     inverse = torch.linalg.inv(a.T @ a / len(ids) + 0.1 * torch.eye(2))
        ...     return {"weight": (inverse @ a.T @ y[ids] / len(ids)).T}
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
        >>> method = uw.BanzhafInfluence(
        ...     model,
        ...     uw.Regression(),
        ...     checkpoints=[trained(h) for h in halves],
        ...     subsets=halves,
        ...     l2=0.1,
        ...     damping=0.0,
        ... )
        >>> method.fit((x, y)).attribute((x[:3], y[:3])).values.shape
        torch.Size([3, 8])
    """

    _name = "banzhaf-influence"

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        checkpoints: Sequence[Checkpoint],
        subsets: Sequence[Any],
        l2: float = 0.0,
        damping: float | str = "auto",
        equal: bool = False,
        parameters: ParameterFilter = None,
        memory: int | str = "auto",
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(model, task, parameters, memory, batch_size, autocast, progress)
        if not isinstance(task, OutputTask):
            raise UpweightError(
                f"task is {type(task).__name__}, expected Classification, BinaryClassification or Regression: the "
                "effect of adding an example is found from the model's outputs -> Ensemble(method='ekfac') for others"
            )
        if type(task).hessian_root is OutputTask.hessian_root:
            raise UpweightError(
                f"{type(task).__name__} has no hessian_root, the curvature of its loss in the outputs -> define it, or "
                "Ensemble(method='ekfac')"
            )
        if task.mask is not None:
            raise UpweightError("a task with a mask has no fixed number of outputs an example -> Ensemble")
        number = 0.0 if isinstance(damping, str) and damping == "auto" else damping
        for name, value in (("l2", l2), ("damping", number)):
            if isinstance(value, bool) or not (
                isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
            ):
                raise UpweightError(f"{name}={value!r}, expected a finite number, 0 or above -> {name}=1e-3")
        automatic = isinstance(damping, str)
        if not automatic and l2 + float(number) <= 0:
            raise UpweightError(
                "neither l2 nor damping is above 0, expected a curvature that can be inverted -> damping='auto'"
            )
        self.l2, self.equal = float(l2), equal
        self.damping = None if automatic else float(number)
        if not isinstance(subsets, Sequence) or isinstance(subsets, str):
            raise UpweightError(
                f"subsets is {type(subsets).__name__}, expected a list: for each checkpoint the ids it was trained on"
            )
        self.checkpoints, self.subsets = as_checkpoints(checkpoints), list(subsets)
        if len(self.subsets) != len(self.checkpoints):
            raise UpweightError(
                f"{len(self.checkpoints)} checkpoints but {len(self.subsets)} subsets, expected one each -> the ids "
                "that each model was trained on"
            )
        self._members: list[OutputSpace] = []

    @without_autocast()
    @torch.inference_mode(False)  # or copies of the model could not be differentiated
    def fit(self, train: Any, *, ids: Sequence[int | str] | None = None) -> BanzhafInfluence:
        """Find what every example does to every model.

        Args:
            train: all of the data, of which the subsets are: a Dataset, a DataLoader, or ``(inputs, targets)``.
            ids: one id per training example; positions if None.

        Returns:
            Itself.

        Raises:
            UpweightError: an id of a subset is unknown or given twice, a checkpoint is of another architecture, the
                subset's outputs do not fit the memory; or what is wrong with the model, the task or the data.
        """
        started = time.perf_counter()
        examples = Examples(train, ids)
        inside = [self._inside(number, subset, examples) for number, subset in enumerate(self.subsets)]
        members, keep = [], self.memory * KEEP_SHARE / len(inside)
        with progress_bar("models of subsets", len(inside), self.progress) as advance:
            for number, chosen in enumerate(inside):
                model = copy.deepcopy(self.model)
                load_checkpoint(model, read_checkpoint(self.checkpoints[number], number), number)
                others = len(inside) - 1
                members.append(
                    OutputSpace(self, model, examples, chosen, self.l2, self.damping, keep, others)
                )
                advance(1)
        self._remember(examples)
        self._members = members
        self._seconds = round(time.perf_counter() - started, 3)
        return self

    @without_autocast()
    @torch.inference_mode(False)
    def attribute(self, query: Any, *, ids: Sequence[int | str] | None = None) -> Scores:
        """Score every training example for every query.

        Args:
            query: queries in the form of the training data.
            ids: one id per query; positions if None.

        Returns:
            `Scores` [query, train], in the measurement's unit; without one if the models are `equal`.

        Raises:
            UpweightError: not fitted, or the queries do not fit the model.
        """
        examples, fingerprints = self._ready()
        started = time.perf_counter()
        queries = Examples(query, ids)
        found = []
        with progress_bar("scores", len(self._members), self.progress) as advance:
            for member in self._members:
                values = self._of_member(member, queries)
                found.append(values / root_mean_square(values) if self.equal else values)
                advance(1)
        source = self._members[0].source
        coverage = source.tracker.coverage
        info = shared_info(
            self._name, self, coverage, fingerprints, examples.n, source.batch_size, source.dtype
        ) | {
            "unit_of": "one example, removed from or added to a subset",
            "models": len(found),
            "subset_sizes": [member.size for member in self._members],
            "equal": self.equal,
            "l2": self.l2,
            "damping": [member.damping for member in self._members],
            "balance": [member.balance for member in self._members],
            "fingerprints": {
                **fingerprints,
                "models": [model_fingerprint(member.tracker.model) for member in self._members],
                "subsets": [_digest(member.inside) for member in self._members],
            },
            "queries": queries.fingerprint(),
            "fit_seconds": self._seconds,
            "attribute_seconds": round(time.perf_counter() - started, 3),
        }
        unit = None if self.equal else self.task.unit
        return Scores(mean_of(found).to(source.dtype), queries.ids, examples.ids, unit, info)

    def self_influence(self) -> SelfInfluence:
        """Refused: an example is inside some of the subsets and outside others, and has no one loss of its own.

        Raises:
            UpweightError: always.
        """
        self._ready()
        raise UpweightError(
            "Banzhaf influence has no self-influence -> Influence(...).self_influence(), or the training data as "
            "queries: attribute(train).values.diagonal()"
        )

    def _of_member(self, member: OutputSpace, queries: Examples) -> Tensor:
        """One model's scores [query, train], a panel of queries after the other."""
        size = member.source.panel_size(queries.n)
        panels = [(a, min(a + size, queries.n)) for a in range(0, queries.n, size)]
        return torch.cat([member.scores(member.source.query_gradients(queries, a, b)) for a, b in panels])

    def _inside(self, number: int, subset: Any, examples: Examples) -> Tensor:
        """[n], whether an example is in the subset."""
        try:
            positions = positions_of(examples.ids, subset)
        except UpweightError as error:
            raise UpweightError(f"subset {number}: {error}") from None
        inside = torch.zeros(examples.n, dtype=torch.bool)
        inside[positions] = True
        return inside


def _digest(inside: Tensor) -> str:
    return hashlib.blake2b(inside.numpy().tobytes(), digest_size=16).hexdigest()
