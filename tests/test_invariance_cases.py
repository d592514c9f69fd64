"""Scores of every kind of layer do not depend on how they were computed: `test_invariance` asks it of real networks.

To 1e-5; or, where eigenvalues of K-FAC's factors are so close that the rounding of float32 turns their vectors by more
than that, to twice the error of the scores beside float64's: two of such errors may be so far apart. Never beyond 5e-5.
"""

from contextlib import contextmanager

import torch
from cases import Case
from cases_all import CASES, each
from torch import Tensor

import upweight as uw
from upweight.data import map_tensors

TRAIN, QUERIES = 12, 5


def influence(case: Case, cache=None, dtype: torch.dtype = torch.float32, **options) -> uw.Influence:
    model, train = case.build(dtype), case.batch(TRAIN, dtype, seed=3)
    options |= {"parameters": case.parameters, "autocast": case.autocast, "progress": False}
    return uw.Influence(model, case.task(), fisher="empirical", **options).fit(train, cache=cache)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference in a row relative to the row's largest score; the worst row."""
    return float(((found - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@each(CASES)
def test_scores_do_not_depend_on_how_they_were_computed(case: Case, tmp_path, monkeypatch):
    query, double = (case.batch(QUERIES, dtype, seed=4) for dtype in (torch.float32, torch.float64))
    method, truth = influence(case), influence(case, dtype=torch.float64)
    scores, own = method.attribute(query).values, method.self_influence().values
    of_scores = min(5e-5, max(1e-5, 2 * error(scores, truth.attribute(double).values)))
    of_own = min(5e-5, max(1e-5, 2 * error(own, truth.self_influence().values)))

    def assert_unchanged(other: uw.Influence) -> None:
        assert error(other.attribute(query).values, scores) < of_scores
        assert error(other.self_influence().values, own) < of_own

    with threads(2):
        assert_unchanged(influence(case, batch_size=5))
    assert_unchanged(influence(case, memory=1 << 13))  # little is kept, the rest computed anew
    assert_unchanged(influence(case, tmp_path))
    order = torch.tensor([3, 0, 4, 2, 1])
    turned = map_tensors(query, lambda t: t[order])
    assert error(method.attribute(turned).values, scores[order]) < of_scores
    monkeypatch.setattr(method, "_panel_size", lambda queries: 2)
    assert_unchanged(method)
