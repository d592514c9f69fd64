"""The separable route: a spectral filter as a few products, as many as a probe of real gradients asks for."""

import pytest
import torch
from networks import digits, trained
from torch import Tensor

import upweight as uw
from upweight.gradients import Eigenbasis, Factored, Router, Spectral
from upweight.gradients.blocks import Piece
from upweight.gradients.separable import RANK_SHARE, Terms, exact_scores, query_errors, separate


def assert_equal(found: Tensor, expected: Tensor):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spectrum(rows: int, cols: int) -> Tensor:
    """Eigenvalues over several decades that are no product of row and column factors."""
    u, v = (10 ** -torch.linspace(0, 2, k, dtype=torch.float64) for k in (rows, cols))
    return torch.outer(u, v) + 0.1 * torch.outer(u.sqrt(), v.flip(0))


def probe(eigenvalues: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors whose squares have the eigenvalues on average, as gradients have."""
    rows, cols = eigenvalues.shape
    return (
        random(n, rows, seed=seed) * eigenvalues.mean(1).sqrt(),
        random(n, cols, seed=seed + 1) * eigenvalues.mean(0).sqrt() / eigenvalues.mean().sqrt(),
    )


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
def test_separable_error_is_within_the_tolerance(tolerance):
    eigenvalues = spectrum(60, 80)
    filter_ = 1 / (eigenvalues + 0.1 * eigenvalues.mean())
    query, train = probe(eigenvalues, 16, 10), probe(eigenvalues, 200, 20)
    terms = separate(filter_, eigenvalues, query, train, tolerance)
    assert terms is not None

    def error(query, train, terms=terms) -> float:
        found = exact_scores(terms.rows @ terms.cols.T, query, train)
        return error_of_queries(found, exact_scores(filter_, query, train))

    assert error(query, train) == pytest.approx(terms.error, rel=1e-6)
    assert terms.error <= tolerance
    assert error(probe(eigenvalues, 40, 30), probe(eigenvalues, 300, 40)) <= 2 * tolerance  # other examples
    assert terms.rank > 1
    fewer = Terms(terms.rows[:, :-1], terms.cols[:, :-1], 0.0)  # one term fewer would not have done
    assert error(query, train, fewer) > RANK_SHARE * tolerance


def error_of_queries(found: Tensor, exact: Tensor) -> float:
    """The root mean square of the queries' relative errors."""
    return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).square().mean().sqrt())


def test_a_query_of_large_gradients_does_not_decide_how_many_terms_there_are():
    """Terms are the same whatever the queries' lengths are, and a query without a gradient is left out."""
    eigenvalues = spectrum(60, 80)
    filter_ = 1 / (eigenvalues + 0.1 * eigenvalues.mean())
    (left, right), train = probe(eigenvalues, 16, 10), probe(eigenvalues, 200, 20)
    scale = torch.logspace(-4, 4, 16, dtype=torch.float64)[:, None]
    plain, scaled = (separate(filter_, eigenvalues, (q, right), train, 1e-2) for q in (left, left * scale))
    assert plain is not None and scaled is not None
    assert scaled.starts == plain.starts and scaled.error == pytest.approx(plain.error)
    none = torch.cat([left, torch.zeros_like(left[:4])]), torch.cat([right, right[:4]])
    with_none = separate(filter_, eigenvalues, none, train, 1e-2)
    assert with_none is not None and with_none.rank == plain.rank and with_none.error <= plain.error


def test_without_gradients_to_measure_by_the_route_is_exact():
    """Terms that fit a probe of zeros, or of nothing, would be any terms at all."""
    eigenvalues = spectrum(60, 80)
    filter_ = 1 / (eigenvalues + 0.1 * eigenvalues.mean())
    query, train = probe(eigenvalues, 8, 10), probe(eigenvalues, 100, 20)
    zeros = torch.zeros_like(train[0]), train[1]
    none = train[0][:0], train[1][:0]
    assert separate(filter_, eigenvalues, query, train, 1e-2) is not None
    assert separate(filter_, eigenvalues, query, zeros, 1e-2) is None
    assert separate(filter_, eigenvalues, query, none, 1e-2) is None


@pytest.mark.parametrize(("n", "separable"), [(8, False), (31, False), (64, True)])
def test_few_training_examples_take_the_exact_route(n, separable):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 64, generator=generator), torch.arange(n) % 10
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 10)).eval()
    method, exact = (
        uw.Influence(model, uw.Classification(), damping=1.0, tolerance=tolerance, progress=False).fit((x, y))
        for tolerance in (5e-2, 0)
    )
    scores, expected = (each.attribute((x[:5], y[:5])) for each in (method, exact))
    assert any("separable" in route for route in scores.info["routes"].values()) == separable
    error = float((scores.values - expected.values).norm() / expected.values.norm())
    assert error < (5e-2 if separable else 1e-6)


