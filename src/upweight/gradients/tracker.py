"""Per-example gradients of any objective of a model: traced once, verified against autograd, then fast.

`Tracker` runs two tiny probe batches first. Comparing the two tells where the examples are in every tensor; comparing the
result with plain autograd, one example at a time, tells which parameters the fast path gets right. Whatever it does not
get right goes to the exact fallback, with the reason on record. After that, a batch costs one forward pass and one
backward pass without weight gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from upweight.data import Examples, map_tensors
from upweight.errors import UpweightError
from upweight.gradients.assemble import block_of, find_layers
from upweight.gradients.blocks import Block, Dense
from upweight.gradients.fallback import Scalars, looped, vmapped
from upweight.gradients.gradients import Gradients
from upweight.gradients.layers import Layer, VectorLayer
from upweight.gradients.operations import Layout
from upweight.gradients.select import ParameterFilter, check_model, select_parameters
from upweight.gradients.tap import Tap, Use
from upweight.task import FisherKind, Task


@dataclass(frozen=True)
class Coverage:
    """How much of the trainable model is tracked.

    Attributes:
        parameters: share of the trainable parameters.
        squared_norm: share of the squared norm of the training gradients of the probe examples.
        layers: {layer name: how its gradient is computed}.
    """

    parameters: float
    squared_norm: float
    layers: dict[str, str]


class Tracker:
    """Per-example gradients of a task's objectives with respect to a model's tracked parameters.

    Args:
        model: the trained model. Nothing on it changes, ever.
        task: the task, whose objectives are differentiated.
        examples: training examples; the first two are the probe.
        parameters: which trainable parameters to track: None for all, a regular expression that is searched in the
            name, or a function of the name.
        autocast: dtype to run the forward pass in (torch.autocast), or None.

    Raises:
        UpweightError: the model is in train mode where that matters, the loss is reduced over the batch, the filter
            matches nothing, or something is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        examples: Examples,
        parameters: ParameterFilter = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.task, self.autocast = model, task, autocast
        check_model(model)
        self.parameters = select_parameters(model, parameters)
        self._names = {id(p): name for name, p in self.parameters.items()}
        any_parameter = next(iter(self.parameters.values()))
        self.device = any_parameter.device
        self._model_dtype = any_parameter.dtype
        doubles = any(p.dtype == torch.float64 for p in self.parameters.values())
        self.dtype = torch.float64 if doubles else torch.float32
        self._vectorises = True
        self._trace(examples)

    # Objectives --------------------------------------------------------------------------------------------------

    def train(self, batch: Any, ids: Sequence[Any]) -> Gradients:
        """Gradients of the training losses of a batch, [batch, parameters]."""
        self.task.check_targets(batch, ids, self.output_shape)
        return self._capture(batch, ids, lambda model, b, _: (self.task.train_loss(model, b)[:, None], None))[0]

    def query(self, batch: Any, ids: Sequence[Any]) -> Gradients:
        """Gradients of the oriented measurements of a batch: of +m for a loss, -m where higher is better."""
        sign = self.task.orientation
        self.task.check_targets(batch, ids, self.output_shape)
        return self._capture(batch, ids, lambda model, b, _: (sign * self.task.measure(model, b)[:, None], None))[0]

    def fisher(
        self, batch: Any, ids: Sequence[Any], kind: FisherKind, draws: int, generator: torch.Generator
    ) -> list[Gradients]:
        """One `Gradients` a column s_c, with ``sum_c s_c s_c^T`` each example's Fisher (see `Task.pseudo_losses`)."""
        self.task.check_targets(batch, ids, self.output_shape)

        def scalars(model: nn.Module, b: Any, drawn: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return self.task.pseudo_losses(model, b, kind, draws, generator, drawn)

        return self._capture(batch, ids, scalars, reproducible=kind != "sampled")

    def move(self, batch: Any) -> Any:
        """The batch on the model's device, floating-point values in the model's precision."""
        cast = self._model_dtype in (torch.float32, torch.float64)

        def one(tensor: Tensor) -> Tensor:
            if cast and tensor.is_floating_point():
                return tensor.to(self.device, self._model_dtype)
            return tensor.to(self.device)

        return map_tensors(batch, one)

    # Capture -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Gradients on, the global random state as it was afterwards, autocast if asked for."""
        devices = [self.device] if self.device.type == "cuda" else []
        kind = self.device.type
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices=devices),
            torch.autocast(kind, self.autocast, enabled=self.autocast is not None),
        ):
            yield

    def _watch(self, batch: Any, scalars: Scalars) -> tuple[Tensor, Tensor | None, Tap]:
        with self._quietly(), Tap(self._names) as tap:
            losses, drawn = scalars(self.model, batch, None)
        return losses, drawn, tap

    def _capture(self, batch: Any, ids: Sequence[Any], scalars: Scalars, reproducible: bool = True) -> list[Gradients]:
        batch = self.move(batch)
        losses, drawn, tap = self._watch(batch, scalars)
        check_per_example(losses, len(ids))
        check_finite(losses.detach(), ids, batch)
        layouts = self._layouts(tap.uses)
        fallback = self._fallback_blocks(batch, losses, drawn, scalars, reproducible or drawn is not None)
        out = []
        columns = losses.shape[1]
        for c in range(columns):
            deltas = self._backward(losses[:, c], tap.uses, retain=c + 1 < columns)
            out.append(self._assemble(tap.uses, deltas, layouts, len(ids), fallback[c]))
        return out

    def _backward(self, losses: Tensor, uses: Sequence[Use], retain: bool) -> list[Tensor | None]:
        if not uses:
            return []
        if not losses.requires_grad:
            raise UpweightError(
                "the loss does not depend on any tracked parameter, expected a gradient -> check the parameter filter, "
                "and that the model does not run under torch.no_grad() or detach its output"
            )
        edges = [use.edge for use in uses]
        try:
            deltas = torch.autograd.grad(
                losses, edges, torch.ones_like(losses), retain_graph=retain, allow_unused=True
            )
        except RuntimeError as error:
            if "checkpoint" in str(error).lower():
                raise UpweightError(
                    "the model uses reentrant activation checkpointing, which autograd cannot differentiate to its "
                    "inner layers -> pass use_reentrant=False to torch.utils.checkpoint"
                ) from error
            raise
        for use in uses:
            use.check_unchanged()
        return list(deltas)

    def _assemble(
        self,
        uses: Sequence[Use],
        deltas: Sequence[Tensor | None],
        layouts: Sequence[Layout],
        batch: int,
        fallback: Mapping[str, Tensor],
    ) -> Gradients:
        blocks: dict[str, Block] = {}
        for name, layer in self.layers.items():
            if name in fallback:
                blocks[name] = Dense(fallback[name].to(self.dtype))
                continue
            mine = [
                (use, delta, layout)
                for use, delta, layout in zip(uses, deltas, layouts, strict=True)
                if delta is not None and (use.weight in layer.parameters or use.bias in layer.parameters)
            ]
            blocks[name] = block_of(layer, mine, batch, self.parameters[layer.weight], self.dtype)
        return Gradients(blocks)

    def _fallback_blocks(
        self, batch: Any, losses: Tensor, drawn: Tensor | None, scalars: Scalars, reproducible: bool
    ) -> list[dict[str, Tensor]]:
        """Fallback layers' gradients {name: [batch, numel]}, one dict a column."""
        names = [name for name, layer in self.layers.items() if layer.how.startswith("exact fallback")]
        if not names:
            return [{} for _ in range(losses.shape[1])]
        parameters = {name: self.parameters[name] for name in names}
        grads: dict[str, Tensor] | None = None
        if self._vectorises and reproducible:
            try:
                with self._quietly():
                    grads = vmapped(self.model, parameters, scalars, batch, drawn)
            except Exception:  # noqa: BLE001 - torch.func refuses in many ways; the loop below refuses none
                self._vectorises = False
        if grads is None:
            grads = looped(losses, parameters)
        return [{name: g[c] for name, g in grads.items()} for c in range(losses.shape[1])]

    # Trace -------------------------------------------------------------------------------------------------------

    def _trace(self, examples: Examples) -> None:
        second = 1 % examples.n
        three, two = [0, second, second], [0, second]
        ids = [examples.ids[p] for p in three]
        larger, smaller = self.move(examples.take(three)), self.move(examples.take(two))
        with self._quietly():
            self.output_shape = self.task.output_shape(self.model, larger)
        self.task.check_targets(larger, ids, self.output_shape)

        def scalars(model: nn.Module, batch: Any, _: Tensor | None) -> tuple[Tensor, None]:
            return self.task.train_loss(model, batch)[..., None], None

        losses, _, tap = self._watch(larger, scalars)
        again, _, small = self._watch(smaller, scalars)
        check_per_example(losses, 3)
        check_per_example(again, 2)
        check_finite(losses.detach(), ids, larger)
        check_unreduced(losses.detach(), again.detach())
        oracle = [_autograd(losses[p, 0], self.parameters) for p in (0, 1)]
        self._layout_of, lost = compare_layouts(tap.uses, small.uses)
        self.layers = find_layers(tap.uses, {**tap.strangers, **small.strangers, **lost}, self.parameters)
        self._verify(tap, losses, oracle, larger, scalars)
        self.coverage = self._cover(losses, oracle)

    def _verify(
        self, tap: Tap, losses: Tensor, oracle: Sequence[Mapping[str, Tensor]], batch: Any, scalars: Scalars
    ) -> None:
        """Send every parameter whose fast gradient differs from autograd's to another layout, then to the fallback."""
        deltas = self._backward(losses[:, 0], tap.uses, retain=True)
        wrong = self._wrong_parameters(tap, deltas, oracle)
        if wrong:  # merged axes may keep positions first: try that for the layers concerned
            before = dict(self._layout_of)
            for key, layouts in before.items():
                if key[0] in wrong or key[1] in wrong:
                    self._layout_of[key] = [replace(layout, position_major=True) for layout in layouts]
            still = self._wrong_parameters(tap, deltas, oracle)
            for key in before:  # what this did not mend goes back and to the fallback
                if key[0] in still or key[1] in still:
                    self._layout_of[key] = before[key]
            for name in still:
                self._to_fallback(name, "its fast gradient differs from autograd's")
        if any(layer.how.startswith("exact fallback") for layer in self.layers.values()):
            blocks = self._fallback_blocks(batch, losses, None, scalars, True)[0]
            for name, block in blocks.items():
                for p, grads in enumerate(oracle):
                    if not _close(block[p], grads[name].reshape(-1)):
                        self._vectorises = False

    def _wrong_parameters(
        self, tap: Tap, deltas: Sequence[Tensor | None], oracle: Sequence[Mapping[str, Tensor]]
    ) -> set[str]:
        layouts = self._layouts(tap.uses)
        wrong: set[str] = set()
        for layer in self.layers.values():
            if layer.how.startswith("exact fallback"):
                continue
            mine = [
                (use, delta, layout)
                for use, delta, layout in zip(tap.uses, deltas, layouts, strict=True)
                if delta is not None and (use.weight in layer.parameters or use.bias in layer.parameters)
            ]
            try:
                block = block_of(layer, mine, 3, self.parameters[layer.weight], self.dtype)
                flat = layer.to_parameters(block.dense())
            except (ValueError, RuntimeError):
                wrong.update(layer.parameters)
                continue
            for name, grads in flat.items():
                if not all(_close(grads[p], oracle[p][name]) for p in (0, 1)):
                    wrong.update(layer.parameters)
        return wrong

    def _to_fallback(self, name: str, reason: str) -> None:
        layers: dict[str, Layer] = {}
        for key, layer in self.layers.items():
            if name not in layer.parameters:
                layers[key] = layer
                continue
            for parameter in layer.parameters:
                shape = tuple(self.parameters[parameter].shape)
                layers[parameter] = VectorLayer(parameter, parameter, shape, f"exact fallback: {reason}")
        self.layers = layers

    def _layouts(self, uses: Sequence[Use]) -> list[Layout]:
        seen: dict[Any, int] = {}
        out = []
        for use in uses:
            known = self._layout_of.get(use.key)
            if known is None:
                # A use that training never had (a query measurement of another kind): it was not verified.
                raise UpweightError(
                    f"{use.weight or use.bias} is used here in a way that the probe batch did not show (control flow "
                    "that depends on the data, or a measurement that calls the model differently) -> leave the "
                    "parameter out with parameters=, or let the measurement call the model as the loss does"
                )
            nth = seen.get(use.key, 0)
            seen[use.key] = nth + 1
            out.append(known[0] if len(set(known)) == 1 else known[min(nth, len(known) - 1)])
        return out

    def _cover(self, losses: Tensor, oracle: Sequence[Mapping[str, Tensor]]) -> Coverage:
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        total = sum(p.numel() for p in trainable.values())
        tracked = sum(p.numel() for p in self.parameters.values())
        rest = {n: p for n, p in trainable.items() if id(p) not in self._names}
        inside = sum(float(g.double().square().sum()) for grads in oracle for g in grads.values())
        outside = 0.0
        if rest:
            for p in (0, 1):
                outside += sum(float(g.double().square().sum()) for g in _autograd(losses[p, 0], rest).values())
        share = inside / (inside + outside) if inside + outside > 0 else 1.0
        return Coverage(tracked / total, share, {name: layer.how for name, layer in self.layers.items()})


