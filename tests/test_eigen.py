"""Eigendecompositions that fail, and curvatures that are not finite: tried again, or named."""

import pytest
import torch
from torch import nn

import upweight as uw
from upweight.curvature.eigen import eigh

REAL = torch.linalg.eigh


def matrix() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    return root @ root.T


def test_a_failure_in_float32_is_tried_again_in_float64(monkeypatch):
    tried = []

    def failing(attempt):
        tried.append(attempt.dtype)
        if attempt.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return REAL(attempt)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = eigh(matrix(), "the factor", torch.float32)
    assert tried == [torch.float32, torch.float64]
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(values.double(), torch.linalg.eigvalsh(matrix()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vectors @ values.diag() @ vectors.mT, matrix().float(), rtol=1e-4, atol=1e-4)


def test_a_result_that_is_not_finite_is_tried_again_and_a_jitter_is_the_last_resort(monkeypatch):
    tried = []

    def failing(attempt):
        tried.append(attempt.clone())
        values, vectors = REAL(attempt)
        return (values, vectors) if len(tried) == 3 else (values * float("nan"), vectors)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, _ = eigh(matrix(), "the factor", torch.float64)
    assert (tried[2] - tried[1]).diagonal() == pytest.approx([1e-8] * 6, rel=1e-6)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix()), rtol=1e-7, atol=1e-6)


def test_no_attempt_succeeds(monkeypatch):
    def failing(_):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.raises(
        uw.UpweightError, match=r"the factor \(6 x 6, .* did not converge -> train in float64"
    ):
        eigh(matrix(), "the factor", torch.float32)


@pytest.mark.parametrize(
    ("curvature", "large"), [("kfac", 3e19), ("ekfac", 3e19), ("ekfac", 1e19), ("diagonal", 3e19)]
)
def test_a_curvature_that_overflows_names_the_layer_and_the_batch(curvature, large):
    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.randn(64, 1)
    x[40] = large  # its loss and gradient are finite, their squares are not
    task = uw.Task.from_functions(lambda model, batch: (model(batch[0]) - batch[1]).abs()[:, 0])
    method = uw.Influence(
        nn.Linear(4, 1).eval(), task, curvature=curvature, fisher="empirical", batch_size=16, progress=False
    )
    with pytest.raises(uw.UpweightError, match="batch from example 32") as error:
        method.fit((x, y))
    assert "layer weight" in str(error.value) and "not finite" in str(error.value)
