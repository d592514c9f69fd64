"""An evaluation as files: evaluate.json, evaluate.html, and the figures as PNG."""

from __future__ import annotations

import json
import math
import operator
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

import upweight
from upweight._files import replace_file
from upweight.evaluate.bootstrap import Estimate
from upweight.evaluate.comparison import Compared, Comparison
from upweight.report.calibration import calibration

__all__ = ["as_json", "figures", "json_text", "render", "write"]

QUERIES_SHOWN = 10
"""Queries named on the page: those that the best method explains worst."""


def write(comparison: Comparison, folder: Path, address: str, warned: list[str]) -> dict[str, str]:
    """Write evaluate.json, evaluate.html and the figures; ``{what: file}`` of what was written.

    The figures are left out where matplotlib is missing.
    """
    files = {"json": folder / "evaluate.json", "html": folder / "evaluate.html"}
    pictures = figures(comparison)
    files |= {name: folder / f"evaluate-{name}.png" for name in pictures}
    named = {name: str(file) for name, file in files.items()}
    for name, figure in pictures.items():
        replace_file(files[name], lambda file, figure=figure: figure.savefig(file, format="png", dpi=160))
    content = as_json(comparison, address, warned) | {"files": named}
    texts = {"html": render(comparison, address, warned), "json": json_text(content)}
    for name, text in texts.items():
        replace_file(files[name], lambda file, text=text: file.write(text.encode("utf-8", "replace")))
    return named


def as_json(comparison: Comparison, address: str, warned: list[str]) -> dict[str, Any]:
    """Everything that was found, as plain numbers and words."""
    experiment, plan, ceiling = comparison.experiment, comparison.plan, comparison.ceiling
    return {
        "upweight": upweight.__version__,
        "experiment": experiment.name,
        "address": address,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "task": experiment.task.name,
        "measurement_unit": comparison.outcomes.unit,
        "train": experiment.train.n,
        "queries": experiment.query.n,
        "query_ids": list(experiment.query.ids),
        "subsets": comparison.subsets,
        "subsets_dropped": comparison.rows[0].lds.subsets_dropped,
        "seeds": plan.seeds,
        "fraction": plan.fraction,
        "subset_seed": plan.seed,
        "bank": {
            "planned": comparison.bank.planned,
            "finished": comparison.bank.finished,
            "trained_now": comparison.bank.trained,
            "failed": [
                {"subset": subset, "seed": seed, "error": error}
                for subset, seed, error in comparison.bank.failed
            ],
            "train_seconds": comparison.outcomes.info["train_seconds"],
        },
        "ceiling": None
        if ceiling is None
        else {
            "value": ceiling.value,
            "low": ceiling.low,
            "high": ceiling.high,
            "one_seed_against_the_others": ceiling.one_against_others,
            "reliability_of_one_seed": ceiling.reliability.value,
        },
        "level": comparison.rows[0].lds.level,
        "methods": [_row(comparison, row) for row in comparison.rows],
        "left_out": comparison.left_out,
        "sentence": comparison.sentence(),
        "warnings": warned,
    }


def _row(comparison: Comparison, row: Compared) -> dict[str, Any]:
    gain = comparison.gains.get(row.name)
    return {
        "name": row.name,
        "baseline": row.baseline,
        "lds": row.lds.value,
        "low": row.lds.low,
        "high": row.lds.high,
        "intervals": {name: list(pair) for name, pair in row.lds.score.intervals.items()},
        "median": row.lds.median,
        "share_of_ceiling": row.lds.corrected,
        "above_best_baseline": None if gain is None else _estimate(gain),
        "undefined_queries": row.lds.undefined,
        "per_query": row.lds.per_query.tolist(),
        "calibration": calibration(row.scores, comparison.outcomes),
        "seconds": round(row.seconds, 3),
        "info": row.scores.info,
    }


