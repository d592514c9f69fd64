"""A spectral filter as a short sum of products of row and column weights, its length chosen by measured error.

EK-FAC scores need ``sum_{rc} filter[r, c] (left_q left_i)[r] (right_q right_i)[c]`` for every pair. If ``filter ~=
sum_k u_k w_k^T``, a pair costs ``2 k (R + C)`` instead of ``2 R C`` operations. The singular value decomposition is
taken of the filter *weighted* by how much gradient mass each row and column carries, then unweighted; how many terms
are enough is decided by the error of the scores on a probe of real gradients, never by a fixed number.

Later terms correct a small rest, to which directions of little mass add nothing that counts. Eigenvectors come in
ascending order, so such a term begins at a later row and column: about a third of the operations are left out. How late
is decided on the same probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upweight.gradients.blocks import Block, Factored, Spectral

if TYPE_CHECKING:
    from upweight.curvature.curvature import Inverse
    from upweight.gradients.gradients import Gradients

PROBE_QUERIES = 8
"""Examples that stand in for queries; each counts alike, so that a few are enough."""
FEWEST_EXAMPLES = 32
"""Of fewer training examples nothing can be measured, and the exact route costs nothing."""
FEWEST_TERMS = 8
"""Layers whose exact route costs as little as this many terms are not worth a probe."""
NO_GRADIENT = 1e-9
"""Probe queries whose scores are this small beside the largest have nothing to be measured by."""
RANK_SHARE = 0.8
"""Share of the error that leaving out further terms may make; the rest is for where terms begin."""
TERMS_AT_A_TIME = 8
"""Terms that are tried together: a matrix product for each would be mostly overhead."""
BEGINNINGS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Where a term may begin, as shares of all rows or columns."""


@dataclass(frozen=True)
class Terms:
    """``filter ~= rows @ cols.T``: rows [R, k], cols [C, k], accepted at this error of scores (see `separate`).

    On the probe the error was `scale` times what the eigenvalues tell (see `expected_error`).
    """

    rows: Tensor
    cols: Tensor
    error: float
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of terms k."""
        return self.rows.shape[1]

    @cached_property
    def starts(self) -> list[tuple[int, int]]:
        """First row and first column of each term: all before are zero."""
        first_rows, first_cols = ((side != 0).int().argmax(0).tolist() for side in (self.rows, self.cols))
        return list(zip(first_rows, first_cols, strict=True))


def find_terms(inverse: Inverse, sample: Gradients, tolerance: float) -> dict[str, Terms]:
    """Separable terms of every layer of a sample of training gradients that has them within the tolerance.

    A few evenly spaced examples of the sample stand in for queries, the others for training examples: with itself
    an example scores far higher than with any other, and little else would be measured.

    Args:
        inverse: the damped inverse curvature.
        sample: gradients of a few hundred training examples, of layers with one position an example.
        tolerance: largest relative error of a layer's scores.
    """
    if sample.batch < FEWEST_EXAMPLES:
        return {}
    positions = torch.arange(sample.batch)
    asked = positions[:: max(1, sample.batch // PROBE_QUERIES)][:PROBE_QUERIES]
    others = positions[~torch.isin(positions, asked)]
    found: dict[str, Terms] = {}
    for name, block in sample.items():
        curvature = inverse.curvature.layers[name]
        preconditioned = curvature.precondition(block, inverse.damping[name])
        if not isinstance(block, Factored) or not isinstance(preconditioned, Spectral) or block.groups > 1:
            continue
        left, right = preconditioned.left[0, :, 0], preconditioned.right[0, :, 0]
        query, train = (left[asked], right[asked]), (left[others], right[others])
        spectral_filter, eigenvalues = preconditioned.filter[0], curvature.eigenvalues[0]
        terms = separate(spectral_filter, eigenvalues, query, train, tolerance)
        if terms is not None:
            error, size = expected_error(terms, spectral_filter, eigenvalues, query)
            told = float((error / size.clamp_min(torch.finfo(size.dtype).tiny)).mean().sqrt())
            found[name] = replace(terms, scale=terms.error / told if told > 0 else 1.0)
    return found


def query_errors(queries: Gradients, inverse: Inverse, terms: Mapping[str, Terms]) -> Tensor:
    """Expected relative error of each preconditioned query's scores by separable terms, [query].

    It depends on the query alone, so that its scores do not depend on the other queries.
    """
    errors, sizes = [], []
    for name, found in terms.items():
        block = queries[name]
        if isinstance(block, Spectral) and block.left.shape[2] == 1:
            factors = block.left[0, :, 0], block.right[0, :, 0]
            eigenvalues = inverse.curvature.layers[name].eigenvalues[0]
            error, size = expected_error(found, block.filter[0], eigenvalues, factors)
            errors.append(error * found.scale**2)
            sizes.append(size)
    if not errors:
        return torch.zeros(queries.batch)
    size = torch.stack(sizes).sum(0)
    return (torch.stack(errors).sum(0) / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt()


def expected_error(
    terms: Terms, spectral_filter: Tensor, eigenvalues: Tensor, query: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean squared error, and mean square, of each query's scores over the training data [q], up to one factor.

    An eigenvalue is the mean square of the training gradients' coordinate. Were their coordinates uncorrelated, a score
    would have the mean square ``sum_rc (filter_rc left_r right_c)^2 Lambda_rc``, and its error that of the rest.
    """
    left, right = (factor.square() for factor in query)
    mass = eigenvalues.clamp_min(0)
    rest = spectral_filter - terms.rows @ terms.cols.mT
    error, size = (((left @ (part.square() * mass)) * right).sum(1) for part in (rest, spectral_filter))
    return error, size


