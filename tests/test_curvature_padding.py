"""K-FAC, EK-FAC and the diagonal of padded sequences: with the task's mask, padding changes nothing."""

import curvature_oracles as oracle
import pytest
import torch
from curvature_cases import DAMPING, FISHERS, QUERIES
from curvature_oracles import relative
from torch import Tensor, nn

import upweight as uw


class Masked(nn.Module):
    """Attention over the real positions of a sequence, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (
            nn.Linear(3, 4),
            nn.Linear(3, 4, False),
            nn.Linear(3, 4),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        weights = self.q(x) @ self.k(x).mT
        weights = weights.masked_fill(real[:, None] == 0, -torch.inf).softmax(-1)
        h = (weights @ self.v(x)).tanh() * real[..., None]
        return self.head(h.sum(1) / real.sum(1, keepdim=True))


def padded(n: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same sequences of 2 to 5 tokens whatever `length` they are padded to, with numbers like any other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 12, 3, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, 6, (n,), generator=generator)
    real = (torch.arange(12) < lengths[:, None]).double()
    return x[:, :length], real[:, :length], torch.randint(0, 3, (n,), generator=generator)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
def test_padding_changes_nothing_if_the_task_has_a_mask(curvature: str, fisher: str, tmp_path):
    torch.manual_seed(1)
    model = Masked().double().eval()

    def scores(length: int, mask: bool, **options) -> Tensor:
        task = uw.Classification()
        task.mask = (lambda batch: batch[1]) if mask else None
        method = uw.Influence(
            model, task, curvature=curvature, fisher=fisher, damping=DAMPING, draws=2, batch_size=4
        )
        return method.fit(padded(9, length, 1), **options).attribute(padded(QUERIES, length, 2)).values

    truth = scores(5, True)
    assert relative(scores(12, True), truth) < 1e-10
    assert relative(scores(12, True, cache=tmp_path), truth) < 1e-10
    if curvature != "diagonal":
        assert relative(scores(12, False), truth) > 1e-3  # what the mask is for


def test_kfac_counts_real_positions_only():
    """Padded sequences against the same sequences one by one, each at its own length."""
    torch.manual_seed(1)
    model = Masked().double().eval()
    x, real, y = padded(9, 12, 1)
    A = B = total = 0
    for i in range(9):
        length = int(real[i].sum())
        kept: list[Tensor] = []
        handle = model.v.register_forward_hook(lambda m, args, z, kept=kept: kept.append(z))
        outputs = model(x[i : i + 1, :length], real[i : i + 1, :length])
        handle.remove()
        a = torch.cat([x[i, :length], torch.ones(length, 1, dtype=torch.float64)], 1)
        A, total = A + a.T @ a, total + length
        (delta,) = torch.autograd.grad(oracle.loss_of("classification", outputs, y[i : i + 1]), kept)
        B = B + delta[0].T @ delta[0] / 9
    task = uw.Classification()
    task.mask = lambda batch: batch[1]
    method = uw.Influence(model, task, curvature="kfac", fisher="empirical", damping=DAMPING).fit(
        (x, real, y)
    )
    eigenvalues = method._fitted.curvature.layers["v"].eigenvalues.reshape(-1).sort()[0]
    truth = torch.linalg.eigvalsh(torch.kron(B, A / total))
    assert relative(eigenvalues, truth) < 1e-12
