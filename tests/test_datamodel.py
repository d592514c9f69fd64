"""The datamodel: exact where outcomes are additive, honest about subsets that it has not seen, and what it refuses."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from refusals import refused
from scipy.stats import spearmanr
from sklearn.linear_model import Lasso, Ridge

import upweight as uw
from upweight.attributors.datamodel import regression
from upweight.evaluate import subsets

N, QUERIES = 12, 3
TASK = uw.Classification()
TRAIN, QUERY = torch.zeros(N, 1), torch.zeros(QUERIES, 1)


@dataclass
class Outcomes:
    """As a retraining bank gives them."""

    masks: np.ndarray
    values: np.ndarray
    query_ids: list
    unit: str = "nats"
    higher_is_better: bool = False
    blocks: np.ndarray | None = None


def any_size(count: int, n: int = N, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, n)) < 0.5


def halves(pairs: int, n: int = N, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    first = np.stack([generator.permutation(n) < n // 2 for _ in range(pairs)])
    return np.stack([first, ~first], 1).reshape(2 * pairs, n)


def additive(masks: np.ndarray, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes ``b + Z w`` [subset, query] and w [query, train]."""
    generator = np.random.default_rng(7)
    w = generator.standard_normal((QUERIES, masks.shape[1]))
    values = generator.standard_normal(QUERIES) + masks @ w.T
    return values + noise * values.std(0) * generator.standard_normal(values.shape), w


def datamodel(masks, values, **options) -> uw.Scores:
    n, queries = masks.shape[1], values.shape[-1]
    method = uw.Datamodel(None, TASK, outcomes=(masks, values), **options).fit(torch.zeros(n, 1))
    return method.attribute(torch.zeros(queries, 1))


# I26: exact where the truth is linear ------------------------------------------------------------------------------


def test_least_squares_recovers_an_additive_utility():
    masks = any_size(60)
    values, w = additive(masks)
    scores = datamodel(masks, values, alpha=0)
    assert np.abs(scores.values.numpy() + w).max() < 1e-8 * np.abs(w).max()
    assert scores.info["identified"] == "fully" and scores.unit == "nats"
    assert scores.info["held_out_lds"] == pytest.approx(1.0)
    assert scores.info["subset_fraction"] == pytest.approx(masks.mean())
    effect = scores.removal_effect([0, 3]).numpy()  # of removing two, which is additive here
    assert np.abs(effect + w[:, [0, 3]].sum(1)).max() < 1e-8


def test_subsets_of_one_size_leave_a_constant_open_and_it_is_said():
    masks = halves(40)
    values, w = additive(masks)
    scores = datamodel(masks, values, alpha=0)
    relative = w - w.mean(1, keepdims=True)
    assert np.abs(scores.values.numpy() + relative).max() < 1e-8
    assert scores.info["identified"].startswith("up to a constant per query")


def test_difference_of_means_is_the_same_contrast_for_balanced_masks():
    """A full factorial: every pair of examples is in or out equally often, so least squares is the contrast."""
    masks = np.array([[bool(k >> i & 1) for i in range(6)] for k in range(64)])
    values, w = additive(masks)
    difference = datamodel(masks, values, estimator="difference").values.numpy()
    assert np.abs(difference + w).max() < 1e-8
    assert np.abs(difference - datamodel(masks, values, alpha=0).values.numpy()).max() < 1e-8


