"""Laws that every solver obeys, and the identities that tie each to the dense inverse (float64)."""

import math

import pytest
import torch
from operators import DenseInverse, DenseOperator, SampledOperator, columns, relative, with_eigenvalues
from refusals import refused
from torch import Tensor

from upweight.curvature.solvers import Arnoldi, Astra, ConjugateGradient, Jacobi, Lissa, Nystrom, Solution

P, DAMPING = 12, 0.05


def logistic(n: int = 60, p: int = P) -> SampledOperator:
    """The Hessian of a logistic regression away from its optimum: ``(1/n) sum_i pi_i (1 - pi_i) x_i x_i^T``."""
    x = columns(p, n, seed=5).T * torch.logspace(0.3, -0.7, p, dtype=torch.float64)
    pi = (x @ columns(p, 1, seed=6)).sigmoid()
    return SampledOperator(((pi * (1 - pi)).sqrt() * x)[:, None, :])


def jacobi(operator: DenseOperator, damping: float = DAMPING) -> Jacobi:
    return Jacobi(operator.H.diagonal(), damping)


# name: (solver that is exact here, whether it takes the preconditioner, tolerance against the dense solve)
EXACT = {
    "block cg": (ConjugateGradient(rtol=1e-12), False, 1e-7),
    "simultaneous cg": (ConjugateGradient(rtol=1e-12, block=False), False, 1e-7),
    "preconditioned block cg": (ConjugateGradient(rtol=1e-12), True, 1e-7),
    "preconditioned simultaneous cg": (ConjugateGradient(rtol=1e-12, block=False), True, 1e-7),
    "neumann": (Lissa(rtol=1e-10), False, 1e-8),
    "lanczos with k = p": (Arnoldi(rank=P, rtol=1e-10), False, 1e-8),
    "lanczos without complement": (Arnoldi(rank=P, complement=False, rtol=1e-10), False, 1e-8),
    "nystrom with k = p": (Nystrom(rank=P, rtol=1e-10), False, 1e-8),
    "astra": (Astra(batch_size=None, iterations=2000, rtol=1e-11), True, 1e-8),
}


@pytest.mark.parametrize("name", EXACT)
def test_equals_the_dense_solve(name: str):
    """I1, I4 and I5 of the identity ledger."""
    solver, takes, tolerance = EXACT[name]
    operator, b = logistic(), columns(P, 5)
    before = operator.products
    solution = solver.solve(operator, b, DAMPING, jacobi(operator) if takes else None)
    assert relative(solution.value, operator.solve(b, DAMPING)) < tolerance
    info = solution.info
    assert info.converged and info.solver == solver.name and info.damping == DAMPING
    assert info.products == operator.products - before > 0
    assert info.seconds > 0 and info.residual.shape == (5,)
    summary = info.summary()
    assert summary["converged"] and summary["residual_max"] == float(info.residual.max())


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (7, 1), (9, 9), (30, 4), (30, 0), (6, 17)], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_any_shape(name: str, shape: tuple[int, int]):
    """More columns than parameters, one parameter, no column: same law."""
    p, k = shape
    solver, takes, _ = EXACT[name]
    if solver.name in ("arnoldi", "nystrom") and p > P:
        pytest.skip("rank below p: an approximation")
    operator, b = (
        DenseOperator(with_eigenvalues(torch.linspace(0.1, 1, p, dtype=torch.float64))),
        columns(p, k),
    )
    solution = solver.solve(operator, b, DAMPING, jacobi(operator) if takes else None)
    assert solution.value.shape == (p, k)
    if k:
        assert relative(solution.value, operator.solve(b, DAMPING)) < 1e-7
    assert solution.info.converged


@pytest.mark.parametrize("name", EXACT)
def test_zero_equal_dependent_and_tiny_right_hand_sides(name: str):
    solver, takes, _ = EXACT[name]
    operator = logistic()
    b = columns(P, 4)
    b = torch.stack([b[:, 0], 0 * b[:, 0], b[:, 0], -3 * b[:, 0] + b[:, 1], b[:, 1], 1e-170 * b[:, 2]], 1)
    M = jacobi(operator) if takes else None
    solution = solver.solve(operator, b, DAMPING, M)
    truth = operator.solve(b, DAMPING)
    assert bool((solution.value[:, 1] == 0).all()) and float(solution.info.residual[1]) == 0
    for column in (0, 2, 3, 4, 5):
        assert relative(solution.value[:, column], truth[:, column]) < 1e-7
    assert solution.info.converged
    zeros = solver.solve(operator, torch.zeros(P, 3, dtype=torch.float64), DAMPING, M)
    assert bool((zeros.value == 0).all()) and zeros.info.converged


