"""The report in words and a few figures: what was found, how far to trust it, what was done, and how it was made."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from upweight.report.charts import Scale, scale, scatter, ticks
from upweight.report.issue_rows import KINDS
from upweight.report.plain import figure, percent, plain, short, signed
from upweight.report.run_files import RunFiles

if TYPE_CHECKING:
    from upweight.experiment import Experiment

__all__ = ["evaluation", "missing", "provenance", "repair", "sentences", "tiles", "title", "verification"]

DOTS = 300
"""Queries of a method that are drawn."""

GROUPS = {
    "forgotten": "forgotten examples",
    "repaired": "relabelled examples",
    "reweighted": "reweighted examples",
    "retained": "retained examples",
    "validation": "validation data",
    "test": "test data",
}
"""What the groups of a repair's evidence are called."""


def title(run: RunFiles, experiment: Experiment | None) -> str:
    """What the experiment is called."""
    return plain(experiment.name if experiment is not None else run.name, 80)


# In short -----------------------------------------------------------------------------------------------------------


def sentences(
    run: RunFiles, experiment: Experiment | None, issues: dict[str, Any] | None
) -> list[tuple[str, str]]:
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
    if run.evaluation is not None and run.evaluation.get("sentence"):
        found.append(("Trust", plain(run.evaluation["sentence"], 600)))
    if issues is not None:
        flagged = [_counted(kind, count) for kind, (count, _) in issues["counts"].items() if count]
        what = _listed(flagged) if flagged else "none"
        found.append(("Issues", f"Of {issues['examples']:,} training examples the audit flagged {what}."))
    if (done := repair(run)) is not None:
        found.append(("Repair", done["sentence"]))
    if (held := verification(run)) is not None and held["sentence"]:
        found.append(("Verified", held["sentence"]))
    return found


def _counted(kind: str, count: int) -> str:
    """A count of issues in words.

    >>> _counted("label", 2), _counted("rare", 1)
    ('2 suspected label errors', '1 rare example')
    """
    words = {"label": "suspected label error", "near_duplicate": "near-duplicate", "outlier": "outlier"}
    name = words.get(kind, f"{KINDS.get(kind, kind)} example")
    return f"{count:,} {name}{'s' if count != 1 else ''}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"


