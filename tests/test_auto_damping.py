"""Automatic damping of an exact curvature: the lowest real objective after the damped step."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor, nn

import upweight as uw
from upweight.curvature import auto_damping as module
from upweight.curvature import fisher_damping as fisher_module
from upweight.curvature.auto_damping import auto_damping
from upweight.curvature.exact import ExactCurvature
from upweight.curvature.fisher_damping import fisher_damping
from upweight.gradients import Tracker

N, L2 = 60, 1e-3


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    return x, (x @ torch.randn(4, 3, generator=generator, dtype=torch.float64)).argmax(1)


def trained() -> nn.Module:
    """A network at its minimum, nearly; its 27 parameters are fewer than the Lanczos steps, which are then exact."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100)
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + L2 / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.eval()


def operator(model: nn.Module, kind: str = "ggn", **options) -> ExactCurvature:
    examples = uw.Examples(data())
    return ExactCurvature(Tracker(model, uw.Classification(), examples), examples, kind, l2=L2, **options)


def halves() -> list[Tensor]:
    """The same random halves, each with its complement."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(module.PAIRS):
        order = torch.randperm(N, generator=generator)
        found += [order[: N // 2], order[-(N // 2) :]]
    return found


def after(model: nn.Module, kind: str, damping: float) -> float:
    """The halves' mean objective after the damped step, all dense and by autograd."""
    x, y = data()
    names = dict(model.named_parameters())
    theta = torch.cat([p.detach().flatten() for p in names.values()])

    def outputs(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in names.values()])
        moved = {k: part.reshape(p.shape) for (k, p), part in zip(names.items(), parts, strict=True)}
        return torch.func.functional_call(model, moved, (x,))

    def half_objective(flat: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(outputs(flat)[rows], y[rows]) + L2 / 2 * flat.square().sum()

    everything = torch.arange(N)
    if kind == "hessian":
        H = torch.func.hessian(half_objective)(theta, everything)
    else:
        S, p = torch.func.jacrev(outputs)(theta), outputs(theta).softmax(1)
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        H = torch.einsum("ncp,ncd,ndq->pq", S, middle, S) / N + L2 * torch.eye(len(theta))
    damped = H + damping * torch.eye(len(theta))
    values = [
        float(
            half_objective(
                theta - torch.linalg.solve(damped, torch.func.grad(half_objective)(theta, rows)), rows
            )
        )
        for rows in halves()
    ]
    return float(np.mean(values))


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_it_is_the_damping_of_the_lowest_objective(kind):
    model = trained()
    found = auto_damping(operator(model, kind))
    for damping, value in found.tried.items():
        assert value == pytest.approx(after(model, kind, damping), rel=1e-9)
    assert found.before == pytest.approx(after(model, kind, 1e15), rel=1e-9)
    bounds = math.log(found.value / 10), math.log(found.value * 10)
    best = minimize_scalar(lambda log: after(model, kind, math.exp(log)), bounds=bounds, method="bounded")
    assert 0.75 < found.value / math.exp(best.x) < 1.33
    gained = found.before - after(model, kind, found.value)
    assert gained > 0.98 * (found.before - best.fun)


@pytest.mark.parametrize(
    ("rule", "fisher"), [(auto_damping, "exact"), (fisher_damping, "sampled"), (fisher_damping, "empirical")]
)
def test_it_does_not_depend_on_the_batch_size(rule, fisher):
    model = trained().float()
    numbers = {rule(operator(model, batch_size=size, fisher=fisher)).value for size in (7, 16, 60)}
    assert len(numbers) == 1


def test_influence_takes_it_and_says_from_what():
    """The same by the dense matrix, by conjugate gradients and by the dual; the model is not touched."""
    model, numbers = trained(), []
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for solver in ("direct", "cg", "dual"):
        method = uw.Influence(
            model, uw.Classification(), curvature="ggn", solver=solver, l2=L2, progress=False
        ).fit(data())
        info = method.attribute(data()).info
        numbers.append(info["damping"])
        assert info["auto_damping"]["damping"] == info["damping"]
        assert (
            min(info["auto_damping"]["objective_after"].values()) < info["auto_damping"]["objective_before"]
        )
    assert len(set(numbers)) == 1
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_an_indefinite_hessian_gets_more_than_its_negative_curvature():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double().eval()  # not trained
    found = auto_damping(operator(model, "hessian"))
    assert found.smallest < -1e-3
    assert found.value >= 2 * -found.smallest
    assert min(found.tried) >= 2 * -found.smallest  # no step is taken where H + damping I is indefinite


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_examples_and_no_gradient_give_a_positive_number(n):
    x, y = data()
    model = trained()
    examples = uw.Examples((x[:n], y[:n]))
    tracker = Tracker(model, uw.Classification(), examples)
    assert 0 < auto_damping(ExactCurvature(tracker, examples)).value < math.inf
    line = nn.Linear(4, 1).double().eval()  # fits its data exactly: no gradient, any damping will do
    with torch.no_grad():
        examples = uw.Examples((x[:n], line(x[:n])))
    found = auto_damping(ExactCurvature(Tracker(line, uw.Regression(), examples), examples))
    assert 0 < found.value < math.inf


# Fisher matrices of sampled or given labels -------------------------------------------------------------------------


def spectrum(H: ExactCurvature) -> Tensor:
    return torch.linalg.eigvalsh(H.product(torch.eye(H.size, dtype=torch.float64))) - L2


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_their_damping_leaves_so_many_directions_an_example(fisher: str, monkeypatch):
    """Dense: df(damping) = tr F (F + (damping + l2) I)^-1 = .08 n. With 60 examples that is 4.8 of 27 directions."""
    H = operator(trained(), fisher=fisher)
    values = spectrum(H)

    def degrees(damping: float) -> float:
        return float((values / (values + damping + L2)).sum())

    assert degrees(1e-3 * L2) > 0.08 * N
    best = math.exp(brentq(lambda log: degrees(math.exp(log)) - 0.08 * N, -16, 4))
    estimated = fisher_damping(H)  # by stochastic quadrature
    assert 0.5 * best < estimated.value < 2 * best
    assert estimated.effective_dimension == pytest.approx(0.08 * N, rel=0.05)
    method = uw.Influence(trained(), uw.Classification(), curvature="ggn", fisher=fisher, l2=L2, draws=4)
    info = method.fit(data()).attribute(data()).info
    assert info["damping"] == estimated.value and info["auto_damping"]["criterion"].endswith("0.08 n")
    monkeypatch.setattr(fisher_module, "lanczos_quadrature", lambda _: (values + L2, torch.ones_like(values)))
    assert fisher_damping(H).value == float(f"{best:.1e}")


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_without_so_many_directions_it_is_that_of_the_highest_evidence(fisher: str, monkeypatch):
    """The marginal likelihood of the trained weights under N(0, 1 / (n (damping + l2))), maximised densely."""
    monkeypatch.setattr(fisher_module, "DIRECTIONS", 0.5)  # 30 of 27
    model = trained()
    H = operator(model, fisher=fisher)
    values = spectrum(H)
    squared = sum(float(p.detach().square().sum()) for p in model.parameters())

    def minus_evidence(log_precision: float) -> float:
        x = math.exp(log_precision)
        return (
            N * x * squared / 2 - H.size / 2 * math.log(x) + float((values.clamp_min(0) + x).log().sum()) / 2
        )

    best = math.exp(
        minimize_scalar(minus_evidence, bounds=(-16, 4), method="bounded", options={"xatol": 1e-9}).x
    )
    estimated = fisher_damping(H)  # by stochastic quadrature
    monkeypatch.setattr(fisher_module, "lanczos_quadrature", lambda _: (values + L2, torch.ones_like(values)))
    exact = fisher_damping(H)
    assert exact.value == float(f"{max(best - L2, 1e-3 * L2):.1e}")
    assert 0.5 * exact.value < estimated.value < 2 * exact.value
    assert "MacKay" in exact.criterion


def test_where_the_regulariser_is_enough_the_damping_is_next_to_nothing():
    model = trained()
    examples = uw.Examples(data())
    H = ExactCurvature(Tracker(model, uw.Classification(), examples), examples, l2=1.0, fisher="empirical")
    assert fisher_damping(H).value == pytest.approx(1e-3)


def test_weights_of_zero_have_a_finite_damping():
    """No prior is too narrow for them: the evidence has no maximum."""
    line = nn.Linear(4, 3).double().eval()
    with torch.no_grad():
        line.weight.zero_(), line.bias.zero_()
    x, y = torch.randn(2000, 4, dtype=torch.float64), torch.arange(2000) % 3
    examples = uw.Examples((x, y))
    found = fisher_damping(
        ExactCurvature(Tracker(line, uw.Classification(), examples), examples, fisher="empirical")
    )
    assert "MacKay" in found.criterion and 0 < found.value < 100


@pytest.mark.parametrize("size", [7, 64, 256, 800])
def test_rounding_determines_no_direction(size: int):
    """A softmax leaves a third of these parameters undetermined; in float32 their eigenvalues are 1e-9, not zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 29, generator=generator)
    y = (x @ torch.randn(29, 3, generator=generator) + torch.randn(800, 3, generator=generator) * 3).argmax(1)
    model = nn.Linear(29, 3)
    with torch.no_grad():
        model.weight.normal_(0, 0.1, generator=generator), model.bias.zero_()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = {}
    for dtype in (torch.float32, torch.float64):
        part = copy.deepcopy(model).eval().to(dtype)
        examples = uw.Examples((x.to(dtype), y))
        tracker = Tracker(part, uw.Classification(), examples)
        found[dtype] = fisher_damping(
            ExactCurvature(tracker, examples, fisher="empirical", batch_size=size)
        ).value
    assert (
        found[torch.float32] == pytest.approx(found[torch.float64], rel=0.2) and found[torch.float64] > 1e-4
    )
