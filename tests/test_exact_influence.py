"""Influence with the exact Gauss-Newton matrix and Hessian: closed forms, limits, laws, damping, refusals."""

import json

import pytest
import torch
import torch.nn.functional as F
from curvature_oracles import relative
from gauss_newton import dense_by_autograd
from oracles import untouched
from torch import Tensor, nn

import upweight as uw
from upweight.curvature.solvers.base import Solution, SolveInfo, relative_residual
from upweight.curvature.solvers.direct import Direct
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Tracker

PENALTY = 0.05


def data(n: int, seed: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (n,), generator=generator)


TRAIN, QUERY = data(15, 1), data(4, 2)


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()


def objective(flat: Tensor, weights: Tensor) -> Tensor:
    """Penalised loss of softmax regression with parameters [15]."""
    W, b = flat[:12].reshape(3, 4), flat[12:]
    losses = F.cross_entropy(TRAIN[0] @ W.T + b, TRAIN[1], reduction="none")
    return (weights * losses).mean() + PENALTY / 2 * flat.square().sum()


def minimise(weights: Tensor) -> Tensor:
    """Its minimum, by Newton's method to rounding."""
    flat = torch.zeros(15, dtype=torch.float64)
    for _ in range(12):
        gradient = torch.func.grad(objective)(flat, weights)
        flat = flat - torch.linalg.solve(torch.func.hessian(objective)(flat, weights), gradient)
    return flat


def logistic() -> nn.Module:
    """Softmax regression at the minimum of its penalised loss."""
    flat = minimise(torch.ones(15, dtype=torch.float64))
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.copy_(flat[:12].reshape(3, 4))
        model.bias.copy_(flat[12:])
    return model.eval()


def influence(model: nn.Module | None = None, curvature: str = "ggn", **options) -> uw.Influence:
    options = {"damping": 1e-2, "progress": False, **options}
    return uw.Influence(model or small(), uw.Classification(), curvature=curvature, **options)


def dense(model: nn.Module, curvature: str) -> tuple[Tensor, Tensor, Tensor]:
    """H [p, p], training gradients [n, p] and query gradients [q, p], all by autograd."""
    return dense_by_autograd(model, TRAIN, QUERY, curvature)


class Fixed:
    """A solver from outside: the dense inverse, with a count of its solves."""

    name = "fixed"

    def __init__(self, converged: bool = True) -> None:
        self.converged, self.solves = converged, 0

    def solve(self, operator, b, damping, preconditioner=None) -> Solution:
        self.solves += 1
        eye = torch.eye(operator.size, dtype=b.dtype)
        x = torch.linalg.solve(operator.dense() + damping * eye, b)
        if preconditioner is not None:
            assert (preconditioner @ b).shape == b.shape
        residual = relative_residual(operator, x, b, damping)
        return Solution(x, SolveInfo(self.name, damping, 1, residual, 1.0, 0.0, self.converged))


# Closed forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, "direct", Fixed()], ids=["default", "direct", "object"])
@pytest.mark.parametrize(("curvature", "damping"), [("ggn", 1e-2), ("hessian", 0.7)])
def test_scores_equal_the_dense_inverse(curvature: str, damping: float, solver):
    """Ledger I1: the dense solve, by Cholesky or by eigenvectors, and any solver."""
    model = small()
    H, G, V = dense(model, curvature)
    eye = torch.eye(len(H), dtype=torch.float64)
    truth = V @ torch.linalg.solve(H + damping * eye, G.T) / len(G)
    own = (G * torch.linalg.solve(H + damping * eye, G.T).T).sum(1) / len(G)
    method = influence(model, curvature, damping=damping, solver=solver)
    with untouched(model):
        scores = method.fit(TRAIN).attribute(QUERY, per_layer=True)
        mine = method.self_influence()
    assert relative(scores.values, truth) < 1e-10
    assert relative(sum(scores.layers.values()), truth) < 1e-10
    assert relative(mine.values, own) < 1e-10
    assert scores.unit == "nats" and mine.unit is not None
    assert scores.info["solve"]["residual_max"] < 1e-10 and scores.info["solve"]["converged"]
    assert scores.info["layer_damping"] == {"0": damping, "2": damping}
    json.dumps(scores.info)