def tiles(run: RunFiles, issues: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Up to four figures, each with what it means."""
    found: list[tuple[str, str]] = []
    if (table := evaluation(run)) is not None and table["best"] is not None:
        best, ceiling = table["best"], table["ceiling"]
        means = f"LDS of {best['name']}: rank correlation with real retraining"
        if ceiling is not None:
            means += f"; noise allows {figure(ceiling['value'])}"
        found.append((figure(best["lds"]), means))
    if issues is not None:
        labels = issues["counts"].get("label")
        count, means = (
            (labels[0], "suspected label errors")
            if labels
            else (
                sum(one for one, _ in issues["counts"].values()),
                "issues flagged by the audit",
            )
        )
        found.append((f"{count:,}", f"{means}, of {issues['examples']:,} training examples"))
    if (done := repair(run)) is not None:
        test = next((g for g in done["groups"] if g["key"] in ("test", "validation")), None)
        if test is not None and test["accuracy_after"] is not None:
            means = f"accuracy on the {test['name']} after the repair, {percent(test['accuracy_before'], 1)} before"
            found.append((percent(test["accuracy_after"], 1), means))
        elif test is not None:
            found.append(
                (signed(test["actual"]), f"change of the mean loss on the {test['name']} by the repair")
            )
    if (held := verification(run)) is not None and held["ratio"] is not None:
        found.append((percent(held["ratio"], 1), "of the time that retraining takes, for the repair"))
    return found[:4]


def missing(run: RunFiles) -> list[tuple[str, str]]:
    """What is not in the folder, and the command that makes it."""
    address, folder = run.address or "EXPERIMENT", str(run.folder)
    commands = [
        (run.scores is None, "Scores of every training example for every query", "attribute"),
        (run.evaluation is None, "How far the scores can be trusted, against real retraining", "evaluate"),
        (run.issues is None, "Suspected label errors, duplicates, outliers and harmful examples", "audit"),
        (run.repair is None, "A repaired model, without a full retrain", "repair"),
        (
            run.repair is not None and run.verification is None,
            "The repaired model against a really retrained one",
            "repair --verify",
        ),
    ]
    return [
        (
            what,
            f"upweight {verb.split()[0]} {address} --out {folder}{verb.partition(' ')[1]}{verb.partition(' ')[2]}",
        )
        for lacks, what, verb in commands
        if lacks
    ]


# Evaluation ----------------------------------------------------------------------------------------------------------


def evaluation(run: RunFiles) -> dict[str, Any] | None:
    """The table of methods, where its marks stand, and the calibration plots."""
    content = run.evaluation
    if content is None:
        return None
    rows = [_row(row) for row in content["methods"] if isinstance(row, dict)]
    rows = [row for row in rows if row is not None]
    ceiling = content.get("ceiling")
    ceiling = ceiling if isinstance(ceiling, dict) and _finite(ceiling.get("value")) else None
    place, marks = _axis(rows, ceiling)
    for row in rows:
        row["from"], row["to"] = sorted((place(0.0), place(row["lds"] or 0.0)), key=float)
        row["low_at"], row["high_at"] = place(row["low"] or 0.0), place(row["high"] or 0.0)
        row["dots"] = _dots(row.pop("per_query"), place)
        row["at"] = place(row["lds"] or 0.0)
    plots = [{"name": row["name"], **row["calibration"]} for row in rows if row["calibration"]][:2]
    return {
        "rows": rows,
        "best": next((row for row in rows if not row["baseline"]), rows[0] if rows else None),
        "ceiling": ceiling,
        "ceiling_at": place(ceiling["value"]) if ceiling else None,
        "zero_at": place(0.0),
        "ticks": marks,
        "plots": plots,
        "level": content.get("level", 0.95),
        "subsets": content.get("subsets"),
        "seeds": content.get("seeds"),
        "fraction": content.get("fraction"),
        "queries": content.get("queries"),
        "unit": plain(content.get("measurement_unit") or "", 40),
        "left_out": {plain(k, 60): plain(v, 300) for k, v in dict(content.get("left_out") or {}).items()},
        "warnings": [plain(text, 400) for text in content.get("warnings") or []],
    }


def _row(row: dict[str, Any]) -> dict[str, Any] | None:
    gain = row.get("above_best_baseline")
    found = row.get("calibration")
    plot = None
    if isinstance(found, dict) and isinstance(found.get("points"), list):
        plot = scatter(found["points"], found.get("slope"))
        plot = plot and {**plot, **{k: found.get(k) for k in ("unit", "pairs", "slope", "correlation")}}
    return {
        "name": plain(row.get("name"), 80),
        "baseline": bool(row.get("baseline")),
        **{key: _known(row.get(key)) for key in ("lds", "low", "high", "median", "seconds")},
        "share": _known(row.get("share_of_ceiling")),
        "gain": {key: _known(gain.get(key)) for key in ("value", "low", "high")}
        if isinstance(gain, dict)
        else None,
        "per_query": [v for v in row.get("per_query") or [] if _finite(v)],
        "calibration": plot,
    }


def _axis(rows: list[dict[str, Any]], ceiling: dict[str, Any] | None) -> tuple[Scale, list[tuple[str, str]]]:
    values = [0.0, *([ceiling["value"]] if ceiling else [])]
    for row in rows:
        values += [row[key] for key in ("lds", "low", "high") if row[key] is not None]
        values += row["per_query"]
    low, high = min(values), max(values)
    margin = 0.03 * (high - low) or 0.1
    low, high = max(-1.05, low - margin), min(1.05, high + margin)
    place = scale(low, high)
    return place, [(place(tick), f"{tick:g}".replace("-", "−")) for tick in ticks(low, high)]


def _dots(values: list[float], place: Scale) -> list[tuple[str, str]]:
    heights = np.random.default_rng(0).uniform(14, 86, len(values))
    step = max(1, math.ceil(len(values) / DOTS))
    return [(place(v), f"{h:.0f}") for v, h in zip(values[::step], heights[::step])]


# Repair --------------------------------------------------------------------------------------------------------------


def repair(run: RunFiles) -> dict[str, Any] | None:
    """What was done, and its predicted and actual effects."""
    content = run.repair
    if content is None or not isinstance(content.get("evidence"), dict):
        return None
    evidence = content["evidence"]
    groups = [
        _group(str(name), one)
        for name, one in dict(evidence.get("groups") or {}).items()
        if isinstance(one, dict)
    ]
    counts = {key: len(content.get(key) or []) for key in ("removed", "relabelled", "reweighted")}
    done = [f"{count:,} {key}" for key, count in counts.items() if count]
    seconds = _known(evidence.get("seconds"))
    what = plain(evidence.get("what") or (_listed(done) if done else "repaired"), 300)
    sentence = f"{what[:1].upper()}{what[1:]}, by {plain(content.get('method'), 60)}, without retraining"
    sentence += f", in {seconds:.1f} s" if seconds is not None else ""
    for group in groups:
        if group["key"] in ("test", "validation"):
            if group["accuracy_after"] is not None:
                sentence += (
                    f"; accuracy on the {group['name']} went from {percent(group['accuracy_before'], 1)} to "
                    f"{percent(group['accuracy_after'], 1)}"
                )
            else:
                sentence += f"; the loss on the {group['name']} changed by {signed(group['actual'])}"
            break
    for (
        group
    ) in groups:  # predicted and actual are to be compared within a group, whose losses have their own size
        largest = (
            max((abs(group[key]) for key in ("actual", "predicted") if group[key] is not None), default=0.0)
            or 1.0
        )
        for key in ("actual", "predicted"):
            value = group[key]
            group[f"{key}_bar"] = None if value is None else (value >= 0, f"{50 * abs(value) / largest:.2f}")
    residual = evidence.get("residual_gradient_norm")
    objective = evidence.get("objective")
    certificate = evidence.get("certificate")
    return {
        "what": what,
        "method": plain(content.get("method"), 60),
        "counts": done,
        "groups": groups,
        "seconds": seconds,
        "residual": residual if isinstance(residual, dict) else None,
        "trust": _known(objective.get("trust_ratio")) if isinstance(objective, dict) else None,
        "certificate": certificate if isinstance(certificate, dict) else None,
        "source": plain(content.get("source") or "", 200),
        "sentence": sentence + ".",
    }


def _group(key: str, one: dict[str, Any]) -> dict[str, Any]:
    predicted = _known(one.get("predicted"))
    numbers = ("n", "of", "loss_before", "loss_after", "actual", "accuracy_before", "accuracy_after")
    return {
        "key": key,
        "name": GROUPS.get(key, plain(key, 60)),
        **{name: _known(one.get(name)) for name in numbers},
        "predicted": _known(one.get("first_order")) if predicted is None else predicted,
    }


def verification(run: RunFiles) -> dict[str, Any] | None:
    """The repaired model beside doing nothing and beside really retrained ones."""
    content = run.verification
    if content is None:
        return None
    rows = []
    for name, key in (
        ("distance of parameters", "parameter_distance"),
        ("distance of predictions", "prediction_distance"),
        ("distance to the mean prediction", "to_mean_prediction"),
    ):
        one = content.get(key)
        if isinstance(one, dict):
            rows.append((name, figure(one.get("before")), figure(one.get("after")), figure(one.get("seeds"))))
    for kind, write in (("accuracy", lambda v: percent(v, 1)), ("loss", figure)):
        for group, one in dict(content.get(kind) or {}).items():
            if isinstance(one, dict) and any(_finite(one.get(k)) for k in ("before", "after")):
                name = f"{kind}, {GROUPS.get(str(group), str(group))}"
                rows.append((name, *(write(one.get(k)) for k in ("before", "after", "retrained"))))
    member = content.get("membership")
    if isinstance(member, dict):
        rows.append(
            (
                "membership inference AUROC (0.5: forgotten)",
                *(figure(member.get(k)) for k in ("before", "after", "retrained")),
            )
        )
    seconds = content.get("seconds") if isinstance(content.get("seconds"), dict) else {}
    distance = content.get("prediction_distance")
    relative = _known(distance.get("relative")) if isinstance(distance, dict) else None
    ratio = _known(seconds.get("ratio"))
    sentence = ""
    if relative is not None:
        sentence = f"The repaired model's predictions keep {percent(relative)} of the distance to real retraining that doing nothing leaves"
        sentence += f", in {percent(ratio, 1)} of the time." if ratio is not None else "."
    return {
        "rows": rows,
        "ratio": ratio,
        "relative": relative,
        "seconds": seconds,
        "seeds": len(content.get("seeds") or []),
        "sentence": sentence,
    }


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


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _known(value: Any) -> float | None:
    return value if _finite(value) else None
