"""The evaluation as the report shows it: methods and baselines against real retraining, and calibration plots."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from upweight.report.charts import Scale, scale, scatter, ticks
from upweight.report.plain import finite, known, plain

__all__ = ["evaluation"]

DOTS = 300
"""Queries of a method that are drawn."""


def evaluation(content: dict[str, Any] | None) -> dict[str, Any] | None:
    """The table of methods, where its marks stand, and the calibration plots."""
    if content is None:
        return None
    rows = [_row(row) for row in content["methods"] if isinstance(row, dict)]
    rows = [row for row in rows if row is not None]
    ceiling = content.get("ceiling")
    ceiling = ceiling if isinstance(ceiling, dict) and finite(ceiling.get("value")) else None
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
        "sentence": plain(content.get("sentence") or "", 600),
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
        **{key: known(row.get(key)) for key in ("lds", "low", "high", "median", "seconds")},
        "share": known(row.get("share_of_ceiling")),
        "gain": {key: known(gain.get(key)) for key in ("value", "low", "high")}
        if isinstance(gain, dict)
        else None,
        "per_query": [v for v in row.get("per_query") or [] if finite(v)],
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
