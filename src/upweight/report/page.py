"""The report: one HTML file of whatever a run folder holds. It loads nothing, and needs no server."""

from __future__ import annotations

import base64
import hashlib
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import upweight
from upweight._files import replace_file
from upweight.errors import StoreError
from upweight.report import summary
from upweight.report.charts import histogram
from upweight.report.issue_rows import KINDS, issue_data
from upweight.report.plain import compact_json, figure, percent, plain, short, signed
from upweight.report.queries import cards, concentration
from upweight.report.repaired import repair, verification
from upweight.report.run_files import RunFiles, read_run
from upweight.report.shown import TINY, drawn_in_ink
from upweight.report.trust import evaluation

if TYPE_CHECKING:
    from upweight.experiment import Experiment

__all__ = ["build", "render"]


def build(run_folder: str | os.PathLike[str], experiment: Experiment | None = None) -> Path:
    """Write ``report.html`` into a run folder, of whatever is there.

    Args:
        run_folder: Of the run.
        experiment: The experiment, which shows its examples; without it the page knows them by their ids.

    Returns:
        The file.

    Raises:
        StoreError: The folder does not exist, holds nothing to report, or cannot be written.
    """
    return write(Path(run_folder).expanduser(), experiment)[0]


def write(folder: Path, experiment: Experiment | None = None) -> tuple[Path, RunFiles]:
    """`build`, and what was found in the folder."""
    run = read_run(folder, experiment)
    if run.empty:
        why = f" ({run.notices[0]})" if run.notices else ""
        raise StoreError(
            f"{folder} holds nothing to report{why} -> upweight attribute, evaluate, audit or repair "
            f"EXPERIMENT --out {folder}"
        )
    text = render(run, experiment)
    path = folder / "report.html"
    replace_file(path, lambda file: file.write(text.encode("utf-8", "replace")))
    return path, run


def render(run: RunFiles, experiment: Experiment | None = None) -> str:
    """The page as one HTML document; every text in it is escaped, of bounded length, and free of hidden characters."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever the page shows goes through this, so no template can forget it.
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    environment.filters.update(figure=figure, percent=percent, signed=signed, short=short, plain=plain)
    script, style = _asset("report.js"), _asset("report.css")
    parts = _parts(run, experiment)
    issues = parts.issues
    queries = [] if run.scores is None else cards(run.scores, experiment)
    looks = [one.look for card in queries for one in (card, *card.proponents, *card.opponents)]
    looks += [one["look"] for one in (parts.repair or {}).get("changed", []) if one["look"] is not None]
    # The browser runs this script and no other: markup that got into the page could not.
    mark = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(_asset("report.html")).render(
        run=run,
        experiment=experiment,
        style=Markup(style),
        script=Markup(script),
        script_hash=Markup(mark),
        title=summary.title(run, experiment),
        sentences=summary.sentences(run, parts),
        tiles=summary.tiles(parts),
        missing=summary.missing(run),
        cards=queries,
        ink=drawn_in_ink(looks),
        tiny=TINY,
        histogram=None if run.scores is None else histogram(run.scores.values.double().cpu().numpy()),
        half=None if run.scores is None else concentration(run.scores),
        evaluation=parts.evaluation,
        issues=issues,
        issue_json=None if issues is None else Markup(compact_json(_for_browser(issues))),
        kinds=KINDS,
        repair=parts.repair,
        verification=parts.verification,
        provenance=summary.provenance(run, experiment),
        version=upweight.__version__,
    )


def _parts(run: RunFiles, experiment: Experiment | None) -> summary.Parts:
    """What the files came to; one that does not hold what it should is left out with a notice."""
    made: dict[str, Any] = {}
    for kind, file, make in (
        ("evaluation", "evaluate.json", evaluation),
        ("issues", "issues.json", lambda content: content and issue_data(content, experiment)),
        ("repair", "repair/repair.json", lambda content: repair(content, experiment)),
        ("verification", "repair/verify.json", verification),
    ):
        try:
            made[kind] = make(getattr(run, kind))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
            run.notices.append(f"{file} holds what it should not ({type(error).__name__}): it is left out.")
            setattr(run, kind, None)
    return summary.Parts(**made)


def _for_browser(issues: dict[str, Any]) -> dict[str, Any]:
    kept = ("texts", "columns", "flagged", "positions", "looks", "unit")
    return {**{key: issues[key] for key in kept}, "kinds": KINDS}


def _asset(name: str) -> str:
    return resources.files("upweight.report").joinpath(name).read_text(encoding="utf-8")
