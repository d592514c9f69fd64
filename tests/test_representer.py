"""Representer points: the refitted layer is a sum over the training examples, and so is every logit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import digits, trained
from oracles import untouched
from refusals import refused
from sklearn.linear_model import LogisticRegression
from small_problem import QUERY, TRAIN, small
from torch import Tensor, nn

import upweight as uw

L2 = 0.05


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def features(model: nn.Sequential, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model[:-1](x), torch.ones(len(x), 1, dtype=x.dtype)], 1)


def true_logits(method: uw.Representer, batch) -> Tensor:
    return method.logits(batch).gather(1, batch[1][:, None])[:, 0]


def representer(model: nn.Module, **options) -> uw.Representer:
    return uw.Representer(model, uw.Classification(), **{"l2": L2, **options})


def test_the_weights_and_the_logits_are_sums_over_training_examples():
    model = small()
    method = representer(model).fit(TRAIN)
    fit = method._fit
    assert relative(fit.alpha.T @ fit.features, fit.weight) < 1e-6
    scores = method.attribute(QUERY)
    assert relative(scores.values.sum(1), true_logits(method, QUERY)) < 1e-6
    assert scores.info["refit"]["relative_gradient"] < 1e-6 and scores.unit is None


def test_the_refit_is_the_minimum_that_scikit_learn_finds():
    model, x, y = small(), *TRAIN
    method = representer(model, tolerance=1e-9).fit(TRAIN)
    fit = LogisticRegression(C=1 / (L2 * 15), fit_intercept=False, tol=1e-12, max_iter=10_000)
    fit.fit(features(model, x).numpy(), y.numpy())
    assert np.abs(fit.coef_ - method._fit.weight.numpy()).max() < 1e-5 * np.abs(fit.coef_).max()


def test_scores_equal_the_formula():
    model, (x, y) = small(), TRAIN
    method = representer(model).fit(TRAIN)
    f, fq, W = features(model, x), features(model, QUERY[0]), method._fit.weight
    alpha = -((f @ W.T).softmax(1) - F.one_hot(y, 3)) / (L2 * 15)
    expected = torch.stack([alpha[:, int(c)] for c in QUERY[1]]) * (fq @ f.T)
    assert relative(method.attribute(QUERY).values, expected) < 1e-10
    own = alpha[torch.arange(15), y] * f.square().sum(1)
    assert relative(method.self_influence().values, own) < 1e-10


@pytest.mark.parametrize("outputs", ["flat", "column"])
def test_one_logit(outputs):
    torch.manual_seed(0)
    body = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)]
    model = nn.Sequential(*body, *([nn.Flatten(0)] if outputs == "flat" else [])).double()
    y = (TRAIN[1] > 0).double()
    query = QUERY[0], (QUERY[1] > 0).double()
    method = uw.Representer(model, uw.BinaryClassification(), l2=L2).fit((TRAIN[0], y))
    signed = method.logits(query)[:, 0] * (2 * query[1] - 1)
    assert relative(method.attribute(query).values.sum(1), signed) < 1e-6
    assert (method.self_influence().values > 0).all()
    assert relative(method.attribute((TRAIN[0], y)).values.diagonal(), method.self_influence().values) < 1e-12


def test_digits_in_float32():
    model, (train, query) = trained("mlp"), digits()
    with untouched(model):
        method = representer(model, l2=1e-3).fit(train)
        scores = method.attribute(query)
    assert scores.values.dtype == torch.float32
    assert relative(scores.values.sum(1), true_logits(method, query).double()) < 1e-4
    assert scores.info["refit"]["same_decisions"] > 0.97


def test_mislabeled_digits_come_first():
    model, ((x, y), _) = trained("mlp"), digits()
    wrong = torch.arange(0, 500, 20)
    y = y.clone()
    y[wrong] = (y[wrong] + 1) % 10
    own = representer(model, l2=1e-2).fit((x, y)).self_influence().values
    flagged = set(own.argsort(descending=True)[:50].tolist())
    assert len(flagged & set(wrong.tolist())) >= 20


def test_a_layer_that_is_at_its_minimum_is_taken_as_it_is():
    refitted = representer(small(), tolerance=1e-10).fit(TRAIN)
    model = small()
    with torch.no_grad():
        model[2].weight.copy_(refitted._fit.weight[:, :-1])
        model[2].bias.copy_(refitted._fit.weight[:, -1])
    scores = representer(model, refit=False).fit(TRAIN).attribute(QUERY)
    assert relative(scores.values, refitted.attribute(QUERY).values) < 1e-6
    assert scores.info["refit"]["refitted"] is False
    with torch.no_grad():
        assert relative(scores.values.sum(1), model(QUERY[0]).gather(1, QUERY[1][:, None])[:, 0]) < 1e-6


def test_a_named_layer_and_a_model_without_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    found, named = representer(model).fit(TRAIN), representer(model, layer="2").fit(TRAIN)
    assert torch.equal(found.attribute(QUERY).values, named.attribute(QUERY).values)
    assert relative(found.attribute(QUERY).values.sum(1), true_logits(found, QUERY)) < 1e-6
    linear = nn.Linear(4, 3).double()
    assert representer(linear, layer="").fit(TRAIN)._fit.features.shape == (15, 5)


def test_refusals():
    with refused("explain a class's logit"):
        uw.Representer(small(), uw.Regression())
    with refused("l2=0"):
        representer(small(), l2=0)
    with refused("not at the minimum.*refit=True"):
        representer(small(), refit=False).fit(TRAIN)
    with refused("after 1 steps.*raise max_iter"):
        representer(small(), max_iter=1).fit(TRAIN)
    with refused(r"is no linear layer of the model.*\['0', '2'\]"):
        representer(small(), layer="head").fit(TRAIN)
    with refused("something comes after it"):
        representer(nn.Sequential(*small(), nn.Softplus())).fit(TRAIN)
    with refused("something comes after it"):
        representer(small(), layer="0").fit(TRAIN)
    with refused("features of 15 training examples take"):
        representer(small(), memory=500).fit(TRAIN)
    frozen = small()
    frozen[2].bias.requires_grad_(False)
    with refused("2.bias is frozen"):
        representer(frozen).fit(TRAIN)
    with refused("not fitted"):
        representer(small()).attribute(QUERY)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.reshape(len(x), 2, 2)).mean(1)

    with refused("several positions"):
        representer(Pooled().double()).fit(TRAIN)
