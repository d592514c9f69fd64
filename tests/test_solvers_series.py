"""LiSSA and ASTRA: the filter of a truncated series, fixed points, mini-batches, divergence."""

import pytest
import torch
from operators import DenseInverse, DenseOperator, SampledOperator, columns, relative, with_eigenvalues
from refusals import refused
from torch import Tensor

from upweight.curvature.solvers import Astra, Jacobi, Lissa
from upweight.curvature.solvers.common import largest_eigenvalue, minibatches

P = 10


def examples(n: int = 120, seed: int = 2) -> SampledOperator:
    J = torch.randn(n, 2, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SampledOperator(J * torch.logspace(0, -1, P, dtype=torch.float64), l2=0.01)


@pytest.mark.filterwarnings("ignore:.*not converged")
@pytest.mark.parametrize("terms", [1, 2, 7, 200])
def test_a_truncated_series_is_its_filter(terms: int):
    """I3: an eigenvalue s of H + damping I is inverted as (1 - (1 - scale s)^J) / s."""
    values = torch.linspace(0.01, 1, P, dtype=torch.float64)
    Q = torch.linalg.qr(columns(P, P, seed=4)).Q
    operator, b, scale, damping = DenseOperator((Q * values) @ Q.T), columns(P, 3), 0.7, 0.02
    solution = Lissa(depth=terms, scale=scale).solve(operator, b, damping)
    s = values + damping
    expected = (Q * (1 - (1 - scale * s) ** terms) / s) @ Q.T @ b
    assert relative(solution.value, expected) < 1e-10
    assert solution.info.iterations == terms and solution.info.notes["scale"] == scale


def test_the_scale_is_found():
    operator = DenseOperator(with_eigenvalues(torch.linspace(0.1, 40, P, dtype=torch.float64)))
    info = Lissa(rtol=1e-6).solve(operator, columns(P, 2), 0.5).info
    assert info.notes["scale"] == pytest.approx(0.9 / 40.5, rel=0.05)
    assert info.notes["largest_eigenvalue"] <= 40.5 * (1 + 1e-12)


def test_power_iteration_finds_the_largest_eigenvalue_of_the_preconditioned_operator():
    H = with_eigenvalues(torch.logspace(0, -2, P, dtype=torch.float64))
    M = Jacobi(torch.linspace(0.1, 2, P, dtype=torch.float64), 0.0)
    expected = float(torch.linalg.eigvals(M @ H).real.max())
    assert largest_eigenvalue(lambda v: H @ v, H, 0, M, iterations=500) == pytest.approx(expected, rel=1e-10)


def test_a_full_series_leaves_finished_queries_alone():
    values = torch.cat([torch.ones(5), torch.full((5,), 0.05)]).double()
    operator = DenseOperator(torch.diag(values))
    b = torch.zeros(P, 4, dtype=torch.float64)
    b[[0, 1, 2, 9], [0, 1, 2, 3]] = 1
    assert Lissa().solve(operator, b, 1e-3).info.converged
    assert operator.widths[20] == 4 and operator.widths[-2] == 1


@pytest.mark.parametrize("terms", [None, 50])
def test_a_scale_too_large_is_an_error(terms: int | None):
    operator, b = examples(), columns(P, 3)
    largest = float(torch.linalg.eigvalsh(operator.H).max())
    for batch_size in (None, 20):
        with refused("lissa diverged.*leave scale=None"):
            Lissa(scale=10 / largest, depth=terms, batch_size=batch_size).solve(operator, b, 0.01)
    with refused("lissa diverged"):  # only just
        Lissa(scale=2.1 / (largest + 0.01), depth=terms and 500).solve(operator, b, 0.01)


def test_a_scale_too_large_for_too_few_terms_to_see_is_not_called_converged():
    operator, b = examples(), columns(P, 3)
    with pytest.warns(UserWarning, match="not converged"):
        assert not Lissa(scale=100.0, depth=1).solve(operator, b, 0.01).info.converged


def test_a_small_negative_eigenvalue_is_noticed_when_it_grows():
    values = torch.linspace(0.001, 1, 100, dtype=torch.float64)
    values[0] = -0.02
    with refused("negative curvature"):
        Lissa().solve(DenseOperator(with_eigenvalues(values), positive=False), columns(100, 2), 0.01)


@pytest.mark.filterwarnings("ignore:.*not converged")
def test_mini_batches_come_near_and_averaging_runs_comes_nearer():
    operator, b, damping = examples(), columns(P, 4), 0.1
    truth = operator.solve(b, damping)

    def error(repeats: int) -> float:
        solver = Lissa(depth=400, batch_size=5, repeats=repeats)
        return float((solver.solve(operator, b, damping).value - truth).norm() / truth.norm())

    assert error(8) < 0.6 * error(1) < 0.3


def test_mini_batch_products_are_counted_by_their_share():
    operator = examples()
    with pytest.warns(UserWarning, match="not converged"):
        info = Lissa(depth=40, batch_size=30, scale=0.1).solve(operator, columns(P, 4), 0.1).info
    assert info.products == pytest.approx(40 * 4 * 30 / 120 + 4)


def test_mini_batches_visit_every_example_once_an_epoch():
    batches = minibatches(10, 3, torch.Generator().manual_seed(0))
    epoch = [next(batches) for _ in range(3)]
    assert [len(batch) for batch in epoch] == [3, 3, 3]
    assert len({i for batch in epoch for i in batch}) == 9
    assert [next(batches) for _ in range(3)] != epoch


def ekfac_like(operator: SampledOperator, damping: float) -> DenseInverse:
    """The right eigenvectors with wrong eigenvalues, a little turned: symmetric positive definite."""
    values, Q = torch.linalg.eigh(operator.H)
    turned = torch.linalg.qr(Q + 0.05 * columns(P, P, seed=8)).Q
    return DenseInverse((turned * (values * torch.linspace(0.5, 2, P) + damping)) @ turned.T)


@pytest.mark.filterwarnings("ignore:.*not converged")
def test_no_refinement_is_the_preconditioner():
    """I5, first half."""
    operator, b = examples(), columns(P, 4)
    M = ekfac_like(operator, 0.01)
    for batch_size in (None, 20):
        solution = Astra(iterations=0, batch_size=batch_size).solve(operator, b, 0.01, M)
        torch.testing.assert_close(solution.value, M @ b, rtol=1e-13, atol=0)
        assert solution.info.iterations == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("preconditioner", ["ekfac", "identity", "any"])
def test_the_fixed_point_does_not_depend_on_the_preconditioner(preconditioner: str, momentum: float):
    """I5, second half."""
    operator, b, damping = examples(), columns(P, 4), 0.05
    root = columns(P, P, seed=11)
    M = {
        "ekfac": ekfac_like(operator, damping),
        "identity": DenseInverse(torch.eye(P, dtype=torch.float64)),
        "any": DenseInverse(root @ root.T + 0.5 * torch.eye(P)),
    }[preconditioner]
    solver = Astra(iterations=20000, batch_size=None, momentum=momentum, rtol=1e-11)
    solution = solver.solve(operator, b, damping, M)
    assert relative(solution.value, operator.solve(b, damping)) < 1e-8
    assert solution.info.converged and solution.info.iterations < 20000


@pytest.mark.filterwarnings("ignore:.*not converged")
def test_stochastic_refinement_improves_on_the_preconditioner_and_averaging_helps():
    operator, b, damping = examples(), columns(P, 4), 0.02
    M = ekfac_like(operator, damping)
    truth = operator.solve(b, damping)

    def error(value: Tensor) -> float:
        return float((value - truth).norm() / truth.norm())

    averaged = Astra(batch_size=30).solve(operator, b, damping, M)
    last = Astra(batch_size=30, average=0.0).solve(operator, b, damping, M)
    assert error(averaged.value) < 0.2 * error(M @ b)
    assert error(averaged.value) < 0.5 * error(last.value)
    assert float(averaged.info.residual.max()) < averaged.info.notes["start_residual"]


@pytest.mark.parametrize("batch_size", [None, 30])
def test_astra_with_a_step_too_large_is_an_error(batch_size: int | None):
    operator, b = examples(), columns(P, 4)
    M = ekfac_like(operator, 0.02)
    for step, iterations in ((50.0, 300), (5.0, 300), (50.0, 1)):
        with refused("astra diverged.*leave step=None"):
            Astra(step=step, batch_size=batch_size, iterations=iterations).solve(operator, b, 0.02, M)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype):
    operator = DenseOperator(examples().H.to(dtype))
    b = columns(P, 3, dtype=dtype)
    M = Jacobi(operator.H.diagonal(), 0.05)
    for solver in (Lissa(), Astra(batch_size=None, rtol=1e-4)):
        solution = solver.solve(operator, b, 0.05, M)
        assert solution.value.dtype == dtype and solution.info.converged
        assert relative(solution.value, operator.solve(b, 0.05)) < 5e-2
