"""Inner products of gradients, example by example, and that nothing as long as the parameters is formed for them."""

import itertools

import pytest
import torch
from torch import nn

import upweight as uw
from upweight.gradients import Dense, Eigenbasis, Factored, Rotated, Sparse, Spectral
from upweight.gradients.blocks import Block, Piece
from upweight.gradients.contraction import TILE_BYTES, tiles
from upweight.gradients.rowwise import paired_blocks

N, R, C = 9, 6, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis() -> Eigenbasis:
    return Eigenbasis(*(torch.linalg.qr(random(1, k, k))[0] for k in (R, C)))


BASIS = basis()


def blocks(seed: int) -> dict[str, Block]:
    """The same layer's gradients in every form, of two seeds."""
    ids = torch.randint(0, R, (N, 5), generator=torch.Generator().manual_seed(seed))
    return {
        "one position": Factored((Piece(random(N, 1, R, seed=seed), random(N, 1, C, seed=seed + 1)),)),
        "positions": Factored((Piece(random(N, 3, R, seed=seed), random(N, 3, C, seed=seed + 1)),)),
        "dense": Dense(random(N, R * C, seed=seed)),
        "sparse": Sparse(ids, random(N, 5, C, seed=seed), (R, C)),
        "rotated": Rotated(random(N, R * C, seed=seed), BASIS),
        "spectral": Spectral(
            random(1, N, 1, R, seed=seed),
            random(1, N, 1, C, seed=seed + 1),
            BASIS,
            random(1, R, C, seed=seed).exp(),
        ),
    }


@pytest.mark.parametrize(("a", "b"), list(itertools.product(blocks(0), repeat=2)))
def test_every_two_forms_meet(a, b):
    one, other = blocks(0)[a], blocks(10)[b]
    expected = (one.dense() * other.dense()).sum(1)
    torch.testing.assert_close(paired_blocks(one, other), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(paired_blocks(one, one), one.dense().square().sum(1), rtol=1e-10, atol=1e-10)


WIDE = {
    "spectral": (
        Spectral(torch.ones(1, N, 1, 3000), torch.ones(1, N, 1, 400), BASIS, torch.ones(1, 3000, 400)),
        3000 * 400,
    ),
    "sparse": (
        Sparse(torch.zeros(N, 2, dtype=torch.long), torch.ones(N, 2, 64), (40_000, 64)),
        40_000 * 64,
    ),
    "one position": (Factored((Piece(torch.ones(N, 1, 3000), torch.ones(N, 1, 400)),)), 3000 * 400),
}
"""Forms far smaller than the gradient, and its length: two vectors of a wide layer, two rows of a long table."""


@pytest.mark.parametrize("name", list(WIDE))
def test_a_tile_of_formed_gradients_stays_within_its_bytes(name):
    block, numel = WIDE[name]
    for rows in tiles(block):
        assert len(block[rows]) == 1 or len(block[rows]) * numel * 4 <= TILE_BYTES


@pytest.mark.parametrize("correction", ["relative", "relative-loss"])
def test_corrections_form_no_gradient_of_one_position(correction, monkeypatch):
    x, y = torch.randn(50, 8), torch.arange(50) % 3
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    made = uw.Influence(model, uw.Classification(), correction=correction, progress=False)
    expected = made.fit((x, y)).self_influence().values

    def refuse(self):
        raise AssertionError("formed")

    monkeypatch.setattr(Spectral, "dense", refuse)
    assert torch.equal(made.fit((x, y)).self_influence().values, expected)


@pytest.mark.parametrize("curvature", ["identity", "diagonal", "ekfac"])
def test_self_influence_forms_no_table_of_an_embedding(curvature, monkeypatch):
    x, y = torch.randint(0, 50, (30, 6)), torch.arange(30) % 3
    model = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(48, 3))
    made = uw.Influence(model, uw.Classification(), curvature=curvature, damping=0.1, progress=False).fit(
        (x, y)
    )
    expected = made.self_influence().values

    def refuse(self):
        raise AssertionError("formed")

    monkeypatch.setattr(Sparse, "dense", refuse)
    assert torch.equal(made.self_influence().values, expected)
