"""What scores obey: orientation, sign, symmetries, limits, sums."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from upweight._conformance.problem import (
    Inapplicable,
    Measured,
    Problem,
    Violated,
    checked,
    close,
    join,
    offers,
    take,
    worst,
)
from upweight._random import preserved, reseed
from upweight._trees import batch_length, map_tensors
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.scores import Scores

HUGE = 1e8
"""Damping that leaves nothing of the curvature, relative to the mean squared gradient."""


def shape(problem: Problem) -> None:
    """Scores are [query, train], also for one query, and finite."""
    method = problem.fitted()
    for count in (problem.queries, 1):
        checked(method.attribute(take(problem.query, range(count))), count, problem.n)


def sign(problem: Problem) -> None:
    """A query that is a training example has a positive score for itself: it is its own proponent."""
    _must_compare(problem)
    own = problem.values(query=problem.train).diagonal()
    if not bool((own > 0).all()):
        worst_one = int(own.argmin())
        raise Violated(
            f"training example {worst_one} scores {float(own[worst_one]):.3g} for itself, expected > 0"
        )


def orientation(problem: Problem) -> Measured:
    """The measurement turned round and said to be better when higher gives the same scores."""
    turned: Any = copy.copy(problem.task)
    turned.measure = lambda model, batch: -problem.task.measure(model, batch)
    turned.higher_is_better = not problem.task.higher_is_better
    found = problem.make(problem.model, turned)
    found.fit(problem.train)
    values = checked(found.attribute(problem.query), problem.queries, problem.n)
    return close(values, problem.values(), "scores of the turned measurement", problem.tolerance)


def ids(problem: Problem) -> None:
    """Scores carry the ids of queries and training examples, and ids move with their examples."""
    of_query = [f"q{i}" for i in range(problem.queries)]
    of_train = [100 + i for i in range(problem.n)]
    turned = list(reversed(range(problem.n)))
    for order in (list(range(problem.n)), turned):
        train = Examples(take(problem.train, order), [of_train[i] for i in order])
        scores = problem.scores(train, Examples(problem.query, of_query))
        expected = [of_train[i] for i in order]
        if list(scores.query_ids) != of_query or list(scores.train_ids) != expected:
            raise Violated(
                f"train_ids are {list(scores.train_ids)[:3]}... and query_ids {list(scores.query_ids)[:3]}..., "
                f"expected {expected[:3]}... and {of_query[:3]}..."
            )
    plain = problem.scores()
    if list(plain.query_ids) != list(range(problem.queries)) or list(plain.train_ids) != list(
        range(problem.n)
    ):
        raise Violated("without ids, query_ids and train_ids must be the positions 0, 1, ...")


def unit(problem: Problem) -> Measured | None:
    """With a unit, removal effects are sums of scores in the measurement's direction; without one they are refused."""
    scores = problem.scores()
    if scores.unit is None:
        try:
            scores.removal_effect([scores.train_ids[0]])
        except UpweightError:
            return None
        raise Violated("the unit is None but removal_effect answers")
    if not isinstance(scores.unit, str) or not scores.unit:
        raise Violated(f"the unit is {scores.unit!r}, expected words or None")
    effect = scores.removal_effect([scores.train_ids[0], scores.train_ids[2]])
    total = problem.task.orientation * scores.values[:, [0, 2]].sum(1)
    return close(effect, total, "the removal effect of two examples", 1e-6)


def determinism(problem: Problem) -> Measured:
    """Two fits give the same scores, whatever the global random state."""
    found = []
    for seed in (11, 12):
        with preserved():
            reseed(seed)
            found.append(problem.values())
    return close(found[1], found[0], "the second fit's scores", problem.exact)


def batch_size(problem: Problem) -> Measured:
    """Scores do not depend on how the data is cut into batches."""
    truth = problem.values()
    measured = []
    for size in (1, 5):
        loader = DataLoader(_Rows(problem.train), batch_size=size)
        found = checked(problem.scores(train=loader), problem.queries, problem.n)
        measured.append(close(found, truth, f"scores from a loader of batches of {size}", problem.tolerance))
        if hasattr(problem.make(problem.model, problem.task), "batch_size"):
            found = checked(
                problem.fitted(batch_size=size).attribute(problem.query), problem.queries, problem.n
            )
            measured.append(close(found, truth, f"scores with batch_size={size}", problem.tolerance))
    return worst(*measured)


