"""Per-example gradients of any objective of a model: traced once, verified against autograd, then fast.

`Tracker` runs a few tiny probe batches first. Comparing two of them tells where the examples are in every tensor;
comparing the result with plain autograd, one example at a time, tells which parameters the fast path gets right.
Whatever it does not get right goes to the exact fallback, with the reason on record. An example's loss that depends on
the rest of its batch, or on chance, is refused. After that, a batch costs one forward and one backward pass without
weight gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from upweight._random import preserved, reseed
from upweight.data import Examples, map_tensors, signature
from upweight.errors import UpweightError
from upweight.gradients.checks import (
    Agreement,
    autograd,
    check_alone,
    check_factors,
    check_finite,
    check_per_example,
    check_uncoupled,
    check_undivided,
    constant_buffers,
    explained,
    is_finite,
    refuse_factors,
    refuse_reentrant,
)
from upweight.gradients.fallback import Scalars, looped, vmapped
from upweight.gradients.gradients import Gradients
from upweight.gradients.layers import Layer
from upweight.gradients.operations import Layout
from upweight.gradients.probe import measure_coverage, pick_others, pick_probe
from upweight.gradients.select import ParameterFilter, check_model, check_still_tracked, select_parameters
from upweight.gradients.tap import Tap, Use
from upweight.gradients.traced import Pattern, Traced
from upweight.task import FisherKind, Task


class Tracker:
    """Per-example gradients of a task's objectives with respect to a model's tracked parameters.

    Args:
        model: the trained model. Nothing on it changes, ever.
        task: the task, whose objectives are differentiated.
        examples: training examples; two of the first sixteen are the probe.
        parameters: which trainable parameters to track: None for all, a regular expression that is searched in the
            name, or a function of the name.
        autocast: dtype to run the forward pass in (torch.autocast), or None.

    Attributes:
        padded: whether an example's form depends on its batch: it is padded to the longest.

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
        self.computes = autocast or self._model_dtype
        self._agreement = lambda oracle: Agreement(oracle, self.computes)
        self._vectorises = True
        self._spread: frozenset[str] | None = None
        self._verified: set[tuple[str, Pattern]] = set()
        self.padded = False
        with constant_buffers(model):
            self._trace(examples)

    @property
    def layers(self) -> dict[str, Layer]:
        """{layer name: layer}, in the order of the model's parameters."""
        return self._traced.layers

    # Objectives --------------------------------------------------------------------------------------------------

    def train(self, batch: Any, ids: Sequence[Any]) -> Gradients:
        """Gradients of the training losses of a batch, [batch, parameters]."""
        self.task.check_targets(batch, ids, self.output_shape)
        return self._capture(batch, ids, self._losses)[0]

    def query(self, batch: Any, ids: Sequence[Any]) -> Gradients:
        """Gradients of the oriented measurements of a batch: of +m for a loss, -m where higher is better."""
        sign = self.task.orientation
        self.task.check_targets(batch, ids, self.output_shape)

        def scalars(model: nn.Module, b: Any, _: Tensor | None) -> tuple[Tensor, None]:
            return sign * self.task.measure(model, b)[..., None], None

        if not any(what == "measurement" for what, _ in self._verified):
            self._check_alone(batch, ids, scalars)
        return self._capture(batch, ids, scalars, "measurement")[0]

    def fisher(
        self, batch: Any, ids: Sequence[Any], kind: FisherKind, draws: int, generator: torch.Generator
    ) -> list[Gradients]:
        """One `Gradients` a column s_c, with ``sum_c s_c s_c^T`` each example's Fisher (see `Task.pseudo_losses`)."""
        self.task.check_targets(batch, ids, self.output_shape)

        passes = draws if kind == "sampled" and self.task.draws_apart else 1

        def scalars(model: nn.Module, b: Any, drawn: Tensor | None) -> tuple[Tensor, Tensor | None]:
            losses, drawn = self.task.pseudo_losses(model, b, kind, draws // passes, generator, drawn)
            return losses / passes**0.5, drawn

        columns = []
        for _ in range(
            passes
        ):  # a draw that runs the model itself is a pass of its own: it uses no other's inputs
            columns += self._capture(
                batch, ids, scalars, "predictive distribution", reproducible=kind != "sampled"
            )
        return columns

    def _losses(self, model: nn.Module, batch: Any, _: Tensor | None) -> tuple[Tensor, None]:
        return self.task.train_loss(model, batch)[..., None], None

    def move(self, batch: Any) -> Any:
        """The batch on the model's device, floating-point values in the model's precision."""
        cast = self._model_dtype in (torch.float32, torch.float64)

        def one(tensor: Tensor) -> Tensor:
            if tensor.is_inference():
                tensor = tensor.clone()  # autograd may not save tensors that were made in inference mode
            if cast and tensor.is_floating_point():
                return tensor.to(self.device, self._model_dtype)
            return tensor.to(self.device)

        return map_tensors(batch, one)

    # Capture -----------------------------------------------------------------------------------------------------

    @contextmanager
    def quietly(self, seed: int | None = None) -> Iterator[None]:
        """The global random states as they were afterwards, autocast if asked for."""
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            preserved(devices),
            torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
        ):
            if seed is not None:
                reseed(seed)
            yield

    def _watch(
        self, batch: Any, scalars: Scalars, seed: int | None = None
    ) -> tuple[Tensor, Tensor | None, Tap]:
        with self.quietly(seed), Tap(self._names, self._spread) as tap:
            losses, drawn = scalars(self.model, batch, None)
        return losses, drawn, tap

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _capture(
        self, batch: Any, ids: Sequence[Any], scalars: Scalars, what: str = "loss", reproducible: bool = True
    ) -> list[Gradients]:
        check_still_tracked(self.model, self.parameters)
        batch = self.move(batch)
        losses, drawn, tap = self._watch(batch, scalars)
        check_per_example(losses, len(ids))
        check_finite(losses.detach(), ids, batch)
        self._check_dependent(losses)
        self._traced.check_known(tap.strangers)
        layouts = self._traced.layouts(tap.uses)
        pattern = self._traced.pattern(tap.uses, layouts, len(ids))
        verify = (what, pattern) not in self._verified
        fallback = self._fallback_blocks(batch, losses, drawn, scalars, reproducible or drawn is not None)
        out = []
        columns = losses.shape[1]
        for c in range(columns):
            deltas = self._backward(losses[:, c], tap.uses, retain=verify or c + 1 < columns)
            check_factors(tap.uses, deltas, layouts, ids, batch, inputs=c == 0)
            for name, values in fallback[c].items():
                if not is_finite(values):
                    refuse_factors(values, ids, batch, name)
            if verify and c == 0:
                layouts = self._verify(losses[:, 0], tap.uses, deltas, what)
                self._verified.add((what, pattern))
            out.append(self._traced.assemble(tap.uses, deltas, layouts, len(ids), fallback[c]))
        return out

    def _check_dependent(self, losses: Tensor) -> None:
        if not losses.requires_grad:
            raise UpweightError(
                "the loss does not depend on any tracked parameter, expected a gradient -> check the parameter filter, "
                "and that the model does not run under torch.no_grad() or detach its output"
            )

    def _backward(self, losses: Tensor, uses: Sequence[Use], retain: bool) -> list[Tensor | None]:
        if not uses:
            return []
        edges = [use.edge for use in uses]
        with explained():
            # The sum, not grad_outputs of ones: those make torch import its symbolic shapes, for half a second.
            deltas = torch.autograd.grad(losses.sum(), edges, retain_graph=retain, allow_unused=True)
        for use in uses:
            use.check_unchanged()
        return [d if d is None else d.reshape(use.shape) for d, use in zip(deltas, uses, strict=True)]

    def _fallback_blocks(
        self, batch: Any, losses: Tensor, drawn: Tensor | None, scalars: Scalars, reproducible: bool
    ) -> list[dict[str, Tensor]]:
        """Fallback layers' gradients {name: [batch, numel]}, one dict a column."""
        names = self._traced.fallback_layers()
        if not names:
            return [{} for _ in range(losses.shape[1])]
        parameters = {name: self.parameters[name] for name in names}
        grads: dict[str, Tensor] | None = None
        if self._vectorises and reproducible:
            try:
                with self.quietly():
                    grads = vmapped(self.model, parameters, scalars, batch, drawn)
            except Exception:  # torch.func refuses in many ways; the loop below refuses none
                self._vectorises = False
        if grads is None:
            grads = looped(losses, parameters)
        return [{name: g[c] for name, g in grads.items()} for c in range(losses.shape[1])]

    # Trace -------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _trace(self, examples: Examples) -> None:
        with self.quietly():
            (first, second), self.output_shape = pick_probe(
                self.model, self.task, examples, self._names, self.move
            )
        three, two = [first, second, second], [first, second]
        ids = [examples.ids[p] for p in three]
        larger, smaller = self.move(examples.take(three)), self.move(examples.take(two))
        losses, _, tap = self._watch(larger, self._losses)
        # Other random numbers in every pass: a forward pass that uses any must show it.
        again, _, small = self._watch(smaller, self._losses, seed=1)
        check_per_example(losses, 3)
        check_per_example(again, 2)
        pairs = []
        for row, position in enumerate(two):
            alone, _, _ = self._watch(self.move(examples.take([position] * 2)), self._losses, seed=2 + row)
            for other in (losses, again):
                check_alone(alone[0, 0], other[row, 0], ids[row])
            pairs.append((alone[0, 0], losses[row, 0]))
        self._check_dependent(losses)
        refuse_reentrant(losses)
        oracle = [autograd(losses[p, 0], self.parameters) for p in (0, 1)]
        self._traced = Traced(tap, small, self.parameters, self.dtype)
        self._spread = frozenset(use.weight for use in tap.uses if use.spread and use.weight)
        lost = self._traced.lost
        placed = [use for use in tap.uses if use.weight not in lost and use.bias not in lost]
        for row in (0, 1):
            self._check_coupling(placed, losses[:, 0], row, ids, larger)
        check_undivided(pairs, 3 / 2, self.parameters, ids[0])
        agreements = [self._agreement(grads) for grads in oracle]
        deltas = self._backward(losses[:, 0], tap.uses, retain=True)
        rows = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
        self._traced.verify(tap.uses, deltas, list(zip(rows, agreements, strict=False)), len(losses))
        self._verified.add(
            ("loss", self._traced.pattern(tap.uses, self._traced.layouts(tap.uses), len(losses)))
        )
        self._verify_on_others(examples)
        for name, block in self._fallback_blocks(larger, losses, None, self._losses, True)[0].items():
            if not all(agreement.holds(name, block[p]) for p, agreement in enumerate(agreements)):
                self._vectorises = False
        hows = {name: layer.how for name, layer in self.layers.items()}
        self.coverage = measure_coverage(self.model, self.parameters, losses, oracle, hows)

    def _verify_on_others(self, examples: Examples) -> None:
        """Others in another order: a model may sort its batch, or route tokens by their content."""
        positions = pick_others(examples)
        if len(positions) < 2:
            return
        batch = self.move(examples.take(positions))
        losses, _, tap = self._watch(batch, self._losses)
        check_per_example(losses, len(positions))
        check_finite(losses.detach(), [examples.ids[p] for p in positions], batch)
        order = losses[:, 0].argsort().tolist()
        for row in {order[(len(order) - 1) * k // 3] for k in range(4)}:
            pair = self.move(examples.take([positions[row]] * 2))
            self.padded |= signature(pair) != signature(batch)
            alone, _, _ = self._watch(pair, self._losses)
            check_alone(alone[0, 0], losses[row, 0], examples.ids[positions[row]])
        blend = self._blend(losses[:, 0])
        deltas = self._backward(losses[:, 0], self._traced.known(tap.uses), retain=False)
        self._traced.verify_again(tap, deltas, [blend], len(losses))

    def _blend(self, losses: Tensor) -> tuple[Tensor, Agreement]:
        """Random weights [batch], and autograd's gradient of the weighted losses: it shows whose rows are whose."""
        weights = torch.randn(len(losses), generator=torch.Generator().manual_seed(0)).to(losses)
        return weights, self._agreement(autograd((losses * weights).sum(), self.parameters))

    def _check_coupling(
        self, uses: Sequence[Use], losses: Tensor, row: int, ids: Sequence[Any], batch: Any
    ) -> None:
        """One example's loss must have a finite gradient, and none in what a layer computes for the others."""
        deltas = self._backward(losses[row : row + 1], uses, retain=True)
        layouts = self._traced.layouts(uses)
        check_factors(uses, deltas, layouts, ids, batch)
        for use, delta, layout in zip(uses, deltas, layouts, strict=True):
            if delta is not None:
                check_uncoupled(delta.movedim(layout.dim, 0), len(losses), ids[row], use.name)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _check_alone(self, batch: Any, ids: Sequence[Any], scalars: Scalars) -> None:
        """The measurement of one example must not depend on the others."""
        batch = self.move(batch)
        together = self._watch(batch, scalars)[0]
        check_per_example(together, len(ids))
        check_finite(together.detach(), ids, batch)
        largest = int(together[:, 0].abs().argmax())
        pair = map_tensors(batch, lambda t: t[[largest, largest]])
        alone = self._watch(pair, scalars, seed=1)[0]
        check_alone(alone[0, 0], together[largest, 0], ids[largest], "measurement")
        if len(ids) != 2:
            both = (alone[0, 0], together[largest, 0])
            check_undivided([both], len(ids) / 2, self.parameters, ids[largest], "measurement")

    def _verify(
        self, losses: Tensor, uses: Sequence[Use], deltas: Sequence[Tensor | None], what: str
    ) -> list[Layout]:
        """Compare the gradients of a pass that uses the layers in a new pattern with autograd's; its layouts."""
        before = self._traced.layouts(uses)
        wrong = self._traced.mend(
            uses, deltas, [self._blend(losses)], len(losses), slack=10
        )  # rounding is no fault
        if wrong:
            raise UpweightError(_differs(what, min(wrong), len(losses)))
        layouts = self._traced.layouts(uses)
        if (
            layouts != before
        ):  # a text of one token tells nothing of their order: what passed may not pass now
            self._verified.clear()
        return layouts


def _differs(what: str, name: str, batch: int) -> str:
    if what == "loss":
        return (
            f"the gradient of {name} differs from autograd's in a batch of {batch}: the model cuts or sorts rows by "
            "the batch's size or content, and whose they are is not known -> a smaller batch_size=, or leave the "
            "parameter out with parameters="
        )
    return (
        f"the gradient of the {what} in {name} differs from autograd's: it uses the model in another way than the "
        "training loss, for which layers were traced -> let both call the model alike, or leave the parameter out with "
        "parameters="
    )
