"""The damping that a bank chooses."""

import numpy as np
import pytest
import torch
from banks import TASK, bank, network, problem
from torch import nn

import upweight as uw
from upweight.evaluate import Outcomes, choose_damping, lds


def fitted() -> tuple[uw.Influence, tuple]:
    torch.manual_seed(0)
    x = torch.randn(30, 4, dtype=torch.float64)
    y = (x[:, 0] + x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return uw.Influence(model, TASK, curvature="ggn", progress=False).fit((x, y)), (x[:5], y[:5])


@pytest.mark.parametrize("right", [1e-3, 1e-1, "auto"])
def test_it_finds_the_damping_that_made_the_outcomes(right):
    method, query = fitted()
    true = method if right == "auto" else method.with_damping(right)
    masks = np.random.default_rng(0).random((60, 30)) < 0.5
    truth = (~masks) @ true.attribute(query).values.numpy().T
    found = choose_damping(method, query, Outcomes(masks, truth[:, None]), [1e-3, 1e-2, 1e-1])
    assert found.value == right and found.tried[right] == pytest.approx(1.0)
    assert max(v for d, v in found.tried.items() if d != right) < 0.999
    assert torch.equal(found.method.attribute(query).values, true.attribute(query).values)


def test_on_a_real_bank(tmp_path):
    made = bank(tmp_path, count=6)
    made.run()
    train, query = problem()
    method = uw.Influence(network(), TASK, progress=False).fit(train)
    outcomes = made.outcomes("queries")
    found = choose_damping(method, query, outcomes)
    assert found.tried["auto"] == lds(method.attribute(query), outcomes).value
    assert found.tried[found.value] == max(found.tried.values())
    assert list(found.to_pandas()["lds"]) == list(found.tried.values())
    assert found.plot().get_xscale() == "log"


@pytest.mark.parametrize("dampings", [[], [0.0], [1e-3, float("nan")]])
def test_refused(dampings):
    method, query = fitted()
    with pytest.raises(uw.UpweightError, match="expected positive numbers"):
        choose_damping(method, query, Outcomes(np.ones((3, 30), bool), np.zeros((3, 1, 5))), dampings)
