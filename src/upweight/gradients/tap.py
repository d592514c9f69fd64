"""Watch one forward pass and note every use of a tracked parameter, without touching the model.

`Tap` is a torch-function mode: every torch function that the forward calls passes through it. Where a tracked parameter
takes part, it notes the operation, the input that the gradient needs, and the *gradient edge* of the output: the place
in the autograd graph where the output's gradient will flow by. `torch.autograd.grad(losses, edges)` then yields all
output gradients in one backward pass that never computes a weight gradient.

Nothing is registered on the model: no hooks, no replaced modules, no `requires_grad` edits. Working by function instead
of by module is what makes reused modules, tied weights and functional calls exact, and what makes a use that is not
understood visible (a *stranger*), so that it goes to the exact fallback instead of being lost.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from upweight.errors import UpweightError
from upweight.gradients.operations import Affine, Lookup, Product, parse

_SPREADING = {
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__iadd__,
    Tensor.expand,
    Tensor.expand_as,
    Tensor.broadcast_to,
    torch.broadcast_to,
}
"""Functions whose output has the gradient of an argument that it repeats, not yet summed over the repetitions."""
_DROPOUTS = {
    F.dropout: 0.5,
    F.dropout1d: 0.5,
    F.dropout2d: 0.5,
    F.dropout3d: 0.5,
    F.alpha_dropout: 0.5,
    F.feature_alpha_dropout: 0.5,
}


@dataclass
class Use:
    """One call in which tracked parameters took part.

    Attributes:
        operation: what the call does with them.
        weight, bias: the parameters' names by role, None where untracked or absent.
        x: the recorded input, None where no tracked weight needs it.
        edge: where the output's gradient passes.
        shape: the output's shape.
        version: the recorded input's version then.
        spread: whether the output is the first that repeats a look-up for every example, instead of the look-up's.
    """

    operation: Product | Lookup | Affine
    weight: str | None
    bias: str | None
    x: Tensor | None
    edge: GradientEdge
    shape: tuple[int, ...]
    version: int
    spread: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies the call site from one pass to the next."""
        return (self.weight, self.bias, type(self.operation), len(self.shape))

    @property
    def name(self) -> str:
        """The parameter that the call is named after."""
        return self.weight or self.bias or ""

    def check_unchanged(self) -> None:
        """Raise if the recorded input was overwritten in place after the call: its gradient would be wrong."""
        if self.x is not None and self.x._version != self.version:
            raise UpweightError(
                f"the input of {self.name} was changed in place after the layer read it, expected it "
                "untouched until the backward pass -> replace the in-place operation (x += y) by x = x + y"
            )


@dataclass
class Shared:
    """The output of a look-up, while all examples may have it in common (the embedding of their positions).

    The gradient of such an output is a sum over the examples. Where it is added to something that has them, or expanded
    to their number, the gradient of the result is each example's own.

    Attributes:
        output: the output, kept alive so that its id stays its own.
        version: its version then: it may not be overwritten.
        ids: the rows looked up, in the shape of the output without its last axis.
        use: the look-up.
    """

    output: Tensor
    version: int
    ids: Tensor
    use: Use

    def spread_over(self, shape: Sequence[int]) -> Tensor | None:
        """The ids in the shape of a tensor [..., width] that repeats the output; None if it cannot."""
        if not shape or shape[-1] != self.output.shape[-1]:
            return None
        rows = torch.Size(shape[:-1])
        if rows.numel() == self.ids.numel():
            return self.ids.reshape(rows)
        try:
            return self.ids.expand(rows)
        except RuntimeError:
            return None

    def is_same(self, other: Tensor) -> bool:
        """Whether a tensor is the output itself, at most in another shape."""
        here = other.data_ptr() == self.output.data_ptr() and other.numel() == self.output.numel()
        return here and other.is_contiguous() and self.output.is_contiguous()


