"""Whatever runs the user's code leaves the global random states as it found them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Restore the global random states of torch (CPU and these devices), numpy and Python at the end.

    Example:
        >>> before = random.getstate()
        >>> with preserved():
        ...     _ = random.random(), torch.rand(1)
        >>> random.getstate() == before
        True
    """
    ours, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is what user code draws from
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numpys)  # noqa: NPY002


def reseed(seed: int) -> None:
    """Seed every global random state, inside `preserved`."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
