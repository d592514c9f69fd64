"""The curve of rank agreement over dampings."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import upweight as uw
from upweight.attributors.damping_curve import DampingCurve, damping_curve
from upweight.errors import UpweightError


def fitted(**options) -> tuple[uw.Influence, tuple]:
    torch.manual_seed(0)
    x = torch.randn(30, 4, dtype=torch.float64)
    y = (x[:, 0] + x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    method = uw.Influence(model, uw.Classification(), damping=1e-2, progress=False, **options)
    return method.fit((x, y)), (x[:5], y[:5])


@pytest.mark.parametrize("curvature", ["ggn", "ekfac"])
def test_agreement_is_the_mean_of_scipys_rank_correlations(curvature):
    method, query = fitted(curvature=curvature)
    dampings = [1.0, 1e-3, 1e-2]
    curve = damping_curve(method, query, dampings)
    assert curve.dampings == [1e-3, 1e-2, 1.0] and curve.chosen == 1e-2
    scores = [method.with_damping(d).attribute(query).values for d in curve.dampings]

    def agreement(a, b):
        return sum(spearmanr(r, s).statistic for r, s in zip(a, b, strict=True)) / len(a)

    assert curve.to_chosen == pytest.approx([agreement(s, scores[1]) for s in scores], abs=1e-10)
    assert curve.neighbours == pytest.approx(
        [agreement(scores[0], scores[1]), agreement(scores[1], scores[2])], abs=1e-10
    )
    assert curve.to_chosen[1] == 1.0 and curve.to_chosen[2] < 0.999


@pytest.mark.parametrize("dampings", [[1e-3], [0.0, 1.0], [1e-3, float("inf")]])
def test_too_few_or_impossible_dampings(dampings):
    with pytest.raises(UpweightError, match="two or more positive"):
        damping_curve(*fitted(), dampings)


class Axes:
    """What a matplotlib axes is asked for."""

    def __init__(self) -> None:
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_plot_draws_both_curves_and_the_choice():
    axes = Axes()
    curve = DampingCurve([1e-4, 1e-2], [0.9], [0.8, 1.0], 1e-2)
    assert curve.plot(axes) is axes
    drawn = {name: args for name, args, _ in axes.calls if name == "axvline"}
    assert drawn == {"axvline": (1e-2,)}
    assert [args[:2] for name, args, _ in axes.calls if name == "plot"] == [
        ([1e-4, 1e-2], [0.8, 1.0]),
        ([pytest.approx(1e-3)], [0.9]),
    ]
