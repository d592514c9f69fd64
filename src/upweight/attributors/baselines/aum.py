"""AUM: the margin of the given label, averaged over the training run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upweight._files import load_bundle, save_bundle
from upweight._ids import Id, as_ids, bytes_to_ids, ids_to_bytes, some
from upweight.attributors.baselines.forward import Forward
from upweight.attributors.baselines.margin import margins
from upweight.attributors.baselines.trajectory import Trajectory
from upweight.attributors.checkpoints import Checkpoint
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.task import Task


class MarginLog:
    """Sums of the margins that a training loop sees, by example id: two numbers an example, whatever the epochs.

    Example:
        >>> log = MarginLog()
        >>> for logits in (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]])):
        ...     log.record(["a", "b"], logits, torch.tensor([0, 0]))
        >>> log.mean(["b", "a"]).tolist(), log.epochs
        ([-2.0, 2.0], (2, 2))
    """

    def __init__(self) -> None:
        self._rows: dict[Id, int] = {}
        self._sum = torch.zeros(0, dtype=torch.float64)
        self._count = torch.zeros(0, dtype=torch.int64)

    def record(self, ids: Iterable[Id], outputs: Tensor, targets: Tensor) -> None:
        """Add the margins of one batch, from the logits that the training step has computed anyway.

        Args:
            ids: one id per example of the batch; those that `AUM.fit` is given later.
            outputs: logits, [batch, class], or [batch] or [batch, 1] for one logit an example.
            targets: the labels trained on, class numbers [batch], or 0 and 1.

        Raises:
            UpweightError: the shapes do not fit, or a margin is not finite.
        """
        names = as_ids(ids, "ids")
        outputs, targets = outputs.detach(), targets.detach()
        if outputs.ndim == 2 and outputs.shape[1] == 1:
            outputs = outputs[:, 0]
        targets = targets.reshape(-1) if outputs.ndim == 1 else targets
        if (
            outputs.ndim not in (1, 2)
            or not (len(names) == len(outputs) == len(targets))
            or targets.ndim != 1
        ):
            raise UpweightError(
                f"{len(names)} ids, logits {tuple(outputs.shape)} and targets {tuple(targets.shape)}, expected "
                "[batch], [batch, class] and [batch] -> record one batch at a time"
            )
        with torch.no_grad():
            values = margins(outputs, targets if outputs.ndim == 1 else targets.long()).double().cpu()
        if not bool(torch.isfinite(values).all()):
            first = int((~torch.isfinite(values)).nonzero()[0, 0])
            raise UpweightError(
                f"the margin of example {names[first]!r} is {float(values[first])} -> the run diverged: lower its "
                "learning rate"
            )
        rows = torch.tensor([self._rows.setdefault(name, len(self._rows)) for name in names])
        if (missing := len(self._rows) - len(self._sum)) > 0:
            self._sum = torch.cat([self._sum, self._sum.new_zeros(max(missing, len(self._sum)))])
            self._count = torch.cat([self._count, self._count.new_zeros(len(self._sum) - len(self._count))])
        self._sum.index_add_(0, rows, values)
        self._count.index_add_(0, rows, torch.ones_like(rows))

    @property
    def epochs(self) -> tuple[int, int]:
        """Fewest and most records of one example."""
        counts = self._count[: len(self._rows)]
        return (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)

    def __len__(self) -> int:
        return len(self._rows)

    def mean(self, ids: Sequence[Id]) -> Tensor:
        """Mean margin of these examples, [n], float64; raise if one was never recorded."""
        if missing := [name for name in ids if name not in self._rows]:
            raise UpweightError(
                f"{len(missing)} of {len(ids)} training examples were never logged ({some(missing)}; the log holds "
                f"{len(self)}, {some(self._rows)}) -> fit with the ids that were given to log.record"
            )
        rows = torch.tensor([self._rows[name] for name in ids])
        return self._sum[rows] / self._count[rows]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the log to one safetensors file, replacing an older one only when complete."""
        path, n = Path(path).expanduser(), len(self._rows)
        ids = ids_to_bytes(list(self._rows))
        save_bundle(path, "margins", {"sum": self._sum[:n], "count": self._count[:n], "ids": ids}, {"n": n})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MarginLog:
        """Read what `save` wrote, for example to go on with a run that was interrupted."""
        tensors, _ = load_bundle(Path(path).expanduser(), "margins")
        log = cls()
        log._rows = {name: row for row, name in enumerate(bytes_to_ids(tensors["ids"]))}
        log._sum, log._count = tensors["sum"], tensors["count"]
        return log


class AUM(Trajectory):
    """Each training example's negated margin, averaged over the training run, a baseline.

    ``scores[query, i] = -(1/T) sum_t (z_y - max_{k != y} z_k)`` with the logits z of epoch t and the label y, the same
    for every query; no unit. Where a network memorises wrong labels late, the average still holds what it thought of
    them before.

    Args:
        model: the trained model, in eval mode, whose architecture the checkpoints share. Nothing on it is changed.
        task: `Classification` or `BinaryClassification`.
        log: margins that the training loop recorded (`AUM.log`); nothing is then run for the training data.
        checkpoints: instead of a log, checkpoints of the run: state dicts, files, models, or functions without
            arguments that return a state dict.
        memory: unused; accepted so that all attributors can be made alike.
        batch_size: examples per forward pass; 256 if None. Scores do not depend on it.
        autocast: dtype for `torch.autocast` in the forward pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: with a log nothing; else one forward pass over the training data for each checkpoint.

    Fails when: most of the run, or of the checkpoints, comes after the labels are memorised; record until the learning
    rate first drops, as the paper does.

    Source: *Identifying Mislabeled Data using the Area Under the Margin Ranking* (arXiv 2001.10528).

    Example:
        >>> import torch, upweight as uw
        >>> model, log = torch.nn.Linear(1, 2), uw.AUM.log()
        >>> x, y, ids = torch.ones(2, 1), torch.tensor([0, 1]), ["a", "b"]
        >>> for step in range(3):
        ...     logits = torch.tensor([[1.0, 0.0], [2.0, 0.0]])  # model(x), in a training loop
        ...     log.record(ids, logits, y)
        >>> uw.AUM(model, uw.Classification(), log=log).fit((x, y), ids=ids).self_influence().values.tolist()
        [-1.0, 2.0]
    """

    _name = "aum"
    _needs = "the true class's logit with the others'"

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        log: MarginLog | None = None,
        checkpoints: Sequence[Checkpoint] | None = None,
        memory: int | str = "auto",
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        if (log is None) == (checkpoints is None):
            raise UpweightError(
                f"{'neither' if log is None else 'both'} of log= and checkpoints= given, expected one of them -> "
                "log=uw.AUM.log(), filled by the training loop, or checkpoints=[state dicts]"
            )
        super().__init__(model, task, checkpoints, memory, batch_size, autocast, progress)
        self._log = log

    @staticmethod
    def log() -> MarginLog:
        """An empty log, for a training loop to call ``log.record(ids, logits, targets)`` on every batch."""
        return MarginLog()

    @staticmethod
    def _of_outputs(outputs: Tensor, targets: Tensor) -> Tensor:
        return -margins(outputs, targets)

    def _score(self, examples: Examples, forward: Forward) -> Tensor:
        if self._log is None:
            return super()._score(examples, forward)
        return -self._log.mean(examples.ids).to(forward.dtype)

    def _facts(self) -> dict[str, Any]:
        return super()._facts() if self._log is None else {"logged_epochs": list(self._log.epochs)}