def may_separate(block: Block) -> bool:
    """Whether a layer has one position an example and is large enough for the separable route to gain anything."""
    if not isinstance(block, Factored) or block.positions != 1 or block.groups != 1:
        return False
    rows, cols = block.left().shape[-1], block.right().shape[-1]
    return most_terms(rows, cols) >= FEWEST_TERMS


def most_terms(rows: int, cols: int) -> int:
    """Beyond this many terms the exact route is as fast."""
    return int(0.7 * rows * cols / (rows + cols))


def separate(
    spectral_filter: Tensor,
    eigenvalues: Tensor,
    query: tuple[Tensor, Tensor],
    train: tuple[Tensor, Tensor],
    tolerance: float,
) -> Terms | None:
    """The fewest and shortest terms whose probe scores are within `tolerance` of the exact ones.

    The error is relative to a query's own scores, and of these the root mean square: otherwise the one or two queries
    of the largest loss would decide alone.

    Args:
        spectral_filter: [R, C], ``1 / (eigenvalue + damping)``.
        eigenvalues: [R, C], for the weights.
        query: probe queries' left [q, R] and right [q, C] factors in the eigenbasis.
        train: probe training examples' factors [n, R] and [n, C].
        tolerance: largest error; 0 asks for the exact route.

    Returns:
        The terms, or None where no number of them is both accurate enough and cheaper than the exact route, or the
        probe has no gradients.
    """
    rows, cols = spectral_filter.shape
    most = most_terms(rows, cols)
    if tolerance <= 0 or most < 1:
        return None
    row_weight, col_weight = _weights(eigenvalues, 1), _weights(eigenvalues, 0)
    weighted = row_weight[:, None] * spectral_filter * col_weight
    left, values, right = torch.linalg.svd(weighted, full_matrices=False)
    u = left * values / row_weight[:, None]
    w = right.mT / col_weight[:, None]
    (left_q, right_q), (left_t, right_t) = query, train
    exact = exact_scores(spectral_filter, query, train)
    sizes = exact.norm(dim=1, keepdim=True)
    if not sizes.max() > 0:  # nothing to measure by
        return None
    each = torch.where(sizes > NO_GRADIENT * sizes.max(), 1 / sizes, 0)
    exact, left_q = exact * each, left_q * each
    norm = exact.norm()
    found = torch.zeros_like(exact)
    longest = min(most, len(values))
    for start in range(0, longest, TERMS_AT_A_TIME):
        few = slice(start, min(start + TERMS_AT_A_TIME, longest))
        products = _products(left_q, left_t, u[:, few]).mul_(_products(right_q, right_t, w[:, few]))
        partial = products.cumsum_(0).add_(found)  # scores by one term more each
        found = partial[-1]
        errors = (partial - exact).flatten(1).norm(dim=1) / norm
        enough = (errors <= RANK_SHARE * tolerance).nonzero()
        if len(enough):
            k = start + int(enough[0, 0]) + 1
            terms = Terms(u[:, :k].contiguous(), w[:, :k].contiguous(), float(errors[k - 1 - start]))
            # A single term is a product filter (K-FAC's, the identity's) and exact: it stays so.
            return terms if k == 1 else _shortened(terms, (left_q, right_q), train, exact, tolerance)
    return None


