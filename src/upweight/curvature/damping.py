"""Damping: what is added to every eigenvalue of the curvature before it is inverted.

Small damping trusts the curvature in directions that the training data hardly determines, where a score can blow up;
large damping tends to plain gradient inner products. A number is the same absolute damping for all layers, which makes
the result one ``(H + damping I)^-1``. ``"auto"`` is

* for structured curvatures the usual tenth of a layer's mean eigenvalue, ``trace(H_l) / p_l``, and of a Kronecker
  layer no less than a fiftieth of what one training example adds to its trace in the mean, ``trace(H_l) / n``. The
  tenth falls as a layer has more parameters than examples, for it counts directions of which no example says anything;
  with five times as many the fiftieth takes over. (Less would often do with fewer, but float32's rounding shows then.)
  Source: benchmarks/lds/damping_rules.py. Of a single layer, where they are nearly exact, it is also no
  less than the regulariser that its weights betray (see `upweight.curvature.implicit_l2`);
* for exact ones the damping whose steps lower the real objective the most (see `upweight.curvature.auto_damping`); for
  a Fisher of sampled or given labels that of as many directions as its examples can tell
  (`upweight.curvature.fisher_damping`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from upweight.errors import UpweightError

AUTO_FRACTION = 0.02
"""Of an example's mean contribution to a layer's trace. The LDS is flat around it, see benchmarks/RESULTS.md."""
SUSPECT = 64
"""A layer is looked at whose gradients, beside the largest layer's, are below this many times a number's precision."""
_RELATIVE = re.compile(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*(mean|top|example)\s*")
LEAST_FRACTION = 0.1
"""Of the mean eigenvalue, what an automatic damping is at least: with .03, rounding moves float32 scores by 2e-5."""
_UNITS = {"mean": "the mean eigenvalue", "top": "the largest eigenvalue", "example": "an example's share"}


@dataclass(frozen=True)
class Spectrum:
    """What dampings can be relative to, of a layer or of the whole matrix; None where it is not known.

    Attributes:
        mean: eigenvalue.
        top: the largest eigenvalue.
        example: what a training example adds to the trace in the mean, ``trace / n``.
    """

    mean: float
    top: float | None = None
    example: float | None = None


def largest(spectra: Mapping[str, Spectrum]) -> Spectrum:
    """The largest of every kind, over all layers."""

    def of(kind: str) -> float | None:
        return max((v for v in (getattr(s, kind) for s in spectra.values()) if v is not None), default=None)

    return Spectrum(of("mean") or 0.0, of("top"), of("example"))


def suspects(spectra: Mapping[str, Spectrum], precision: float) -> list[str]:
    """Layers with so small eigenvalues that their gradients might be only rounding.

    Args:
        spectra: of every layer.
        precision: of the numbers that gradients are computed in: the distance from 1 to the next one.
    """
    limit = (SUSPECT * precision) ** 2 * largest(spectra).mean
    return [name for name, found in spectra.items() if 0 < found.mean < limit]


@dataclass(frozen=True)
class Damping:
    """How to damp each layer: an absolute number, or a fraction of what the layer's spectrum tells.

    Attributes:
        value: the number or the fraction.
        relative: what `value` is a fraction of: ``"mean"`` (or True) or ``"top"``, the layer's mean or largest
            eigenvalue, or ``"example"``, what one training example adds to the layer's trace in the mean (of the whole
            matrix for exact curvatures); False for an absolute number.
        layers: exceptions by layer name, each a `Damping`.
        auto: chosen by a criterion where the curvature has one; `value` and `relative` are the rule elsewhere.

    Example:
        >>> Damping.of("auto").resolve("fc1", Spectrum(mean=0.5, example=10.0))
        0.2
        >>> Damping.of({"fc1": 0.3, "*": 1e-3}).resolve("fc2", Spectrum(mean=0.5))
        0.001
        >>> Damping.of("0.01 top").resolve("fc1", Spectrum(mean=0.5, top=20.0))
        0.2
    """

    value: float
    relative: bool | str = False
    layers: tuple[tuple[str, Damping], ...] = ()
    auto: bool = False

    def __post_init__(self) -> None:
        if self.relative is True:
            object.__setattr__(self, "relative", "mean")
        if self.relative is not False and self.relative not in _UNITS:
            raise UpweightError(
                f"relative={self.relative!r}, expected 'mean' or 'top' (eigenvalue), or 'example' -> "
                "Damping(0.01, relative='top')"
            )
        if not (isinstance(self.value, (int, float)) and math.isfinite(self.value) and self.value >= 0):
            raise UpweightError(
                f"damping={self.value!r}, expected a finite number >= 0 -> try 'auto' or 1e-3"
            )

    @staticmethod
    def of(damping: DampingLike) -> Damping:
        """Read ``"auto"``, a number, ``"0.1 mean"``, ``"0.01 top"``, ``"1 example"``, ``{layer name: any of these}``.

        In a dict, ``"*"`` is for the rest of the layers.
        """
        if isinstance(damping, Damping):
            return damping
        if damping == "auto":
            return Damping(AUTO_FRACTION, relative="example", auto=True)
        if isinstance(damping, str) and (match := _RELATIVE.fullmatch(damping)):
            return Damping(float(match[1]), relative=match[2])
        if isinstance(damping, (int, float)) and not isinstance(damping, bool):
            return Damping(float(damping))
        if isinstance(damping, Mapping):
            rest = Damping.of(damping.get("*", "auto"))
            named = tuple((name, Damping.of(d)) for name, d in damping.items() if name != "*")
            return Damping(rest.value, rest.relative, named, rest.auto)
        raise UpweightError(
            f"damping={damping!r}, expected 'auto', a number, '0.1 mean', '0.01 top', '1 example' or "
            "{layer: number} -> try 'auto'"
        )

    def instead_of_auto(self, value: float, relative: str) -> Damping:
        """The same with another automatic rule."""
        layers = tuple((name, damping.instead_of_auto(value, relative)) for name, damping in self.layers)
        mine = {"value": value, "relative": relative} if self.auto else {}
        return replace(self, layers=layers, **mine)

    def resolve(self, layer: str, spectrum: Spectrum, least: float = 0.0) -> float:
        """The damping of one layer with this spectrum; an automatic one is at least `least`.

        Raises:
            UpweightError: it is relative to something that is not known.
        """
        for name, damping in self.layers:
            if name == layer:
                return damping.resolve(layer, spectrum, least)
        if not self.relative:
            return float(self.value)
        scale = getattr(spectrum, str(self.relative))
        if scale is None:
            raise UpweightError(
                f"damping={self.describe()!r}, but {_UNITS[str(self.relative)]} is not known here -> '0.1 mean' or a "
                "number"
            )
        # A layer without any curvature has no gradient either: any damping gives its zero scores.
        found = self.value * scale if scale > 0 else 1.0
        return max(found, LEAST_FRACTION * spectrum.mean, least) if self.auto else found

    def by_layer(
        self, spectra: Mapping[str, Spectrum], rounding: Collection[str] = (), least: float = 0.0
    ) -> dict[str, float]:
        """The damping of every layer, from its spectrum.

        Relative to itself, a gradient that is only rounding would count like any other layer's: such a layer is damped
        as the largest one is.

        Args:
            spectra: of every layer.
            rounding: layers whose gradients are only rounding, see `upweight.gradients.rounding`.
            least: what an automatic damping is at least.
        """
        self.check_layers(list(spectra))
        seen = {name: largest(spectra) if name in rounding else found for name, found in spectra.items()}
        return {name: self.resolve(name, found, least) for name, found in seen.items()}

    def describe(self) -> float | str:
        """The rule in words, or the number."""
        if self.auto:
            return "auto"
        if not self.relative:
            return self.value
        return f"{self.value:g} x {_UNITS[str(self.relative)]}"

    def check_layers(self, known: list[str]) -> None:
        """Raise if an exception names a layer that does not exist."""
        unknown = [name for name, _ in self.layers if name not in known]
        if unknown:
            raise UpweightError(
                f"damping names the layers {unknown}, known are {known[:6]} -> use names from info"
            )


DampingLike: TypeAlias = "float | str | Mapping[str, float | str] | Damping"
