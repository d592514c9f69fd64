"""What the commands on an experiment share: where output goes, what a warning looks like, and how Ctrl-C ends."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

import upweight

if TYPE_CHECKING:
    from upweight.experiment import Experiment

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class Session:
    """One command's way to its user: results on standard output, everything else on standard error.

    Attributes:
        out: Where tables go.
        warned: Warnings of our own so far, for the report.
        stopped: What to say after Ctrl-C.
    """

    def __init__(self, json: bool) -> None:
        self.json = json
        self.out = Console(quiet=json, highlight=False)
        self.notes = Console(stderr=True, highlight=False, soft_wrap=True)
        self.warned: list[str] = []
        self.stopped: Callable[[], str] = lambda: "nothing was kept"
        self._seen: set[str] = set()

    def say(self, text: str) -> None:
        """A line about what happens, for whoever watches."""
        self.notes.print(Text(printable(text), style="dim"))

    def warn(self, message: Any, category: Any, filename: str, *rest: Any) -> None:
        """Show a warning as one line, once; in the place of `warnings.showwarning`."""
        text = " ".join(printable(str(message)).split())
        if text in self._seen:
            return
        self._seen.add(text)
        if Path(filename).is_relative_to(Path(upweight.__file__).parent):
            self.warned.append(text)
        self.notes.print(Text.assemble(("warning: ", "bold yellow"), text))


@contextmanager
def session(json: bool) -> Iterator[Session]:
    """A command's work: whatever the user's code prints stays out of --json, and Ctrl-C says how to go on.

    Args:
        json: Whether standard output is for JSON alone.
    """
    ours = Session(json)
    with warnings.catch_warnings(), _standard_output_kept_clean(json):
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = ours.warn
        try:
            yield ours
        except KeyboardInterrupt:
            ours.notes.print(Text.assemble(("\nstopped: ", "bold yellow"), ours.stopped()))
            raise typer.Exit(INTERRUPTED) from None


def again() -> str:
    """The command line as it was typed."""
    return shlex.join(["upweight", *sys.argv[1:]])


def open_run(address: str, out: Path | None) -> tuple[Experiment, Path]:
    """The experiment and the folder of the run, which is made if need be."""
    from upweight._files import refusing
    from upweight.experiment import Experiment

    if out is not None:  # before any time is spent
        folder = out.expanduser()
        with refusing(folder, "written"):
            folder.mkdir(parents=True, exist_ok=True)
    experiment = Experiment.load(address)
    if out is not None:
        return experiment, out.expanduser()
    from upweight._file_names import folder_name

    return experiment, Path("runs") / folder_name(experiment.name)


def printable(text: str) -> str:
    """The text without terminal codes and other unprintable characters."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


@contextmanager
def _standard_output_kept_clean(json: bool) -> Iterator[None]:
    """With --json, send to standard error whatever the user's code prints, also in worker processes."""
    if not json:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
