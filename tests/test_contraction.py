"""Every route of ``queries @ train.T`` gives what the dense matrices give, on every case and on grids of shapes."""

import itertools

import pytest
import torch
from cases_all import EXACT, N, each, track
from torch import Tensor

from upweight.data import map_tensors
from upweight.errors import UpweightError
from upweight.gradients import Dense, Eigenbasis, Factored, Gradients, Router, Sparse, Spectral, contraction
from upweight.gradients.blocks import Piece
from upweight.gradients.operations import Patches
from upweight.gradients.separable import Terms

ROUTES = ("ghost", "dense", "stream", "sparse")
Q = 3
TOLERANCE = 1e-10


def assert_equal(found: Tensor, expected: Tensor):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def densely(gradients: Gradients) -> Gradients:
    return Gradients({name: Dense(block.dense()) for name, block in gradients.items()})


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Cases


@each(EXACT)
def test_every_route_equals_the_dense_answer(case):
    _, batch, tracker = track(case)
    train = tracker.train(batch, range(N))
    query = tracker.train(map_tensors(batch, lambda t: t[:Q]), range(Q))
    expected = {name: query[name].dense() @ train[name].dense().T for name in train}
    for route in ROUTES:
        for asked in (query, densely(query)):  # factored as captured, and dense as after preconditioning
            router = Router(force=route)
            for name, found in asked.with_router(router).by_layer(train.T).items():
                if route in router.options(name, asked[name], train[name]):
                    assert router.chosen[name] == route
                assert_equal(found, expected[name])
            assert_equal(asked.with_router(router) @ train.T, query.dense() @ train.dense().T)


@each([case for case in EXACT if case.longer is not None])
def test_queries_may_be_of_other_lengths_than_training_examples(case):
    _, batch, tracker = track(case)
    query, train = tracker.train(case.batch(Q, longer=True), range(Q)), tracker.train(batch, range(N))
    for route in ROUTES:
        assert_equal(query.with_router(Router(force=route)) @ train.T, query.dense() @ train.dense().T)


def test_every_route_is_met_by_some_case():
    met = set()
    for case in EXACT[::3]:
        if case.warning:
            continue
        _, batch, tracker = track(case)
        train = tracker.train(batch, range(N))
        for query in (train, densely(train)):
            met |= {route for name in train for route in Router().options(name, query[name], train[name])}
    assert met == set(ROUTES)


# Grids of shapes


def product(
    n: int, positions: int, rows: int, cols: int, groups: int = 1, ones: bool = False, seed: int = 0
) -> Factored:
    left = random(n, positions, groups * rows, seed=seed)
    if groups == 1:
        return Factored((Piece(left, random(n, positions, cols, seed=seed + 1)),), ones=ones)
    maps = random(
        n, 1, positions, groups * cols, seed=seed + 1
    )  # windows of one pixel see their own channels only
    one_pixel = Patches((1,), (1,), ((0, 0),), (1,))
    return Factored((Piece(left, maps, one_pixel, (positions,)),), groups, ones)


GRID = list(itertools.product((1, 2, 5), (1, 3), (1, 4), (1, 6), (1, 2), (False, True)))


