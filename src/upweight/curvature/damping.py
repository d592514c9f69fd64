"""Damping: what is added to every eigenvalue of the curvature before it is inverted.

Small damping trusts the curvature in directions that the training data hardly determines, where a score can blow up;
large damping tends to plain gradient inner products. ``"auto"`` is a tenth of each layer's mean eigenvalue, the rule
that most EK-FAC work uses; a number is the same absolute damping for all layers, which makes the result one ``(H +
damping I)^-1``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from upweight.errors import UpweightError

AUTO_FRACTION = 0.1


@dataclass(frozen=True)
class Damping:
    """How to damp each layer: an absolute number, or a fraction of the layer's mean eigenvalue.

    Attributes:
        value: the number or the fraction.
        relative: whether `value` is a fraction of the layer's mean eigenvalue.
        layers: exceptions by layer name, each a `Damping`.

    Example:
        >>> Damping.of("auto").resolve("fc1", mean=0.5)
        0.05
        >>> Damping.of({"fc1": 0.3, "*": 1e-3}).resolve("fc2", mean=0.5)
        0.001
    """

    value: float
    relative: bool = False
    layers: tuple[tuple[str, Damping], ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.value, (int, float)) and math.isfinite(self.value) and self.value >= 0):
            raise UpweightError(
                f"damping={self.value!r}, expected a finite number >= 0 -> try 'auto' or 1e-3"
            )

    @staticmethod
    def of(damping: DampingLike) -> Damping:
        """Read ``"auto"``, a number, ``{layer name: any of these}`` (``"*"`` for the rest), or a `Damping`."""
        if isinstance(damping, Damping):
            return damping
        if damping == "auto":
            return Damping(AUTO_FRACTION, relative=True)
        if isinstance(damping, (int, float)) and not isinstance(damping, bool):
            return Damping(float(damping))
        if isinstance(damping, Mapping):
            rest = Damping.of(damping.get("*", "auto"))
            named = tuple((name, Damping.of(d)) for name, d in damping.items() if name != "*")
            return Damping(rest.value, rest.relative, named)
        raise UpweightError(
            f"damping={damping!r}, expected 'auto', a number or {{layer: number}} -> try 'auto'"
        )

    def resolve(self, layer: str, mean: float) -> float:
        """The damping of one layer with this mean eigenvalue."""
        for name, damping in self.layers:
            if name == layer:
                return damping.resolve(layer, mean)
        if not self.relative:
            return float(self.value)
        # A layer without any curvature has no gradient either: any damping gives its zero scores.
        return self.value * mean if mean > 0 else 1.0

    def check_layers(self, known: list[str]) -> None:
        """Raise if an exception names a layer that does not exist."""
        unknown = [name for name, _ in self.layers if name not in known]
        if unknown:
            raise UpweightError(
                f"damping names the layers {unknown}, known are {known[:6]} -> use names from info"
            )


DampingLike: TypeAlias = "float | str | Mapping[str, float | str] | Damping"
