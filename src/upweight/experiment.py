"""An experiment: a model, what it was trained on, what to ask it, and how to train it again.

Every verb of the command line takes one, by the convention ``path/to/file.py:name`` or ``package.module:name``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from upweight._load import import_name
from upweight._trees import map_tensors, tensors_in
from upweight.curvature.l2 import CONVENTIONS, L2, check_l2
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.task import Task

__all__ = ["Experiment"]

TrainFunction = Callable[..., Any]
Method = Any
"""An attributor, or a function ``(model, task) -> attributor``."""


_SIGNATURES = {
    "train_fn": "def train_fn(indices, seed)",
    "show": "def show(example)",
    "read": "def read(path_or_text)",
}


@dataclass(frozen=True, eq=False, repr=False)
class Experiment:
    """What the command line works on.

    Args:
        model: The trained model, in eval mode.
        task: Its training loss, and what is asked of queries.
        train: The data it was trained on, in any form that `Examples` reads; `Examples` themselves to give ids.
        query: What to explain, in the same form.
        train_fn: ``(indices, seed) -> model``, trained from scratch on these positions of ``train`` (int64 array), with
            the seed deciding all randomness. Needed only where something is retrained.
        show: How to show an example to a person: a function of one example (in the form of the data, without the batch
            axis) that returns text, a picture (a PIL image, or numbers [H, W], [H, W, C] or [C, H, W]), or a text's
            tokens as ``[(token, weight), ...]``, which are coloured by their weights. If None, inputs shaped like
            images are shown as images, vectors as rows of a table, and anything else by its class.
        classes: The names of the classes, by number.
        methods: ``{name: method}``, where a method is an attributor or a function ``(model, task) -> attributor``.
            These are evaluated unless others are asked for, and may be asked for by name; the first of them explains
            queries.
        name: What to call the experiment, and the folder of its runs.
        features: The names of the columns, where an input is the row of a table.
        read: How the explorer reads a query that a person brings: a function of the path of an uploaded file, or of a
            typed text, that returns one input (or a whole example in the form of the data) without the batch axis. If
            None, pictures and rows of numbers are understood where the training data are such.
        l2: The weight decay that was part of the training objective, ``(1/2) sum_j l2_j theta_j^2``: one coefficient,
            or {regular expression of parameter names: coefficient}, as `Influence` and `unlearn` take it. Repairs and
            the methods ``ggn``, ``block-ggn`` and ``hessian`` use it; methods of your own say theirs. None: there was
            none.
        convention: What ``train_fn`` divides the sum of losses by when examples are left out, and so what a repair
            imitates: ``"mean"``, by those that are left, or ``"sum"``, still by n, as scikit-learn's penalties do
            (``uw.from_sklearn(...).convention``). Only with an ``l2`` do the two differ.

    Raises:
        UpweightError: What is wrong with one of them, in one line.

    Example:
        >>> import torch, upweight as uw
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> y = torch.tensor([0, 1, 1])
        >>> experiment = uw.Experiment(
        ...     torch.nn.Linear(1, 2),
        ...     uw.Classification(),
        ...     (x, y),
        ...     (x, y),
        ...     classes=["cat", "dog"],
        ...     name="pets",
        ... )
        >>> experiment
        Experiment 'pets': 3 training examples, 3 queries, Linear, Classification, cannot be retrained (no train_fn)
        >>> experiment.describe(experiment.query, [0, 2])
        ['cat', 'dog']
    """

    model: nn.Module
    task: Task
    train: Examples
    query: Examples
    train_fn: TrainFunction | None = None
    show: Callable[[Any], object] | None = None
    classes: Sequence[str] | None = None
    methods: Mapping[str, Method] | None = None
    name: str = "experiment"
    features: Sequence[str] | None = None
    read: Callable[[Any], object] | None = None
    l2: L2 = 0.0
    convention: str = "mean"

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        train: Any,
        query: Any,
        train_fn: TrainFunction | None = None,
        show: Callable[[Any], object] | None = None,
        classes: Sequence[str] | None = None,
        methods: Mapping[str, Method] | None = None,
        name: str = "experiment",
        features: Sequence[str] | None = None,
        read: Callable[[Any], object] | None = None,
        l2: L2 | None = None,
        convention: str = "mean",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UpweightError(
                f"the experiment's model is {type(model).__name__}, expected a torch.nn.Module -> give the trained "
                "model (uw.from_sklearn converts scikit-learn's)"
            )
        if not isinstance(task, Task):
            raise UpweightError(
                f"the experiment's task is {type(task).__name__}, expected a Task -> uw.Classification() for example"
            )
        for what, function in (("train_fn", train_fn), ("show", show), ("read", read)):
            if function is not None and not callable(function):
                raise UpweightError(
                    f"the experiment's {what} is {type(function).__name__}, expected a function -> "
                    + _SIGNATURES[what]
                )
        for what, names, one in (("classes", classes, "class"), ("features", features, "feature")):
            if isinstance(names, str):
                raise UpweightError(
                    f"{what}={names!r} is one text, expected one name for each {one} -> a list"
                )
        if methods is not None and not (
            isinstance(methods, Mapping) and methods and all(isinstance(key, str) for key in methods)
        ):
            raise UpweightError(
                "methods is no mapping of names, expected {name: attributor} with at least one -> "
                "methods={'ggn': lambda model, task: uw.Influence(model, task, curvature='ggn')} for example"
            )
        if convention not in CONVENTIONS:
            raise UpweightError(
                f"the experiment's convention={convention!r} is unknown -> use one of {list(CONVENTIONS)}"
            )
        if not str(name).strip():
            raise UpweightError(
                f"the experiment's name is {name!r}, expected some text -> it names the run's folder, runs/NAME"
            )
        values = {
            "model": model,
            "task": task,
            "train": _opened(train, "train"),
            "query": _opened(query, "query"),
            "train_fn": train_fn,
            "show": show,
            "classes": None if classes is None else [str(one) for one in classes],
            "methods": None if methods is None else dict(methods),
            "name": str(name),
            "features": None if features is None else [str(one) for one in features],
            "read": read,
            "l2": _penalty(l2, model),
            "convention": convention,
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)
        self._check_features()

    def _check_features(self) -> None:
        first = next(iter(tensors_in(self.train.take([0]))), None) if self.features is not None else None
        if first is not None and (first.ndim != 2 or first.shape[1] != len(self.features or ())):
            raise UpweightError(
                f"{len(self.features or ())} features are named, but an input has shape {list(first.shape[1:])} -> "
                "one name for each column, for inputs that are rows of a table"
            )

    @classmethod
    def load(cls, address: str) -> Experiment:
        """The experiment at ``path/to/file.py:name`` or ``package.module:name``.

        Args:
            address: Where it is. The name may be that of an experiment, or of a function without arguments that returns
                one (so that importing the file costs nothing in worker processes).

        Raises:
            UpweightError: There is no such file, module or name, its code raises, or it is no experiment.
        """
        found = import_name(address, lambda value: isinstance(value, cls))
        if not isinstance(found, cls):
            raise UpweightError(
                f"{address} is {_article(found)}, expected an upweight.Experiment or a function without arguments that "
                f"returns one -> {address.rpartition(':')[2]} = uw.Experiment(model, task, train, query, train_fn=...)"
            )
        return found

    def describe(self, examples: Examples, positions: Sequence[int]) -> list[str]:
        """The examples at these positions in words: what ``show`` says, else their class, else nothing.

        Raises:
            UpweightError: ``show`` raises.
        """
        if not len(positions):
            return []
        from upweight.report.shown import describe

        batch = examples.take(positions)
        return [
            describe(self, map_tensors(batch, lambda tensor, k=k: tensor[k]), examples.ids[position])
            for k, position in enumerate(positions)
        ]

    def holds_text(self) -> bool:
        """Whether the inputs look like token ids: integers [batch, position]."""
        first = next(iter(tensors_in(self.train.take([0]))), None)
        return first is not None and first.ndim == 2 and first.dtype in (torch.int32, torch.int64)

    def __repr__(self) -> str:
        again = "" if self.train_fn is not None else ", cannot be retrained (no train_fn)"
        return (
            f"Experiment {self.name!r}: {self.train.n:,} training examples, {self.query.n:,} queries, "
            f"{type(self.model).__name__}, {type(self.task).__name__}{again}"
        )


def _opened(data: Any, what: str) -> Examples:
    try:
        return data if isinstance(data, Examples) else Examples(data)
    except UpweightError as error:
        raise UpweightError(f"the experiment's {what}: {error}") from error


def _penalty(l2: L2 | None, model: nn.Module) -> L2:
    """A regulariser that can be one: a pattern that finds nothing would be no weight decay at all."""
    try:
        check_l2(0.0 if l2 is None else l2)
    except UpweightError as error:
        raise UpweightError(f"the experiment's {error}") from error
    if not isinstance(l2, Mapping):
        return 0.0 if l2 is None else l2
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in l2:
        try:
            found = any(re.search(pattern, name) for name in names)
        except (re.error, TypeError) as error:
            raise UpweightError(
                f"the experiment's l2 names {pattern!r}, expected a regular expression ({error}) -> 'weight$' "
                "for example"
            ) from error
        if not found:
            raise UpweightError(
                f"the experiment's l2 names {pattern!r}, which finds none of {names[:6]} -> a regular expression of "
                "parameter names"
            )
    return dict(l2)


def _article(value: object) -> str:
    kind = value.__name__ if isinstance(value, type) else type(value).__name__
    return f"the class {kind}" if isinstance(value, type) else f"of type {kind}"
