"""Fisher columns of a task that draws its targets itself, by running the model: each draw is a pass of its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upweight as uw
from upweight.gradients import Gradients, Tracker, assemble
from upweight.gradients.layers import to_parameters

N = 6


def drawn(model: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    logits = model(batch[0])
    labels = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, labels, reduction="none")


def setting() -> tuple[nn.Module, uw.Task, uw.Examples]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 4)).double().eval()
    data = uw.Examples((torch.randn(N, 2, 4, dtype=torch.float64), torch.randint(4, (N,))))
    task = uw.Task.from_functions(
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"), sampled_loss=drawn
    )
    return model, task, data


def columns(draws: int) -> list[Gradients]:
    model, task, data = setting()
    generator = torch.Generator().manual_seed(5)
    return Tracker(model, task, data).fisher(data.take(range(N)), data.ids, "sampled", draws, generator)


def test_they_are_the_gradients_of_the_draws():
    model, task, data = setting()
    generator, draws = torch.Generator().manual_seed(5), 3
    for found in columns(draws):
        losses = drawn(model, data.take(range(N)), generator) / draws**0.5
        parameters = list(model.parameters())
        for row, loss in zip(_by_parameter(found, model, task, data), losses, strict=True):
            g = torch.autograd.grad(loss, parameters, retain_graph=True)
            expected = torch.cat([part.flatten() for part in g])
            torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-14)


def _by_parameter(found: Gradients, model: nn.Module, task: uw.Task, data: uw.Examples) -> Tensor:
    """[batch, parameters] in the order of the model's."""
    named = to_parameters(Tracker(model, task, data).layers, found.dense())
    return torch.cat([named[name].flatten(1) for name, _ in model.named_parameters()], 1)


@pytest.mark.parametrize("weighted", [False, True])
def test_their_cost_is_linear_in_the_draws(weighted, monkeypatch):
    """A draw's column was once assembled from the uses of all of them."""
    counted = []
    piece = assemble._piece
    monkeypatch.setattr(assemble, "_piece", lambda *a: counted.append(1) or piece(*a))
    calls = {}
    for draws in (2, 4, 8):
        counted.clear()
        if weighted:
            model, task, data = setting()
            options = {"method": "influence", "curvature": "ekfac", "fisher": "sampled", "draws": draws}
            uw.reweight(model, task, data, {1: 0.5}, progress=False, **options)
        else:
            columns(draws)
        calls[draws] = len(counted)
    assert calls[8] - calls[4] == 2 * (calls[4] - calls[2]) > 0


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_a_convolution_has_the_positions_of_one_draw(curvature):
    """Four draws of the same label are the empirical Fisher, spectra and all."""
    model, _, data = setting()
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")  # noqa: E731
    task = uw.Task.from_functions(loss, sampled_loss=lambda model, batch, _: loss(model, batch))
    options = {"curvature": curvature, "damping": 1e-2, "draws": 4, "progress": False}
    scores = [
        uw.Influence(model, task, fisher=fisher, **options).fit(data).attribute(data).values
        for fisher in ("sampled", "empirical")
    ]
    torch.testing.assert_close(*scores, rtol=1e-10, atol=1e-14)
