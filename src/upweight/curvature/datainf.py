"""DataInf: the mean of the examples' own damped inverses in place of the inverse of their mean, layer by layer.

    (H_l + lambda_l I)^-1 v  ~  (1/n) sum_i (g_i g_i^T + lambda_l I)^-1 v
                             =  (1/(n lambda_l)) sum_i [ v - g_i (g_i^T v) / (lambda_l + |g_i|^2) ]

Closed form, no factor, no solver. The mean of inverses dominates the inverse of the mean, so magnitudes are too large
and scores only rank; it is exact for a single example. "DataInf: Efficiently Estimating Data Influence in LoRA-tuned
LLMs and Diffusion Models" (arXiv 2310.00902), equation 5, with its ``lambda_l = 0.1 mean_i |g_i|^2 / p_l``, which is a
tenth of the layer's mean eigenvalue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upweight.curvature.columns import combined
from upweight.curvature.damping import LEAST_FRACTION, Damping, Spectrum
from upweight.errors import UpweightError
from upweight.gradients import Gradients
from upweight.gradients.blocks import Dense
from upweight.gradients.layers import Layer
from upweight.gradients.norms import layer_squared_norms
from upweight.passes import Kept, Pass

if TYPE_CHECKING:
    from upweight.gradients.gradients import Transposed


@dataclass
class DataInfCurvature:
    """The training gradients by their squared norms, layer by layer; the gradients themselves are read again.

    Attributes:
        training: passes over the training gradients.
        layers: the tracked layers.
        norms: {layer: ``|g_i|^2`` [n]}, float64.
        info: what is represented how.
    """

    training: Pass[Gradients]
    layers: Mapping[str, Layer]
    norms: Mapping[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def fit(training: Pass[Gradients], layers: Mapping[str, Layer]) -> DataInfCurvature:
        """One pass over the training gradients."""
        norms: dict[str, list[Tensor]] = {name: [] for name in layers}
        for step in training:
            for name, block in step.load().items():
                norms[name].append(layer_squared_norms(block))
        represented = {"represented": dict.fromkeys(layers, "mean of per-example inverses")}
        return DataInfCurvature(training, layers, {k: torch.cat(v) for k, v in norms.items()}, represented)

    @property
    def n(self) -> int:
        """Training examples."""
        return len(next(iter(self.norms.values())))

    def damping(self, damping: Damping) -> dict[str, float]:
        """The damping of every layer; an automatic one is the paper's."""
        damping = damping.instead_of_auto(LEAST_FRACTION, "mean")
        return damping.by_layer(self.spectra(), self.info.get("without_effect", ()))

    def spectra(self) -> dict[str, Spectrum]:
        """Of every layer: its mean eigenvalue is ``mean_i |g_i|^2 / p_l``."""
        means = {name: float(norms.mean()) for name, norms in self.norms.items()}
        return {
            name: Spectrum(means[name] / layer.numel, example=means[name] / self.n)
            for name, layer in self.layers.items()
        }

    def inverse(self, damping: Damping) -> DataInfInverse:
        """The mean of the examples' damped inverses. Another damping costs nothing."""
        numbers = self.damping(damping)
        for name, number in numbers.items():
            if not number > 0:
                raise UpweightError(
                    f"damping={number:g} of layer {name}, expected a positive number: one example's g g^T is singular "
                    "-> 'auto' or 1e-3 for example"
                )
        return DataInfInverse(self, numbers)


@dataclass(frozen=True)
class DataInfInverse:
    """``(1/n) sum_i (g_i g_i^T + lambda_l I)^-1`` of every layer."""

    curvature: DataInfCurvature
    damping: Mapping[str, float]

    def __matmul__(self, queries: Gradients) -> DataInfQueries | Gradients:
        """Preconditioned queries, by one pass over the training gradients for ``v^T g_i``, and maybe another one.

        While the training gradients are in memory and few, the second sum is left to the products with them;
        else it is carried out here, and the queries become as large as the parameters.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in queries}
        for step in self.curvature.training:
            for name, part in queries.by_layer(step.load().T).items():
                parts[name].append(part)
        weights = {name: torch.cat(part, 1) * self._shares(name) for name, part in parts.items()}
        if self._by_products(queries):
            return DataInfQueries(queries, weights, self)
        return self._carried_out(queries, weights)

    def quadratic(self, gradients: Gradients) -> dict[str, Tensor]:
        """``g^T (H_l + lambda_l I)^-1 g`` of every example, [batch], by layer."""
        explained = {name: torch.zeros(gradients.batch, dtype=torch.float64) for name in gradients}
        for step in self.curvature.training:
            for name, products in gradients.by_layer(step.load().T).items():
                share = self._shares(name)[step.start : step.stop]
                explained[name] = explained[name].to(share.device) + products.double().square() @ share
        out = {}
        for name, block in gradients.items():
            norms = layer_squared_norms(block)
            out[name] = ((norms - explained[name]) / self.damping[name]).to(gradients.dtype)
        return out

    def _shares(self, name: str) -> Tensor:
        """``1 / (n (lambda_l + |g_i|^2))`` of every training example [n]."""
        return 1 / (self.curvature.n * (self.damping[name] + self.curvature.norms[name]))

    def _by_products(self, queries: Gradients) -> bool:
        training = self.curvature.training
        if isinstance(training, Kept) and training.share_in_memory < 1:
            return False
        parameters = sum(layer.numel for layer in self.curvature.layers.values())
        factors = max(1, queries.nbytes // (queries.batch * torch.finfo(queries.dtype).bits // 8))
        return self.curvature.n * factors <= queries.batch * parameters

    def _carried_out(self, queries: Gradients, weights: Mapping[str, Tensor]) -> Gradients:
        sums = {name: block.dense().double() for name, block in queries.items()}
        for step in self.curvature.training:
            for name, block in step.load().items():
                sums[name] = sums[name] - combined(block, weights[name][:, step.start : step.stop])
        blocks = {name: Dense((total / self.damping[name]).to(queries.dtype)) for name, total in sums.items()}
        return Gradients(blocks, queries.router)


@dataclass(frozen=True)
class DataInfQueries:
    """``(1/lambda_l) [v - sum_i w_i g_i]`` of some queries, kept as v and ``w_i = v^T g_i / (n (lambda_l + |g_i|^2))``.

    Attributes:
        gradients: v, the query gradients.
        weights: {layer: w [query, n]}, float64.
        inverse: what made them.
    """

    gradients: Gradients
    weights: Mapping[str, Tensor]
    inverse: DataInfInverse

    def __matmul__(self, train: Transposed) -> Tensor:
        """Inner products [query, train]."""
        return torch.stack(list(self.by_layer(train).values())).sum(0)

    def by_layer(self, train: Transposed) -> dict[str, Tensor]:
        """Inner products [query, train] of each layer: one pass over the training gradients."""
        totals = {name: part.double() for name, part in self.gradients.by_layer(train).items()}
        for step in self.inverse.curvature.training:
            for name, gram in step.load().by_layer(train).items():
                share = self.weights[name][:, step.start : step.stop]
                totals[name] = totals[name] - share @ gram.double()
        dtype, damping = self.gradients.dtype, self.inverse.damping
        return {name: (total / damping[name]).to(dtype) for name, total in totals.items()}