@pytest.mark.parametrize(("curvature", "damping"), [("ggn", 1e-2), ("hessian", 0.7)])
def test_blocks_are_a_matrix_for_every_layer(curvature: str, damping: float):
    model = small()
    H, G, V = dense(model, curvature)
    H += damping * torch.eye(len(H), dtype=torch.float64)
    method = influence(model, curvature, damping=damping, blocks=True).fit(TRAIN)
    found = method.attribute(QUERY, per_layer=True)
    first = sum(p.numel() for p in model[0].parameters())
    for name, own in (("0", slice(first)), ("2", slice(first, None))):
        truth = V[:, own] @ torch.linalg.solve(H[own, own], G[:, own].T) / len(G)
        assert relative(found.layers[name], truth) < 1e-10
    with pytest.raises(UpweightError, match="one matrix over all layers"):
        method.removal([0], QUERY)


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [("cg", 1e-5), ("lissa", 5e-3), ("arnoldi", 1e-8), ("nystrom", 1e-6), ("astra", 5e-2), ("dual", 1e-8)],
)
def test_every_solver_by_name_comes_to_the_dense_inverse(solver: str, tolerance: float):
    """To several times the residual each of them promises."""
    truth = influence(damping=0.1).fit(TRAIN)
    method = influence(damping=0.1, solver=solver).fit(TRAIN)
    scores = method.attribute(QUERY)
    assert relative(scores.values, truth.attribute(QUERY).values) < tolerance
    assert relative(method.self_influence().values, truth.self_influence().values) < tolerance
    assert scores.info["solve"]["solver"] == solver and scores.info["solve"]["converged"]
    json.dumps(scores.info)


def test_cholesky_and_eigenvectors_are_one(monkeypatch):
    by_eigen = influence().fit(TRAIN).attribute(QUERY)
    monkeypatch.setattr("upweight.curvature.solvers.direct.EIGEN_UP_TO", 0)
    by_cholesky = influence().fit(TRAIN).attribute(QUERY)
    assert (
        "smallest_eigenvalue" in by_eigen.info["solve"]
        and "smallest_eigenvalue" not in by_cholesky.info["solve"]
    )
    assert relative(by_cholesky.values, by_eigen.values) < 1e-10


def test_panels_and_batches_do_not_matter(monkeypatch):
    whole = influence().fit(TRAIN)
    truth = whole.attribute(QUERY).values
    parts = influence(batch_size=4).fit(TRAIN)
    monkeypatch.setattr(parts, "_panel_size", lambda queries: 3)
    scores = parts.attribute(QUERY)
    assert relative(scores.values, truth) < 1e-12
    assert scores.info["solve"]["panels"] == 2
    assert relative(parts.self_influence().values, whole.self_influence().values) < 1e-12


# Laws ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_large_damping_tends_to_the_gradient_dot(curvature: str):
    """Ledger I17: ``n damping S -> V G^T``."""
    model = small()
    H, G, V = dense(model, curvature)
    damping = 1e8 * float(torch.linalg.eigvalsh(H)[-1])
    scores = influence(model, curvature, damping=damping).fit(TRAIN).attribute(QUERY).values
    assert relative(15 * damping * scores, V @ G.T) < 1e-6


class Mixed(nn.Module):
    """One logit from ``A phi``, or from phi itself."""

    def __init__(self, phi: Tensor, A: Tensor) -> None:
        super().__init__()
        self.A, self.phi = A, nn.Parameter(phi)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.A @ self.phi)


def test_full_hessian_influence_does_not_depend_on_the_parametrisation():
    """Law 19: without damping, ``theta = A phi`` changes gradients and Hessian, but no score."""
    generator = torch.Generator().manual_seed(0)
    eye = torch.eye(4, dtype=torch.float64)
    theta = torch.randn(4, 1, generator=generator, dtype=torch.float64)
    A = torch.randn(4, 4, generator=generator, dtype=torch.float64) + 3 * eye
    train, query = data(15, 1, classes=2), data(4, 2, classes=2)
    found = {}
    for name, model in {"plain": Mixed(theta, eye), "mixed": Mixed(torch.linalg.solve(A, theta), A)}.items():
        for damping in (0.0, 0.1):
            method = uw.Influence(
                model.eval(), uw.BinaryClassification(), curvature="hessian", damping=damping, progress=False
            )
            found[name, damping] = method.fit(train).attribute(query).values
    assert relative(found["mixed", 0.0], found["plain", 0.0]) < 1e-8
    assert relative(found["mixed", 0.1], found["plain", 0.1]) > 1e-3  # a damping is not invariant


