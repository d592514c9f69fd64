"""Training gradients that are kept in the curvature's eigenbasis give what recomputed factors give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import upweight as uw
from upweight.budget import KEEP_SHARE
from upweight.curvature.operators import Kronecker
from upweight.gradients import Dense, Eigenbasis, Gradients, Rotated, Router
from upweight.gradients.blocks import cast, concatenate
from upweight.gradients.rowwise import paired

N, Q, T = 40, 7, 12
GROUPS, ROWS, COLS = 2, 5, 6


class Sequence(nn.Module):
    """Many positions an example, a grouped convolution, and a head with one position."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Linear(6, 8)
        self.mix = nn.Conv1d(8, 4, 3, groups=2, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.mix(self.each(x).tanh().mT).tanh().mean(2))


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N + Q, T, 6, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (N + Q,), generator=generator)
    return (x[:N], y[:N]), (x[N:], y[N:])


def influence(**options) -> uw.Influence:
    torch.manual_seed(0)
    model = Sequence().double().eval()
    return uw.Influence(
        model, uw.Classification(), fisher="empirical", damping=1e-3, batch_size=16, **options
    )


def both(**options) -> tuple[uw.Influence, uw.Influence]:
    """With the gradients in memory, and with a budget into which next to nothing fits."""
    kept, recomputed = influence(**options).fit(data()[0]), influence(memory=60_000, **options).fit(data()[0])
    assert set(kept._fitted.rotated) == {"each", "mix"}
    assert not recomputed._fitted.rotated
    return kept, recomputed


def assert_same(found, expected) -> None:
    assert float((found - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


def test_scores_and_self_influence_are_those_of_recomputed_gradients():
    kept, recomputed = both()
    query = data()[1]
    mine, theirs = kept.attribute(query, per_layer=True), recomputed.attribute(query, per_layer=True)
    assert_same(mine.values, theirs.values)
    for name, part in theirs.layers.items():
        assert_same(mine.layers[name], part)
    assert_same(kept.attribute(query).values, theirs.values)
    assert_same(kept.self_influence().values, recomputed.self_influence().values)
    assert mine.info["training_gradients"]["layers_in_eigenbasis"] == 2
    assert mine.info["routes"] == {"each": "eigenbasis", "mix": "eigenbasis", "head": "dense"}


@pytest.mark.parametrize("correction", ["rescaled", "relative", "relative-loss"])
def test_corrections(correction: str):
    kept, recomputed = both(correction=correction)
    assert_same(kept.attribute(data()[1]).values, recomputed.attribute(data()[1]).values)
    assert_same(kept.self_influence().values, recomputed.self_influence().values)


def test_another_damping_needs_no_pass():
    kept, recomputed = both()
    first, other = (m.with_damping(0.3).attribute(data()[1]).values for m in (kept, recomputed))
    assert_same(first, other)


def test_effects_of_changes():
    kept, recomputed = both()
    query = data()[1]
    for change in ([0, 3, 17], [5]):
        mine, theirs = (m.removal(change, query).first_order for m in (kept, recomputed))
        assert_same(mine, theirs)


def test_only_a_pass_that_is_whole_in_memory_is_rotated():
    """Half of the steps kept: their factors stay as they are, so that all training gradients have one form."""
    method = influence()
    source = method.fit(data()[0])._fitted.training.source
    factors = sum(step.load().nbytes for step in source)
    half = influence(memory=int(0.7 * factors / KEEP_SHARE)).fit(data()[0])
    assert 0 < half._fitted.training.share_in_memory < 1
    assert not half._fitted.rotated
    assert_same(half.attribute(data()[1]).values, method.attribute(data()[1]).values)


def test_the_exact_fishers_training_gradients_are_kept_as_factors():
    method = influence().fit(data()[0])
    torch.manual_seed(0)
    exact = uw.Influence(Sequence().double().eval(), uw.Classification(), fisher="exact", damping=1e-3)
    assert not exact.fit(data()[0])._fitted.rotated
    assert method._fitted.rotated


# The block ---------------------------------------------------------------------------------------------------------


def curvature(seed: int = 0) -> Kronecker:
    generator = torch.Generator().manual_seed(seed)
    options = {"dtype": torch.float64, "generator": generator}
    basis = Eigenbasis(*(torch.linalg.qr(torch.randn(GROUPS, k, k, **options))[0] for k in (ROWS, COLS)))
    return Kronecker(basis, torch.randn(GROUPS, ROWS, COLS, **options).exp())


def test_a_rotated_block_is_the_gradient_in_another_basis():
    layer = curvature()
    gradients = Dense(torch.randn(9, layer.values.numel(), dtype=torch.float64))
    rotated = layer.rotate(gradients)
    assert_same(rotated.dense(), gradients.values)
    assert_same(rotated.values, layer.coordinates(gradients))
    assert_same(layer.coordinates(rotated), rotated.values)
    assert_same(layer.precondition(rotated, 0.1).dense(), layer.precondition(gradients, 0.1).dense())
    assert_same(layer.quadratic(rotated, 0.1), layer.quadratic(gradients, 0.1))
    assert len(rotated[2:5]) == 3 and rotated.nbytes == rotated.values.nbytes
    assert_same(concatenate([rotated[:4], rotated[4:]]).values, rotated.values)
    assert float((cast(rotated, torch.float32).dense() - gradients.values).abs().max()) < 1e-5


def test_rotated_blocks_of_one_basis_meet_without_rotating_back():
    layer, other = curvature(0), curvature(1)
    a, b = (Dense(torch.randn(k, layer.values.numel(), dtype=torch.float64)) for k in (4, 9))
    expected = a.values @ b.values.T
    router = Router()
    for query, train, route in [
        (layer.rotate(a), layer.rotate(b), "eigenbasis"),
        (layer.rotate(a), other.rotate(b), "dense"),  # two bases: both go back
        (a, layer.rotate(b), "dense"),
        (layer.rotate(a), b, "dense"),
    ]:
        assert_same(router.contract("layer", query, train), expected)
        assert router.chosen["layer"] == route
    pairs = [Gradients({"layer": block}) for block in (layer.rotate(a), layer.rotate(b[:4]), b[:4])]
    assert_same(paired(pairs[0], pairs[1]), (a.values * b.values[:4]).sum(1))
    assert_same(paired(pairs[0], pairs[2]), (a.values * b.values[:4]).sum(1))


def test_panels_of_rotated_queries_are_gathered_in_place():
    layer = curvature()
    whole = layer.rotate(Dense(torch.randn(9, layer.values.numel(), dtype=torch.float64)))
    parts = [Gradients({"layer": whole[rows]}) for rows in (slice(0, 4), slice(4, 8), slice(8, 9))]
    gathered = Gradients.gather(iter(parts), 9)["layer"]
    assert isinstance(gathered, Rotated) and gathered.basis is layer.basis
    assert torch.equal(gathered.values, whole.values)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_blocks_of_other_bases_are_joined_out_of_all(first: int):
    """A batch that came in another basis, or in none, must not be read as if it were in the first one's."""
    gradients = Dense(torch.randn(9, curvature().values.numel(), dtype=torch.float64))
    forms = [curvature(0).rotate(gradients), curvature(1).rotate(gradients), gradients]
    order = forms[first:] + forms[:first]
    parts = [form[3 * k : 3 * k + 3] for k, form in enumerate(order)]
    assert_same(concatenate(parts).dense(), gradients.values)
    gathered = Gradients.gather((Gradients({"layer": part}) for part in parts), 9)
    assert_same(gathered.dense(), gradients.values)
