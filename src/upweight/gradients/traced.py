"""What tracing a model found: its layers, where the examples are in each use's output, and what needs the fallback.

With it, the uses of a forward pass and their output gradients become per-example gradients. Every mistake ends in the
exact fallback: a parameter whose fast gradient differs from autograd's, or whose layout depends on the data, is sent
there with the reason on record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from upweight.errors import UpweightError
from upweight.gradients.assemble import block_of, find_layers
from upweight.gradients.blocks import Block, Dense
from upweight.gradients.checks import Agreement
from upweight.gradients.gradients import Gradients
from upweight.gradients.layers import Layer, VectorLayer
from upweight.gradients.operations import Layout
from upweight.gradients.probe import compare_layouts
from upweight.gradients.rowwise import weighted_sum_of
from upweight.gradients.tap import Tap, Use

Pattern: TypeAlias = "tuple[tuple[Any, float], ...]"
"""Each use's call site, and how many rows of its output belong to one example."""


class Traced:
    """Layers and layouts of a model, from a forward pass of three examples and one of two.

    Args:
        larger, smaller: what was recorded in the two passes.
        parameters: the tracked parameters.
        dtype: precision of the gradients.

    Attributes:
        layers: {layer name: layer}, in the order of the model's parameters.
        lost: {parameter: why its uses have no axis of examples}.
    """

    def __init__(
        self, larger: Tap, smaller: Tap, parameters: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        self.parameters, self.dtype = parameters, dtype
        self._layout_of, self.lost = compare_layouts(larger.uses, smaller.uses)
        strangers = {**larger.strangers, **smaller.strangers, **self.lost}
        self.layers: dict[str, Layer] = find_layers(larger.uses, strangers, parameters)

    # Gradients ---------------------------------------------------------------------------------------------------

    def layouts(self, uses: Sequence[Use]) -> list[Layout]:
        """Where the examples are in each use's output; raise for a use that tracing did not see."""
        seen: dict[Any, int] = {}
        out = []
        for use in uses:
            known = self._layout_of.get(use.key)
            if known is None and {use.weight, use.bias} <= {None, *self._of_fallback()}:
                known = [Layout(0)]  # never looked at
            if known is None:
                raise _unseen(use.name)
            nth = seen.get(use.key, 0)
            seen[use.key] = nth + 1
            out.append(known[0] if len(set(known)) == 1 else known[min(nth, len(known) - 1)])
        return out

    def pattern(self, uses: Sequence[Use], layouts: Sequence[Layout], batch: int) -> Pattern:
        """How a pass uses the layers that are not of the fallback: in a new pattern, gradients are to be verified."""
        exact = {None, *self._of_fallback()}
        pairs = zip(uses, layouts, strict=True)
        return tuple(
            (use.key, use.shape[layout.dim] / batch)
            for use, layout in pairs
            if not {use.weight, use.bias} <= exact
        )

    def assemble(
        self,
        uses: Sequence[Use],
        deltas: Sequence[Tensor | None],
        layouts: Sequence[Layout],
        batch: int,
        fallback: Mapping[str, Tensor],
    ) -> Gradients:
        """Per-example gradients from output gradients, and from those of the fallback layers {name: [batch, numel]}."""
        blocks: dict[str, Block] = {}
        for name, layer in self.layers.items():
            if name in fallback:
                blocks[name] = Dense(fallback[name].to(self.dtype))
            else:
                blocks[name] = self._block(layer, uses, deltas, layouts, batch)
        return Gradients(blocks)

    def _block(
        self,
        layer: Layer,
        uses: Sequence[Use],
        deltas: Sequence[Tensor | None],
        layouts: Sequence[Layout],
        batch: int,
    ) -> Block:
        mine = [
            (use, delta, layout)
            for use, delta, layout in zip(uses, deltas, layouts, strict=True)
            if delta is not None and (use.weight in layer.parameters or use.bias in layer.parameters)
        ]
        return block_of(layer, mine, batch, self.parameters[layer.weight], self.dtype)

    # Verification ------------------------------------------------------------------------------------------------

    def verify(
        self,
        uses: Sequence[Use],
        deltas: Sequence[Tensor | None],
        oracle: Sequence[tuple[Tensor, Agreement]],
        batch: int,
    ) -> None:
        """Send every parameter whose fast gradient differs from autograd's to another layout, then to the fallback.

        Args:
            uses: of one forward pass.
            deltas: their output gradients.
            oracle: weights [batch], and autograd's gradients of the losses summed with them.
            batch: examples in it.
        """
        for name in self.mend(uses, deltas, oracle, batch):
            self._to_fallback(name, "its fast gradient differs from autograd's")

    def mend(
        self,
        uses: Sequence[Use],
        deltas: Sequence[Tensor | None],
        oracle: Sequence[tuple[Tensor, Agreement]],
        batch: int,
        slack: float = 1.0,
    ) -> set[str]:
        """Give parameters whose fast gradient differs from autograd's another layout; return those it does not mend."""
        wrong = self._wrong(uses, deltas, oracle, batch, slack)
        if not wrong:
            return wrong
        # Merged axes may keep positions first: try that for the layers concerned.
        before = dict(self._layout_of)
        for key, layouts in before.items():
            if key[0] in wrong or key[1] in wrong:
                self._layout_of[key] = [replace(layout, position_major=True) for layout in layouts]
        still = self._wrong(uses, deltas, oracle, batch, slack)
        for key in before:
            if key[0] in still or key[1] in still:
                self._layout_of[key] = before[key]
        return still

    def verify_again(
        self,
        tap: Tap,
        deltas: Sequence[Tensor | None],
        oracle: Sequence[tuple[Tensor, Agreement]],
        batch: int,
    ) -> None:
        """The same on other examples, which may take other ways through the model, for the uses that are `known`."""
        new = [use for use in tap.uses if use.key not in self._layout_of]
        uses = self.known(tap.uses)
        for use in new:  # of parameters that go to the fallback, which needs no layout
            self._layout_of[use.key] = [Layout(0)]
        wrong = self._wrong(uses, deltas, oracle, batch, slack=10)
        wrong.update(tap.strangers, (n for use in new for n in (use.weight, use.bias) if n is not None))
        for name in wrong:
            self._to_fallback(name, "which examples a use holds depends on the data")

    def known(self, uses: Sequence[Use]) -> list[Use]:
        """Those of which tracing has a layout."""
        return [use for use in uses if use.key in self._layout_of]

    def _wrong(
        self,
        uses: Sequence[Use],
        deltas: Sequence[Tensor | None],
        oracle: Sequence[tuple[Tensor, Agreement]],
        batch: int,
        slack: float = 1.0,
    ) -> set[str]:
        """Parameters whose fast gradients, summed with an oracle's weights, differ from autograd's."""
        layouts = self.layouts(uses)
        weights = torch.stack([weights for weights, _ in oracle])
        wrong: set[str] = set()
        for layer in self.layers.values():
            if _is_fallback(layer):
                continue
            try:
                block = self._block(layer, uses, deltas, layouts, batch)
                flat = layer.to_parameters(weighted_sum_of(block, weights))
            except (ValueError, RuntimeError):
                wrong.update(layer.parameters)
                continue
            for name, grads in flat.items():
                pairs = zip(grads, oracle, strict=True)
                if not all(agreement.holds(name, grad, slack) for grad, (_, agreement) in pairs):
                    wrong.update(layer.parameters)
        return wrong

    # Fallback ----------------------------------------------------------------------------------------------------

    def fallback_layers(self) -> list[str]:
        """Layers whose gradients the exact fallback computes; each is one parameter."""
        return [name for name, layer in self.layers.items() if _is_fallback(layer)]

    def check_known(self, strangers: Mapping[str, str]) -> None:
        """Raise if a parameter took part in an operation that only the fallback could differentiate."""
        fallback = self._of_fallback()
        for name in strangers:
            if name not in fallback:
                raise _unseen(name)

    def _of_fallback(self) -> set[str]:
        return {p for layer in self.layers.values() if _is_fallback(layer) for p in layer.parameters}

    def _to_fallback(self, name: str, reason: str) -> None:
        layers: dict[str, Layer] = {}
        for key, layer in self.layers.items():
            if name not in layer.parameters or _is_fallback(layer):
                layers[key] = layer
                continue
            for parameter in layer.parameters:
                shape = tuple(self.parameters[parameter].shape)
                layers[parameter] = VectorLayer(parameter, parameter, shape, f"exact fallback: {reason}")
        self.layers = layers


def _is_fallback(layer: Layer) -> bool:
    """Whether a layer's gradients are the exact fallback's."""
    return layer.how.startswith("exact fallback")


def _unseen(name: str) -> UpweightError:
    return UpweightError(
        f"{name} is used here in a way that the probe batch did not show (control flow that depends on the data, or a "
        "measurement that calls the model differently) -> leave the parameter out with parameters=, or let the "
        "measurement call the model as the loss does"
    )
