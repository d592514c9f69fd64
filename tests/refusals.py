"""What tests of refusals share: one small data set, and what an error must look like."""

from contextlib import contextmanager

import pytest
import torch
from cases import CLASSES
from torch import Tensor, nn

from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Tracker
from upweight.task import Classification, Task

N = 8
IDS = [f"image-{i}" for i in range(N)]


@contextmanager
def refused(message: str):
    """An UpweightError of one line that says what was seen, and after an arrow what to do."""
    with pytest.raises(UpweightError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value) and " -> " in str(caught.value)
    assert len(str(caught.value)) < 500


def data(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, *(shape or (4,))), torch.arange(N) % CLASSES


def track(model: nn.Module, batch=None, task: Task | None = None, **options) -> Tracker:
    return Tracker(model, task or Classification(), Examples(batch or data(), IDS), **options)
