"""A fitted curvature, layer by layer, and its damped inverse: ``curvature.inverse(damping) @ gradients``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from upweight.curvature.damping import LEAST_FRACTION, Damping, Spectrum
from upweight.curvature.operators import Diagonal, Full, Identity, Kronecker, LayerCurvature
from upweight.errors import UpweightError
from upweight.gradients.blocks import Eigenbasis
from upweight.gradients.gradients import Gradients


@dataclass(frozen=True)
class Curvature:
    """Block-diagonal curvature of the mean training loss.

    Attributes:
        kind: ``"identity"``, ``"diagonal"``, ``"kfac"`` or ``"ekfac"``.
        layers: {layer name: its curvature}, with raw eigenvalues.
        info: how each layer is represented, and of how many training examples it is.
    """

    kind: str
    layers: Mapping[str, LayerCurvature]
    info: dict[str, Any] = field(default_factory=dict)

    def damping(self, damping: Damping) -> dict[str, float]:
        """The damping of every layer, from its raw eigenvalues. Only Kronecker layers count examples."""
        rounding, least = self.info.get("without_effect", ()), self.info.get("implicit_l2", 0.0)
        spectra, plain = self.spectra(), damping.instead_of_auto(LEAST_FRACTION, "mean")
        counting, others = (rule.by_layer(spectra, rounding, least) for rule in (damping, plain))
        return {
            name: (counting if isinstance(layer, Kronecker) else others)[name]
            for name, layer in self.layers.items()
        }

    def spectra(self) -> dict[str, Spectrum]:
        """The raw spectrum of every layer."""
        values = {name: layer.eigenvalues for name, layer in self.layers.items()}
        n = self.info.get("examples")
        return {
            name: Spectrum(float(v.mean()), float(v.max()), float(v.mean()) * v.numel() / n if n else None)
            for name, v in values.items()
        }

    def inverse(self, damping: Damping) -> Inverse:
        """``(H + damping I)^-1`` as an operator on `Gradients`. Costs nothing: the eigenvalues are kept raw."""
        return Inverse(self, self.damping(damping))

    def state(self) -> dict[str, Tensor]:
        """All tensors by name, for a file; `from_state` is its inverse."""
        out: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            if isinstance(layer, Kronecker):
                out[f"{name}|rows"], out[f"{name}|cols"] = layer.basis.rows, layer.basis.cols
                out[f"{name}|kronecker"] = layer.values
            elif isinstance(layer, Full):
                out[f"{name}|full"], out[f"{name}|vectors"] = layer.values, layer.vectors
            elif isinstance(layer, Diagonal):
                out[f"{name}|diagonal"] = layer.values
        return out

    @staticmethod
    def from_state(
        kind: str, names: list[str], state: Mapping[str, Tensor], info: dict[str, Any]
    ) -> Curvature:
        """The curvature that `state` came from."""
        layers: dict[str, LayerCurvature] = {}
        for name in names:
            if f"{name}|kronecker" in state:
                basis = Eigenbasis(state[f"{name}|rows"], state[f"{name}|cols"])
                layers[name] = Kronecker(basis, state[f"{name}|kronecker"])
            elif f"{name}|full" in state:
                layers[name] = Full(state[f"{name}|full"], state[f"{name}|vectors"])
            elif f"{name}|diagonal" in state:
                layers[name] = Diagonal(state[f"{name}|diagonal"])
            else:
                layers[name] = Identity()
        return Curvature(kind, layers, info)


@dataclass(frozen=True)
class Inverse:
    """``(H + damping I)^-1`` with one damping per layer."""

    curvature: Curvature
    damping: Mapping[str, float]

    def __matmul__(self, gradients: Gradients) -> Gradients:
        """Preconditioned gradients."""
        self._check(gradients)
        layers = self.curvature.layers
        blocks = {
            name: layers[name].precondition(block, self.damping[name]) for name, block in gradients.items()
        }
        return Gradients(blocks, gradients.router)

    def quadratic(self, gradients: Gradients) -> dict[str, Tensor]:
        """``g^T (H + damping I)^-1 g`` of every example, [batch], by layer."""
        self._check(gradients)
        layers = self.curvature.layers
        return {name: layers[name].quadratic(block, self.damping[name]) for name, block in gradients.items()}

    def _check(self, gradients: Gradients) -> None:
        if set(gradients) != set(self.curvature.layers):
            raise UpweightError(
                "the gradients and the curvature have different layers -> fit on the same model"
            )
