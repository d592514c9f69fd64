"""Any scalar of the model as a query: a validation loss, a fairness gap, the loss of the worst group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upweight.errors import UpweightError
from upweight.gradients import Gradients, Tracker
from upweight.gradients.blocks import Dense


@dataclass(frozen=True)
class Functional:
    """One number that depends on the model, in the place of a query.

    Attributes:
        function: ``model -> scalar tensor``, differentiable in the model's parameters.
        name: the query's id in the result.
        unit: its unit in words.
        higher_is_better: whether a higher value is better.

    Example:
        >>> import torch, upweight as uw
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(20, 2)
        >>> y = (x[:, 0] > 0).long()
        >>> model = torch.nn.Linear(2, 2)
        >>> method = uw.Influence(model, uw.Classification()).fit((x, y))
        >>> def mean_loss(model):
        ...     return torch.nn.functional.cross_entropy(model(x[:5]), y[:5])
        >>> method.attribute(uw.Functional(mean_loss, "validation loss", "nats")).query_ids
        ['validation loss']
    """

    function: Callable[[nn.Module], Tensor]
    name: str = "functional"
    unit: str = "measurement"
    higher_is_better: bool = False

    @property
    def orientation(self) -> int:
        """+1 if a higher value is worse, -1 if it is better."""
        return -1 if self.higher_is_better else 1

    def value(self, model: nn.Module) -> Tensor:
        """The scalar, checked."""
        value = self.function(model)
        if not isinstance(value, Tensor) or value.numel() != 1:
            seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UpweightError(
                f"the functional {self.name!r} returned {seen}, expected one number as a tensor -> .mean()"
            )
        if not bool(torch.isfinite(value).all()):
            raise UpweightError(
                f"the functional {self.name!r} is {float(value)} -> look for overflow or log(0) in it"
            )
        return value.reshape(())


class FunctionalQueries:
    """Functionals as queries, one row of scores each.

    Attributes:
        functionals: they.
        n: how many.
        ids: their names, or the ids that were given.
        unit: the unit they share.
        higher_is_better: whether a higher value is better, for all of them.
    """

    def __init__(self, functionals: Sequence[Functional], ids: Sequence[Any] | None = None) -> None:
        self.functionals, self.n = list(functionals), len(functionals)
        self.ids = [f.name for f in functionals] if ids is None else list(ids)
        if len(set(self.ids)) != self.n:
            raise UpweightError(f"{self.n} functionals have the names {self.ids} -> give each its own name=")
        if len({(f.unit, f.higher_is_better) for f in functionals}) > 1:
            raise UpweightError(
                "the functionals have different units or directions, expected one -> attribute them one by one"
            )
        self.unit, self.higher_is_better = functionals[0].unit, functionals[0].higher_is_better

    def fingerprint(self) -> str:
        """Their names: a function has no content to hash."""
        return "functionals: " + ", ".join(f.name for f in self.functionals)


def functional_queries(query: object, ids: Sequence[Any] | None = None) -> FunctionalQueries | None:
    """The functionals that a query consists of; None if it is data."""
    if isinstance(query, Functional):
        return FunctionalQueries([query], ids)
    if isinstance(query, (list, tuple)) and any(isinstance(q, Functional) for q in query):
        found = [q for q in query if isinstance(q, Functional)]
        if len(found) != len(query):
            raise UpweightError(
                "the queries mix functionals and data, expected one kind -> attribute them one by one"
            )
        return FunctionalQueries(found, ids)
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def functional_gradients(tracker: Tracker, functionals: Sequence[Functional]) -> Gradients:
    """Gradients of the oriented functionals, one row each, in the tracker's layers."""
    parameters = tracker.parameters
    rows: dict[str, list[Tensor]] = {name: [] for name in tracker.layers}
    for functional in functionals:
        with tracker.quietly():
            value = functional.value(tracker.model)
            found = (
                torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
                if value.requires_grad
                else [None]
            )
        if all(g is None for g in found):
            raise UpweightError(
                f"the functional {functional.name!r} does not depend on any tracked parameter -> call the model in it, "
                "without torch.no_grad() or .item()"
            )
        named = {
            name: functional.orientation * (torch.zeros_like(p) if g is None else g.to_dense())[None]
            for (name, p), g in zip(parameters.items(), found, strict=True)
        }
        for name, layer in tracker.layers.items():
            rows[name].append(layer.from_parameters(named).to(tracker.dtype))
    return Gradients({name: Dense(torch.cat(parts)) for name, parts in rows.items()})
