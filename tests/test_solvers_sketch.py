"""The sketch that preconditions conjugate gradients, and the regulariser that low-rank methods do not leave out."""

import pytest
import torch
from operators import DenseOperator, SampledOperator, columns, relative, with_eigenvalues
from refusals import refused

from upweight.curvature.solvers import Arnoldi, ConjugateGradient, Nystrom, Sketch

P = 60


def decaying(smallest: float = -6) -> DenseOperator:
    return DenseOperator(with_eigenvalues(torch.logspace(0, smallest, P, dtype=torch.float64)))


@pytest.mark.parametrize("solver", [Arnoldi(rank=8, iterations=P), Nystrom(rank=8)], ids=lambda s: s.name)
@pytest.mark.parametrize("damping", [0.0, 0.02])
def test_the_regulariser_is_inverted_exactly_however_small_the_rank(solver, damping: float):
    """H = J^T J / n + l2 I of rank 6 but for the regulariser: eight directions know all the rest."""
    J = columns(P, 6, seed=2).T  # six examples of one output
    operator, b = SampledOperator(J[:, None], l2=0.03), columns(P, 5)
    solution = solver.solve(operator, b, damping)
    assert relative(solution.value, operator.solve(b, damping)) < 1e-9
    assert solution.info.converged
    operator.floor = 0.0  # who does not know of it is wrong by the factor of the dampings
    with pytest.warns(UserWarning, match="not converged"):
        assert relative(solver.solve(operator, b, 0.02).value, operator.solve(b, 0.02)) > 0.5


@pytest.mark.parametrize("positive", [True, False], ids=["nystrom", "ritz"])
def test_a_sketch_of_full_rank_is_the_inverse(positive: bool):
    operator, b = decaying(-2), columns(P, 3)
    operator.positive = positive
    M = Sketch(rank=P).inverse(operator, 1e-2, b)
    assert relative(M @ b, operator.solve(b, 1e-2)) < 1e-9


@pytest.mark.parametrize("positive", [True, False], ids=["nystrom", "ritz"])
def test_conjugate_gradients_need_few_steps_with_it(positive: bool):
    operator, b, damping = decaying(), columns(P, 1), 1e-4
    operator.positive = positive
    M = Sketch(rank=30).inverse(operator, damping, b)
    plain = ConjugateGradient(rtol=1e-8).solve(operator, b, damping)
    helped = ConjugateGradient(rtol=1e-8).solve(operator, b, damping, M)
    assert 3 * helped.info.iterations <= plain.info.iterations
    assert relative(helped.value, operator.solve(b, damping)) < 1e-6


def test_negative_curvature_is_left_out_of_the_sketch():
    values = torch.cat([torch.tensor([-3.0, 5.0, 2.0]), torch.full((P - 3,), 1e-3)]).double()
    operator = DenseOperator(with_eigenvalues(values), positive=False)
    found, vectors = Sketch(rank=20).eigenpairs(operator, columns(P, 1))
    assert float(found.min()) > 0
    assert relative(found[:2], torch.tensor([5.0, 2.0]).double()) < 1e-6
    assert relative(vectors.T @ vectors, torch.eye(len(found)).double()) < 1e-12


def test_it_is_drawn_once_and_refuses_what_it_cannot_divide_by():
    operator, b, sketch = decaying(), columns(P, 1), Sketch(rank=10)
    sketch.inverse(operator, 1e-2, b)
    sketch.inverse(operator, 1e-3, b)
    assert operator.products == 10
    nothing = DenseOperator(torch.zeros(P, P, dtype=torch.float64))
    with refused("sketch needs damping > 0"):
        Sketch(rank=10).inverse(nothing, 0.0, b)
    with refused("rank=0"):
        Sketch(rank=0)
