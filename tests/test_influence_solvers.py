"""Every solver by name through `Influence`, against dense inverses made by autograd, within what each promises.

A solver promises a relative residual. Scores then differ from the truth by no more than

    |scores - truth| <= residual |v_q| |g_i| / (n s),     s the smallest eigenvalue of H + damping I,

which is the tolerance here: nothing is tuned.
"""

import json
import warnings
from functools import cache

import oracles
import pytest
import torch
from cases import Case
from cases_all import CASES
from networks import digits, trained
from torch import Tensor

import upweight as uw
from upweight.curvature.solvers import Arnoldi, ConjugateGradient, Lissa, Nystrom, Sketch
from upweight.errors import UpweightError

TRAIN, QUERIES, PENALTY, DAMPING = 12, 4, 0.01, 0.05
PROMISED = {
    "direct": 1e-8,
    "dual": 1e-8,
    "cg": 1e-6,
    "lissa": 1e-3,
    "arnoldi": 1e-2,
    "nystrom": 1e-2,
    "astra": 1e-2,
}
BY_NAME = {case.name: case for case in CASES}
NETWORKS = pytest.mark.parametrize("name", ["mlp", "lenet", "mlp regression", "mlp logistic"])


def batches(case: Case, dtype: torch.dtype = torch.float64):
    return case.batch(TRAIN, dtype, seed=3), case.batch(QUERIES, dtype, seed=4)


@cache
def truth(name: str, curvature: str) -> tuple[Tensor, Tensor, Tensor]:
    """H with the penalty [p, p], training gradients [n, p] and query gradients [q, p], in the parameters' order."""
    case = BY_NAME[name]
    model, (train, query) = case.build(), batches(case)
    loss = case.oracle_loss()
    G = oracles.flat(oracles.gradients(loss, model, train, TRAIN))
    V = oracles.flat(oracles.gradients(loss, model, query, QUERIES))
    if curvature == "ggn":
        H = sum(oracles.fisher(case.kind, model, train, i) for i in range(TRAIN)) / TRAIN
    else:
        names, parts = zip(*model.named_parameters(), strict=True)

        def mean(*values: Tensor) -> Tensor:
            def outputs(one) -> Tensor:
                return torch.func.functional_call(model, dict(zip(names, values, strict=True)), one[:-1])

            ones = [oracles.one(train, i) for i in range(TRAIN)]
            return sum(oracles.LOSS[case.kind](outputs(one), one[-1]) for one in ones) / TRAIN

        rows = torch.autograd.functional.hessian(mean, parts)
        sizes = [part.numel() for part in parts]
        H = torch.cat(
            [
                torch.cat([b.reshape(n, m) for b, m in zip(row, sizes, strict=True)], 1)
                for row, n in zip(rows, sizes, strict=True)
            ]
        )
    return H + PENALTY * torch.eye(len(H), dtype=torch.float64), G, V


