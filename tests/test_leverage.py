"""Leaving examples out by Woodbury against dense inverses of the curvature without them, on every registered model."""

import pytest
import torch
from cases_all import CASES, WITH_OUTPUTS, N, each, named, track
from dense_inverse import DenseInverse
from gauss_newton import parts
from refusals import refused
from torch import Tensor

import upweight as uw
from upweight.curvature.leverage import Each, Group, leverages
from upweight.gradients import Gradients
from upweight.gradients.rowwise import combined, paired, weighted_sum

TOLERANCE = 1e-10


def close(found: Tensor, truth: Tensor, tolerance: float = TOLERANCE) -> None:
    assert float((found - truth).abs().max()) <= tolerance * float(truth.abs().max()) + 1e-14


@each(WITH_OUTPUTS)
def test_leaving_one_out_equals_the_dense_inverse_without_it(case):
    gradients, columns, own, A = parts(case)
    inverse = DenseInverse(A)
    found = inverse @ Each(columns, inverse, N, range(N)).correct(gradients)
    direct = [torch.linalg.solve(A - H_i / N, g) for H_i, g in zip(own, gradients.dense(), strict=True)]
    close(found.dense(), torch.stack(direct))


@each(WITH_OUTPUTS)
def test_leaving_a_group_out_equals_the_dense_inverse_without_it(case):
    gradients, columns, own, A = parts(case)
    inverse, group = DenseInverse(A), slice(1, 4)
    total = weighted_sum(gradients.rows(group), torch.ones(1, 3, dtype=A.dtype))
    close(total.dense(), gradients.dense()[group].sum(0, keepdim=True))
    members = [column.rows(group) for column in columns]
    found = inverse @ Group(members, inverse, N).correct(total)
    close(found.dense()[0], torch.linalg.solve(A - sum(own[group]) / N, total.dense()[0]))
    one = slice(2, 3)  # a group of one is leaving one out
    members = [column.rows(one) for column in columns]
    alone = Each(members, inverse, N, [2]).correct(gradients.rows(one))
    close(Group(members, inverse, N).correct(gradients.rows(one)).dense(), alone.dense())


@named("mlp", "linear", "logistic", "mlp regression")
def test_any_change_of_weights_equals_the_dense_inverse_with_them(case):
    gradients, columns, own, A = parts(case)
    inverse = DenseInverse(A)
    change = torch.tensor([-0.5, 0.0, 3.0, -1.0, 1.0], dtype=A.dtype)
    G = gradients.dense()
    every = change[:, None].expand(-1, len(columns))
    found = Each(columns, inverse, N, range(N), every).solve(gradients).dense()
    pairs = zip(change, own, G, strict=True)
    close(found, torch.stack([torch.linalg.solve(A + d * H_i / N, g) for d, H_i, g in pairs]))
    moved = A + sum(d * H_i for d, H_i in zip(change, own, strict=True)) / N
    close(Group(columns, inverse, N, change).solve(gradients).dense(), torch.linalg.solve(moved, G.T).T)


@each(WITH_OUTPUTS)
def test_leverages_sum_to_the_effective_number_of_parameters(case):
    _, columns, own, A = parts(case)
    h = leverages(columns, DenseInverse(A), N)
    H = sum(own) / N
    close(h.diagonal(dim1=1, dim2=2).sum(), torch.linalg.solve(A, H).trace())
    for i in range(N):
        roots = torch.stack([column.dense()[i] for column in columns])
        close(h[i], roots @ torch.linalg.solve(A, roots.T) / N)


@each(WITH_OUTPUTS)
def test_arithmetic_example_by_example_equals_the_dense_one(case):
    gradients, columns, _, _ = parts(case)
    G, S = gradients.dense(), columns[0].dense()
    close(paired(gradients, columns[0]), (G * S).sum(1))
    weights = torch.randn(N, len(columns), dtype=G.dtype, generator=torch.Generator().manual_seed(0))
    expected = G + sum(w[:, None] * c.dense() for w, c in zip(weights.T, columns, strict=True))
    close(combined(gradients, columns, weights).dense(), expected)
    for k in (1, N + 1):
        w = torch.randn(k, N, dtype=G.dtype, generator=torch.Generator().manual_seed(1))
        close(weighted_sum(gradients, w).dense(), w @ G)


@named("mlp")
def test_structured_curvature_stands_in_for_the_exact_one(case):
    """With EK-FAC in the place of H the formula is the same: dense blocks, layer by layer."""
    model, batch, _ = track(case)
    method = uw.Influence(model, case.task("loss"), curvature="ekfac", damping=0.05).fit(batch)
    inverse = method._ready().curvature.inverse(method.damping)
    gradients, columns, _, _ = parts(case)
    found = Each(columns, inverse, N, range(N)).correct(gradients)
    for i in range(N):
        S = Gradients.concatenate([column.rows(slice(i, i + 1)) for column in columns])
        solved = (inverse @ S).dense()
        h = solved @ S.dense().T / N
        w = torch.linalg.solve(torch.eye(len(h), dtype=h.dtype) - h, solved @ gradients.dense()[i] / N)
        close(found.dense()[i], gradients.dense()[i] + w @ S.dense())


@named("linear")
def test_an_example_that_holds_all_the_curvature_is_refused(case):
    _, columns, own, A = parts(case)
    H = own[1] / N + 1e-12 * torch.eye(len(A), dtype=A.dtype)
    members = [column.rows(slice(1, 2)) for column in columns]
    with refused("leverage of example b is 1, "):
        Each(members, DenseInverse(H), N, ["b"])
    with refused("leverage of the group"):
        Group(members, DenseInverse(H), N)


@pytest.mark.parametrize("wrong", ["n", "sign", "transpose"])
def test_a_mistake_would_show(wrong):
    """Mutations of the formula differ from the dense inverse by far more than the tolerance."""
    case = next(case for case in CASES if case.name == "linear")
    gradients, columns, own, A = parts(case)
    n = {"n": N + 1}.get(wrong, N)
    direct = torch.stack(
        [torch.linalg.solve(A - H_i / N, g) for H_i, g in zip(own, gradients.dense(), strict=True)]
    )
    inverse = DenseInverse(A)
    found = (inverse @ Each(columns, inverse, n, range(N)).correct(gradients)).dense()
    if wrong == "sign":
        found = 2 * (inverse @ gradients).dense() - found
    if wrong == "transpose":
        found = (inverse @ gradients).dense()
    assert float((found - direct).abs().max()) > 1e-3 * float(direct.abs().max())
