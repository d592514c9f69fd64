"""The exact Gauss-Newton matrix and Hessian against autograd's dense ones, in float64, over the registry of models."""

import oracles
import torch
from cases_all import EXACT, WITH_OUTPUTS, N, each, track
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from upweight.curvature.exact import ExactCurvature
from upweight.data import Examples
from upweight.gradients import Tracker
from upweight.gradients.layers import from_parameters

TWICE_REFUSED: tuple[str, ...] = ("sparse embedding",)
"""Cases whose Hessian torch itself cannot compute."""


def in_flat_order(tracker: Tracker, H: Tensor) -> Tensor:
    """H [p, p] in the order of the tracker's parameters, in the order of its layers' flat gradients instead."""
    parameters = tracker.parameters
    order = torch.arange(float(len(H)), dtype=torch.float64)
    parts = order.split([p.numel() for p in parameters.values()])
    named = {
        name: part.reshape(1, *parameters[name].shape) for name, part in zip(parameters, parts, strict=True)
    }
    rows = from_parameters(tracker.layers, named)[0].long()
    return H[rows][:, rows]


def dense_hessian(tracker: Tracker, case, batch) -> Tensor:
    """By torch.autograd.functional.hessian, of the mean loss."""
    parameters = tracker.parameters
    names, shapes = list(parameters), [p.shape for p in parameters.values()]
    loss = case.oracle_loss()

    def mean(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        values = {n: part.reshape(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        wrapped = _Loss(tracker.model, loss)
        moved = {f"model.{n}": v for n, v in values.items()}
        total = sum(torch.func.functional_call(wrapped, moved, (oracles.one(batch, i),)) for i in range(N))
        return total / N

    at = torch.cat([p.detach().flatten() for p in parameters.values()])
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(mean, at)


class _Loss(nn.Module):
    def __init__(self, model: nn.Module, loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch) -> Tensor:
        return self.loss(self.model, batch).sum()


def dense_ggn(tracker: Tracker, case, batch) -> Tensor:
    return sum(oracles.fisher(case.kind, tracker.model, batch, i, case.parameters) for i in range(N)) / N


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-10) -> None:
    assert float((found - truth).abs().max()) <= tolerance * float(truth.abs().max()) + 1e-14


@each([case for case in EXACT if case.name not in TWICE_REFUSED])
def test_hessian_equals_autograds(case):
    model, batch, tracker = track(case)
    H = ExactCurvature(tracker, Examples(batch), "hessian", batch_size=3)
    with oracles.untouched(model):
        dense = H.dense()
    close(dense, in_flat_order(tracker, dense_hessian(tracker, case, batch)))


@each(WITH_OUTPUTS)
def test_ggn_equals_the_outputs_jacobians(case, monkeypatch):
    model, batch, tracker = track(case)
    truth = in_flat_order(tracker, dense_ggn(tracker, case, batch))
    H = ExactCurvature(tracker, Examples(batch), "ggn", batch_size=3)
    x = torch.randn(H.size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with oracles.untouched(model):
        product, dense = H.product(x), H.dense()
        columns, gram = H._by_columns(), H._gram()
        sampled = H.sampled_product(x, range(N))
    for found in (dense, columns, gram):
        close(found, truth)
    close(product, truth @ x)
    close(sampled, truth @ x)
    blocks = ExactCurvature(tracker, Examples(batch), "ggn", blocks=True)
    cut = torch.block_diag(*(truth[a:b, a:b] for a, b in blocks.spans()))
    close(blocks.dense(), cut)
    close(blocks.product(x), cut @ x)