def test_shapley_values_of_a_game_with_interactions():
    """Every subset of 4, every size as often: the values are those of the definition, by all orders."""
    n, rng = 4, np.random.default_rng(0)
    worth = {ids: rng.standard_normal() for k in range(n + 1) for ids in itertools.combinations(range(n), k)}
    phi = np.zeros(n)
    for order in itertools.permutations(range(n)):
        for place, i in enumerate(order):
            before = tuple(sorted(order[:place]))
            phi[i] += (worth[tuple(sorted((*before, i)))] - worth[before]) / math.factorial(n)
    often = [ids for ids in worth if 0 < len(ids) < n for _ in range(12 // math.comb(n, len(ids)))]
    masks = np.array([[i in ids for i in range(n)] for ids in often])
    values = np.array([[worth[ids]] for ids in often])
    found = -datamodel(masks, values, estimator="shapley", folds=2).values.numpy()[0]
    assert found - found.mean() == pytest.approx(phi - phi.mean(), abs=1e-12)


def test_shapley_values_by_sampling():
    """An additive game's values are its weights; sampled sizes and complements find them."""
    weights = np.random.default_rng(1).standard_normal(12)
    drawn = subsets.any_size(12, 4000)
    assert (drawn.masks[0::2] ^ drawn.masks[1::2]).all()
    share = np.bincount(drawn.masks.sum(1), minlength=13)[1:12] / 4000
    assert share == pytest.approx(np.full(11, 1 / 11), abs=0.03)
    found = -datamodel(drawn.masks, drawn.masks @ weights[:, None], estimator="shapley").values.numpy()[0]
    assert np.corrcoef(found, weights)[0, 1] > 0.99
    assert np.polyfit(weights, found, 1)[0] == pytest.approx(1, abs=0.05)
    with refused("expected all sizes below the whole alike"):
        datamodel(subsets.half_subsets(12, 40).masks, np.ones((40, 1)), estimator="shapley")
    tossed = np.random.default_rng(0).random((400, 12)) < 0.5  # of many sizes, but most near a half
    with refused("expected all sizes below the whole alike"):
        datamodel(tossed, np.ones((400, 1)), estimator="shapley")
    some = subsets.any_size(100, 200, least=0.3, most=0.7).masks  # the mean over these sizes
    assert datamodel(some, np.ones((len(some), 1)), estimator="shapley").values.shape == (1, 100)
    with refused("each comes with its complement"):
        subsets.any_size(12, 4, least=0.5)


def test_difference_of_means_by_hand():
    masks = any_size(30)
    values, _ = additive(masks, noise=0.5)
    found = datamodel(masks, values, estimator="difference").values.numpy()
    for q in range(QUERIES):
        for i in range(N):
            inside = masks[:, i]
            assert found[q, i] == pytest.approx(values[~inside, q].mean() - values[inside, q].mean())
    masks[:, 4] = True  # in all of them: nothing can be said
    assert not datamodel(masks, values, estimator="difference").values[:, 4].any()


# Penalties ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [any_size(40), halves(20), any_size(30, 50), halves(15, 50)])
@pytest.mark.parametrize("alpha", [0.3, 0.02])
def test_penalised_weights_are_scikit_learns(masks, alpha):
    values, _ = additive(masks, noise=0.3)
    found = datamodel(masks, values, alpha=alpha).values.numpy()
    for q in range(QUERIES):
        truth = Lasso(alpha=alpha, tol=1e-12, max_iter=100_000).fit(masks.astype(float), values[:, q]).coef_
        loss = [
            np.square(values[:, q] - values[:, q].mean() - (masks - masks.mean(0)) @ w).sum()
            / (2 * len(masks))
            + alpha * np.abs(w).sum()
            for w in (-found[q], truth)
        ]
        assert loss[0] <= loss[1] * (1 + 1e-8)  # a minimum may have several arguments
        if masks.shape[1] < len(masks) and len({mask.sum() for mask in masks}) > 1:
            assert np.abs(found[q] + truth).max() < 1e-6
    found = datamodel(masks, values, estimator="ridge", alpha=alpha).values.numpy()
    truth = Ridge(alpha=alpha * len(masks)).fit(masks.astype(float), values).coef_
    assert np.abs(found + truth).max() < 1e-8


def test_a_sparse_truth_is_found_by_the_lasso():
    masks, n = halves(100, 60), 60
    w = np.zeros((QUERIES, n))
    for q in range(QUERIES):
        w[q, [q, 10 + q, 20 + q]] = [-2.0, 1.5, -1.0]
    values = masks @ w.T + 0.5 * np.random.default_rng(0).standard_normal((200, QUERIES))
    scores = datamodel(masks, values)
    for q in range(QUERIES):
        assert set(scores.top_k(2).ids[q]) == {q, 20 + q} and scores.bottom_k(1).ids[q] == [10 + q]
    assert scores.info["held_out_lds"] > 0.85 and scores.info["nonzero"] < 40


# The held-out score ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["lasso", "ridge", "difference"])
def test_the_held_out_lds_of_noise_is_zero(estimator):
    """Pairs of complements would give noise away if they were split: 40 queries bring its deviation to about .03."""
    masks = halves(30, 40)
    values = np.random.default_rng(3).standard_normal((60, 40))
    info = datamodel(masks, values, estimator=estimator).info
    assert abs(info["held_out_lds"]) < 0.12
    fit = datamodel(masks, values, estimator="ridge", alpha=1e-6)
    predicted = (1 - masks) @ fit.values.numpy().T
    in_sample = np.mean([spearmanr(predicted[:, q], values[:, q])[0] for q in range(40)])
    assert in_sample > 0.6  # what evaluating on the masks of the fit would have claimed


def test_the_held_out_lds_is_what_new_subsets_show():
    masks, new = halves(60, 30), halves(200, 30, seed=5)
    values, w = additive(masks, noise=1.0)
    noise = np.random.default_rng(11).standard_normal((400, QUERIES))
    clean = new @ w.T
    truth = clean + noise * (masks @ w.T).std(0)
    scores = datamodel(masks, values, estimator="ridge")
    shown = regression.spearman(((1 - new) @ scores.values.numpy().T).T, truth.T).mean()
    assert scores.info["held_out_lds"] == pytest.approx(shown, abs=0.15) and shown > 0.3
    assert scores.info["held_out_lds"] == pytest.approx(np.mean(scores.info["held_out_lds_by_query"]))


def test_subsets_that_belong_together_are_never_on_both_sides():
    masks = np.concatenate([halves(6), halves(6)[:3], any_size(9, seed=4)])
    blocks = np.arange(len(masks))
    blocks[-1] = blocks[-2]
    groups = regression.groups_of(masks, blocks)
    for a in range(len(masks)):
        for b in range(a):
            same = (masks[a] == masks[b]).all() or (masks[a] != masks[b]).all() or blocks[a] == blocks[b]
            assert same <= (groups[a] == groups[b])
    assert len(np.unique(groups)) == 6 + 9 - 1
    folds = regression.split(groups, 3, 0)
    assert sorted(np.concatenate(folds)) == list(range(len(masks)))
    assert not any(set(groups[a]) & set(groups[b]) for a in folds for b in folds if a is not b)


def test_rank_correlation_equals_scipys():
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 6, (4, 20)), generator.standard_normal((4, 20))
    assert regression.spearman(x, y) == pytest.approx([spearmanr(a, b)[0] for a, b in zip(x, y)])
    assert regression.spearman(np.ones((1, 5)), y[:1, :5]).tolist() == [0.0]


def test_queries_that_nothing_changes_score_zero():
    masks = any_size(40)
    values, _ = additive(masks)
    values[:, 1] = 3.25
    for estimator in ("lasso", "ridge", "difference"):
        assert not datamodel(masks, values, estimator=estimator).values[1].abs().gt(1e-12).any()


# Outcomes of a bank ------------------------------------------------------------------------------------------------


def test_outcomes_of_a_bank_are_means_over_seeds_by_query_id():
    masks = any_size(50)
    values, w = additive(masks)
    seeds = np.stack([values - 0.5, values + 0.5], 1)  # [subset, seed, query]
    seeds[7, 1, 2] = np.nan  # a failed run: its subset is left out
    bank = Outcomes(masks, seeds, ["a", "b", "c"])
    method = uw.Datamodel(None, TASK, outcomes=bank, alpha=0).fit(TRAIN, ids=[f"x{i}" for i in range(N)])
    scores = method.attribute(QUERY[:2], ids=["c", "a"])
    assert np.abs(scores.values.numpy() + w[[2, 0]]).max() < 1e-8
    assert scores.query_ids == ["c", "a"] and scores.train_ids[1] == "x1"
    assert scores.info["subsets_dropped"] == 1 and scores.info["subsets"] == 49
    assert method.attribute(QUERY).query_ids == [0, 1, 2]
    with refused("the bank did not measure the queries 'd'"):
        method.attribute(QUERY[:1], ids=["d"])
    with refused("2 queries without ids for outcomes of 3"):
        method.attribute(QUERY[:2])
    with refused("the outcomes are in 'nats' and the task measures 'log-odds'"):
        uw.Datamodel(None, uw.Classification("margin"), outcomes=bank)


def test_a_margin_is_oriented_once():
    """Outcomes are in loss orientation; a removal effect is in the measurement's own direction."""
    masks = any_size(50)
    values, w = additive(masks)
    bank = Outcomes(masks, values[:, None], [0, 1, 2], unit="log-odds", higher_is_better=True)
    method = uw.Datamodel(None, uw.Classification("margin"), outcomes=bank, alpha=0).fit(TRAIN)
    scores = method.attribute(QUERY)
    assert np.abs(scores.values.numpy() + w).max() < 1e-8
    assert torch.allclose(scores.removal_effect([2]), torch.from_numpy(w[:, 2]))


def test_what_does_not_fit_is_refused():
    masks = any_size(40)
    values, _ = additive(masks)
    wrong = {
        "expected bank.outcomes": {"outcomes": values},
        "masks have shape": {"outcomes": (masks, values[:-1])},
        "other values than 0 and 1": {"outcomes": (2 * masks, values)},
        "1 values are infinite": {"outcomes": (masks, np.where(values == values[0, 0], np.inf, values))},
        "0 of 40 subsets have all their values": {"outcomes": (masks, np.full_like(values, np.nan))},
        "estimator='ols' is unknown": {"outcomes": (masks, values), "estimator": "ols"},
        "expected 'cv' or a finite number": {"outcomes": (masks, values), "alpha": -1.0},
        "which has no penalty": {"outcomes": (masks, values), "estimator": "difference", "alpha": 0},
        "folds=5 with 10 independent subsets": {"outcomes": (halves(10), values[:20])},
        "alpha=0 with 12 subsets for 12": {"outcomes": (masks[:12], values[:12]), "folds": 3, "alpha": 0},
    }
    for message, options in wrong.items():
        with refused(message):
            uw.Datamodel(None, TASK, **options)
    method = uw.Datamodel(None, TASK, outcomes=(masks, values))
    with refused("not fitted yet"):
        method.attribute(QUERY)
    with refused("the masks are of 12 training examples but the data holds 3"):
        method.fit(QUERY)
    with refused("2 queries for outcomes of 3 that have no ids"):
        method.fit(TRAIN).attribute(QUERY[:2])
    with refused("has no self-influence by itself"):
        method.self_influence()
