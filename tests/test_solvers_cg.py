"""Conjugate gradients: golden values, what the block and the preconditioner save, per-query stopping, float32."""

import pytest
import torch
from operators import DenseInverse, DenseOperator, columns, relative, with_eigenvalues
from torch import Tensor

from upweight.curvature.solvers import ConjugateGradient, Jacobi, Nystrom
from upweight.errors import UpweightError

FORMS = pytest.mark.parametrize("block", [True, False], ids=["block", "simultaneous"])


@FORMS
def test_golden_three_by_three(block: bool):
    """I18."""
    H = torch.tensor([[4, 1, 0], [1, 3, 1], [0, 1, 2]], dtype=torch.float64)
    b = torch.tensor([[1.0], [2], [3]], dtype=torch.float64)
    solution = ConjugateGradient(block=block, rtol=1e-13).solve(DenseOperator(H), b, 0.0)
    expected = torch.tensor([[2 / 9], [1 / 9], [13 / 9]], dtype=torch.float64)
    assert relative(solution.value, expected) < 1e-12
    assert solution.info.iterations == 3


@FORMS
def test_stops_after_as_many_steps_as_there_are_distinct_eigenvalues(block: bool):
    values = torch.tensor([1.0, 2, 5, 9] * 5, dtype=torch.float64)
    operator = DenseOperator(with_eigenvalues(values))
    solution = ConjugateGradient(block=block, rtol=1e-11).solve(operator, columns(20, 2), 1e-3)
    assert solution.info.iterations == 4