def test_later_terms_begin_later_within_the_tolerance():
    """With eigenvalues in ascending order, as `eigh` gives them, small corrections reach the largest ones only."""
    u, v = (10 ** -torch.linspace(9, 0, k, dtype=torch.float64) for k in (120, 96))
    eigenvalues = torch.outer(u, v) + 0.1 * torch.outer(u.sqrt(), v**1.5)
    filter_ = 1 / (eigenvalues + 0.1 * eigenvalues.mean())
    query, train = probe(eigenvalues, 16, 10), probe(eigenvalues, 200, 20)
    terms = separate(filter_, eigenvalues, query, train, 1e-3)
    assert terms is not None and terms.error <= 1e-3
    for k, (row, col) in enumerate(terms.starts):
        assert (terms.rows[:row, k] == 0).all() and (terms.cols[:col, k] == 0).all()
    kept = sum(120 - row + 96 - col for row, col in terms.starts) / (terms.rank * (120 + 96))
    assert kept < 0.9
    # The route that leaves the zeros out gives what all rows and columns give.
    found = spectral_scores(filter_, query, train, terms)
    assert_equal(found, exact_scores(terms.rows @ terms.cols.T, query, train))
    assert error_of_queries(found, exact_scores(filter_, query, train)) == pytest.approx(
        terms.error, rel=1e-6
    )


def spectral_scores(filter_, query, train, terms) -> Tensor:
    """Scores by the separable route, of factors that are in the eigenbasis already."""
    basis = Eigenbasis(*(torch.eye(k, dtype=torch.float64)[None] for k in filter_.shape))
    asked = Spectral(query[0][None, :, None], query[1][None, :, None], basis, filter_[None])
    block = Factored((Piece(train[0][:, None], train[1][:, None]),))
    return Router(terms={"layer": terms}).contract("layer", asked, block)


def test_a_rough_spectrum_is_left_to_the_exact_route():
    eigenvalues = random(60, 80).mul(3).exp()
    filter_ = 1 / (eigenvalues + 0.1 * eigenvalues.mean())
    assert separate(filter_, eigenvalues, probe(eigenvalues, 16, 1), probe(eigenvalues, 200, 2), 1e-3) is None


def test_exact_scores_are_the_filtered_inner_products():
    filter_ = random(4, 6).exp()
    query, train = (random(3, 4, seed=1), random(3, 6, seed=2)), (random(5, 4, seed=3), random(5, 6, seed=4))
    expected = torch.einsum("rc,qr,qc,nr,nc->qn", filter_, *query, *train)
    assert_equal(exact_scores(filter_, query, train), expected)


def test_a_product_spectrum_needs_one_term():
    """K-FAC's and the identity's filters are outer products: one term is exact."""
    filter_ = torch.outer(random(40, seed=1).exp(), random(50, seed=2).exp())
    query, train = (random(4, 40), random(4, 50)), (random(9, 40, seed=3), random(9, 50, seed=4))
    terms = separate(filter_, 1 / filter_, query, train, 1e-12)
    assert terms is not None and terms.rank == 1 and terms.error <= 1e-12


def test_dead_units_do_not_break_the_separation():
    eigenvalues = spectrum(40, 50)
    eigenvalues[7] = 0  # a unit that never fires, a pixel that is always black
    eigenvalues[:, 11] = 0
    filter_ = 1 / (eigenvalues + 0.1 * eigenvalues.mean())
    terms = separate(filter_, eigenvalues, probe(eigenvalues, 16, 1), probe(eigenvalues, 100, 2), 1e-2)
    assert terms is not None and terms.error <= 1e-2
    assert torch.isfinite(terms.rows).all() and torch.isfinite(terms.cols).all()


def test_no_tolerance_asks_for_the_exact_route():
    filter_ = random(40, 50).exp()
    query, train = (random(4, 40), random(4, 50)), (random(9, 40, seed=3), random(9, 50, seed=4))
    assert separate(filter_, 1 / filter_, query, train, 0.0) is None


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_every_query_is_within_the_tolerance_and_does_not_depend_on_the_others(curvature):
    """Terms are found on training gradients; noise has others, and takes exact routes, each query for itself."""
    train, (x, y) = digits()
    noise = 30 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    query = torch.cat([x, noise]), torch.cat([y, y])
    method, exact = (
        uw.Influence(
            trained("mlp"),
            uw.Classification(),
            curvature=curvature,
            tolerance=t,
            damping=1e-3,
            progress=False,
        ).fit(train)
        for t in (1e-3, 0)
    )
    scores, expected = method.attribute(query, per_layer=True), exact.attribute(query).values
    assert any("separable" in route for route in scores.info["routes"].values())
    errors = (scores.values - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.max()) < 2e-3 and float(errors.square().mean().sqrt()) < 1e-3
    if curvature == "ekfac":  # as the terms alone would not have been
        terms = method._router().terms
        inverse = method._fitted.curvature.inverse(method.damping)
        gradients = inverse @ method._query_gradients(uw.Examples(query), range(2 * len(x)))
        assert float(query_errors(gradients, inverse, terms)[len(x) :].min()) > 1e-3
    torch.testing.assert_close(sum(scores.layers.values()), scores.values)
    for few in (slice(0, 3), slice(len(x) - 2, len(x) + 2), slice(len(x), None)):
        alone = method.attribute(tuple(t[few] for t in query)).values
        assert float((alone - scores.values[few]).norm() / alone.norm()) < 1e-5
