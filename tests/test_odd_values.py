"""Values that are nearly what is asked for: taken for what they are, or refused in words."""

import warnings

import numpy as np
import pytest
import torch
from networks import digits, trained
from refusals import refused
from torch import nn

import upweight as uw

torch.manual_seed(0)
X = torch.randn(40, 4, dtype=torch.float64)
MODEL = nn.Linear(4, 3).double()
Y = torch.arange(40) % 3


@pytest.mark.parametrize("form", [torch.tensor, np.array, list])
def test_a_mask_is_not_taken_for_ids(form):
    scores = uw.Scores(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), [0], range(4), unit="nats")
    with refused(r"nonzero\(\)"):
        scores.removal_effect(form([False, False, False, True]))
    with refused(r"nonzero\(\)"):
        uw.GradDot(MODEL, uw.Classification()).fit((X[:2], Y[:2]), ids=form([True, False]))


@pytest.mark.parametrize(
    "rate", [0.1, np.float32(0.1), torch.tensor(0.1), [0.1], np.array([0.1]), torch.tensor([0.1])]
)
def test_a_learning_rate_may_be_any_number(rate):
    def scores(rate):
        method = uw.TracIn(
            MODEL, uw.Classification(), checkpoints=[MODEL.state_dict()], learning_rates=rate, progress=False
        )
        return method.fit((X, Y)).attribute((X[:3], Y[:3])).values

    torch.testing.assert_close(scores(rate), scores(0.1), rtol=1e-6, atol=0)


def test_ids_of_weights_may_be_tensors():
    method = uw.Influence(MODEL, uw.Classification(), curvature="ggn", damping=0.1, progress=False).fit(
        (X, Y)
    )
    expected = method.reweight({3: 2.0, 5: 0.5}, (X[:2], Y[:2])).effect("newton")
    weights = {torch.tensor(3): np.float32(2), np.int64(5): torch.tensor(0.5)}
    assert torch.equal(method.reweight(weights, (X[:2], Y[:2])).effect("newton"), expected)


def test_a_hessian_is_checked_where_losses_are_not_zero():
    """At the first eight, labelled beyond doubt, it is rounding noise, and noise is not symmetric."""
    x = X.clone()
    x[:8] *= 1000
    y = MODEL(x).argmax(1)
    y[20:] = (y[20:] + 1) % 3
    options = {"curvature": "hessian", "damping": 0.1, "progress": False}
    scores, other = (
        uw.Influence(MODEL, uw.Classification(), **options).fit(train).attribute((x[20:24], y[20:24])).values
        for train in ((x, y), (x.flip(0), y.flip(0)))
    )
    torch.testing.assert_close(scores, other.flip(1))


def test_an_index_warns_of_queries_unlike_the_training_data(tmp_path):
    (x, y), (qx, qy) = digits()
    method = uw.Influence(trained("mlp"), uw.Classification(), damping=1e-3, progress=False)
    method.fit((x, y), cache=uw.Cache(tmp_path, "index"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.attribute((qx, qy))
    noise = 30 * torch.randn(qx.shape, generator=torch.Generator().manual_seed(2))
    with pytest.warns(UserWarning, match="unlike training data"):
        method.attribute((noise, qy))