def ill_conditioned(p: int = 400) -> tuple[Tensor, Tensor]:
    """Condition 1e6 with damping 1e-6, and an approximation with, like EK-FAC, wrong eigenvalues."""
    values = torch.logspace(0, -9, p, dtype=torch.float64)
    noise = torch.randn(p, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return with_eigenvalues(values), with_eigenvalues(values * (0.4 * noise).exp())


@FORMS
def test_a_good_preconditioner_takes_at_most_a_third_of_the_iterations(block: bool):
    H, approximate = ill_conditioned()
    damping, b = 1e-6, columns(400, 6)
    solver = ConjugateGradient(block=block, max_iter=4000)
    M = DenseInverse(approximate + damping * torch.eye(400))
    plain = solver.solve(DenseOperator(H), b, damping).info
    helped = solver.solve(DenseOperator(H), b, damping, M).info
    assert plain.converged and helped.converged and not plain.notes["preconditioned"]
    assert 3 * helped.iterations <= plain.iterations
    assert helped.notes["preconditioned"]


@FORMS
def test_jacobi_undoes_a_bad_scaling(block: bool):
    scale = torch.logspace(0, -3, 60, dtype=torch.float64)
    H = with_eigenvalues(torch.linspace(1, 2, 60, dtype=torch.float64)) * scale[:, None] * scale
    operator, b = DenseOperator(H), columns(60, 3)
    solver = ConjugateGradient(block=block, max_iter=1000)
    plain = solver.solve(operator, b, 1e-9).info.iterations
    assert 3 * solver.solve(operator, b, 1e-9, Jacobi(H.diagonal(), 1e-9)).info.iterations <= plain


def test_a_sketch_too_coarse_to_be_a_solution_is_a_preconditioner():
    values = torch.cat([torch.linspace(1, 100, 30), torch.full((170,), 1e-3)]).double()
    operator, b = DenseOperator(with_eigenvalues(values)), columns(200, 1)
    solver = ConjugateGradient(max_iter=1000)
    M = Nystrom(rank=40).preconditioner(operator, 1e-3, b)
    plain, helped = solver.solve(operator, b, 1e-3), solver.solve(operator, b, 1e-3, M)
    assert 3 * helped.info.iterations <= plain.info.iterations
    assert relative(helped.value, plain.value) < 1e-5


def test_the_block_shares_what_all_queries_find():
    H, _ = ill_conditioned(200)
    b = columns(200, 20)
    block = ConjugateGradient(max_iter=4000).solve(DenseOperator(H), b, 1e-4)
    alone = ConjugateGradient(max_iter=4000, block=False).solve(DenseOperator(H), b, 1e-4)
    assert block.info.converged and alone.info.converged
    assert 4 * block.info.products < alone.info.products


def test_equal_and_dependent_queries_cost_nothing_extra():
    H, _ = ill_conditioned(100)
    b = columns(100, 3)
    dependent = torch.cat([b, b, b @ columns(3, 4, seed=9), torch.zeros(100, 2, dtype=b.dtype)], 1)
    operator = DenseOperator(H)
    few = ConjugateGradient().solve(operator, b, 1e-4).info.iterations
    widths = len(operator.widths)
    many = ConjugateGradient().solve(operator, dependent, 1e-4)
    # The same but for rounding, which this conditioning turns into a few iterations.
    assert many.info.converged and many.info.iterations <= 1.1 * few
    assert max(operator.widths[widths:-1]) == 3  # the last product is the check of all


@FORMS
def test_each_query_stops_at_its_own_time(block: bool):
    """Some queries lie in a small invariant subspace and are done at once; the rest go on without them."""
    values = torch.cat([torch.ones(20), torch.logspace(-1, -4, 80)]).double()
    Q = torch.linalg.qr(columns(100, 100, seed=4)).Q
    operator = DenseOperator((Q * values) @ Q.T)
    b = torch.cat([Q[:, :20] @ columns(20, 8), Q[:, 20:] @ columns(80, 3)], 1)
    solution = ConjugateGradient(block=block, max_iter=1000).solve(operator, b, 1e-5)
    assert solution.info.converged and relative(solution.value, operator.solve(b, 1e-5)) < 1e-4
    assert solution.info.notes["first_stopped"] < solution.info.iterations / 3
    assert operator.widths[0] == 11 and operator.widths[-2] <= 3


@FORMS
def test_a_query_does_not_depend_on_its_company_or_order(block: bool):
    H, _ = ill_conditioned(80)
    b = columns(80, 6)
    solver = ConjugateGradient(block=block, rtol=1e-10, max_iter=2000)
    together = solver.solve(DenseOperator(H), b, 1e-4).value
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    assert relative(solver.solve(DenseOperator(H), b[:, order], 1e-4).value, together[:, order]) < 1e-6
    assert relative(solver.solve(DenseOperator(H), b[:, 2:3], 1e-4).value, together[:, 2:3]) < 1e-6


@FORMS
def test_float32_reaches_its_default_tolerance_and_its_residual_is_true(block: bool):
    H, approximate = ill_conditioned()
    damping, b = 1e-3, columns(400, 12, dtype=torch.float32)
    M = DenseInverse((approximate + damping * torch.eye(400)).float())
    solution = ConjugateGradient(block=block).solve(DenseOperator(H.float()), b, damping, M)
    assert solution.value.dtype == torch.float32 and solution.info.converged
    x = solution.value.double()
    true = (b.double() - H @ x - damping * x).norm(dim=0) / b.double().norm(dim=0)
    assert float(true.max()) < 2e-4
    assert relative(solution.value, DenseOperator(H).solve(b, damping)) < 1e-3


@FORMS
def test_float32_stagnation_is_reported_and_stops_early(block: bool):
    """The recurrence goes on to shrink where the true residual no longer does."""
    H, approximate = ill_conditioned()
    b = columns(400, 4, dtype=torch.float32)
    M = DenseInverse((approximate + 1e-4 * torch.eye(400)).float())
    solver = ConjugateGradient(block=block, rtol=1e-7, max_iter=3000)
    with pytest.warns(UserWarning, match="rounding allows no more.*float64"):
        info = solver.solve(DenseOperator(H.float()), b, 1e-4, M).info
    assert not info.converged and info.iterations < 1000
    assert 1e-7 < float(info.residual.max()) < 1e-2


def test_running_out_of_iterations_is_reported():
    H, _ = ill_conditioned(100)
    with pytest.warns(UserWarning, match=r"after 5 iterations, above 1e-06 for 2 of 2 .* -> raise max_iter"):
        info = ConjugateGradient(max_iter=5).solve(DenseOperator(H), columns(100, 2), 1e-6).info
    assert not info.converged and info.iterations == 5 and info.notes["restarts"] == 0


def test_the_callback_sees_every_iteration():
    seen: list[tuple[int, float]] = []
    solver = ConjugateGradient(callback=lambda iteration, residual: seen.append((iteration, residual)))
    info = solver.solve(DenseOperator(ill_conditioned(60)[0]), columns(60, 2), 1e-3).info
    assert [iteration for iteration, _ in seen] == list(range(1, info.iterations + 1))
    assert seen[-1][1] <= 1e-6 < seen[0][1]


class Drifting(DenseOperator):
    """Its first three products are a little off, as rounding's are: the recurrence never learns of it."""

    def product(self, x: Tensor) -> Tensor:
        out = super().product(x)
        return out * (1 + 1e-4) if len(self.widths) <= 3 else out


@FORMS
def test_a_residual_that_drifted_from_the_recurrence_is_taken_up_again(block: bool):
    operator, b = Drifting(ill_conditioned(80)[0]), columns(80, 3)
    solution = ConjugateGradient(block=block, max_iter=2000).solve(operator, b, 1e-2)
    assert solution.info.converged and solution.info.notes["restarts"] >= 1
    assert relative(solution.value, operator.solve(b, 1e-2)) < 1e-4


@pytest.mark.parametrize("queries", [20, 35, 60])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_directions_that_nearly_depend_have_no_negative_curvature(queries: int, preconditioned: bool):
    """As many queries as parameters, nearly: what rounding leaves of a direction is divided by its length squared."""
    values = torch.logspace(0, -6, 59, dtype=torch.float64) * torch.tensor([1.0, -0.3] * 29 + [1.0])
    H = with_eigenvalues(values)
    operator = DenseOperator(H, positive=False)
    preconditioner = DenseInverse(with_eigenvalues(values.abs() + 0.5)) if preconditioned else None
    b = columns(59, queries)
    solution = ConjugateGradient().solve(operator, b, 0.5, preconditioner)
    expected = torch.linalg.solve(H + 0.5 * torch.eye(59, dtype=torch.float64), b)
    assert solution.info.converged and relative(solution.value, expected) < 1e-5
    with pytest.raises(UpweightError, match="negative curvature"):
        ConjugateGradient().solve(operator, b, 0.1, preconditioner)
