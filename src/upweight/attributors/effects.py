"""The predicted effect of removing, changing or reweighting training examples, all at once.

A change of the training set gives example i the weight ``1 + delta_i`` in the objective

    J(theta) = (1/n) sum_i (1 + delta_i) l_i(theta) + R(theta)

where removal is delta = -1, and replacing an example is its removal and the addition of another. From the minimum for
delta = 0 the parameters are predicted to move by

    first order  -(1/n) (H + damping I)^-1 sum_i delta_i g_i
    rescaled     -(1/n) sum_i (H + (delta_i / n) H_i + damping I)^-1 delta_i g_i          each example alone
    Newton       -(1/n) (H + (1/n) sum_i delta_i H_i + damping I)^-1 sum_i delta_i g_i    all together

and every measurement by its gradient times that. Newton is exact for quadratic objectives and any group.

A Kronecker-factored curvature leaves examples out of its eigenvalues (`upweight.curvature.leave_out`).

Sources: "Rescaled Influence Functions: Accurate Data Attribution in High Dimension" (arXiv 2506.06656); for changed
labels and inputs, "Machine Unlearning of Features and Labels" (arXiv 2108.11577).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upweight._ids import positions_of
from upweight.attributors.base import explained_by_form
from upweight.attributors.evidence import influence_info, left_out_of
from upweight.attributors.fitted import CALIBRATED
from upweight.attributors.functional import FunctionalQueries, functional_gradients, functional_queries
from upweight.attributors.group import ESTIMATES, GroupEffect
from upweight.attributors.reweighted import Reweighted, Side, batches
from upweight.attributors.second_order import bend
from upweight.curvature.dense import as_gradients
from upweight.curvature.l2 import CONVENTIONS, l2_vector
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Gradients
from upweight.gradients.layers import from_parameters, to_parameters
from upweight.gradients.rowwise import weighted_sum

if TYPE_CHECKING:
    from upweight.attributors.fitted import Fitted
    from upweight.attributors.influence import Influence

FIXED_POINT_STEPS = 500

Solve = Callable[[Gradients], Gradients]


def removal(method: Influence, ids: Any, query: Any, convention: str = "sum") -> GroupEffect:
    """See `Influence.removal`."""
    fitted = method._ready()
    positions = positions_of(fitted.examples.ids, ids)
    side = Side(fitted.examples, positions, -torch.ones(len(positions), dtype=fitted.dtype))
    what = f"removal of {len(positions)} training example{'s' if len(positions) > 1 else ''}"
    return _effect(method, [side], query, convention, what)


def change(method: Influence, ids: Any, to: Any, query: Any) -> GroupEffect:
    """See `Influence.change`."""
    fitted = method._ready()
    positions = positions_of(fitted.examples.ids, ids)
    replacements = Examples(to)
    if replacements.n != len(positions):
        raise UpweightError(
            f"{len(positions)} examples are to be changed but {replacements.n} replacements were given -> one for each "
            "id, in the ids' order"
        )
    first = replacements.take([0])
    explained_by_form(
        first, fitted.signature, lambda: fitted.tracker.train(first, replacements.ids[:1]), "replacements"
    )
    ones = torch.ones(len(positions), dtype=fitted.dtype)
    sides = [
        Side(fitted.examples, positions, -ones),
        Side(replacements, list(range(replacements.n)), ones),
    ]
    what = f"change of {len(positions)} training example{'s' if len(positions) > 1 else ''}"
    return _effect(method, sides, query, "sum", what)


def reweight(method: Influence, weights: Any, query: Any, convention: str = "sum") -> GroupEffect:
    """See `Influence.reweight`."""
    fitted = method._ready()
    n = fitted.examples.n
    if isinstance(weights, Mapping):
        positions = positions_of(fitted.examples.ids, list(weights))
        values = torch.as_tensor([float(weight) for weight in weights.values()], dtype=fitted.dtype)
    else:
        values = torch.as_tensor(weights, dtype=fitted.dtype).flatten()
        positions = list(range(n))
        if len(values) != n:
            raise UpweightError(
                f"{len(values)} weights were given for {n} training examples -> one each, or {{id: weight}} for some"
            )
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise UpweightError(
            f"a weight is {float(values.min()):g} or not finite, expected >= 0 -> 0 removes an example"
        )
    moved = [k for k in range(len(values)) if float(values[k]) != 1]
    if not moved:
        raise UpweightError(
            "every weight is 1, expected some other -> 0 removes an example, 2 counts it twice"
        )
    side = Side(fitted.examples, [positions[k] for k in moved], values[moved] - 1)
    return _effect(method, [side], query, convention, f"reweighting of {len(moved)} training examples")


# The effect ----------------------------------------------------------------------------------------------------------


def _effect(method: Influence, sides: list[Side], query: Any, convention: str, what: str) -> GroupEffect:
    if convention not in CONVENTIONS:
        raise UpweightError(f"convention={convention!r} is unknown -> use one of {list(CONVENTIONS)}")
    started = time.perf_counter()
    fitted = method._ready()
    if method.blocks:
        raise UpweightError(
            "the effect of a group takes it out of one matrix over all layers, expected blocks=False -> fit without "
            "blocks, or with curvature='ekfac'"
        )
    if method.curvature not in CALIBRATED:
        raise UpweightError(
            f"curvature={method.curvature!r} only ranks training examples, expected one that predicts changes -> use "
            "curvature='ekfac', 'ggn' or 'hessian'"
        )
    steps = _Steps(method, fitted, sides, convention).all()
    named = {
        name: {p: v[0] for p, v in to_parameters(fitted.tracker.layers, u.dense()).items()}
        for name, u in steps.items()
    }
    stacked = Gradients.concatenate(list(steps.values()))
    linear, bent, query_ids = [], [], []
    queries = functional_queries(query) or Examples(query)
    for gradients, sign, measure, ids in _queries(method, fitted, queries):
        linear.append(sign * (gradients @ stacked.T))  # [query, estimate], as the measurement itself moves
        bent.append(torch.stack([bend(fitted.tracker, measure, named[name]) for name in steps], 1))
        query_ids += ids
    effects, bends = torch.cat(linear), torch.cat(bent)
    return GroupEffect(
        *(effects[:, k] for k in range(len(ESTIMATES))),
        second_order={name: bends[:, k] for k, name in enumerate(ESTIMATES)},
        steps=named,
        query_ids=query_ids,
        train_ids=[fitted.examples.ids[p] for p in sides[0].positions],
        what=what,
        convention=convention,
        unit=queries.unit if isinstance(queries, FunctionalQueries) else method.task.unit,
        info={
            **influence_info(method, fitted),
            "left_out_of": left_out_of(fitted),
            "seconds": round(time.perf_counter() - started, 3),
        },
    )


def _queries(
    method: Influence, fitted: Fitted, queries: Examples | FunctionalQueries
) -> Iterator[tuple[Gradients, int, Callable[[Any], Tensor], list[Any]]]:
    """(oriented gradients, orientation, ``model -> measurements``, ids) of a batch of queries after the other."""
    if isinstance(queries, FunctionalQueries):
        for f in queries.functionals:
            yield functional_gradients(fitted.tracker, [f]), f.orientation, f.value, [f.name]
        return
    for rows in queries.batches(fitted.batch_size):
        batch, ids = fitted.tracker.move(rows.batch), list(queries.ids[rows.start : rows.stop])
        gradients = explained_by_form(
            batch, fitted.signature, lambda b=batch, i=ids: fitted.tracker.query(b, i)
        )
        yield gradients, method.task.orientation, lambda model, b=batch: method.task.measure(model, b), ids


# The steps -----------------------------------------------------------------------------------------------------------


class _Steps:
    """The predicted steps of the parameters.

    With convention "mean" the changed objective is ``(1/m) sum_i (1 + delta_i) l_i + R`` for m = n + sum_i delta_i.
    Times m/n it is the fixed-sum one but for R, whose share shrinks: with s = (m - n) / n and the regulariser's (and
    the damping's) coefficients d, a step solves ``(W + s d) u = -(1/n) (sum_i delta_i g_i + (m - n) grad R)``, where W
    is the fixed-sum matrix. Since ``W >= d``, the iteration ``u <- W^-1 (b - s d u)`` converges like |s|^k.
    """

    def __init__(self, method: Influence, fitted: Fitted, sides: list[Side], convention: str) -> None:
        self.method, self.fitted, self.convention = method, fitted, convention
        self.n = fitted.examples.n
        self.reweighted = Reweighted(method, fitted, fitted.curvature.inverse(method.damping), sides)
        self.inverse = self.reweighted.inverse
        # What member i adds to the right-hand side: delta_i g_i, for a replaced one with its replacement's.
        rows = [
            weighted_sum(_gradients(fitted, side), torch.diag(delta))
            for side, delta in zip(sides, self.reweighted.changes, strict=True)
        ]
        self.right = rows[0] if len(rows) == 1 else as_gradients(rows[0].dense() + rows[1].dense(), rows[0])
        self.surplus = torch.stack(self.reweighted.changes).sum(0)  # delta, with a replacement's
        self.l2 = l2_vector(method.l2, fitted.tracker)

    def all(self) -> dict[str, Gradients]:
        """{estimate: step}, one row each."""
        each, group = self.reweighted.solve_each, self.reweighted.solve_group
        ones = torch.ones(1, self.right.batch, dtype=self.right.dense().dtype, device=self.surplus.device)
        total = weighted_sum(self.right, ones)
        s = self.surplus.sum()[None] / self.n
        if self.convention == "sum":
            first = self.inverse @ total
            alone = weighted_sum(each(self.right), ones)
            newton = group(total)
            scale = 1.0
        else:
            total = self._with_regulariser(total, self.surplus.sum()[None])
            first = self.inverse @ total
            mine = self._with_regulariser(self.right, self.surplus)
            alone = weighted_sum(self._fixed_mean(each, mine, self.surplus / self.n), ones)
            newton = self._fixed_mean(group, total, s)
            scale = float(1 / (1 + s))
        found = {"first_order": (first, scale), "rescaled": (alone, 1.0), "newton": (newton, 1.0)}
        return {
            name: weighted_sum(u, u_scale * -ones[:, :1] / self.n) for name, (u, u_scale) in found.items()
        }

    def _with_regulariser(self, rows: Gradients, surplus: Tensor) -> Gradients:
        """``b + (m - n) grad R`` of every row, its own m - n in `surplus`."""
        parameters = {name: p.detach()[None] for name, p in self.fitted.tracker.parameters.items()}
        theta = from_parameters(self.fitted.tracker.layers, parameters)[0].to(self.l2)
        flat = rows.dense()
        return as_gradients(flat + surplus[:, None].to(flat) * (self.l2 * theta).to(flat), rows)

    def _fixed_mean(self, solve: Solve, b: Gradients, s: Tensor) -> Gradients:
        """``(W + s d)^-1 b`` for every row by ``u <- W^-1 (b - s d u)``."""
        damping = [
            self.l2.new_full((layer.numel,), self.inverse.damping[name])
            for name, layer in self.fitted.tracker.layers.items()
        ]
        flat = b.dense()
        d = (self.l2 + torch.cat(damping)).to(flat)
        u = solve(b).dense()
        for _ in range(FIXED_POINT_STEPS):
            moved = solve(as_gradients(flat - s[:, None].to(flat) * d * u, b)).dense()
            change = float((moved - u).norm())
            u = moved
            if change <= 10 * torch.finfo(flat.dtype).eps * float(u.norm()):
                return as_gradients(u, b)
        raise UpweightError(
            f"the fixed-mean step did not settle in {FIXED_POINT_STEPS} iterations (the weights change by "
            f"{float(s.abs().max()):.0%} of n) -> use convention='sum'"
        )


# Members -------------------------------------------------------------------------------------------------------------


def _gradients(fitted: Fitted, side: Side) -> Gradients:
    return Gradients.concatenate([fitted.tracker.train(batch, ids) for batch, ids in batches(fitted, side)])