def _shortened(
    terms: Terms,
    query: tuple[Tensor, Tensor],
    train: tuple[Tensor, Tensor],
    exact: Tensor,
    tolerance: float,
) -> Terms:
    """The same terms, each from as late a row and column as the tolerance allows.

    The errors of the beginnings are nearly independent, so each may take an equal share of the squared error that is
    left; if they turn out to add up to more, all take less. Scores are scaled as `separate` does.
    """
    sides = ((query[0], train[0], terms.rows), (query[1], train[1], terms.cols))
    products = [_products(*side) for side in sides]
    # [beginning, term]: the squared error of one term that begins there on one side.
    errors = [
        torch.stack([(lost * other).square_().sum((1, 2)) for lost in _left_out(*side)])
        / exact.square().sum()
        for side, other in zip(sides, products[::-1], strict=True)
    ]
    left = (tolerance**2 - terms.error**2) / (2 * terms.rank)
    for share in (left, left / 4, left / 16):
        rows, cols = (
            _begun(weights, (error <= share).cumprod(0).sum(0))
            for (_, _, weights), error in zip(sides, errors, strict=True)
        )
        found = (_products(query[0], train[0], rows) * _products(query[1], train[1], cols)).sum(0)
        error = float((found - exact).norm() / exact.norm())
        if error <= tolerance:
            return Terms(rows, cols, error)
    return terms


def _products(query: Tensor, train: Tensor, weights: Tensor) -> Tensor:
    """``<q o weights_k, t>`` for every term: [term, query, train]."""
    weighted = (query * weights.mT[:, None]).flatten(0, 1)  # [term * query, row]
    return (weighted @ train.mT).unflatten(0, (weights.shape[1], -1))


def _left_out(query: Tensor, train: Tensor, weights: Tensor) -> Iterator[Tensor]:
    """The part of `_products` before each beginning, in their order."""
    lost: Tensor | None = None
    for start, stop in pairwise(round(share * len(weights)) for share in (0.0, *BEGINNINGS)):
        part = _products(query[:, start:stop], train[:, start:stop], weights[start:stop])
        lost = part if lost is None else lost.add_(part)
        yield lost


def _begun(weights: Tensor, steps: Tensor) -> Tensor:
    """The weights [row, term] with zeros before each term's beginning, the number `steps` [term] of the shares."""
    shares = torch.tensor([0.0, *BEGINNINGS], device=weights.device)[steps]
    first = (shares * len(weights)).round()
    rows = torch.arange(len(weights), device=weights.device)
    return weights * (rows[:, None] >= first)


def exact_scores(
    spectral_filter: Tensor, query: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor]
) -> Tensor:
    """Scores [q, n] without any approximation, for a few queries: ``left_i^T [filter o left_q right_q^T] right_i``."""
    (left_q, right_q), (left_t, right_t) = query, train
    filtered = spectral_filter[:, None] * left_q.mT[:, :, None] * right_q  # [R, q, C]
    formed = (left_t @ filtered.flatten(1)).unflatten(1, filtered.shape[1:])  # [n, q, C]
    return (formed @ right_t[:, :, None])[..., 0].mT


def _weights(eigenvalues: Tensor, axis: int) -> Tensor:
    """Mean gradient mass along an axis, floored: a dead unit's zero must not turn into a division by zero.

    The mass itself, not its root: a score multiplies a query's coordinate with a training example's, and the product
    of two numbers of this variance has this standard deviation.
    """
    mass = eigenvalues.clamp_min(0).mean(axis)
    return mass.clamp_min(float(mass.max()) * 1e-4 + 1e-30)
