"""Random scores: what any evaluation must call worthless."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor, nn

from upweight._trees import tensors_in
from upweight.attributors.base import Attributor
from upweight.attributors.baselines.forward import FORWARD_BATCH, Forward
from upweight.attributors.evidence import shared_info
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.scores import Scores, SelfInfluence
from upweight.task import Task

CONTROL = "random numbers"


class Random(Attributor):
    """Random scores, a control: what no method may fall behind, and no metric may favour.

    ``scores[query, i]`` are independent standard normal numbers that depend on the seed and on the content of the query
    and of the training example alone: other batches, another order or other queries do not change them, and two copies
    of one example score the same. No unit.

    Args:
        model: a trained model in eval mode, which queries must fit.
        task: its task.
        seed: of the numbers; other seeds give independent scores.
        memory: unused; accepted so that all attributors can be made alike.
        batch_size: examples per forward pass of the queries; 256 if None. Scores do not depend on it.
        autocast: dtype for `torch.autocast` in that pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: reading the training data once.

    Example:
        >>> import torch, upweight as uw
        >>> x, y = torch.arange(3.0)[:, None], torch.zeros(3, 1)
        >>> method = uw.Random(torch.nn.Linear(1, 1), uw.Regression(), seed=1).fit((x, y))
        >>> scores = method.attribute((x, y)).values
        >>> bool((scores.flip(0) == method.attribute((x.flip(0), y)).values).all())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        seed: int = 0,
        memory: int | str = "auto",
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(model, task, None, memory, batch_size, autocast, progress)
        self.seed = seed
        self._forward: Forward | None = None
        self._digests = np.zeros(0, np.uint64)

    def fit(self, train: Any, *, ids: Sequence[int | str] | None = None) -> Random:
        """Read the training data.

        Args:
            train: a Dataset, a DataLoader, or ``(inputs, targets)``.
            ids: one id per training example; positions if None.

        Returns:
            Itself.

        Raises:
            UpweightError: what is wrong with the model or the data, in one line.
        """
        examples = Examples(train, ids)
        self._forward = Forward(self, self.model, examples)
        self._digests = _digests(examples)
        self._remember(examples)
        return self

    def attribute(self, query: Any, *, ids: Sequence[int | str] | None = None) -> Scores:
        """A random number for every query and training example.

        Args:
            query: queries in the form of the training data.
            ids: one id per query; positions if None.

        Returns:
            `Scores` [query, train], without a unit.

        Raises:
            UpweightError: not fitted, or the queries do not fit the model.
        """
        examples, _ = self._ready()
        assert self._forward is not None
        queries = Examples(query, ids)
        self._forward.check(queries)
        rows = [self._normal(digest) for digest in _digests(queries)]
        info = self._info() | {"queries": queries.fingerprint()}
        return Scores(torch.stack(rows), queries.ids, examples.ids, None, info)

    def self_influence(self) -> SelfInfluence:
        """A random number for every training example: its score for itself."""
        examples, _ = self._ready()
        return SelfInfluence(self._normal(self._digests), examples.ids, None, self._info())

    def _normal(self, query: Any) -> Tensor:
        """Standard normal numbers [train], of one query's digest or of one query each."""
        assert self._forward is not None
        seed = np.frombuffer(hashlib.blake2b(str(self.seed).encode(), digest_size=8).digest(), np.uint64)
        bits = _mix(_mix(_mix(self._digests + seed) ^ query))
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return torch.from_numpy(ndtri(uniform)).to(self._forward.dtype)

    def _info(self) -> dict[str, Any]:
        examples, fingerprints = self._ready()
        forward = self._forward
        assert forward is not None
        size, dtype = forward.batch_size, forward.dtype
        shared = shared_info("random", self, None, fingerprints, examples.n, size, dtype)
        return shared | {"control": CONTROL, "seed": self.seed}


def _digests(examples: Examples) -> np.ndarray:
    """64 bits of every example's content, [n]; raise if it holds NaN or infinity."""
    found = []
    for rows in examples.batches(FORWARD_BATCH):
        tensors = [t.detach().cpu().contiguous() for t in tensors_in(rows.batch)]
        for tensor in tensors:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                first = int((~torch.isfinite(tensor)).nonzero()[0, 0])
                raise UpweightError(
                    f"example {examples.ids[rows.start + first]} holds NaN or infinity -> clean or drop it"
                )
        content = [t.reshape(len(rows), -1).view(torch.uint8).numpy() for t in tensors]
        for row in range(len(rows)):
            digest = hashlib.blake2b(digest_size=8)
            for part in content:
                digest.update(part[row].tobytes())
            found.append(int.from_bytes(digest.digest(), "little"))
    return np.array(found, np.uint64)


def _mix(bits: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the output depends on every bit of the input."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
