"""The model runs in the precision that `autocast=` names, and nothing else follows an autocast around it."""

import pytest
import torch
from torch import nn

import upweight as uw

torch.manual_seed(0)
X, Y = torch.randn(64, 20), torch.randint(0, 3, (64,))
QUERY = X[:9] + 0.1, Y[:9]
MODEL = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3)).eval()
MIXED = nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 3).bfloat16()).eval()
"""Runs under autocast alone."""


def influence(curvature, model=MODEL, **options):
    return uw.Influence(
        model, uw.Classification(), curvature=curvature, damping=0.01, progress=False, **options
    )


METHODS = {
    **{kind: lambda kind=kind: influence(kind) for kind in ("kfac", "ekfac", "datainf", "diagonal", "ggn")},
    "cg": lambda: influence("ggn", solver="cg"),
    "dual": lambda: influence("ggn", solver="dual"),
    "GradDot": lambda: uw.GradDot(MODEL, uw.Classification(), progress=False),
    "TracIn": lambda: uw.TracIn(
        MODEL,
        uw.Classification(),
        checkpoints=[MODEL.state_dict()],
        learning_rates=[0.1],
        projection=64,
        progress=False,
    ),
    "EmbeddingSimilarity": lambda: uw.EmbeddingSimilarity(MODEL, uw.Classification(), progress=False),
    "Representer": lambda: uw.Representer(MODEL, uw.Classification(), l2=0.1, progress=False),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_autocast_around_the_library_changes_nothing(name):
    def results():
        method = METHODS[name]().fit((X, Y))
        return method.attribute(QUERY).values, method.self_influence().values

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
        assert torch.is_autocast_enabled("cpu")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_autocast_around_effects_and_repair_changes_nothing():
    def results():
        method = influence("ggn").fit((X, Y))
        repaired = uw.unlearn(MODEL, uw.Classification(), (X, Y), [1, 2], method="newton", progress=False)
        weights = torch.cat([p.detach().flatten() for p in repaired.model.parameters()])
        return method.removal([1, 2], QUERY).effect("newton"), weights

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "identity", "ggn"])
def test_a_model_that_needs_autocast_gets_it_everywhere(curvature, tmp_path):
    """Also where the loss is looked at once, for what a folder on disk belongs to."""
    method = influence(curvature, MIXED, autocast=torch.bfloat16)
    plain = method.fit((X, Y)).attribute(QUERY)
    kept = method.fit((X, Y), cache=tmp_path / "cache").attribute(QUERY, out=tmp_path / "scores")
    torch.testing.assert_close(
        kept.values, plain.values, rtol=1e-3, atol=1e-3 * float(plain.values.abs().max())
    )


@pytest.mark.parametrize("kind", [uw.GradDot, uw.EmbeddingSimilarity])
def test_the_last_layer_is_found_under_autocast(kind):
    options = {"parameters": "last_layer"} if kind is uw.GradDot else {}
    method = kind(MIXED, uw.Classification(), autocast=torch.bfloat16, progress=False, **options)
    assert bool(method.fit((X, Y)).attribute(QUERY).values.isfinite().all())