def compare_layouts(
    larger: Sequence[Use], smaller: Sequence[Use]
) -> tuple[dict[Any, list[Layout]], dict[str, str]]:
    """Where the examples are in each use's output, from a batch of three and one of two; and what has no such axis."""
    lost: dict[str, str] = {}
    layouts: dict[Any, list[Layout]] = {}
    if [use.key for use in larger] != [use.key for use in smaller]:
        everyone = {name for use in (*larger, *smaller) for name in (use.weight, use.bias) if name}
        for use in (*larger, *smaller):
            layouts.setdefault(use.key, []).append(Layout(0))
        return layouts, dict.fromkeys(everyone, "a forward pass that changes with the batch size")
    for one, other in zip(larger, smaller, strict=True):
        moved = [axis for axis, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b]
        if len(moved) == 1 and one.shape[moved[0]] * 2 == other.shape[moved[0]] * 3:
            layouts.setdefault(one.key, []).append(Layout(moved[0]))
            continue
        layouts.setdefault(one.key, []).append(Layout(0))
        for name in (one.weight, one.bias):
            if name:
                lost[name] = "an operation whose output has no axis of examples"
    return layouts, lost


def check_per_example(losses: Tensor, batch: int) -> None:
    """Raise unless there is one number per example: scalars [batch, columns]."""
    if losses.ndim == 2 and losses.shape[0] == batch:
        return
    shape = tuple(losses.shape[:-1])
    seen = "a single number" if shape == () else f"shape {shape}"
    raise UpweightError(
        f"the loss of {batch} examples is {seen}, expected one number per example, shape ({batch},): it looks averaged or "
        "summed over the batch -> use reduction='none' (and sum each example's own tokens or outputs)"
    )


