"""The dense inverse by Cholesky: what it says of a Hessian's spectrum without diagonalising, against the spectrum."""

import pytest
import torch
from operators import DenseOperator, columns, relative, with_eigenvalues
from refusals import refused

from upweight.curvature.solvers import Direct
from upweight.curvature.solvers.direct import negative_eigenvalues


@pytest.fixture(autouse=True)
def _never_diagonalises(monkeypatch):
    monkeypatch.setattr("upweight.curvature.solvers.direct.EIGEN_UP_TO", 0)


def indefinite(size: int, negative: int):
    """Eigenvalues -0.5 to 3, none near 0, `negative` of them below 0."""
    below = -torch.linspace(0.1, 0.5, negative, dtype=torch.float64)
    return torch.cat([below, torch.linspace(0.1, 3, size - negative, dtype=torch.float64)])


@pytest.mark.parametrize("negative", [0, 1, 2, 13, 40])
def test_the_inertia_of_a_hessian_is_counted_without_its_spectrum(negative: int, monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", None)
    monkeypatch.setattr("upweight.curvature.solvers.direct.LANCZOS_STEPS", 40)  # exact
    operator = DenseOperator(with_eigenvalues(indefinite(40, negative)), positive=False)
    b = columns(40, 3)
    solution = Direct().solve(operator, b, 0.6)
    assert relative(solution.value, operator.solve(b, 0.6)) < 1e-12
    notes = solution.info.notes
    values = indefinite(40, negative)
    assert notes["negative_eigenvalues"] == negative
    assert notes["smallest_eigenvalue"] == pytest.approx(float(values.min()), abs=1e-10)
    assert notes["largest_eigenvalue"] == pytest.approx(float(values.max()), abs=1e-10)


def test_the_ends_of_a_large_spectrum_are_found_nearly():
    """Ritz values lie within the spectrum; the smallest, by the inverse, is much the more accurate."""
    values = indefinite(200, 20)
    operator = DenseOperator(with_eigenvalues(values), positive=False)
    notes = Direct().solve(operator, columns(200, 2), 0.52).info.notes
    assert -0.5 - 1e-12 <= notes["smallest_eigenvalue"] < -0.4999
    assert 2.9 < notes["largest_eigenvalue"] <= 3 + 1e-12


def test_blocks_of_two_rows_count_once():
    """A zero diagonal makes every pivot a block of two rows: eigenvalues +-1, +-2, +-3."""
    H = torch.zeros(6, 6, dtype=torch.float64)
    for k in range(3):
        H[2 * k, 2 * k + 1] = H[2 * k + 1, 2 * k] = k + 1.0
    assert negative_eigenvalues(H, 0.0) == 3


def test_a_zero_eigenvalue_is_not_negative():
    H = with_eigenvalues(torch.tensor([-1.0, 0.0, 0.0, 1.0, 2.0], dtype=torch.float64))
    assert negative_eigenvalues(H, 1e-12) == 1


def test_another_damping_counts_the_inertia_once(monkeypatch):
    operator, solver, b = DenseOperator(with_eigenvalues(indefinite(30, 4)), False), Direct(), columns(30, 2)
    solver.solve(operator, b, 0.6)
    monkeypatch.setattr("upweight.curvature.solvers.direct.negative_eigenvalues", None)
    assert solver.solve(operator, b, 0.7).info.notes["negative_eigenvalues"] == 4


def test_damping_below_a_negative_eigenvalue_names_it():
    operator = DenseOperator(with_eigenvalues(indefinite(30, 4)), positive=False)
    with refused(r"indefinite: its smallest eigenvalue -0\.5 <= -damping, with damping=0\.4"):
        Direct().solve(operator, columns(30, 2), 0.4)
