"""Attributors by the names that a command line takes: ``ekfac``, ``ggn:damping=0.01``, ``grad-cos``."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

import upweight
from upweight.curvature.exact import EXACT_KINDS
from upweight.curvature.l2 import L2
from upweight.errors import UpweightError
from upweight.task import Task

__all__ = ["BASELINES", "METHODS", "build", "key_of", "known", "own_name"]

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ekfac": ("Influence", {"curvature": "ekfac"}),
    "kfac": ("Influence", {"curvature": "kfac"}),
    "ggn": ("Influence", {"curvature": "ggn"}),
    "block-ggn": ("Influence", {"curvature": "ggn", "blocks": True}),
    "hessian": ("Influence", {"curvature": "hessian"}),
    "datainf": ("Influence", {"curvature": "datainf"}),
    "diagonal": ("Influence", {"curvature": "diagonal"}),
    "identity": ("Influence", {"curvature": "identity"}),
    "grad-dot": ("GradDot", {}),
    "grad-cos": ("GradCos", {}),
    "representer": ("Representer", {}),
}
"""Name: (public name of the attributor, its options)."""

BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("Random", {}),
    "loss": ("Loss", {}),
    "margin": ("Margin", {}),
    "grad-norm": ("GradNorm", {}),
    "same-class": ("SameClass", {}),
    "embedding-similarity": ("EmbeddingSimilarity", {}),
    "bm25": ("BM25", {}),
}
"""What every evaluation shows unasked, as far as it applies."""


def key_of(name: str) -> str:
    """The one spelling of a name.

    >>> key_of("Grad_Dot")
    'grad-dot'
    """
    return name.strip().lower().replace("_", "-")


def known(own: Mapping[str, Any] | None = None) -> list[str]:
    """All names that `build` takes, the experiment's own first."""
    ours = [
        name for name, (attributor, _) in {**METHODS, **BASELINES}.items() if hasattr(upweight, attributor)
    ]
    return list(dict.fromkeys([*(own or {}), *ours]))


def own_name(spec: str, own: Mapping[str, Any] | None) -> str | None:
    """Which of the user's own methods a spec means, if any: of the whole text, or of what stands before its options.

    The exact spelling comes first; another one is understood where only one method is spelt so.

    Raises:
        UpweightError: Several methods are spelt so but for case, ``_`` and ``-``, and none exactly.

    >>> own_name("Mine", {"mine": 1}), own_name("b:c", {"B": 1, "b:c": 2}), own_name("ggn", {"mine": 1})
    ('mine', 'b:c', None)
    """
    for text in dict.fromkeys((spec, spec.partition(":")[0])):
        if own and text in own:
            return text
        alike = [name for name in own or () if key_of(name) == key_of(text)]
        if len(alike) > 1:
            raise UpweightError(
                f"{text!r} may be {' or '.join(map(repr, alike))} -> spell it as the experiment does"
            )
        if alike:
            return alike[0]
    return None


def build(spec: str, model: nn.Module, task: Task, own: Mapping[str, Any] | None = None, l2: L2 = 0.0) -> Any:
    """The attributor of a name, not yet fitted.

    Args:
        spec: ``NAME`` or ``NAME:OPTION=VALUE:OPTION=VALUE``; options are arguments of the attributor's class. One of
            the user's own is found by its whole name first, which may hold colons.
        model: What it is for.
        task: Its task.
        own: The user's own methods: attributors, or functions ``(model, task) -> attributor``.
        l2: Weight decay of the training objective, for the exact curvatures unless the spec has another: the structured
            ones model the loss alone, and have their damping in its place.

    Raises:
        UpweightError: The name or an option is not known, or the attributor refuses.

    Example:
        >>> import torch
        >>> method = build("ggn:damping=0.01", torch.nn.Linear(2, 2), upweight.Classification())
        >>> type(method).__name__, method.curvature
        ('Influence', 'ggn')
    """
    name, *settings = spec.split(":")
    mine = own_name(spec, own)
    if own and mine is not None:
        if settings and key_of(mine) != key_of(spec):
            raise UpweightError(f"{spec!r}: {name} is the experiment's own -> set its options there")
        return _own(mine, own[mine], model, task)
    options = dict(_option(setting, spec) for setting in settings)
    listed = {**METHODS, **BASELINES}.get(key_of(name))
    if listed is None or not hasattr(upweight, listed[0]):
        raise UpweightError(f"there is no method {name!r} -> one of {', '.join(known(own))}")
    attributor = getattr(upweight, listed[0])
    options = {**listed[1], **options}
    if options.get("curvature") in EXACT_KINDS:
        options = {"l2": l2, **options}
    return attributor(model, task, **_checked(attributor, options, spec))


def _own(name: str, method: Any, model: nn.Module, task: Task) -> Any:
    made = method if hasattr(method, "attribute") and not isinstance(method, type) else method(model, task)
    if not (hasattr(made, "fit") and hasattr(made, "attribute")):
        raise UpweightError(
            f"the experiment's method {name!r} is {type(made).__name__}, expected an attributor (fit, attribute) -> "
            "give one, or a function (model, task) that returns one"
        )
    return made


def _option(setting: str, spec: str) -> tuple[str, Any]:
    name, equals, text = setting.partition("=")
    if not equals or not name.strip().isidentifier():
        raise UpweightError(
            f"{spec!r}: {setting!r} is no option -> NAME:OPTION=VALUE, such as ggn:damping=0.01"
        )
    try:
        return name.strip(), ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return name.strip(), text.strip()


def _checked(attributor: Callable[..., Any], options: dict[str, Any], spec: str) -> dict[str, Any]:
    taken = inspect.signature(attributor).parameters
    allowed = [name for name in taken if name not in ("model", "task", "progress")]
    if unknown := [name for name in options if name not in allowed]:
        raise UpweightError(f"{spec!r} has no option {unknown[0]!r} -> one of {', '.join(allowed)}")
    needed = [name for name, one in taken.items() if one.default is one.empty and name in allowed]
    if missing := [name for name in needed if name not in options]:
        raise UpweightError(
            f"{spec!r} needs {', '.join(missing)} -> {spec}:{missing[0]}=VALUE, or one of the experiment's own methods="
        )
    return options
