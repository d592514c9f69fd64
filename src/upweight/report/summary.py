"""The report in words and a few figures: what was found, what is not there yet, and how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upweight.report.issue_rows import KINDS
from upweight.report.plain import figure, listed, percent, plain, quoted, short, signed
from upweight.report.run_files import RunFiles

if TYPE_CHECKING:
    from upweight.experiment import Experiment

__all__ = ["Parts", "missing", "provenance", "sentences", "tiles", "title"]

LISTED = 50
"""Ids that a command on the page names one by one."""


def title(run: RunFiles, experiment: Experiment | None) -> str:
    """What the experiment is called."""
    return plain(experiment.name if experiment is not None else run.name, 80)


# In short -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What the run folder's files came to; None where there is none.

    Attributes:
        evaluation: See `upweight.report.trust.evaluation`.
        issues: See `upweight.report.issue_rows.issue_data`.
        repair, verification: See `upweight.report.repaired`.
    """

    evaluation: dict[str, Any] | None = None
    issues: dict[str, Any] | None = None
    repair: dict[str, Any] | None = None
    verification: dict[str, Any] | None = None


def sentences(run: RunFiles, parts: Parts) -> list[tuple[str, str]]:
    """``(what, sentence)``: the report in a few sentences."""
    found: list[tuple[str, str]] = []
    if run.scores is not None:
        queries, train = run.scores.values.shape
        text = f"{train:,} training examples were scored for each of {queries:,} queries by {plain(run.method, 80)}: "
        text += (
            f"the predicted change of the query's measurement, in {run.scores.unit}, if an example is removed."
            if run.scores.unit
            else "an order within each query, without a unit."
        )
        found.append(("Scores", text))
    if parts.evaluation is not None and parts.evaluation["sentence"]:
        found.append(("Trust", parts.evaluation["sentence"]))
    if (issues := parts.issues) is not None:
        flagged = [_counted(kind, count) for kind, (count, _) in issues["counts"].items() if count]
        what = listed(flagged) if flagged else "none"
        found.append(("Issues", f"Of {issues['examples']:,} training examples the audit flagged {what}."))
    if parts.repair is not None:
        found.append(("Repair", parts.repair["sentence"]))
    if parts.verification is not None and parts.verification["sentence"]:
        found.append(("Verified", parts.verification["sentence"]))
    return found


def _counted(kind: str, count: int) -> str:
    """A count of issues in words.

    >>> _counted("label", 2), _counted("rare", 1)
    ('2 suspected label errors', '1 rare example')
    """
    words = {"label": "suspected label error", "near_duplicate": "near-duplicate", "outlier": "outlier"}
    name = words.get(kind, f"{KINDS.get(kind, kind)} example")
    return f"{count:,} {name}{'s' if count != 1 else ''}"


def tiles(parts: Parts) -> list[tuple[str, str]]:
    """Up to four figures, each with what it means."""
    found: list[tuple[str, str]] = []
    if parts.evaluation is not None and (best := parts.evaluation["best"]) is not None:
        means = f"LDS of {best['name']}: rank correlation with real retraining"
        if (ceiling := parts.evaluation["ceiling"]) is not None:
            means += f"; noise allows {figure(ceiling['value'])}"
        found.append((figure(best["lds"]), means))
    if (issues := parts.issues) is not None:
        labels = issues["counts"].get("label")
        count = labels[0] if labels else sum(one for one, _ in issues["counts"].values())
        means = "suspected label errors" if labels else "issues flagged by the audit"
        found.append((f"{count:,}", f"{means}, of {issues['examples']:,} training examples"))
    if parts.repair is not None and (judged := parts.repair["judged"]) is not None:
        if judged["accuracy_after"] is not None:
            means = f"accuracy on the {judged['name']} after the repair, {percent(judged['accuracy_before'], 1)} before"
            found.append((percent(judged["accuracy_after"], 1), means))
        else:
            found.append(
                (signed(judged["actual"]), f"change of the mean loss on the {judged['name']} by the repair")
            )
    if parts.verification is not None and parts.verification["ratio"] is not None:
        found.append(
            (percent(parts.verification["ratio"], 1), "of the time that retraining takes, for the repair")
        )
    return found


