"""What every test needs: one thread (tests run side by side) and a fixed global random state."""

import random
import sys

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what a model or a data set may use
    random.seed(0)


@pytest.fixture
def upweight(monkeypatch, capsys):
    """Run the command as typed; gives exit code, standard output and standard error."""
    from upweight import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["upweight", *arguments])
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setenv("NO_COLOR", "1")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