def _estimate(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def json_text(content: object) -> str:
    """Indented JSON, with null for what is not a number.

    >>> print(json_text({"lds": float("nan")}).split())
    ['{', '"lds":', 'null', '}']
    """
    return json.dumps(_plain(content), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if not isinstance(value, (str, int, float, bool, type(None))):
        value = operator.methodcaller("item")(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figures(comparison: Comparison) -> dict[str, Any]:
    """``{"lds": Figure, "queries": Figure}`` of matplotlib; nothing where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    rows = comparison.rows[::-1]
    height = 1.6 + 0.36 * len(rows)
    bars = Figure(figsize=(7, height), layout="constrained")
    axes = bars.subplots()
    places = np.arange(len(rows))
    axes.barh(
        places,
        [row.lds.value for row in rows],
        xerr=np.array([[row.lds.value - row.lds.low, row.lds.high - row.lds.value] for row in rows]).T.clip(
            0
        ),
        color=["0.75" if row.baseline else "#0b7570" for row in rows],
        error_kw={"elinewidth": 1, "capsize": 3, "ecolor": "0.2"},
    )
    axes.set(yticks=places, yticklabels=[_drawn(row.name) for row in rows])
    axes.set_xlabel("LDS, with its 95 % interval (grey: baselines)")
    _mark_ceiling(axes, comparison)

    spread = Figure(figsize=(7, height + 0.3), layout="constrained")
    axes = spread.subplots()
    generator = np.random.default_rng(0)
    for place, row in zip(places, rows):
        values = row.lds.per_query[np.isfinite(row.lds.per_query)]
        up = place + generator.uniform(-0.25, 0.25, len(values))
        axes.scatter(values, up, s=10, lw=0, alpha=0.5, color="0.5" if row.baseline else "#0b7570")
        axes.plot([row.lds.value] * 2, [place - 0.35, place + 0.35], color="#b2500b", lw=2)
    axes.set(yticks=places, yticklabels=[_drawn(row.name) for row in rows])
    axes.set_xlabel("LDS of each query (bar: mean)")
    _mark_ceiling(axes, comparison)
    return {"lds": bars, "queries": spread}


def _drawn(name: str) -> str:
    return name.replace("$", r"\$")  # matplotlib takes text between dollars for mathematics


def _mark_ceiling(axes: Any, comparison: Comparison) -> None:
    axes.axvline(0, color="0.4", lw=0.8)
    if comparison.ceiling is not None:
        value = comparison.ceiling.value
        axes.axvline(value, color="#a8128f", ls="--", lw=1.2, label=f"noise ceiling {value:.3f}")
        axes.figure.legend(loc="outside lower right", fontsize=8, frameon=False)
    axes.set_title(_drawn(comparison.experiment.name), fontsize=10)


def render(comparison: Comparison, address: str, warned: list[str]) -> str:
    """The page as one HTML document; every text in it is escaped, and it loads nothing."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(figure=_figure, percent=_percent)
    template = resources.files("upweight.report").joinpath("evaluation.html").read_text(encoding="utf-8")
    low, high = _ends(comparison)

    def place(value: float) -> str:
        return f"{100 * (min(max(value, low), high) - low) / (high - low):.2f}"

    return environment.from_string(template).render(
        comparison=comparison,
        experiment=comparison.experiment,
        plan=comparison.plan,
        rows=comparison.rows,
        ceiling=comparison.ceiling,
        sentence=comparison.sentence(),
        address=address,
        warned=warned,
        place=place,
        ticks=[(place(tick), f"{tick:g}".replace("-", "−")) for tick in _ticks(low, high)],
        dots=[_dots(row, place) for row in comparison.rows],
        worst=_worst(comparison),
        finite=math.isfinite,
        version=upweight.__version__,
    )


def _ends(comparison: Comparison) -> tuple[float, float]:
    """The scale that all marks of the page share."""
    values = np.concatenate([[*row.lds.per_query, row.lds.low, row.lds.high] for row in comparison.rows])
    values = np.append(
        values[np.isfinite(values)], [0.0, comparison.ceiling.value if comparison.ceiling else 0.0]
    )
    low, high = float(values.min()), float(values.max())
    margin = 0.03 * (high - low) or 0.1
    return max(-1.05, low - margin), min(1.05, high + margin)


def _ticks(low: float, high: float) -> list[float]:
    step = 0.25 if high - low > 0.8 else 0.1 if high - low > 0.3 else 0.05
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _dots(row: Compared, place: Any) -> list[tuple[str, str]]:
    """Where a query's mark stands, across and down, in percent; the same query at the same height in every row."""
    heights = np.random.default_rng(0).uniform(12, 88, len(row.lds.per_query))
    return [
        (place(value), f"{height:.1f}")
        for value, height in zip(row.lds.per_query, heights)
        if math.isfinite(value)
    ]


def _worst(comparison: Comparison) -> list[dict[str, object]]:
    """The queries that the best row explains worst."""
    row, query = comparison.rows[0], comparison.experiment.query
    order = np.argsort(np.nan_to_num(row.lds.per_query, nan=-2.0), kind="stable")[:QUERIES_SHOWN].tolist()
    words = comparison.experiment.describe(query, order)
    return [
        {"id": query.ids[position], "words": text, "lds": float(row.lds.per_query[position])}
        for position, text in zip(order, words)
    ]


def _figure(value: float) -> str:
    """Three decimals and a true minus; a dash for what is not defined.

    >>> _figure(-0.1234), _figure(float("nan"))
    ('−0.123', '–')
    """
    return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else "–"


def _percent(value: float) -> str:
    return f"{value:.0%}".replace("-", "−") if math.isfinite(value) else "–"
