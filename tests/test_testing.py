"""`check_attributor` passes every attributor of the library, and each carries the same evidence."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from networks import nearby
from torch import nn

import upweight as uw
from upweight.curvature.solvers import ConjugateGradient
from upweight.testing import check_attributor

Make = Callable[[nn.Module, uw.Task], object]


def tracin(**options) -> Make:
    """TracIn at three checkpoints around the model that the suite hands over."""

    def make(model: nn.Module, task: uw.Task) -> uw.TracIn:
        generator = torch.Generator().manual_seed(3)
        checkpoints = [
            {
                k: v + 0.1 * t * torch.randn(v.shape, generator=generator, dtype=v.dtype)
                for k, v in state.items()
            }
            for t, state in enumerate([model.state_dict()] * 3)
        ]
        return uw.TracIn(model, task, checkpoints=checkpoints, learning_rates=[0.1, 0.1, 0.01], **options)

    return make


class BankOfTheLinearTruth:
    """A datamodel of outcomes to which every example adds what influence functions say: it must say so again."""

    def __init__(self, model: nn.Module, task: uw.Task) -> None:
        self.truth = uw.Influence(model, task, curvature="ekfac", damping=1e-2)
        self.task = task

    def fit(self, train):
        self.truth.fit(train)
        self.train = train
        return self

    def attribute(self, query):
        effects = self.truth.attribute(query)
        n = effects.values.shape[1]
        masks = torch.rand(4 * n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) < 0.5
        outcomes = masks.numpy(), (1.0 - masks.double() @ effects.values.T).numpy()
        scores = uw.Datamodel(None, self.task, outcomes=outcomes, alpha=0).fit(self.train).attribute(query)
        rounding = scores.values.abs() < 1e-12  # what a regression leaves of an exact zero
        return replace(scores, values=scores.values.masked_fill(rounding, 0.0))

    def self_influence(self):
        self.truth.self_influence()  # refuses before the fit
        raise uw.UpweightError("none -> attribute the training data")


def influence(curvature: str, **options) -> Make:
    return lambda model, task: uw.Influence(model, task, curvature=curvature, **{"damping": 1e-2, **options})


CONTROL = {"sign", "zero gradient", "weight", "damping limit", "layers"}
"""What is not asked of scores that know no gradient."""

ATTRIBUTORS: dict[str, tuple[Make, set[str]]] = {
    # the factory, and the checks that do not apply to it
    "Influence, EK-FAC": (influence("ekfac"), set()),
    "Influence, EK-FAC, auto": (influence("ekfac", damping="auto"), set()),
    "Influence, EK-FAC, empirical": (influence("ekfac", fisher="empirical"), set()),
    "Influence, K-FAC": (influence("kfac"), set()),
    "Influence, EK-FAC, rescaled": (influence("ekfac", correction="rescaled"), {"weight"}),
    "Influence, K-FAC, rescaled": (influence("kfac", correction="rescaled"), {"weight"}),
    "Influence, rescaled": (influence("ggn", correction="rescaled"), {"weight"}),
    "Influence, relative": (influence("ggn", correction="relative"), {"weight", "damping limit"}),
    "Influence, relative to the loss": (
        influence("ekfac", correction="relative-loss"),
        {"weight", "damping limit"},
    ),
    "Influence, diagonal": (influence("diagonal"), {"weight"}),
    "Influence, identity": (influence("identity"), {"weight", "damping limit"}),
    "Influence, Gauss-Newton, direct": (influence("ggn", solver="direct"), set()),
    "Influence, Gauss-Newton, dual": (influence("ggn", solver="dual"), set()),
    "Influence, Gauss-Newton, CG": (influence("ggn", solver=ConjugateGradient(rtol=1e-12)), set()),
    "Influence, Gauss-Newton, Arnoldi": (influence("ggn", solver="arnoldi"), set()),
    "Influence, Gauss-Newton, Nyström": (influence("ggn", solver="nystrom"), set()),
    "Influence, Gauss-Newton, rescaled": (influence("ggn", correction="rescaled"), {"weight"}),
    "Influence, Gauss-Newton, relative": (
        influence("ggn", correction="relative"),
        {"weight", "damping limit"},
    ),
    "Influence, EK-FAC, relative to the loss": (
        influence("ekfac", correction="relative-loss"),
        {"weight", "damping limit"},
    ),
    "Influence, Hessian": (influence("hessian", l2=0.05, damping=0.1), set()),
    "Influence, DataInf": (influence("datainf"), {"weight"}),
    "GradDot": (uw.GradDot, {"weight", "damping limit"}),
    "GradCos": (uw.GradCos, {"weight", "damping limit", "self-influence"}),
    "TracIn": (tracin(), {"weight", "damping limit"}),
    "TracIn, projected": (tracin(projection=32), {"weight", "damping limit", "layers"}),
    "TracIn, last layer": (tracin(parameters="last_layer"), {"weight", "damping limit"}),
    "Ensemble, EK-FAC": (
        lambda m, t: uw.Ensemble(m, t, checkpoints=nearby(m), method=influence("ekfac")),
        {"damping limit"},
    ),
    "Ensemble, equal": (
        lambda m, t: uw.Ensemble(m, t, checkpoints=nearby(m), method=influence("ekfac"), equal=True),
        {"weight", "damping limit", "self-influence"},
    ),
    "Ensemble, by name": (
        lambda m, t: uw.Ensemble(m, t, checkpoints=nearby(m), method="grad-dot"),
        {"weight", "damping limit"},
    ),
    "Representer": (lambda m, t: uw.Representer(m, t, l2=0.1), {"weight", "damping limit", "layers"}),
    "Datamodel": (BankOfTheLinearTruth, {"damping limit", "self-influence", "layers"}),
    "Loss": (uw.Loss, CONTROL),
    "Margin": (uw.Margin, CONTROL),
    "GradNorm": (uw.GradNorm, CONTROL),
    "EL2N": (lambda m, t: uw.EL2N(m, t, checkpoints=nearby(m)), CONTROL),
    "AUM": (lambda m, t: uw.AUM(m, t, checkpoints=nearby(m)), CONTROL),
    "Random": (uw.Random, CONTROL),
    "SameClass": (uw.SameClass, CONTROL),
    "EmbeddingSimilarity": (uw.EmbeddingSimilarity, {"weight", "damping limit", "layers", "self-influence"}),
}


@pytest.mark.parametrize("name", list(ATTRIBUTORS))
def test_every_attributor_obeys_the_laws(name):
    make, inapplicable = ATTRIBUTORS[name]
    report = check_attributor(make)
    assert report.passed
    assert {check.name for check in report.checks if check.status == "not applicable"} == inapplicable


def test_attributors_that_fit_themselves_to_the_data_obey_the_other_laws():
    """Automatic damping depends on the data's size; LiSSA stops at a residual of one in a thousand."""
    auto = check_attributor(influence("ggn", damping="auto"))
    lissa = check_attributor(influence("ggn", solver="lissa"), skip=("damping limit",))
    wide = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3)).double().eval()
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 3
    many = check_attributor(
        influence("ekfac", damping="auto"), (x, y), (x[:3] + 1, y[:3]), model=wide, task=uw.Classification()
    )
    assert auto.passed and lissa.passed and many.passed
    assert "counts the examples" in many["weight"].detail


@pytest.mark.parametrize("name", ["Influence, K-FAC", "GradDot", "TracIn", "Ensemble, EK-FAC", "Representer"])
def test_every_result_carries_the_same_evidence(name):
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    method = ATTRIBUTORS[name][0](nn.Sequential(nn.Linear(4, 3)), uw.Classification())
    info = method.fit((x, y)).attribute((x[:3], y[:3])).info
    assert {"method", "coverage", "layers", "n", "fingerprints", "versions"} <= set(info)
    assert {"higher_is_better", "convention", "queries"} <= set(info)