@cache
def scores_of(name: str, curvature: str, damping: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and self-influence, and by how much a relative residual of 1 may change either."""
    H, G, V = truth(name, curvature)
    A = H + damping * torch.eye(len(H), dtype=torch.float64)
    smallest = torch.linalg.eigvalsh(A)[0]
    assert smallest > 0
    own = (G * torch.linalg.solve(A, G.T).T).sum(1) / TRAIN
    lengths = G.norm(dim=1) / (TRAIN * smallest)
    return (
        V @ torch.linalg.solve(A, G.T) / TRAIN,
        own,
        V.norm(dim=1)[:, None] * lengths,
        G.norm(dim=1) * lengths,
    )


def influence(name: str, dtype: torch.dtype = torch.float64, **options) -> uw.Influence:
    case = BY_NAME[name]
    options = {"curvature": "ggn", "damping": DAMPING, "l2": PENALTY, "progress": False, **options}
    return uw.Influence(case.build(dtype), case.task(), **options).fit(batches(case, dtype)[0])


def queries(name: str, dtype: torch.dtype = torch.float64):
    return batches(BY_NAME[name], dtype)[1]


@NETWORKS
@pytest.mark.parametrize("solver", PROMISED)
def test_scores_are_within_what_the_solver_promises(name: str, solver: str):
    expected, own, unit, own_unit = scores_of(name, "ggn", DAMPING)
    method = influence(name, solver=solver)
    found = method.attribute(queries(name))
    assert bool(((found.values - expected).abs() <= PROMISED[solver] * unit).all())
    assert found.unit == method.task.unit and method.self_influence().unit
    solve = found.info["solve"]
    assert solve["solver"] == solver and solve["damping"] == DAMPING and solve["converged"]
    assert solve["residual_max"] <= PROMISED[solver]
    json.dumps(found.info)
    if solver in ("direct", "dual", "cg"):
        difference = (method.self_influence().values - own).abs()
        assert bool((difference <= PROMISED[solver] * own_unit).all())


@pytest.mark.parametrize("name", ["mlp", "lenet"])
@pytest.mark.parametrize("solver", ["direct", "cg", "lissa", "arnoldi", "astra"])
def test_hessians_within_a_damping_that_makes_them_positive(name: str, solver: str):
    smallest = float(torch.linalg.eigvalsh(truth(name, "hessian")[0])[0])
    assert smallest < 0
    damping = -2 * smallest
    expected, _, unit, _ = scores_of(name, "hessian", damping)
    found = influence(name, curvature="hessian", solver=solver, damping=damping).attribute(queries(name))
    assert bool(((found.values - expected).abs() <= PROMISED[solver] * unit).all())
    assert found.info["solve"]["converged"]
    if solver in (
        "direct",
        "cg",
        "lissa",
    ):  # less damping than the negative eigenvalue is refused, not solved
        with pytest.raises(UpweightError, match=r"negative|indefinite|diverged"):
            influence(name, curvature="hessian", solver=solver, damping=-0.2 * smallest).attribute(
                queries(name)
            )


@pytest.mark.parametrize(
    "preconditioner", ["auto", "sketch", "ekfac", "kfac", "diagonal", None, Sketch(rank=5)]
)
def test_preconditioners_change_the_way_and_not_the_end(preconditioner):
    expected, _, unit, _ = scores_of("lenet", "ggn", DAMPING)
    method = influence("lenet", solver="cg", preconditioner=preconditioner)
    found = method.attribute(queries("lenet"))
    assert bool(((found.values - expected).abs() <= 1e-6 * unit).all())
    assert found.info["solve"]["preconditioned"] is (preconditioner is not None)
    spent = method._fitted.curvature.operator.products
    assert found.info["solve"]["products"] == spent  # those of the sketch included


@pytest.mark.parametrize("solver", ["direct", "dual", "cg", "nystrom", "arnoldi", "lissa", "astra"])
def test_another_damping_is_the_same_as_another_fit(solver: str):
    method = influence("mlp", solver=solver)
    method.attribute(queries("mlp"))
    moved, fresh = method.with_damping(0.2), influence("mlp", solver=solver, damping=0.2)
    expected, _, unit, _ = scores_of("mlp", "ggn", 0.2)
    for one in (moved, fresh):
        values = one.attribute(queries("mlp")).values
        assert bool(((values - expected).abs() <= PROMISED[solver] * unit).all())


@pytest.mark.parametrize(
    "solver",
    [
        ConjugateGradient(max_iter=1),
        Lissa(depth=2),
        Arnoldi(rank=2, iterations=3, rtol=1e-6),
        Nystrom(rank=2, rtol=1e-6),
    ],
    ids=lambda solver: solver.name,
)
def test_what_did_not_converge_says_so_and_by_how_much(solver):
    """And the scores are wrong, but by no more than the reported residual allows."""
    expected, _, unit, _ = scores_of("mlp", "ggn", DAMPING)
    method = influence("mlp", solver=solver, preconditioner=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = method.attribute(queries("mlp"))
    assert any("did not converge" in str(w.message) and " -> " in str(w.message) for w in caught)
    assert found.info["solve"]["converged"] is False
    worst = ((found.values - expected).abs() / unit).max()
    assert 1e-4 < float(worst) <= found.info["solve"]["residual_max"]


@pytest.mark.parametrize("solver", ["direct", "dual", "cg", "nystrom"])
def test_float32_is_within_its_rounding(solver: str):
    expected, _, unit, _ = scores_of("lenet", "ggn", DAMPING)
    found = influence("lenet", torch.float32, solver=solver).attribute(queries("lenet", torch.float32))
    assert found.values.dtype == torch.float32 and found.info["solve"]["converged"]
    promised = 1e-2 if solver == "nystrom" else 1e-3
    assert bool(((found.values.double() - expected).abs() <= promised * unit).all())


def test_on_a_trained_network_a_third_of_the_iterations_of_plain_conjugate_gradients():
    """A sketch alone takes less than a third, and in the block form less than that."""
    model = trained("cnn").double()
    train, query = ((x[:k].double(), y[:k]) for (x, y), k in zip(digits(), (200, 16), strict=True))
    steps = {}
    for name, block, preconditioner in (
        ("plain", False, None),
        ("sketch", False, "sketch"),
        ("block sketch", True, "sketch"),
    ):
        method = uw.Influence(
            model,
            uw.Classification(),
            curvature="ggn",
            solver=ConjugateGradient(block=block, rtol=1e-6),
            preconditioner=preconditioner,
            l2=1e-3,
            damping=1e-3,
            progress=False,
        )
        solve = method.fit(train).attribute(query).info["solve"]
        assert solve["converged"] and solve["residual_max"] <= 1e-6
        steps[name] = solve["iterations"]
    assert 3 * steps["sketch"] <= steps["plain"]
    assert steps["block sketch"] < steps["sketch"]
