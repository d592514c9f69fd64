"""The sign and the unit of influence scores: what removal does to a loss, a margin, and a function of one's own."""

import copy

import pytest
import torch
from curvature_oracles import relative
from small_problem import CURVATURES, QUERY, TRAIN, cross_entropy, data, influence, small
from torch import Tensor, nn

import upweight as uw
from upweight.errors import UpweightError


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_query_that_is_a_training_example_is_its_own_proponent(curvature):
    method = influence(small(), curvature=curvature).fit(TRAIN)
    own = method.attribute(TRAIN).values.diagonal()
    assert (own > 0).all()
    assert relative(method.self_influence().values, own) < 1e-12


def test_removing_a_proponent_raises_the_loss():
    """Softmax regression, really trained to its minimum without each of 20 of 80 examples."""
    train = data(80, 3)
    model = nn.Linear(4, 3).double()
    everyone = torch.ones(80, dtype=torch.float64)
    train_to_minimum(model, train, everyone)
    before = cross_entropy(model, QUERY).detach()
    real = []
    for i in range(20):
        weights = everyone.clone()
        weights[i] = 0
        changed = copy.deepcopy(model)
        train_to_minimum(changed, train, weights)
        real.append(cross_entropy(changed, QUERY).detach() - before)
    real = torch.stack(real, 1)
    for curvature, least in {"ekfac": 0.97, "kfac": 0.97, "diagonal": 0.9, "identity": 0.8}.items():
        method = influence(model, curvature=curvature, damping=PENALTY, fisher="exact").fit(train)
        scores = method.attribute(QUERY).values[:, :20]
        correlation = torch.corrcoef(torch.stack([scores.reshape(-1), real.reshape(-1)]))[0, 1]
        assert correlation > least, curvature
        clear = scores.abs() > scores.abs().median()
        assert (scores[clear].sign() == real[clear].sign()).double().mean() > least - 0.05, curvature
        if curvature in ("ekfac", "kfac"):  # calibrated: right in size, too
            assert 0.8 < float((scores * real).sum() / (scores**2).sum()) < 1.3, curvature


PENALTY = 0.05


def train_to_minimum(model: nn.Module, batch, weights: Tensor) -> None:
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = (weights * cross_entropy(model, batch)).sum() / len(weights)
        value = value + PENALTY / 2 * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimiser.step(closure)
    optimiser.zero_grad()


@pytest.mark.parametrize("curvature", CURVATURES)
def test_loss_and_margin_tell_the_same_story(curvature):
    """``d loss = -(1 - p) d margin``: the scores of a query differ by the factor 1 - p, and not in sign."""
    model = small()
    loss = influence(model, curvature=curvature).fit(TRAIN).attribute(QUERY)
    margin = influence(model, uw.Classification("margin"), curvature=curvature).fit(TRAIN).attribute(QUERY)
    p = model(QUERY[0]).softmax(1).gather(1, QUERY[1][:, None]).detach()
    assert relative((1 - p) * margin.values, loss.values) < 1e-12
    assert (loss.info["higher_is_better"], margin.info["higher_is_better"]) == (False, True)


def test_a_function_of_ones_own_is_oriented_by_its_word():
    model = small()

    def logit(model: nn.Module, batch) -> Tensor:
        return model(batch[0]).gather(1, batch[1][:, None])[:, 0]

    built_in = influence(model, uw.Classification("logit")).fit(TRAIN).attribute(QUERY)
    higher = (
        influence(model, uw.Classification(logit, higher_is_better=True, unit="logit"))
        .fit(TRAIN)
        .attribute(QUERY)
    )
    lower = (
        influence(model, uw.Classification(lambda m, b: -logit(m, b), unit="minus logit"))
        .fit(TRAIN)
        .attribute(QUERY)
    )
    assert relative(higher.values, built_in.values) < 1e-12
    assert relative(lower.values, built_in.values) < 1e-12
    assert (built_in.unit, higher.unit, lower.unit) == ("logit", "logit", "minus logit")


@pytest.mark.parametrize("curvature", CURVATURES)
def test_only_calibrated_curvatures_have_a_unit(curvature):
    method = influence(small(), curvature=curvature).fit(TRAIN)
    scores, own = method.attribute(QUERY), method.self_influence()
    if curvature in ("ekfac", "kfac"):
        assert scores.unit == "nats" and own.unit is not None
        effect = scores.removal_effect([3, 5])
        assert torch.allclose(effect, scores.values[:, [3, 5]].sum(1), rtol=1e-12, atol=0)
    else:
        assert scores.unit is None and own.unit is None
        with pytest.raises(UpweightError, match="only ranks") as caught:
            scores.removal_effect([3])
        assert "\n" not in str(caught.value)
