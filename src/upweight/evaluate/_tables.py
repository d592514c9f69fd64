"""Tables and figures, from libraries that are imported only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

Axes = Any
"""`matplotlib.axes.Axes`."""


def frame(columns: Mapping[str, Any]) -> pandas.DataFrame:
    """A pandas table."""
    return _import("pandas").DataFrame(dict(columns))


def axes_or_new(axes: Axes | None) -> Axes:
    """The axes given, or those of a new figure, which no global state holds on to."""
    if axes is not None:
        return axes
    return _import("matplotlib.figure").Figure(figsize=(5, 3.5), layout="constrained").subplots()


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name.split('.')[0]} -> pip install 'upweight[report]'") from error