def test_the_regulariser_is_part_of_the_matrix():
    """``l2`` and damping add to the same eigenvalues; only the damping is reported as damping."""
    together = influence(damping=0.03).fit(TRAIN).attribute(QUERY)
    apart = influence(damping=0.01, l2=0.02).fit(TRAIN).attribute(QUERY)
    assert relative(apart.values, together.values) < 1e-12
    assert (apart.info["damping"], apart.info["l2"]) == (0.01, 0.02)


def test_removal_from_a_penalised_logistic_regression():
    """At the minimum of the penalised loss, ``l2`` makes the score the response of really refitting, to first order:
    a ten-thousandth of an example's weight less changes a query by a ten-thousandth of its score."""
    model = logistic()
    scores = influence(model, "hessian", damping=0.0, l2=PENALTY).fit(TRAIN).attribute(QUERY).values
    step = 1e-4

    def measured(flat: Tensor) -> Tensor:
        return F.cross_entropy(QUERY[0] @ flat[:12].reshape(3, 4).T + flat[12:], QUERY[1], reduction="none")

    for i in range(5):
        real = []
        for sign in (1, -1):
            weights = torch.ones(15, dtype=torch.float64)
            weights[i] -= sign * step
            real.append(measured(minimise(weights)))
        assert relative((real[0] - real[1]) / (2 * step), scores[:, i]) < 1e-6


def test_margins_are_oriented():
    loss = influence().fit(TRAIN).attribute(QUERY).values
    method = uw.Influence(small(), uw.Classification("margin"), curvature="ggn", damping=1e-2, progress=False)
    p = small()(QUERY[0]).softmax(1).gather(1, QUERY[1][:, None]).detach()
    assert relative((1 - p) * method.fit(TRAIN).attribute(QUERY).values, loss) < 1e-10


# Damping -------------------------------------------------------------------------------------------------------------


def test_damping_relative_to_the_spectrum():
    model = small()
    values = torch.linalg.eigvalsh(dense(model, "ggn")[0])
    for damping, number in {
        "0.1 mean": 0.1 * float(values.mean()),
        "0.01 top": 0.01 * float(values[-1]),
        "2 example": 2 * float(values.sum()) / len(TRAIN[1]),
        uw.Damping(0.2, relative=True): 0.2 * float(values.mean()),
        uw.Damping(0.2, relative="top"): 0.2 * float(values[-1]),
    }.items():
        for solver in ("direct", Fixed()):  # from the spectrum; from the trace and from Lanczos
            method = influence(model, damping=damping, solver=solver).fit(TRAIN)
            used = method.attribute(QUERY).info["layer_damping"]
            assert used == {"0": pytest.approx(number, rel=1e-6), "2": pytest.approx(number, rel=1e-6)}


def test_another_damping_needs_no_other_fit():
    method = influence(damping=1e-2).fit(TRAIN)
    operator = method._fitted.curvature.operator
    before = operator.products
    again = method.with_damping(0.5)
    assert (
        relative(again.attribute(QUERY).values, influence(damping=0.5).fit(TRAIN).attribute(QUERY).values)
        < 1e-12
    )
    assert operator.products - before == 4  # the check of the residual alone


# Evidence and refusals -----------------------------------------------------------------------------------------------


def test_a_system_that_did_not_converge_is_said_so():
    method = influence(solver=Fixed(converged=False)).fit(TRAIN)
    with pytest.warns(UserWarning, match="did not converge"):
        scores = method.attribute(QUERY)
    assert scores.info["solve"]["converged"] is False


@pytest.mark.parametrize("preconditioner", ["ekfac", "kfac", "diagonal"])
def test_structured_preconditioners_are_symmetric_and_positive(preconditioner: str):
    method = influence(solver=Fixed(), preconditioner=preconditioner, l2=0.01).fit(TRAIN)
    scores = method.attribute(QUERY)
    assert scores.info["solve"]["solver"] == "fixed"
    eye = torch.eye(51, dtype=torch.float64)
    M = method._fitted.curvature.preconditioned_by(0.02, eye) @ eye
    assert relative(M, M.T) < 1e-12
    assert float(torch.linalg.eigvalsh(M)[0]) > 0
    structured = uw.Influence(
        small(), uw.Classification(), curvature=preconditioner, damping=0.03, progress=False
    )
    inverse = structured.fit(TRAIN)._fitted.curvature.inverse(uw.Damping(0.03))
    queries = method._query_gradients(Examples(QUERY), range(4))
    assert relative(M @ queries.dense().T, (inverse @ queries).dense().T) < 1e-12


