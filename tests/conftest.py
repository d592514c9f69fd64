"""What every test needs: one thread (tests run side by side) and a fixed global random state."""

import os
import random
import re
import sys

import numpy as np
import pytest
import torch
from projects import PETS

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """A test's name is the same in every process: workers that disagree on one run no test at all."""
    if unstable := [item.nodeid for item in items if re.search(r"0x[0-9a-f]{6,}", item.nodeid)]:
        raise pytest.UsageError(f"names with an address of memory in them, give ids=[...]: {unstable}")


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


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder; what loading experiments does to the interpreter is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "pets.py").write_text(PETS.format(tests=os.path.dirname(__file__)))
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
