"""An example is named by its id alone, in whatever scalar it comes, or among others; anything else is refused."""

import numpy as np
import pytest
import torch
from refusals import refused

import upweight as uw

ONE = {
    "an integer": 3,
    "a tensor": torch.tensor(3),
    "an array": np.array(3),
    "a NumPy integer": np.int32(3),
    "a list": [3],
    "a tensor in a list": [torch.tensor(3)],
}
NONE = {
    "a float": 10.0,
    "a tensor": torch.tensor(3.0),
    "an array": np.array(3.5),
    "a NumPy float": np.float32(3),
    "nothing": None,
    "a truth value": True,
}


@pytest.fixture(scope="module")
def fitted():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 2, dtype=torch.float64, generator=generator)
    y = torch.arange(12) % 2
    model = torch.nn.Linear(2, 2).double()
    method = uw.Influence(model, uw.Classification(), curvature="ggn", damping=0.1).fit((x, y))
    return method, method.attribute((x[:2], y[:2])), (x[:2], y[:2])


@pytest.mark.parametrize("given", ONE.values(), ids=ONE)
def test_one_example_may_be_named_alone(fitted, given):
    method, scores, query = fitted
    assert scores.removal_effect(given).equal(scores.removal_effect([3]))
    assert method.removal(given, query).first_order.equal(method.removal([3], query).first_order)


@pytest.mark.parametrize("given", NONE.values(), ids=NONE)
def test_what_is_no_id_is_refused(fitted, given):
    method, scores, query = fitted
    with refused("train_ids is .*, expected an integer, a string, or several of them -> "):
        scores.removal_effect(given)
    with refused("ids is .*, expected an integer, a string, or several of them -> "):
        method.removal(given, query)


def test_a_text_is_one_id():
    scores = uw.Scores(torch.tensor([[1.0, 2.0]]), ["q"], ["scan-7", "scan-8"], "nats")
    for given in ("scan-8", np.str_("scan-8"), np.array("scan-8"), ["scan-8"]):
        assert scores.removal_effect(given).tolist() == [2.0]
