"""What every test needs: one thread (tests run side by side) and a fixed global random state."""

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what a model or a data set may use
    random.seed(0)
