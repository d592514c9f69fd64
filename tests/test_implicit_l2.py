"""The regulariser that trained parameters betray: exact where theory is, silent where they say nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upweight as uw
from upweight.curvature.exact import ExactCurvature
from upweight.curvature.implicit_l2 import implicit_l2, implicit_l2_beside
from upweight.gradients import Tracker

N, L2 = 80, 0.03


def table(classes: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, 10, generator=generator, dtype=torch.float64) * torch.logspace(0.5, -1, 10)
    y = x @ torch.randn(10, classes, generator=generator, dtype=torch.float64)
    y = y + torch.randn(N, classes, generator=generator, dtype=torch.float64)
    return (x, y) if classes == 1 else (x, y.argmax(1))


def zeros(classes: int) -> nn.Linear:
    model = nn.Linear(10, classes, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def minimised(model: nn.Module, data: tuple[Tensor, Tensor], l2: float) -> nn.Module:
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0]), data[1])
        loss = loss + l2 / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    return model.eval()


def betrayed(
    model: nn.Module, data: tuple[Tensor, Tensor], task: uw.Task, l2: float = 0.0, batch_size: int = 16
) -> float:
    examples = uw.Examples(data)
    return implicit_l2_beside(
        ExactCurvature(Tracker(model, task, examples), examples, l2=l2, batch_size=batch_size)
    )


def test_a_regulariser_that_was_not_told_is_found():
    data = table(classes=3)
    model = minimised(zeros(3), data, L2)
    for size in (7, 80):
        assert betrayed(model, data, uw.Classification(), batch_size=size) == pytest.approx(L2, rel=1e-6)
    # What was told is no longer to be found, and half of it leaves the other half.
    assert betrayed(model, data, uw.Classification(), l2=L2) < 1e-6
    assert betrayed(model, data, uw.Classification(), l2=L2 / 2) == pytest.approx(L2 / 2, rel=1e-6)


@pytest.mark.parametrize("steps", [20, 100, 500])
def test_stopped_gradient_descent_is_as_its_spectrum_says(steps):
    """Least squares from zero, in closed form: g = -s (1 - eta s)^t w and theta = (1 - (1 - eta s)^t) w."""
    (x, y), rate = table(), 0.01
    s, V = torch.linalg.eigh(x.T @ x / N)
    w = V.T @ torch.linalg.lstsq(x, y).solution[:, 0]
    left = (1 - rate * s) ** steps
    g, theta = -s * left * w, (1 - left) * w
    expected = float(g.square().sum() / -(g @ theta))
    for _ in range(200):
        f = expected / (s + expected)
        expected = float((f * g).square().sum() / -(f * g @ (f * theta)))
    model = zeros(1)
    with torch.no_grad():
        for _ in range(steps):
            model.weight -= rate * ((x @ model.weight.T - y).T @ x) / N
    assert betrayed(model.eval(), (x, y), uw.Regression()) == pytest.approx(expected, rel=1e-5)
    assert 0.3 < expected * rate * steps < 1.1  # 1 / (rate x steps), as theory has it


def test_nothing_is_claimed_where_the_weights_are_not_along_the_gradient():
    generator = torch.Generator().manual_seed(0)
    g, theta = torch.randn(2, 10_000, generator=generator)
    assert found(g, theta) == found(theta, theta) == 0  # the latter points the other way
    assert found(torch.zeros(9), torch.ones(9)) == found(torch.ones(9), torch.zeros(9)) == 0
    assert found(-torch.ones(9), torch.ones(9)) == 1
    assert found(-torch.ones(2), torch.ones(2)) == 0  # too few to tell


def found(g: Tensor, theta: Tensor) -> float:
    return implicit_l2(g, theta, lambda _: (g, theta))


@pytest.mark.parametrize("seed", range(4))
def test_the_noise_of_the_last_steps_is_no_regulariser(seed):
    """At random places around a minimum, as far off as its curvature lets the noise drive them."""
    data = table(classes=3)
    model = minimised(zeros(3), data, 0.0)
    with torch.no_grad():
        scale = 0.1 * model.weight.norm() / model.weight.numel() ** 0.5
        model.weight += scale * torch.randn(3, 10, generator=torch.Generator().manual_seed(seed)).double()
    assert betrayed(model, data, uw.Classification()) < 1e-3
    model = minimised(zeros(3), data, L2)
    with torch.no_grad():
        model.weight += 0.02 * torch.randn(3, 10, generator=torch.Generator().manual_seed(seed)).double()
    assert betrayed(model, data, uw.Classification()) == pytest.approx(L2, rel=0.4)


def test_biases_have_no_say():
    """One that training had no time to move would claim an early stop for all weights."""
    x, y = table()
    model = nn.Linear(10, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x - x.mean(0), y - y.mean()).solution.T)
        model.bias.fill_(-5.0)
    assert betrayed(model.eval(), (x, y + 20), uw.Regression()) == 0


def stopped_early(data: tuple[Tensor, Tensor]) -> nn.Module:
    model = zeros(3)
    with torch.no_grad():
        for _ in range(30):
            p = model(data[0]).softmax(1)
            model.weight -= 0.01 * (p - F.one_hot(data[1], 3)).T @ data[0] / N
    return model.eval()


EXACT = [("ggn", "exact"), ("ggn", "sampled"), ("ggn", "empirical"), ("hessian", "exact")]
STRUCTURED = [("ekfac", "exact"), ("ekfac", "empirical"), ("kfac", "exact"), ("diagonal", "exact")]


@pytest.mark.parametrize(("curvature", "fisher"), EXACT + STRUCTURED)
def test_automatic_damping_is_no_less(curvature, fisher):
    """A step that trains on lowers the objective most with no damping at all: it must not have the say."""
    data = table(classes=3)
    model = stopped_early(data)
    least = betrayed(model, data, uw.Classification())
    method = uw.Influence(model, uw.Classification(), curvature=curvature, fisher=fisher, progress=False)
    info = method.fit(data).attribute((data[0][:2], data[1][:2])).info
    exact = (curvature, fisher) in EXACT
    said = info["auto_damping"]["implicit_l2"] if exact else info["implicit_l2"]
    assert said == pytest.approx(
        least, rel=1e-6 if fisher == "exact" and curvature in ("ggn", "hessian") else 0.5
    )
    assert least > 1
    damping = next(iter(info["layer_damping"].values()))
    assert said <= damping <= (1.2 if exact and fisher == "exact" else 10) * said


def test_a_damping_that_was_named_and_networks_with_structured_curvature_are_left_alone():
    data = table(classes=3)
    query = (data[0][:2], data[1][:2])
    for damping, expected in ((1e-3, 1e-3), ({"weight": 1e-4}, 1e-4)):
        method = uw.Influence(stopped_early(data), uw.Classification(), damping=damping, progress=False)
        found = method.fit(data).attribute(query).info["layer_damping"]
        assert list(found.values()) == [expected]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    method = uw.Influence(minimised(network, data, L2), uw.Classification(), progress=False).fit(data)
    assert "implicit_l2" not in method.attribute(query).info


def test_a_layer_that_is_large_beside_the_memory_is_not_asked():
    data = table(classes=3)
    method = uw.Influence(stopped_early(data), uw.Classification(), memory=2000, batch_size=8, progress=False)
    assert "implicit_l2" not in method.fit(data).attribute((data[0][:2], data[1][:2])).info
