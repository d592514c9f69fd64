"""The page's charts as numbers for SVG and CSS: where marks stand, in percent of a common scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["Scale", "histogram", "scatter", "ticks"]

Scale = Callable[[float], str]
"""A value's place on an axis, in percent."""

BINS = 61
"""Bars of a histogram, an odd number: the middle one holds zero."""


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two ends.

    >>> ticks(-0.3, 2.2), ticks(0, 5000, 2)
    ([0.0, 0.5, 1.0, 1.5, 2.0], [0.0, 2000.0, 4000.0])
    """
    if not (math.isfinite(low) and math.isfinite(high)) or not high > low:
        return []
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.10g}") for k in range(first, last + 1)]


def scale(low: float, high: float) -> Scale:
    """Percent of the way from low to high; what lies beyond stands at the end."""
    span = (high - low) or 1.0
    return lambda value: f"{100 * (min(max(value, low), high) - low) / span:.2f}"


def histogram(values: np.ndarray) -> dict[str, Any] | None:
    """Counts of scores in bars on both sides of zero; bars are as high as the logarithm of their count.

    The scale is linear and ends where all but a thousandth of the scores are shown, with the rest in the last bars.

    Args:
        values: Any shape.

    Returns:
        ``{"bars": [(left, height, side, low, high, count), ...], "ticks": [(place, text), ...], "beyond": count}``,
        places and heights in percent; None if all scores are zero.
    """
    flat = np.asarray(values, dtype=np.float64).ravel()
    flat = flat[np.isfinite(flat)]
    sample = flat if len(flat) <= 2_000_000 else flat[:: len(flat) // 1_000_000]
    end = float(np.quantile(np.abs(sample), 0.999)) if len(sample) else 0.0
    end = end or float(np.abs(flat).max(initial=0.0))
    if not end > 0:
        return None
    edges = np.linspace(-end, end, BINS + 1)
    counts, _ = np.histogram(flat.clip(-end, end), edges)
    highest = math.log1p(float(counts.max()))
    place = scale(-end, end)
    bars = [
        (
            place(float(edges[k])),
            f"{100 * math.log1p(float(counts[k])) / highest:.1f}",
            "mid" if k == BINS // 2 else "pro" if k > BINS // 2 else "opp",
            float(edges[k]),
            float(edges[k + 1]),
            int(counts[k]),
        )
        for k in range(BINS)
        if counts[k]
    ]
    return {
        "bars": bars,
        "width": f"{100 / BINS:.3f}",
        "ticks": [(place(tick), _tick(tick)) for tick in ticks(-end, end)],
        "beyond": int((np.abs(flat) > end).sum()),
        "count": len(flat),
    }


def scatter(points: Sequence[Sequence[float]], slope: float | None) -> dict[str, Any] | None:
    """Points in a square of 100 by 100 with one scale for both axes, so that the diagonal is the truth."""
    kept = [(p[0], p[1]) for p in points if len(p) == 2 and all(_number(v) for v in p)]
    extremes = np.abs(np.array(kept, dtype=np.float64)) if kept else np.zeros((0, 2))
    end = 1.05 * float(np.quantile(extremes.max(axis=1), 0.995)) if len(kept) else 0.0
    if not end > 0:
        return None
    shown = [(x, y) for x, y in kept if abs(x) <= end and abs(y) <= end]
    place = scale(-end, end)
    path = "".join(f"M{place(x)} {100 - float(place(y)):.2f}h0" for x, y in shown)
    line = None
    if slope is not None and _number(slope):
        reach = end if abs(slope) <= 1 else end / abs(slope)
        ends = [(-reach, -slope * reach), (reach, slope * reach)]
        line = [(float(place(x)), 100 - float(place(y))) for x, y in ends]
    marks = [(place(tick), f"{100 - float(place(tick)):.2f}", _tick(tick)) for tick in ticks(-end, end, 4)]
    return {"path": path, "line": line, "ticks": marks, "outside": len(kept) - len(shown)}


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "−")