def check_unreduced(losses: Tensor, again: Tensor) -> None:
    """Raise if repeating one example changed the others' losses: they were averaged, or the examples are coupled."""
    larger, smaller = losses[:2, 0].double(), again[:, 0].double()
    tolerance = 5e-2 if losses.dtype in (torch.bfloat16, torch.float16) else 1e-3
    scale = max(float(larger.abs().max()), float(smaller.abs().max()), 1e-6)
    if float((larger - smaller).abs().max()) > tolerance * scale:
        raise UpweightError(
            f"repeating one example in the batch changed the losses from {smaller.tolist()} to {larger.tolist()}: the loss "
            "is averaged over the batch, the examples see each other, or the forward pass is random -> return "
            "reduction='none' losses that depend on their own example only"
        )


def check_finite(losses: Tensor, ids: Sequence[Any], batch: Any) -> None:
    """Raise with the id of the first example whose loss is not finite, and say whether its input is."""
    bad = ~torch.isfinite(losses).all(1)
    if not bad.any():
        return
    position = int(bad.nonzero()[0, 0])
    from upweight.data import tensors_in

    broken = any(t.is_floating_point() and not torch.isfinite(t[position]).all() for t in tensors_in(batch))
    where = "its input holds NaN or infinity" if broken else "its input is finite, so the model or the loss overflows"
    raise UpweightError(
        f"the loss of example {ids[position]} is {float(losses[position, 0])}: {where} ({int(bad.sum())} such in this "
        "batch) -> clean or drop the example"
    )


def _autograd(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    pairs = zip(parameters.items(), grads, strict=True)
    return {name: torch.zeros_like(p) if g is None else g.detach() for (name, p), g in pairs}


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding: a wrong layout or a lost use is off by far more."""
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(other.dtype, 5e-2)
    difference = (one.double() - other.double()).norm()
    return bool(difference <= tolerance * other.double().norm() + 1e-30)