class Tap(TorchFunctionMode):
    """Records the uses of `parameters` ({tensor id: name}) during one forward pass.

    Attributes:
        uses: recognised calls, in order.
        strangers: {parameter name: function} for parameters that took part in anything else.
        spread: tables whose look-ups all examples have in common, noted where they are spread over the examples; None
            while that is not known: then those whose output is repeated.
    """

    def __init__(self, parameters: Mapping[int, str], spread: frozenset[str] | None = None) -> None:
        super().__init__()
        self.parameters, self.spread = parameters, spread
        self.uses: list[Use] = []
        self.strangers: dict[str, str] = {}
        self._shared: dict[int, Shared] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:  # look inside: its projections are linear layers
                return _attention_body(*args, **kwargs)
        if func in _DROPOUTS:
            _refuse_dropout(func, args, kwargs)
        elif func is F.batch_norm:
            _refuse_batch_statistics(args, kwargs, self.parameters)
        elif func is F.scaled_dot_product_attention:
            _refuse_attention_dropout(args, kwargs)
        elif func in (F.embedding, F.embedding_bag):
            _refuse_table_options(args, kwargs, self.parameters)
        touched = {self.parameters[id(t)]: t for t in _flat(args, kwargs) if id(t) in self.parameters}
        if not touched:
            shared = [self._shared[id(t)] for t in _flat(args, kwargs) if id(t) in self._shared]
            output = func(*args, **kwargs)
            if isinstance(output, Tensor) and "alpha" not in kwargs:
                for one in shared:
                    self._follow(one, func, output)
            return output
        call = parse(func, args, kwargs)
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor):
            if any(t.requires_grad for t in _flat((output,), {})):
                self._strangers(touched, func)
            return output
        if any(output is parameter for parameter in touched.values()):
            return output  # nothing was done: a cast to its own dtype, contiguous()
        if not output.requires_grad:
            return output  # a shape, a detached copy, or a region without gradients
        if call is None:
            self._strangers(touched, func)
            return output
        weight = self.parameters.get(id(call.weight))
        bias = self.parameters.get(id(call.bias))
        self._strangers({n: t for n, t in touched.items() if n not in (weight, bias)}, func)
        needed = call.x if weight is not None else None  # a bias needs no input
        version = needed._version if needed is not None else 0
        # Detached, it shares memory and version counter, and drops the graph.
        x = needed.detach() if needed is not None else None
        edge = get_gradient_edge(_unviewed(output))
        self.uses.append(Use(call.operation, weight, bias, x, edge, tuple(output.shape), version))
        if isinstance(call.operation, Lookup) and x is not None and self._may_spread(weight):
            self._shared[id(output)] = Shared(output, output._version, x, self.uses[-1])
        return output

    def _may_spread(self, weight: str | None) -> bool:
        return self.spread is None or weight in self.spread

    def _follow(self, shared: Shared, function: Any, output: Tensor) -> None:
        """Note what becomes of a look-up: the same numbers in another shape, or the first output it is spread over."""
        ids = shared.spread_over(output.shape)
        if ids is None or shared.output._version != shared.version or not output.requires_grad:
            return
        use = shared.use
        if function in _SPREADING and (self.spread is not None or output.numel() > shared.output.numel()):
            edge, shape = get_gradient_edge(_unviewed(output)), tuple(output.shape)
            self.uses = [one for one in self.uses if one is not use]  # whose edge sums over the examples
            use = replace(use, x=ids, edge=edge, shape=shape, version=ids._version, spread=True)
            self.uses.append(use)
        if shared.is_same(output):  # which may still be spread
            self._shared[id(output)] = Shared(output, output._version, ids, use)

    def _strangers(self, names: Mapping[str, Tensor], function: Any) -> None:
        for name in names:
            self.strangers.setdefault(name, getattr(function, "__name__", str(function)))


def _unviewed(output: Tensor) -> Tensor:
    """What the output's gradient surely passes: a view that is overwritten (ReLU inplace) is bypassed."""
    base = output._base if output._is_view() else None
    if base is None or not base.requires_grad or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def _flat(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _flat(value, {})
        elif isinstance(value, dict):
            yield from _flat((), value)


def _without_override_check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose own look for overrides says no: a mode can then run its body and see what it calls."""
    namespace = {**function.__globals__, "has_torch_function": lambda _: False}
    clone = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__)
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone


_attention_body = _without_override_check(F.multi_head_attention_forward)


def _refuse_dropout(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    p = args[1] if len(args) > 1 else kwargs.get("p", _DROPOUTS[function])
    # F.dropout trains by default, alpha dropouts do not; modules always say.
    default = function not in (F.alpha_dropout, F.feature_alpha_dropout)
    training = args[2] if len(args) > 2 else kwargs.get("training", default)
    if training and p > 0:
        raise UpweightError(
            f"{function.__name__} is active (p={p}): every gradient would be of another random network -> call "
            "model.eval() first"
        )


def _refuse_attention_dropout(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    p = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    if p > 0:
        raise UpweightError(
            f"attention dropout is active (p={p}): gradients would be random -> call model.eval() first"
        )


def _refuse_batch_statistics(
    args: Sequence[Any], kwargs: Mapping[str, Any], names: Mapping[int, str]
) -> None:
    training = args[5] if len(args) > 5 else kwargs.get("training", False)
    if training:
        weight = args[3] if len(args) > 3 else kwargs.get("weight")
        name = names.get(id(weight), "a BatchNorm layer")
        raise UpweightError(
            f"{name} normalises by the statistics of the batch, so one example's gradient depends on the others and is "
            "undefined -> call model.eval() first (and keep track_running_stats on)"
        )


def _refuse_table_options(args: Sequence[Any], kwargs: Mapping[str, Any], names: Mapping[int, str]) -> None:
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    name = names.get(id(weight), "an embedding")
    if (args[3] if len(args) > 3 else kwargs.get("max_norm")) is not None:
        raise UpweightError(
            f"{name} has max_norm, which rewrites the table in every forward pass, expected a model that stays as it "
            "is -> set max_norm = None on the trained embedding"
        )
    if args[5] if len(args) > 5 else kwargs.get("scale_grad_by_freq", False):
        raise UpweightError(
            f"{name} has scale_grad_by_freq, so one example's gradient depends on the tokens of the others and is "
            "undefined -> set scale_grad_by_freq = False on the trained embedding"
        )