@pytest.mark.parametrize("route", ["ghost", "dense", "stream"])
def test_products_of_any_shape(route):
    for q_positions, positions, rows, cols, groups, ones in GRID:
        query = product(4, q_positions, rows, cols, groups, ones, seed=2)
        train = product(7, positions, rows, cols, groups, ones)
        expected = query.dense() @ train.dense().T
        assert_equal(Router(force=route).contract("layer", query, train), expected)
        assert_equal(Router(force=route).contract("layer", Dense(query.dense()), train), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_dense_is_the_sum_of_outer_products(groups):
    block = product(3, 4, 2, 5, groups, ones=True)
    left, right = block.left(), block.right()
    expected = torch.zeros(3, groups, 2, 6, dtype=torch.float64)
    for b, g, t in itertools.product(range(3), range(groups), range(4)):
        expected[b, g] += torch.outer(left[g, b, t], right[g, b, t])
    assert_equal(block.dense(), expected.flatten(1))
    assert torch.equal(right[..., -1], torch.ones(groups, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("route", ["ghost", "dense", "stream"])
def test_uses_are_summed_before_they_are_multiplied(route):
    def used_twice(n: int, positions: tuple[int, int], seed: int) -> Factored:
        return Factored(
            tuple(product(n, t, 3, 4, seed=seed + 10 * t).pieces[0] for t in positions), ones=True
        )

    query, train = used_twice(2, (1, 3), 5), used_twice(6, (4, 2), 6)
    assert query.positions == 4
    for block in (query, train):
        parts = sum(Factored((piece,), ones=True).dense() for piece in block.pieces)
        assert_equal(block.dense(), parts)
    assert_equal(Router(force=route).contract("layer", query, train), query.dense() @ train.dense().T)


@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_embeddings_of_any_shape(route):
    for q_positions, positions, rows, width in itertools.product((1, 4), (1, 3, 6), (1, 5), (1, 2)):
        g = torch.Generator().manual_seed(positions)
        ids_q, ids_t = (
            torch.randint(0, rows, (n, t), generator=g) for n, t in ((4, q_positions), (7, positions))
        )
        query = Sparse(ids_q, random(4, q_positions, width, seed=1), (rows, width))
        train = Sparse(ids_t, random(7, positions, width, seed=2), (rows, width))
        expected = torch.zeros(7, rows, width, dtype=torch.float64)
        for b, t in itertools.product(range(7), range(positions)):
            expected[b, ids_t[b, t]] += train.rows[b, t]
        assert_equal(train.dense(), expected.flatten(1))
        assert_equal(Router(force=route).contract("layer", query, train), query.dense() @ train.dense().T)
        assert_equal(Router().contract("layer", Dense(query.dense()), train), query.dense() @ train.dense().T)


@pytest.mark.parametrize("budget", [1, 4000])
@pytest.mark.parametrize("route", ROUTES)
def test_tiles_do_not_change_the_answer(route, budget, monkeypatch):
    """A budget of one byte gives tiles of one example."""
    monkeypatch.setattr(contraction, "TILE_BYTES", budget)
    monkeypatch.setattr(contraction.tiles, "__defaults__", (budget,))
    if route == "sparse":
        g = torch.Generator().manual_seed(0)
        query = Sparse(torch.randint(0, 3, (4, 2), generator=g), random(4, 2, 5), (3, 5))
        train = Sparse(torch.randint(0, 3, (7, 6), generator=g), random(7, 6, 5, seed=1), (3, 5))
    else:
        query, train = product(4, 2, 3, 5, ones=True), product(7, 3, 3, 5, ones=True, seed=4)
    for asked in (query, Dense(query.dense())):
        assert_equal(Router(force=route).contract("layer", asked, train), query.dense() @ train.dense().T)


def test_tiles_cover_all_examples_once_and_stay_within_the_budget():
    block = product(10, 3, 4, 5)
    bytes_each = contraction.example_bytes(block)
    slices = list(contraction.tiles(block, 3 * bytes_each))
    assert [(s.start, s.stop) for s in slices] == [(0, 3), (3, 6), (6, 9), (9, 10)]


def test_the_router_takes_the_cheapest_route_and_says_so():
    tall = (
        product(4, 1, 40, 50),
        product(6, 1, 40, 50, seed=1),
    )  # one position: two Gram matrices beat gradients
    long = (
        product(64, 300, 2, 2),
        product(64, 300, 2, 2, seed=1),
    )  # many positions of a tiny layer: the reverse
    router = Router()
    router.contract("tall", *tall)
    router.contract("long", *long)
    assert router.chosen == {"tall": "ghost", "long": "dense"}


# Concatenation


def test_blocks_of_different_lengths_are_concatenated():
    def sparse(n: int, positions: int, seed: int) -> Sparse:
        ids = torch.randint(0, 5, (n, positions), generator=torch.Generator().manual_seed(seed))
        return Sparse(ids, random(n, positions, 2, seed=seed), (5, 2))

    pairs = [
        (product(2, 3, 4, 5), product(3, 3, 4, 5, seed=9)),
        (product(2, 3, 4, 5), product(3, 6, 4, 5, seed=9)),
        (product(2, 3, 4, 5), Dense(random(3, 20))),
        (Dense(random(3, 20)), product(2, 3, 4, 5)),
        (sparse(2, 3, 0), sparse(4, 6, 1)),
    ]
    for one, other in pairs:
        both = Gradients.concatenate([Gradients({"layer": one}), Gradients({"layer": other})])
        assert_equal(both.dense(), torch.cat([one.dense(), other.dense()]))


def test_gradients_of_different_trackers_are_refused():
    one, other = Gradients({"a": product(2, 1, 3, 4)}), Gradients({"b": product(2, 1, 3, 4)})
    with pytest.raises(UpweightError, match="hold different layers"):
        one @ other.T
    with pytest.raises(UpweightError, match=r"layers hold \[2, 3\] examples"):
        Gradients({"a": product(2, 1, 3, 4), "b": product(3, 1, 3, 4)})


# Preconditioned queries


def spectral(query: Factored, filter_: Tensor, seed: int = 0) -> Spectral:
    groups, rows, cols = filter_.shape
    bases = [torch.linalg.qr(random(groups, k, k, seed=seed + k))[0] for k in (rows, cols)]
    basis = Eigenbasis(*bases)
    return Spectral(*basis.rotate(query), basis, filter_)


def test_spectral_queries_are_filtered_in_the_eigenbasis():
    for positions, groups in itertools.product((1, 4), (1, 2)):
        query, train = product(3, positions, 4, 5, groups), product(6, 2, 4, 5, groups, seed=3)
        asked = spectral(query, random(groups, 4, 5, seed=7).exp())
        expected = []
        gradients = query.dense().reshape(3, groups, 4, 5)
        for g in range(groups):
            Qr, Qc = asked.basis.rows[g], asked.basis.cols[g]
            expected.append(Qr @ (asked.filter[g] * (Qr.T @ gradients[:, g] @ Qc)) @ Qc.T)
        dense = torch.stack(expected, 1).flatten(1)
        assert_equal(asked.dense(), dense)
        router = Router()
        assert_equal(router.contract("layer", prepared(router, asked), train), dense @ train.dense().T)


def prepared(router: Router, block: Spectral):
    return router.prepare(Gradients({"layer": block}))["layer"]


def full_rank(filter_: Tensor) -> Terms:
    left, values, right = torch.linalg.svd(filter_, full_matrices=False)
    return Terms(left * values, right.mT, 0.0)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (5, 1), (300, 3)])
def test_separable_route_of_full_rank_is_exact(shape):
    query, train = (
        product(300, 1, *shape),
        product(530, 1, *shape, seed=5),
    )  # more than one tile of the result
    asked = spectral(query, random(1, *shape, seed=2).exp())
    router = Router(terms={"layer": full_rank(asked.filter[0])})
    assert prepared(router, asked) is asked
    assert_equal(router.contract("layer", asked, train), asked.dense() @ train.dense().T)
    assert router.chosen["layer"] == f"separable, {min(shape)} terms"


def test_separable_terms_are_not_used_where_they_do_not_apply():
    asked = spectral(product(3, 2, 4, 6), random(1, 4, 6).exp())  # two positions
    router = Router(terms={"layer": full_rank(asked.filter[0])})
    assert isinstance(prepared(router, asked), Dense)
    train = product(5, 1, 4, 6, seed=5)
    assert_equal(router.contract("layer", prepared(router, asked), train), asked.dense() @ train.dense().T)


@pytest.mark.parametrize(
    ("queries", "positions", "rows", "columns", "route"),
    [
        (1, 1, 512, 785, "stream"),
        (200, 1, 512, 785, "stream"),
        (8, 4, 2048, 2049, "stream"),
        (64, 16, 128, 1152, "dense"),
        (16, 128, 384, 129, "dense"),
    ],
)
def test_routes_that_were_measured(queries, positions, rows, columns, route, monkeypatch):
    """Formed gradients of a wide layer with few positions are many bytes, and few at a time meet all queries: streaming
    took a half to a quarter of the time there, and up to twenty times as long elsewhere."""
    monkeypatch.setattr(contraction, "measured_rates", lambda *_: contraction.Rates(60e9, 33e9, 22e9))
    train = Factored((Piece(torch.zeros(32, positions, rows), torch.zeros(32, positions, columns)),))
    assert Router().route("layer", Dense(torch.zeros(queries, rows * columns)), train) == route