SEEDED = {
    "lissa": lambda seed: Lissa(depth=30, batch_size=7, seed=seed),
    "arnoldi": lambda seed: Arnoldi(rank=3, iterations=5, seed=seed),
    "nystrom": lambda seed: Nystrom(rank=3, seed=seed),
    "astra": lambda seed: Astra(iterations=30, batch_size=7, seed=seed),
}


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.filterwarnings("ignore:.*not converged")
def test_a_seed_decides_and_the_global_random_state_is_left_alone(name: str):
    operator, b = logistic(), columns(P, 3)

    def value(seed: int) -> Tensor:
        return SEEDED[name](seed).solve(operator, b, DAMPING, jacobi(operator)).value

    first, state = value(0), torch.get_rng_state()
    assert torch.equal(first, value(0)) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, value(1))


@pytest.mark.parametrize("name", EXACT)
def test_the_reported_residual_is_that_of_the_full_operator(name: str):
    solver, takes, _ = EXACT[name]
    operator, b = logistic(), 100 * columns(P, 4)
    solution = solver.solve(operator, b, DAMPING, jacobi(operator) if takes else None)
    rest = (b - operator.H @ solution.value - DAMPING * solution.value).norm(dim=0) / b.norm(dim=0)
    torch.testing.assert_close(solution.info.residual, rest, rtol=0, atol=1e-14)


def warned(solver, operator, b: Tensor, damping: float, M=None) -> Solution:
    """A solution that says itself it is not one."""
    with pytest.warns(UserWarning, match="not converged -> "):
        solution = solver.solve(operator, b, damping, M)
    assert not solution.info.converged
    return solution