def missing(run: RunFiles, address: str = "") -> list[tuple[str, str]]:
    """What is not in the folder, and the command that makes it."""
    address, folder = quoted(address or run.address or "EXPERIMENT"), quoted(run.folder)
    lacking = [
        (run.scores is None, "Scores of every training example for every query", "attribute", ()),
        (
            run.evaluation is None,
            "How far the scores can be trusted, against real retraining",
            "evaluate",
            (),
        ),
        (
            run.issues is None,
            "Suspected label errors, duplicates, outliers and harmful examples",
            "audit",
            (),
        ),
        (run.repair is None, "A repaired model, without a full retrain", "repair", ()),
        (
            run.repair is not None and run.verification is None,
            "The repaired model against a really retrained one",
            "repair",
            (*_repeated(run.repair or {}), "--verify"),
        ),
    ]
    return [
        (what, " ".join(["upweight", verb, address, "--out", folder, *options]))
        for lacks, what, verb, options in lacking
        if lacks
    ]


def _repeated(repair: dict[str, Any]) -> list[str]:
    """The options that make the same repair again: without them it would be that of the decisions or suggestions."""
    source, options = str(repair.get("source") or ""), []
    if "--remove" in source:
        ids = [str(name) for name in repair.get("removed") or []]
        listed = len(ids) <= LISTED and not any("," in name or name != name.strip() for name in ids)
        options += ["--remove", quoted(",".join(ids)) if listed else "FILE"]
    if "--relabel" in source:
        options += ["--relabel", "FILE"]
    if repair.get("method") != "newton":
        options += ["--method", quoted(repair.get("method"))]
    return options


# How it was made -----------------------------------------------------------------------------------------------------


def provenance(run: RunFiles, experiment: Experiment | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """``(heading, [(what, value), ...])`` of everything that says how the figures were made."""
    parts: list[tuple[str, list[tuple[str, str]]]] = []
    about = [("experiment", run.address), ("run folder", run.folder.resolve().name)]
    if experiment is not None:
        about += [("what it is", repr(experiment))]
    for name, content in (
        ("evaluate.json", run.evaluation),
        ("issues.json", run.issues),
        ("repair.json", run.repair),
    ):
        if content is not None:
            about.append(
                (
                    f"{name} written",
                    f"{content.get('written', '–')} by upweight {content.get('upweight', '–')}",
                )
            )
    parts.append(("The run", [(key, plain(value, 300)) for key, value in about if value]))
    if run.scores is not None:
        parts.append((f"The scores shown: {plain(run.method, 80)}", _pairs(run.scores.info)))
        others = [name for name in run.methods if name != run.method]
        if others:
            parts[0][1].append(("other methods here", plain(", ".join(others), 600)))
    if run.evaluation is not None:
        keys = ("task", "train", "queries", "subsets", "seeds", "fraction", "subset_seed", "bank", "ceiling")
        parts.append(("The evaluation", _pairs({key: run.evaluation.get(key) for key in keys})))
    if run.issues is not None:
        keys = ("settings", "detectors", "influence", "left_out")
        parts.append(("The audit", _pairs({key: run.issues[key] for key in keys if run.issues.get(key)})))
    if run.repair is not None:
        keys = ("objective", "residual_gradient_norm", "certificate", "solver", "parameters", "buffers_kept")
        evidence = run.repair["evidence"]
        kept = {key: evidence[key] for key in (*keys, "fingerprints", "versions") if evidence.get(key)}
        parts.append(("The repair", _pairs(kept)))
    return parts


def _pairs(content: dict[str, Any]) -> list[tuple[str, str]]:
    return [(plain(str(key).replace("_", " "), 60), short(value, 300)) for key, value in content.items()]
