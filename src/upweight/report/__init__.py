"""What a run found, as JSON for machines, figures, and one HTML file for people."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upweight.experiment import Experiment

__all__ = ["build"]


def build(run_folder: str | os.PathLike[str], experiment: Experiment | None = None) -> Path:
    """Write ``report.html`` into a run folder: one file that loads nothing, of whatever the folder holds.

    Args:
        run_folder: Of the run, with any of what ``attribute``, ``evaluate``, ``audit`` and ``repair`` write.
        experiment: The experiment, which shows its examples; without it the page knows them by their ids.

    Returns:
        The file.

    Raises:
        StoreError: The folder does not exist, holds nothing to report, or cannot be written.

    Example:
        >>> import tempfile, torch, upweight as uw
        >>> run = tempfile.mkdtemp()
        >>> _ = uw.Scores(torch.tensor([[1.0, -2.0]]), ["q"], ["a", "b"], "nats").save(f"{run}/scores/ekfac")
        >>> build(run).name
        'report.html'
    """
    from upweight.report.page import build as written

    return written(run_folder, experiment)