def query_order(problem: Problem) -> Measured:
    """Queries in another order, or asked one at a time, have the same scores."""
    truth, method = problem.values(), problem.fitted()
    order = [*range(1, problem.queries), 0]
    found = checked(method.attribute(take(problem.query, order)), problem.queries, problem.n)
    alone = checked(method.attribute(take(problem.query, [2])), 1, problem.n)
    return worst(
        close(found, truth[order], "scores of queries in another order", problem.tolerance),
        close(alone, truth[2:3], "scores of one query alone", problem.tolerance),
    )


def train_order(problem: Problem) -> Measured:
    """Training examples in another order have the same scores."""
    order = [*range(3, problem.n), 2, 1, 0]
    found = problem.values(train=take(problem.train, order))
    return close(
        found, problem.values()[:, order], "scores of training data in another order", problem.tolerance
    )


def duplicates(problem: Problem) -> Measured:
    """Both copies of a training example that occurs twice have the same score."""
    found = problem.values(train=join(problem.train, take(problem.train, [3])))
    return close(found[:, -1], found[:, 3], "the copy's scores", problem.tolerance)


def weight(problem: Problem) -> Measured:
    """Training data given twice is the same objective, of which every copy has half the weight: half the score."""
    first = problem.scores()
    if first.unit is None:
        raise Inapplicable("the unit is None: the size of scores means nothing")
    if first.info.get("correction") is not None:
        raise Inapplicable("the scores are corrected for each example's own leverage, which is halved too")
    train = join(problem.train, problem.train)
    twice = problem.scores(train)
    if not _as_damped(first, twice):
        raise Inapplicable("the damping counts the examples, and is another one for twice as many")
    found = checked(twice, len(first.query_ids), batch_length(train))
    half = first.values.double() / 2
    return worst(
        close(found[:, : problem.n], half, "scores of the first copies", problem.tolerance),
        close(found[:, problem.n :], half, "scores of the second copies", problem.tolerance),
    )


def _as_damped(one: Scores, other: Scores) -> bool:
    """Whether both say the same damping for every layer, up to rounding, or say nothing of it."""
    a, b = (scores.info.get("layer_damping") or {} for scores in (one, other))
    return a.keys() == b.keys() and all(math.isclose(a[name], b[name], rel_tol=1e-3) for name in a)


def frozen(problem: Problem) -> Measured:
    """A frozen parameter contributes nothing: as if it were a constant of the model."""
    names = [name for name, p in problem.model.named_parameters() if p.requires_grad]
    first = names[0].rpartition(".")[0]
    fixed = [name for name in names if name.rpartition(".")[0] == first]
    if len(fixed) == len(names):
        raise Inapplicable("the model has a single layer, and something must stay trainable")
    model, constant = copy.deepcopy(problem.model), copy.deepcopy(problem.model)
    for name in fixed:
        model.get_parameter(name).requires_grad_(False)
        owner = constant.get_submodule(first)
        values = constant.get_parameter(name).detach()
        delattr(owner, name.rpartition(".")[2])
        owner.register_buffer(name.rpartition(".")[2], values)
    found, expected = problem.with_model(model).values(), problem.with_model(constant).values()
    return close(found, expected, f"scores with {', '.join(fixed)} frozen", problem.tolerance)


def zero_gradient(problem: Problem) -> None:
    """A training example or query without gradient scores exactly 0, and nothing becomes NaN."""
    _must_compare(problem)
    problem = problem if problem.unbiased is None else problem.with_model(problem.unbiased)
    train, query = _blank(problem.train, 3), _blank(problem.query, 1)
    gradients = problem.gradients(problem.task.train_loss, take(train, [3]))
    asked = problem.gradients(problem.task.measure, take(query, [1]))
    if bool(gradients.any()) or bool(asked.any()):
        raise Inapplicable("an input of zeros has a gradient in this model")
    values = problem.values(train, query)
    if bool(values[:, 3].any()) or bool(values[1].any()):
        size = max(float(values[:, 3].abs().max()), float(values[1].abs().max()))
        raise Violated(f"an example without gradient scores {size:.3g}, expected exactly 0")
    if not bool(values.any()):
        raise Violated("all scores are 0")