UNFINISHED = {
    "cg": ConjugateGradient(max_iter=2),
    "simultaneous cg": ConjugateGradient(max_iter=2, block=False),
    "lissa": Lissa(depth=3),
    "sampled lissa": Lissa(depth=3, batch_size=5),
    "arnoldi": Arnoldi(rank=2),
    "nystrom": Nystrom(rank=2),
    "astra": Astra(iterations=2),
    "sampled astra": Astra(iterations=2, batch_size=10),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_an_unfinished_solve_says_so(name: str):
    solver = UNFINISHED[name]
    operator, b = logistic(n=256), columns(P, 1)
    solution = warned(solver, operator, b, 1e-4, jacobi(operator, 1e-4) if solver.name == "astra" else None)
    assert float(solution.info.residual.max()) > 1e-3


BAD = {
    "shape": (lambda b: b[:-1], DAMPING, r"shape \(11, 3\), expected \[12"),
    "vector": (lambda b: b[:, 0], DAMPING, "one column per query"),
    "integers": (lambda b: b.long(), DAMPING, "int64, expected floating point"),
    "nan": (
        lambda b: b.index_fill(1, torch.tensor([1]), math.nan),
        DAMPING,
        "right-hand side 1 is not finite",
    ),
    "negative damping": (lambda b: b, -1e-3, "damping=-0.001, expected a finite number >= 0"),
    "infinite damping": (lambda b: b, math.inf, "damping=inf"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", EXACT)
def test_bad_input_is_refused(name: str, case: str):
    change, damping, message = BAD[case]
    solver, _, _ = EXACT[name]
    operator = logistic()
    with refused(message):
        solver.solve(operator, change(columns(P, 3)), damping, jacobi(operator))


@pytest.mark.parametrize("name", EXACT)
def test_a_product_that_is_not_finite_is_refused(name: str):
    solver, _, _ = EXACT[name]
    operator = DenseOperator(torch.full((P, P), math.nan, dtype=torch.float64))
    with refused("not finite"):
        solver.solve(operator, columns(P, 2), DAMPING, Jacobi(torch.ones(P, dtype=torch.float64), DAMPING))


def test_bad_options_are_refused():
    for build in (
        lambda: ConjugateGradient(rtol=0.0),
        lambda: ConjugateGradient(max_iter=0),
        lambda: Lissa(depth=0),
        lambda: Lissa(scale=-1.0),
        lambda: Arnoldi(rank=0),
        lambda: Nystrom(rank=0),
        lambda: Astra(iterations=-1),
        lambda: Astra(momentum=1.0),
        lambda: Astra(average=2.0),
    ):
        with refused("at (its|their) default|is the default"):
            build()
    operator, b = logistic(), columns(P, 1)
    with refused("got none"):
        Astra().solve(operator, b, DAMPING)
    with refused("expected \\[p\\]"):
        Jacobi(torch.ones(2, 2), DAMPING)
    with refused("goes down to -1"):
        Jacobi(torch.tensor([1.0, -1.0]), 0.0)
    broken = DenseInverse(torch.eye(P, dtype=torch.float64))
    broken.inverse[0, 0] = math.inf
    for solver in (ConjugateGradient(), ConjugateGradient(block=False), Astra()):
        with refused("preconditioner gave numbers that are not finite"):
            solver.solve(operator, b, DAMPING, broken)


# I19: f = sum_i sin x_i has the Hessian diag(-sin x) and the iHVP -v / sin x


def sine(x: Tensor) -> DenseOperator:
    return DenseOperator(torch.diag(-x.sin()), positive=False)


INDEFINITE = {
    "block cg": ConjugateGradient(),
    "simultaneous cg": ConjugateGradient(block=False),
    "lissa": Lissa(),
    "sampled lissa": Lissa(batch_size=1),
    "nystrom": Nystrom(rank=4),
    "astra": Astra(batch_size=None),
}


@pytest.mark.parametrize("name", INDEFINITE)
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_an_indefinite_curvature_is_refused(name: str, damping: float):
    operator = sine(torch.linspace(0.3, 6, P, dtype=torch.float64))
    M = Jacobi(torch.ones(P, dtype=torch.float64), 0.0)
    with refused("ggn"):
        INDEFINITE[name].solve(operator, columns(P, 3), damping, M if name == "astra" else None)


def test_negative_curvature_names_the_rayleigh_quotient():
    operator = sine(torch.tensor([0.5], dtype=torch.float64))
    for solver in (ConjugateGradient(), ConjugateGradient(block=False), Lissa()):
        with refused(f"= {0.1 - math.sin(0.5):.2e}.*raise the damping beyond {math.sin(0.5):.1e}"):
            solver.solve(operator, columns(1, 1), 0.1)


@pytest.mark.parametrize("name", ["block cg", "simultaneous cg", "lissa"])
def test_a_hessian_that_is_positive_is_solved(name: str):
    x = torch.linspace(3.3, 6.1, P, dtype=torch.float64)
    v = columns(P, 3)
    solver = {"block cg": ConjugateGradient(rtol=1e-12), "lissa": Lissa(rtol=1e-11)}.get(
        name, ConjugateGradient(rtol=1e-12, block=False)
    )
    assert relative(solver.solve(sine(x), v, 0.0).value, -v / x.sin()[:, None]) < 1e-8


def test_eigenpairs_invert_an_indefinite_curvature_and_say_so():
    x = torch.linspace(0.3, 6, P, dtype=torch.float64)
    v = columns(P, 3)
    solution = Arnoldi(rank=P).solve(sine(x), v, 0.0)
    assert relative(solution.value, -v / x.sin()[:, None]) < 1e-8
    assert solution.info.notes["negative_eigenvalues"] == int((x.sin() > 0).sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["block cg", "simultaneous cg", "lanczos with k = p", "nystrom with k = p"])
def test_a_singular_curvature_without_damping_is_refused(name: str, dtype: torch.dtype):
    values = torch.linspace(0, 1, P, dtype=torch.float64)
    values[:4] = 0
    operator = DenseOperator(with_eigenvalues(values).to(dtype))
    with refused("damping"):
        EXACT[name][0].solve(operator, columns(P, 3, dtype=dtype), 0.0)


@pytest.mark.parametrize("solver", [Lissa(), Astra(batch_size=None)], ids=lambda s: s.name)
def test_a_singular_curvature_without_damping_never_passes_for_solved(solver: Lissa | Astra):
    operator = DenseOperator(with_eigenvalues(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)))
    warned(solver, operator, columns(3, 2), 0.0, Jacobi(torch.ones(3, dtype=torch.float64), 0.0))
