"""Whatever runs the user's code leaves the global random states as it found them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from numpy import random as np_random  # here, not on first use: numpy takes a while to load it


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
    ours, numpys = random.getstate(), np_random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(ours)
            np_random.set_state(numpys)


def reseed(seed: int) -> None:
    """Seed every global random state, inside `preserved`."""
    random.seed(seed)
    np_random.seed(seed)
    if torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available():
        torch.manual_seed(seed)
    else:  # it would make a note of the whole call stack for every kind of accelerator that is not there
        torch.default_generator.manual_seed(seed)