def damping_limit(problem: Problem) -> Measured:
    """The larger the damping, the nearer the scores are to gradient inner products over n times the damping."""
    method = problem.fitted()
    if not hasattr(method, "with_damping"):
        raise Inapplicable("it has no with_damping")
    info = method.attribute(problem.query).info
    if info.get("correction") in ("relative", "relative-loss"):
        raise Inapplicable("relative scores are divided by their own size")
    if info.get("coverage", {}).get("parameters", 1.0) < 1:
        raise Inapplicable("it tracks a part of the parameters only")
    G = problem.gradients(problem.task.train_loss, problem.train)
    V = problem.task.orientation * problem.gradients(problem.task.measure, problem.query)
    damping = HUGE * max(1.0, float(G.square().sum(1).mean()))
    found = [
        checked(method.with_damping(d).attribute(problem.query), problem.queries, problem.n)
        for d in (damping, 2 * damping)
    ]
    if torch.equal(found[0], found[1]):
        raise Inapplicable("its scores do not depend on the damping")
    what = "scores times n and the damping, against gradient inner products"
    return close(found[0] * problem.n * damping, V @ G.T, what, max(1e-6, problem.tolerance))


def self_influence(problem: Problem) -> Measured:
    """The self-influence is the diagonal of the scores of the training data for itself."""
    method = problem.fitted()
    try:
        own = method.self_influence()
    except UpweightError as reason:
        raise Inapplicable(f"it refuses: {reason}") from reason
    if "self_score" in own.info:
        raise Inapplicable(f"its self score is another one: {own.info['self_score']}")
    batch = problem.moved(problem.train)
    with torch.no_grad():
        loss, asked = (f(problem.model, batch) for f in (problem.task.train_loss, problem.task.measure))
    if not torch.allclose(loss, asked):
        raise Inapplicable("the measurement is not the training loss")
    if tuple(own.values.shape) != (problem.n,) or list(own.train_ids) != list(range(problem.n)):
        raise Violated(
            f"the self-influence has shape {tuple(own.values.shape)}, expected [train] with its ids"
        )
    diagonal = checked(method.attribute(problem.train), problem.n, problem.n).diagonal()
    return close(own.values, diagonal, "the self-influence against the diagonal", problem.tolerance)


def layers(problem: Problem) -> Measured:
    """Scores are the sums of their layers' parts, and the same whether or not parts are asked for."""
    method = problem.fitted()
    if not offers(method, "attribute", "per_layer"):
        raise Inapplicable("attribute has no per_layer=")
    try:
        scores = method.attribute(problem.query, per_layer=True)
    except UpweightError as reason:
        raise Inapplicable(f"it refuses: {reason}") from reason
    values = checked(scores, problem.queries, problem.n)
    if not scores.layers:
        raise Violated("per_layer=True gives no layers")
    total = torch.stack([part.double() for part in scores.layers.values()]).sum(0)
    plain = checked(method.attribute(problem.query), problem.queries, problem.n)
    return worst(
        close(total, values, "the sum of the layers' parts", problem.tolerance),
        close(values, plain, "scores with per_layer=True", problem.tolerance),
    )


def _must_compare(problem: Problem) -> None:
    """A control, which says that its scores do not compare the query with the example, owes them nothing."""
    control = problem.scores().info.get("control")
    if control is not None:
        raise Inapplicable(f"it is a control: {control}")


class _Rows(Dataset):
    """A tree of tensors as a map-style data set."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def __len__(self) -> int:
        return batch_length(self.tree)

    def __getitem__(self, position: int) -> Any:
        return map_tensors(self.tree, lambda t: t[position])


def _blank(tree: Any, position: int) -> Any:
    """The same examples, one with zeros for its inputs (class numbers are not inputs)."""

    def one(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.clone()
        tensor[position] = 0
        return tensor

    return map_tensors(tree, one)


Law = Callable[[Problem], "Measured | None"]

SCORE_LAWS: dict[str, Law] = {
    "shape": shape,
    "sign": sign,
    "orientation": orientation,
    "ids": ids,
    "unit": unit,
    "determinism": determinism,
    "batch size": batch_size,
    "query order": query_order,
    "train order": train_order,
    "duplicates": duplicates,
    "weight": weight,
    "frozen parameters": frozen,
    "zero gradient": zero_gradient,
    "damping limit": damping_limit,
    "self-influence": self_influence,
    "layers": layers,
}
