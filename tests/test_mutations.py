"""The comparisons with oracles must fail for the classic silent errors: the sign, the 1/n, the T factor, the damping.

Each mutation is made to the running code; the unmutated comparison passes and the mutated one must not. They stay, so
that a comparison that has stopped comparing is noticed.
"""

from collections.abc import Callable
from dataclasses import replace

import curvature_oracles as oracle
import pytest
import torch
from curvature_oracles import relative
from torch import Tensor, nn

import upweight as uw
from upweight.attributors import influence as influence_module
from upweight.curvature import fit as fit_module
from upweight.curvature import operators
from upweight.curvature.operators import Kronecker
from upweight.task import Task

N, DAMPING = 6, 1e-2


class Pooled(nn.Module):
    """Seven positions, so that factors of T show; two layers, so that a factor cannot hide in one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        return self.head(h.mT @ torch.linspace(0.5, 1.5, h.shape[1], dtype=h.dtype))


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    x, q = torch.randn(N, 7, 3, dtype=torch.float64), torch.randn(4, 7, 3, dtype=torch.float64)
    return Pooled().double().eval(), (x, torch.tensor([0, 1, 2, 0, 1, 2])), (q, torch.tensor([2, 1, 0, 1]))


def error(curvature: str, measurement: str = "loss") -> float:
    """How far the scores are from the dense formula."""
    model, train, query = problem()
    layers = oracle.record(model, train, oracle.class_expectation)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return oracle.loss_of("classification", f, y)

    def measured(f: Tensor, y: Tensor) -> Tensor:  # of a logit, whose removal effect is what it loses
        return loss(f, y) if measurement == "loss" else -f[0, int(y)]

    V = oracle.layer_gradients(measured, model, query, layers)
    G = oracle.layer_gradients(loss, model, train, layers)
    dense = oracle.DENSE[curvature]
    truth = sum(oracle.solve(dense(layer), DAMPING, V[name], G[name]) for name, layer in layers.items()) / N
    task = uw.Classification(measurement)
    method = uw.Influence(model, task, curvature=curvature, fisher="exact", damping=DAMPING, progress=False)
    return relative(method.fit(train).attribute(query).values, truth)


# Mutations -----------------------------------------------------------------------------------------------------------


def flip_sign(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Task, "orientation", property(lambda self: 1 if self.higher_is_better else -1))


def forget_to_orient(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Task, "orientation", property(lambda self: 1))


def forget_n(patch: pytest.MonkeyPatch) -> None:
    real = influence_module.ScoreTiles.write

    def write(self, query: int, train: int, parts: dict[str, Tensor]) -> None:
        real(self, query, train, {name: part * self.n for name, part in parts.items()})

    patch.setattr(influence_module.ScoreTiles, "write", write)


def finished(change: Callable[[fit_module._Factors], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """A mutation of K-FAC's sums just before they are divided."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        real = fit_module._Factors.finish

        def finish(self, n: int, where: str, dtype: torch.dtype):
            change(self)
            return real(self, n, where, dtype)

        patch.setattr(fit_module._Factors, "finish", finish)

    return mutate


def average_over_examples(factors: fit_module._Factors) -> None:
    """A's mean over examples instead of positions: T times too large where T > 1."""
    factors.positions = N


def forget_the_curvatures_n(patch: pytest.MonkeyPatch) -> None:
    """The curvature of the summed loss beside scores of the mean one."""
    real = fit_module.fit_curvature

    def fit_curvature(kind, layers, source, n, dtype, keeper=None):
        curvature = real(kind, layers, source, n, dtype)
        scaled = {name: replace(layer, values=layer.values * n) for name, layer in curvature.layers.items()}
        return replace(curvature, layers=scaled)

    from upweight.attributors import fitted

    patch.setattr(fitted, "fit_curvature", fit_curvature)


def subtract_damping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(operators, "damped_inverse", lambda values, damping: 1 / (values - damping))


def damp_factors_apart(patch: pytest.MonkeyPatch) -> None:
    """The root of the damping on each factor instead of the damping on their product."""
    real = Kronecker.precondition

    def precondition(self, block, damping: float):
        beta, alpha = (
            self.values.amax(2) ** 0.5,
            self.values.amax(1) ** 0.5,
        )  # proportional to the factors' spectra
        scale = (self.values.amax((1, 2)) ** 0.5)[:, None]
        beta, alpha = beta**2 / scale, alpha**2 / scale
        split = (beta + damping**0.5)[:, :, None] * (alpha + damping**0.5)[:, None, :]
        return real(replace(self, values=split - damping), block, damping)

    patch.setattr(Kronecker, "precondition", precondition)


def swap_bases(patch: pytest.MonkeyPatch) -> None:
    """Eigenvectors as rows instead of columns."""
    real = fit_module.eigh

    def eigh(matrix, what, dtype):
        values, vectors = real(matrix, what, dtype)
        return values, vectors.mT.contiguous()

    patch.setattr(fit_module, "eigh", eigh)


def forget_to_correct(patch: pytest.MonkeyPatch) -> None:
    """EK-FAC with K-FAC's eigenvalues."""
    patch.setattr(fit_module, "_correct_eigenvalues", lambda fitted, *_: fitted)


MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, ...], str]] = {
    "sign": (flip_sign, ("kfac", "ekfac", "diagonal"), "loss"),
    "sign of a measurement where higher is better": (forget_to_orient, ("ekfac",), "logit"),
    "1/n of the scores": (forget_n, ("kfac", "ekfac", "diagonal"), "loss"),
    "1/n of the curvature": (forget_the_curvatures_n, ("kfac", "ekfac", "diagonal"), "loss"),
    "T factor": (finished(average_over_examples), ("kfac",), "loss"),
    "damping sign": (subtract_damping, ("kfac", "ekfac", "diagonal"), "loss"),
    "damping of the factors": (damp_factors_apart, ("kfac",), "loss"),
    "eigenvectors transposed": (swap_bases, ("kfac", "ekfac"), "loss"),
    "eigenvalues not corrected": (forget_to_correct, ("ekfac",), "loss"),
}


@pytest.mark.parametrize("measurement", ["loss", "logit"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
def test_without_mutations_the_comparison_holds(curvature: str, measurement: str):
    assert error(curvature, measurement) < 1e-10


@pytest.mark.parametrize(
    ("name", "curvature"),
    [(name, curvature) for name, (_, kinds, _) in MUTATIONS.items() for curvature in kinds],
)
def test_a_mutation_is_noticed(name: str, curvature: str, monkeypatch):
    mutate, _, measurement = MUTATIONS[name]
    mutate(monkeypatch)
    assert error(curvature, measurement) > 1e-2
