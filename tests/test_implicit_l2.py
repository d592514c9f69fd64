"""The regulariser that trained parameters betray: exact where theory is, silent where they say nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upweight as uw
from upweight.curvature.implicit_l2 import implicit_l2, implicit_l2_of
from upweight.curvature.l2 import l2_vector
from upweight.gradients import Tracker

N, L2 = 80, 0.03


def table(classes: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, 6, generator=generator, dtype=torch.float64) * torch.tensor([3, 2, 1, 1, 0.3, 0.1])
    y = x @ torch.randn(6, classes, generator=generator, dtype=torch.float64)
    y = y + torch.randn(N, classes, generator=generator, dtype=torch.float64)
    return (x, y) if classes == 1 else (x, y.argmax(1))


def zeros(classes: int) -> nn.Linear:
    model = nn.Linear(6, classes, bias=False).double()
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
    tracker = Tracker(model, task, examples)
    return implicit_l2_of(tracker, examples, batch_size, l2_vector(l2, tracker))


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
    model = zeros(1)
    with torch.no_grad():
        for _ in range(steps):
            model.weight -= rate * ((x @ model.weight.T - y).T @ x) / N
    assert betrayed(model.eval(), (x, y), uw.Regression()) == pytest.approx(expected, rel=1e-9)
    assert 0.3 < expected * rate * steps < 1.1  # 1 / (rate x steps), as theory has it


def test_nothing_is_claimed_where_the_weights_are_not_along_the_gradient():
    generator = torch.Generator().manual_seed(0)
    g, theta = torch.randn(2, 10_000, generator=generator)
    assert implicit_l2(g, theta) == 0
    assert implicit_l2(theta, theta) == 0  # it points the other way
    assert implicit_l2(torch.zeros(3), torch.ones(3)) == implicit_l2(torch.ones(3), torch.zeros(3)) == 0


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
    found = info["auto_damping"]["implicit_l2"] if (curvature, fisher) in EXACT else info["implicit_l2"]
    assert found == pytest.approx(least, rel=1e-6)
    assert least > 1
    assert next(iter(info["layer_damping"].values())) >= 0.95 * least  # two digits


def test_a_damping_that_was_named_and_networks_with_structured_curvature_are_left_alone():
    data = table(classes=3)
    query = (data[0][:2], data[1][:2])
    for damping, expected in ((1e-3, 1e-3), ({"weight": 1e-4}, 1e-4)):
        method = uw.Influence(stopped_early(data), uw.Classification(), damping=damping, progress=False)
        found = method.fit(data).attribute(query).info["layer_damping"]
        assert list(found.values()) == [expected]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    method = uw.Influence(minimised(network, data, L2), uw.Classification(), progress=False).fit(data)
    assert "implicit_l2" not in method.attribute(query).info
