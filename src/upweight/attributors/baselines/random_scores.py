"""Random scores: what any evaluation must call worthless."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor, nn

from upweight._trees import tensors_in
from upweight.attributors.baselines.baseline import Baseline
from upweight.attributors.baselines.forward import FORWARD_BATCH
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.task import Task


class Random(Baseline):
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

    _name = "random"
    _control = "random numbers"
    _digests = np.zeros(0, np.uint64)

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
        super().__init__(
            model, task, memory=memory, batch_size=batch_size, autocast=autocast, progress=progress
        )
        self.seed = seed

    def _learn(self, examples: Examples) -> None:
        self._digests = _digests(examples)

    def _compare(self, queries: Examples) -> Tensor:
        self._forward.check(queries)
        return torch.stack([self._normal(digest) for digest in _digests(queries)])

    def _own(self) -> Tensor:
        return self._normal(self._digests)

    def _normal(self, query: Any) -> Tensor:
        """Standard normal numbers [train], of one query's digest or of one query each."""
        seed = np.frombuffer(hashlib.blake2b(str(self.seed).encode(), digest_size=8).digest(), np.uint64)
        bits = _mix(_mix(_mix(self._digests + seed) ^ query))
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return torch.from_numpy(ndtri(uniform)).to(self._forward.dtype)

    def _facts(self) -> dict[str, Any]:
        return {"seed": self.seed}


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
