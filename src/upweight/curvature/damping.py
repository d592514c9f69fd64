"""Damping: what is added to every eigenvalue of the curvature before it is inverted.

Small damping trusts the curvature in directions that the training data hardly determines, where a score can blow up;
large damping tends to plain gradient inner products. ``"auto"`` is a tenth of each layer's mean eigenvalue for
structured curvatures, the rule that most EK-FAC work uses (of a single layer, where they are nearly exact, no less than
the regulariser that its weights betray, see `upweight.curvature.implicit_l2`), and for exact ones the damping whose
steps lower the real objective the most (see `upweight.curvature.auto_damping`); a number is the same absolute damping
for all layers, which makes the result one ``(H + damping I)^-1``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from upweight.errors import UpweightError

AUTO_FRACTION = 0.1
SUSPECT = 64
"""A layer is looked at whose gradients, beside the largest layer's, are below this many times a number's precision."""
_RELATIVE = re.compile(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*(mean|top)\s*")

Spectrum: TypeAlias = "tuple[float, float | None]"
"""A layer's mean and largest eigenvalue."""


def largest(spectra: Mapping[str, Spectrum]) -> Spectrum:
    """Of the layer with the largest mean."""
    return max(spectra.values(), key=lambda found: found[0], default=(0.0, None))


def suspects(spectra: Mapping[str, Spectrum], precision: float) -> list[str]:
    """Layers with so small eigenvalues that their gradients might be only rounding.

    Args:
        spectra: {layer: (mean, largest) eigenvalue}.
        precision: of the numbers that gradients are computed in: the distance from 1 to the next one.
    """
    limit = (SUSPECT * precision) ** 2 * largest(spectra)[0]
    return [name for name, (mean, _) in spectra.items() if 0 < mean < limit]


@dataclass(frozen=True)
class Damping:
    """How to damp each layer: an absolute number, or a fraction of the layer's mean or top eigenvalue.

    Attributes:
        value: the number or the fraction.
        relative: what `value` is a fraction of: ``"mean"`` (or True) or ``"top"``, the layer's mean or largest
            eigenvalue (of the whole matrix for exact curvatures); False for an absolute number.
        layers: exceptions by layer name, each a `Damping`.
        auto: chosen by a criterion where the curvature has one; `value` and `relative` are the rule elsewhere.

    Example:
        >>> Damping.of("auto").resolve("fc1", mean=0.5)
        0.05
        >>> Damping.of({"fc1": 0.3, "*": 1e-3}).resolve("fc2", mean=0.5)
        0.001
        >>> Damping.of("0.01 top").resolve("fc1", mean=0.5, top=20.0)
        0.2
    """

    value: float
    relative: bool | str = False
    layers: tuple[tuple[str, Damping], ...] = ()
    auto: bool = False

    def __post_init__(self) -> None:
        if self.relative not in (False, True, "mean", "top"):
            raise UpweightError(
                f"relative={self.relative!r}, expected 'mean' or 'top' (eigenvalue) -> Damping(0.01, relative='top')"
            )
        if not (isinstance(self.value, (int, float)) and math.isfinite(self.value) and self.value >= 0):
            raise UpweightError(
                f"damping={self.value!r}, expected a finite number >= 0 -> try 'auto' or 1e-3"
            )

    @staticmethod
    def of(damping: DampingLike) -> Damping:
        """Read ``"auto"``, a number, ``"0.1 mean"``, ``"0.01 top"``, ``{layer name: any of these}`` or a `Damping`.

        In a dict, ``"*"`` is for the rest of the layers.
        """
        if isinstance(damping, Damping):
            return damping
        if damping == "auto":
            return Damping(AUTO_FRACTION, relative=True, auto=True)
        if isinstance(damping, str) and (match := _RELATIVE.fullmatch(damping)):
            return Damping(float(match[1]), relative=match[2])
        if isinstance(damping, (int, float)) and not isinstance(damping, bool):
            return Damping(float(damping))
        if isinstance(damping, Mapping):
            rest = Damping.of(damping.get("*", "auto"))
            named = tuple((name, Damping.of(d)) for name, d in damping.items() if name != "*")
            return Damping(rest.value, rest.relative, named, rest.auto)
        raise UpweightError(
            f"damping={damping!r}, expected 'auto', a number, '0.1 mean', '0.01 top' or {{layer: number}} -> try 'auto'"
        )

    def resolve(self, layer: str, mean: float, top: float | None = None, least: float = 0.0) -> float:
        """The damping of one layer with this mean and this largest eigenvalue; an automatic one is at least `least`.

        Raises:
            UpweightError: it is relative to the largest eigenvalue, which is not known.
        """
        for name, damping in self.layers:
            if name == layer:
                return damping.resolve(layer, mean, top, least)
        if not self.relative:
            return float(self.value)
        if self.relative == "top" and top is None:
            raise UpweightError(
                f"damping={self.describe()!r}, but the largest eigenvalue is not known here -> '0.1 mean' or a number"
            )
        scale = top if self.relative == "top" and top is not None else mean
        # A layer without any curvature has no gradient either: any damping gives its zero scores.
        found = self.value * scale if scale > 0 else 1.0
        return max(found, least) if self.auto else found

    def by_layer(
        self, spectra: Mapping[str, Spectrum], rounding: Collection[str] = (), least: float = 0.0
    ) -> dict[str, float]:
        """The damping of every layer, from its mean and its largest eigenvalue.

        Relative to itself, a gradient that is only rounding would count like any other layer's: such a layer is damped
        as the largest one is.

        Args:
            spectra: {layer: (mean, largest) eigenvalue}, the largest None where it is not known.
            rounding: layers whose gradients are only rounding, see `upweight.gradients.rounding`.
            least: what an automatic damping is at least.
        """
        self.check_layers(list(spectra))
        seen = {name: largest(spectra) if name in rounding else found for name, found in spectra.items()}
        return {name: self.resolve(name, mean, top, least) for name, (mean, top) in seen.items()}

    def describe(self) -> float | str:
        """The rule in words, or the number."""
        if not self.relative:
            return self.value
        return f"{self.value:g} x {'top' if self.relative == 'top' else 'mean'} eigenvalue"

    def check_layers(self, known: list[str]) -> None:
        """Raise if an exception names a layer that does not exist."""
        unknown = [name for name, _ in self.layers if name not in known]
        if unknown:
            raise UpweightError(
                f"damping names the layers {unknown}, known are {known[:6]} -> use names from info"
            )


DampingLike: TypeAlias = "float | str | Mapping[str, float | str] | Damping"
