"""What must hold of losses and gradients for per-example gradients to mean anything; plain autograd to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from upweight.data import tensors_in
from upweight.errors import UpweightError
from upweight.gradients.operations import Layout
from upweight.gradients.tap import Use


def check_per_example(losses: Tensor, batch: int) -> None:
    """Raise unless there is one number per example: scalars [batch, columns]."""
    if losses.ndim == 2 and losses.shape[0] == batch:
        return
    shape = tuple(losses.shape[:-1])
    seen = "a single number" if shape == () else f"shape {shape}"
    raise UpweightError(
        f"the loss of {batch} examples is {seen}, expected one number per example, shape ({batch},): it looks averaged "
        "or summed over the batch -> use reduction='none' (and sum each example's own tokens or outputs)"
    )


_ROUNDING = {torch.float64: (1e-6, 1e-7), torch.float32: (1e-3, 1e-5)}
"""{dtype: how much a loss may differ from batch to batch, relative and absolute}."""


def check_alone(alone: Tensor, among: Tensor, example: Any, what: str = "loss") -> None:
    """Raise if one example's loss in one batch is not what it is in another.

    Args:
        alone: its loss in a batch that holds nothing else.
        among: its loss in a batch with other examples.
        example: its id.
        what: what the numbers are, in words.
    """
    one, other = float(alone.detach()), float(among.detach())
    relative, absolute = _ROUNDING.get(among.dtype, (5e-2, 1e-2))
    if abs(one - other) > relative * max(abs(one), abs(other)) + absolute:
        raise UpweightError(
            f"the {what} of example {example} is {one:.6g} in one batch and {other:.6g} in another: it is averaged "
            "over the batch, the examples see each other (padding that is not masked?), or the forward pass is random "
            "-> return reduction='none' losses that depend on their own example only, from a model in eval mode"
        )


def check_undivided(
    pairs: Sequence[tuple[Tensor, Tensor]],
    ratio: float,
    parameters: Mapping[str, Tensor],
    example: Any,
    what: str = "loss",
) -> None:
    """Raise if tiny losses, which rounding hides from `check_alone`, shrink as their batch grows: their gradients do.

    Args:
        pairs: one example's loss in a small batch and in a larger one, for some examples.
        ratio: the larger batch's size by the smaller one's.
        parameters: what to differentiate in.
        example: an id, for the message.
        what: what the numbers are, in words.
    """
    for pair in pairs:
        if max(float(loss.detach().abs()) for loss in pair) > 4 * _ROUNDING.get(pair[0].dtype, (0, 1e-2))[1]:
            return
        small, large = (
            sum(float(g.double().square().sum()) for g in autograd(loss, parameters).values()) ** 0.5
            for loss in pair
        )
        if large == 0 or abs(small / large - ratio) > 0.02 * ratio:
            return
    raise UpweightError(
        f"the gradient of the {what} of example {example} is {ratio:g} times as large in a batch that is as many times "
        "smaller: it is averaged over the batch -> return reduction='none' losses"
    )


def check_uncoupled(delta: Tensor, batch: int, example: Any, layer: str) -> None:
    """Raise if one example's loss has a gradient in more of a layer's outputs than are that example's.

    Args:
        delta: the gradient of its loss in the outputs, examples (alone or merged with positions) along the first axis.
        batch: examples in the batch.
        example: its id.
        layer: the layer's name.
    """
    rows = delta.flatten(1).norm(dim=1)
    if int((rows > 1e-5 * rows.max()).sum()) * batch > len(rows):
        raise UpweightError(
            f"the loss of example {example} depends on what {layer} computes for other examples of its batch, so its "
            "gradient is undefined -> take out what couples them (statistics over the batch, contrastive losses)"
        )


def check_finite(losses: Tensor, ids: Sequence[Any], batch: Any) -> None:
    """Raise with the id of the first example whose loss is not finite, and say whether its input is."""
    bad = ~torch.isfinite(losses).all(1)
    if not bad.any():
        return
    position = int(bad.nonzero()[0, 0])
    raise UpweightError(
        f"the loss of example {ids[position]} is {float(losses[position, 0])}: {_blame(batch, position)} "
        f"({int(bad.sum())} such in this batch) -> clean or drop the example"
    )


def check_factors(
    uses: Sequence[Use],
    deltas: Sequence[Tensor | None],
    layouts: Sequence[Layout],
    ids: Sequence[Any],
    batch: Any,
    inputs: bool = True,
) -> None:
    """Raise with layer and example if an output gradient (or input) is not finite though the losses are."""
    for use, delta, layout in zip(uses, deltas, layouts, strict=True):
        factors = [delta] if delta is not None else []
        if inputs and delta is not None and use.x is not None and use.x.is_floating_point():
            factors.append(use.x)
        for factor in factors:
            if not is_finite(factor):
                refuse_factors(layout.batch_first(factor, len(ids)), ids, batch, use.name)


def refuse_factors(factors: Tensor, ids: Sequence[Any], batch: Any, layer: str) -> NoReturn:
    """Name the layer and the example of a gradient's factors [batch, ...] that are not finite though the losses are."""
    bad = ~torch.isfinite(factors.flatten(1)).all(1)
    position = int(bad.nonzero()[0, 0])
    raise UpweightError(
        f"the gradient of {layer} for example {ids[position]} is not finite although its loss is: "
        f"{_blame(batch, position)} ({int(bad.sum())} such in this batch) -> clean or drop the example, or use float64"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, by one sum: a single read, no mask."""
    return bool(
        torch.isfinite(tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32))
    )


def _blame(batch: Any, position: int) -> str:
    broken = any(t.is_floating_point() and not torch.isfinite(t[position]).all() for t in tensors_in(batch))
    return (
        "its input holds NaN or infinity"
        if broken
        else "its input is finite, so the model or the loss overflows"
    )


@contextmanager
def constant_buffers(model: nn.Module) -> Iterator[None]:
    """Raise, and put them back, if buffers change: running statistics, power iterations, counters."""
    before = {name: (buffer, buffer._version, buffer.clone()) for name, buffer in model.named_buffers()}

    def restore() -> list[str]:
        changed = []
        now = dict(model.named_buffers())
        for name, (buffer, version, values) in before.items():
            current = now.get(name, buffer)
            written = current is not buffer or buffer._version != version
            if written and current.shape == values.shape and not torch.equal(current, values):
                changed.append(name)
                with torch.no_grad():
                    current.copy_(values)
        return changed

    try:
        yield
    except BaseException:
        restore()
        raise
    changed = restore()
    if changed:
        raise UpweightError(
            f"the forward pass changes {', '.join(changed[:3])}, expected a model that stays as it is -> call "
            "model.eval() first, so that nothing is updated"
        )


_REENTRANT = (
    "the model uses reentrant activation checkpointing, which hides its inner layers from autograd.grad -> pass "
    "use_reentrant=False to torch.utils.checkpoint"
)


def refuse_reentrant(losses: Tensor) -> None:
    """Raise if the graph holds a reentrant checkpoint: the gradients of its parameters would be missing, not wrong."""
    seen, stack = set(), [losses.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise UpweightError(_REENTRANT)
        stack.extend(parent for parent, _ in node.next_functions)


@contextmanager
def explained() -> Iterator[None]:
    """Turn autograd's refusals that have a known way out into errors that name it."""
    try:
        yield
    except RuntimeError as error:
        if "checkpoint" in str(error).lower():
            raise UpweightError(_REENTRANT) from error
        if "inplace operation" in str(error):
            raise UpweightError(
                "a tensor that the backward pass needs was changed in place in the forward pass, expected it untouched "
                "-> replace the in-place operation (x += y) by x = x + y"
            ) from error
        raise


def autograd(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name: gradient} of one number, zero where it does not depend on the parameter."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    with explained():
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    found = zip(parameters.items(), grads, strict=True)
    return {name: torch.zeros_like(p) if g is None else g.detach().to_dense() for (name, p), g in found}


class Agreement:
    """Whether gradients equal autograd's up to rounding: a wrong layout or a lost use is off by far more.

    Args:
        oracle: autograd's gradients of one example, {name: gradient}.
        dtype: the dtype in which the model computes.
    """

    def __init__(self, oracle: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.oracle = oracle
        # A gradient that is zero in theory (of a key's bias) is rounding noise, relative to the whole gradient.
        self.relative, self.floor = {torch.float64: (1e-6, 1e-12), torch.float32: (1e-3, 1e-5)}.get(
            dtype, (5e-2, 5e-3)
        )
        self.norm = sum(float(g.double().square().sum()) for g in oracle.values()) ** 0.5

    def holds(self, name: str, gradient: Tensor, slack: float = 1.0) -> bool:
        """Whether this parameter's gradient is autograd's, within `slack` times the tolerance."""
        truth = self.oracle[name].double().reshape(-1)
        difference = float((gradient.double().reshape(-1) - truth).norm())
        return difference <= slack * (self.relative * float(truth.norm()) + self.floor * self.norm + 1e-30)
