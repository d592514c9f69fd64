"""A progress bar with the time left, silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_OPEN: ContextVar[Progress | None] = ContextVar("progress", default=None)
"""What is on the terminal now."""


@contextmanager
def progress_bar(what: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A context whose value is called with the number of items just finished.

    Args:
        what: a few words for the line.
        total: items in all.
        show: False for silence; a stream that is no terminal is always silent.
    """
    if not show or not sys.stderr.isatty():
        yield lambda _: None
        return
    outer = _OPEN.get()
    if outer is not None and outer.live.is_started:  # one line more: two displays would write over each other
        task = outer.add_task(what, total=total)
        try:
            yield lambda items: outer.advance(task, items)
        finally:
            outer.remove_task(task)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        _OPEN.set(bar)
        try:
            yield lambda items: bar.advance(task, items)
        finally:
            _OPEN.set(None)