def test_an_indefinite_hessian_is_refused_with_its_eigenvalue():
    smallest = float(torch.linalg.eigvalsh(dense(small(), "hessian")[0])[0])
    assert smallest < -0.1
    with pytest.raises(
        UpweightError, match=rf"indefinite: its smallest eigenvalue {smallest:.3g} <= -damping.*ggn"
    ):
        influence(curvature="hessian", damping=1e-2).fit(TRAIN)
    scores = influence(curvature="hessian", damping=-1.5 * smallest).fit(TRAIN).attribute(QUERY)
    assert scores.info["solve"]["negative_eigenvalues"] > 0
    assert scores.info["solve"]["smallest_eigenvalue"] == pytest.approx(smallest)
    chosen = influence(curvature="hessian", damping="auto").fit(TRAIN).attribute(QUERY)
    assert chosen.info["damping"] > -smallest


def test_no_damping_and_a_singular_matrix_are_refused():
    with pytest.raises(UpweightError, match="singular"):
        influence(damping=0.0).fit(TRAIN)


def test_a_matrix_that_does_not_fit_is_refused_and_the_default_goes_on_without():
    with pytest.raises(UpweightError, match=r"51 parameters takes .*KiB.*solver='cg'"):
        influence(solver="direct", memory=50_000).fit(TRAIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "solver='newton' is unknown"),
        ({"solver": 3}, "expected a name or an object"),
        ({"curvature": "ekfac", "solver": "direct"}, "closed form"),
        ({"curvature": "ekfac", "l2": 0.1}, "models the loss alone"),
        ({"l2": -1.0}, "l2=-1.0"),
        ({"curvature": "hessian", "solver": "dual"}, "sum of squares"),
        ({"solver": "dual", "blocks": True}, "couples all layers"),
        ({"curvature": "ekfac", "blocks": True}, "never couples layers"),
        ({"correction": "rescaled", "blocks": True}, "one matrix over all layers"),
        ({"curvature": "fisher"}, "'hessian'"),
        ({"damping": "0.1 median"}, "'0.01 top'"),
    ],
)
def test_arguments_that_do_not_go_together(options, message: str):
    with pytest.raises(UpweightError, match=message):
        influence(**options)


def test_what_only_the_fit_can_see():
    with pytest.raises(UpweightError, match="one number for all"):
        influence(damping={"0": 0.1}).fit(TRAIN)
    with pytest.raises(UpweightError, match="preconditioner='jacobi'"):
        influence(preconditioner="jacobi").fit(TRAIN)
    functions = uw.Task.from_functions(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
    with pytest.raises(UpweightError, match="curvature='hessian'"):
        uw.Influence(small(), functions, curvature="ggn").fit(TRAIN)
    hessian = uw.Influence(small(), functions, curvature="hessian", damping=1.0, progress=False).fit(TRAIN)
    expected = influence(curvature="hessian", damping=1.0).fit(TRAIN).attribute(QUERY).values
    assert relative(hessian.attribute(QUERY).values, expected) < 1e-12


def test_scores_resume_from_a_folder_and_an_index_is_refused(tmp_path):
    method = influence().fit(TRAIN, cache=tmp_path / "cache")
    first = method.attribute(QUERY, out=tmp_path / "out")
    again = influence().fit(TRAIN, cache=tmp_path / "cache").attribute(QUERY, out=tmp_path / "out")
    assert torch.equal(first.values, again.values)
    with pytest.raises(UpweightError, match="eigenbasis"):
        influence().fit(TRAIN, cache=uw.Cache(tmp_path / "index", precision="index"))


def test_a_subset_of_the_parameters():
    model = small()
    scores = influence(model, parameters=r"^2\.").fit(TRAIN).attribute(QUERY)
    tracker = Tracker(model, uw.Classification(), Examples(TRAIN), r"^2\.")
    G, V = tracker.train(TRAIN, range(15)).dense(), tracker.query(QUERY, range(4)).dense()
    S = torch.cat([c.dense() for c in tracker.fisher(TRAIN, range(15), "exact", 2, torch.Generator())])
    H = S.T @ S / 15 + 1e-2 * torch.eye(21, dtype=torch.float64)
    assert relative(scores.values, V @ torch.linalg.solve(H, G.T) / 15) < 1e-10


def test_direct_follows_the_operator_it_is_given():
    solver = Direct()
    first = influence(small(), solver=solver).fit(TRAIN)
    second = influence(logistic(), solver=solver).fit(TRAIN)
    for method in (first, second, first):
        own = influence(method.model).fit(TRAIN).attribute(QUERY).values
        assert relative(method.attribute(QUERY).values, own) < 1e-12
