"""Arnoldi and Nyström: eigenpairs, breakdown, the complement, what is kept between solves."""

import gc

import pytest
import torch
from operators import DenseOperator, SampledOperator, columns, relative, rotation, with_eigenvalues
from refusals import refused
from torch import Tensor

from upweight.curvature.solvers import Arnoldi, LowRankInverse, Nystrom

P = 40


def decaying(dtype: torch.dtype = torch.float64) -> DenseOperator:
    return DenseOperator(with_eigenvalues(torch.logspace(0, -6, P, dtype=torch.float64)).to(dtype))


@pytest.mark.filterwarnings("ignore:.*not converged")
@pytest.mark.parametrize("complement", [True, False])
def test_the_largest_eigenpairs_are_inverted_and_the_rest_has_no_curvature(complement: bool):
    values = torch.cat([torch.tensor([9.0, -7, 5, 3]), torch.linspace(-0.1, 0.1, P - 4)]).double()
    Q = rotation(P, seed=3)
    operator, b, damping = DenseOperator((Q * values) @ Q.T, positive=False), columns(P, 5), 0.5
    solution = Arnoldi(rank=4, iterations=P, complement=complement).solve(operator, b, damping)
    E = Q[:, :4]
    expected = (E / (values[:4] + damping)) @ E.T @ b
    if complement:
        expected += (b - E @ E.T @ b) / damping
    assert relative(solution.value, expected) < 1e-10
    assert solution.info.notes["negative_eigenvalues"] == 1
    assert solution.info.notes["rank"] == 4 and solution.info.iterations == P


def test_a_krylov_space_that_ends_early_goes_on_in_a_fresh_direction():
    """Repeated eigenvalues: one start vector sees one direction of each."""
    for values in (torch.tensor([2.0] * 5 + [1.0] * 10), torch.zeros(15), torch.ones(15)):
        operator = DenseOperator(with_eigenvalues(values.double()))
        found, vectors = Arnoldi(rank=15).eigenpairs(operator, columns(15, 1))
        torch.testing.assert_close(found, values.double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            vectors.T @ vectors, torch.eye(15, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_the_basis_stays_orthogonal_in_float32():
    _, vectors = Arnoldi(rank=P).eigenpairs(decaying(torch.float32), columns(P, 1, dtype=torch.float32))
    assert float((vectors.T @ vectors - torch.eye(P)).abs().max()) < 1e-5


@pytest.mark.filterwarnings("ignore:.*not converged")
@pytest.mark.parametrize("solver", [Arnoldi(rank=8), Nystrom(rank=8)], ids=lambda s: s.name)
def test_the_factor_is_computed_once_per_operator(solver: Arnoldi | Nystrom):
    operator, b = decaying(), columns(P, 3)
    first = solver.solve(operator, b, 1e-2)
    again = solver.solve(operator, columns(P, 2, seed=7), 1e-3)
    assert first.info.products > 8 and again.info.products == 2  # the check of the residual
    fresh = type(solver)(rank=8).solve(decaying(), columns(P, 2, seed=7), 1e-3)
    assert torch.equal(again.value, fresh.value)
    other = DenseOperator(2 * operator.H)  # a new operator is not mistaken for the old one
    assert solver.solve(other, b, 1e-2).info.products > 8
    assert solver.solve(DenseOperator(operator.H.float()), b.float(), 1e-2).value.dtype == torch.float32
    del other
    gc.collect()


@pytest.mark.filterwarnings("ignore:.*not converged")
def test_more_rank_is_nearer():
    operator, b = decaying(), columns(P, 4)
    truth = operator.solve(b, 1e-3)
    for solver in (Arnoldi, Nystrom):
        errors = []
        for rank in (4, 12, 24, P):
            errors.append(relative(solver(rank=rank).solve(operator, b, 1e-3).value, truth))
        assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-8


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_a_sketch_as_wide_as_the_rank_is_exact(rank: int):
    J = torch.randn(rank, 1, P, dtype=torch.float64)
    operator, b = SampledOperator(J), columns(P, 3)
    solution = Nystrom(rank=rank + 2, rtol=1e-6).solve(operator, b, 1e-2)
    assert relative(solution.value, operator.solve(b, 1e-2)) < 1e-8


def test_nystrom_equals_its_formula():
    """``(1/damping) [b - C (damping K + C^T C)^-1 C^T b]`` with ``C = H W`` and ``K = W^T C``."""
    operator, damping = DenseOperator(with_eigenvalues(torch.linspace(0.1, 3, P, dtype=torch.float64))), 0.3
    b = columns(P, 2)
    inverse = Nystrom(rank=6, seed=5).preconditioner(operator, damping, b)
    drawn = torch.randn(P, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    C = operator.H @ drawn
    core = damping * drawn.T @ C + C.T @ C
    expected = (b - C @ torch.linalg.solve(core, C.T @ b)) / damping
    assert relative(inverse @ b, expected) < 1e-10


def test_nystrom_eigenvalues_never_exceed_those_of_the_operator():
    operator = decaying()
    inverse = Nystrom(rank=10).preconditioner(operator, 1e-2, columns(P, 1))
    truth = torch.linalg.eigvalsh(operator.H).flip(0)[:10]
    assert bool((inverse.values.sort(descending=True).values <= truth * (1 + 1e-10)).all())
    assert bool((inverse.values >= 0).all())


def test_damping_is_needed_outside_the_subspace():
    operator, b = decaying(), columns(P, 1)
    for solver in (Arnoldi(rank=3), Nystrom(rank=3)):
        with refused("needs damping > 0, got 0"):
            solver.solve(operator, b, 0.0)
    with refused("may have negative eigenvalues"):
        Nystrom(rank=3).solve(DenseOperator(operator.H, positive=False), b, 1e-2)


def test_a_damping_that_cancels_an_eigenvalue_is_refused():
    values = torch.linspace(1, 2, P, dtype=torch.float64)
    values[0] = -3
    with refused("met the eigenvalue -3"):
        Arnoldi(rank=P).solve(DenseOperator(torch.diag(values), positive=False), columns(P, 1), 3.0)


def test_a_curvature_of_zeros():
    b: Tensor = columns(P, 2)
    for solver in (Arnoldi(rank=3), Nystrom(rank=3)):
        solution = solver.solve(DenseOperator(torch.zeros(P, P, dtype=torch.float64)), b, 0.5)
        assert relative(solution.value, 2 * b) < 1e-10


def test_low_rank_inverse_equals_the_dense_one():
    U = rotation(P)[:, :5]
    values = torch.linspace(1, 3, 5, dtype=torch.float64)
    inverse = LowRankInverse(U, values, 0.1)
    dense = torch.linalg.inv((U * values) @ U.T + 0.1 * torch.eye(P, dtype=torch.float64))
    assert relative(inverse @ torch.eye(P, dtype=torch.float64), dense) < 1e-12
