"""What a first use costs: modules that take a second to import, and passes of the model that nothing asked for."""

import subprocess
import sys

import torch
from torch import nn

import upweight as uw
from upweight.curvature.exact import ExactCurvature
from upweight.gradients import Tracker

FIRST_USE = """
import sys, torch, upweight as uw
x, y = torch.randn(20, 3), torch.arange(20) % 3
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 3)).eval()
for options in ({}, {"curvature": "ggn", "solver": "cg"}, {"curvature": "ggn", "solver": "dual"}):
    uw.Influence(model, uw.Classification(), damping=0.1, progress=False, **options).fit((x, y)).attribute((x, y))
heavy = "scipy.stats", "sklearn", "pandas", "matplotlib", "torch._dynamo", "sympy"
print([name for name in heavy if name in sys.modules])
"""


def network() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)).double().eval()
    return model, (torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 3)


def test_a_first_attribution_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_products_of_mini_batches_run_the_model_once_where_the_columns_fit(monkeypatch):
    model, data = network()
    examples = uw.Examples(data)
    tracker = Tracker(model, uw.Classification(), examples)
    whole, starved = (
        ExactCurvature(tracker, examples, batch_size=8, memory=memory) for memory in (1 << 30, 1)
    )
    x, positions = torch.randn(whole.size, 2, dtype=torch.float64), [1, 3, 17]
    calls = []
    fisher = tracker.fisher
    monkeypatch.setattr(tracker, "fisher", lambda *a, **k: (calls.append(1), fisher(*a, **k))[1])
    found = [whole.sampled_product(x, positions) for _ in range(4)]
    assert len(calls) == 3  # the batches of one walk
    again = [starved.sampled_product(x, positions) for _ in range(4)]
    assert len(calls) == 3 + 4  # nothing fits: the mini-batch itself, each time
    torch.testing.assert_close(found, again, rtol=1e-12, atol=1e-14)


def test_many_outputs_have_their_columns_counted_without_forming_a_root():
    """10^5 classes: the root of one example would take 80 GB."""
    task = uw.Classification()
    one = torch.zeros(1, 100_000, dtype=torch.float64)
    model = nn.Identity()
    assert task.fisher_columns(model, (one, torch.zeros(1, dtype=torch.long)), "exact", 1) == 99_999
