"""Which parameters to track, and whether a model is in a state in which per-example gradients exist."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from upweight.errors import UpweightError

ParameterFilter: TypeAlias = str | re.Pattern[str] | Callable[[str], bool] | None
"""None for all trainable parameters, a regular expression searched in the name, or a function of the name."""

_SUPPORTED = (torch.float32, torch.float64, torch.bfloat16)


def select_parameters(model: nn.Module, which: ParameterFilter = None) -> dict[str, Tensor]:
    r"""The trainable parameters that a filter keeps, {name: parameter}, tied ones once under their first name.

    Raises:
        UpweightError: nothing is trainable, the filter matches nothing, or a parameter is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> list(select_parameters(model, r"^1\."))
        ['1.weight', '1.bias']
    """
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise UpweightError(
            f"parameter {lazy[0]} has no shape yet, expected an initialised model -> run it once on a batch"
        )
    parameters = model.named_parameters()
    trainable: dict[str, Tensor] = {name: p for name, p in parameters if p.requires_grad and p.numel()}
    if not trainable:
        raise UpweightError(
            "the model has no trainable parameter (requires_grad=True) -> unfreeze what was trained"
        )
    if which is None:
        chosen = trainable
    elif callable(which) and not isinstance(which, re.Pattern):
        chosen = {name: p for name, p in trainable.items() if which(name)}
    elif not isinstance(which, (str, re.Pattern)):
        raise UpweightError(
            f"parameters is {type(which).__name__}, expected a regular expression or a function of the name -> for a "
            "list of names, pass names.__contains__"
        )
    else:
        try:
            pattern = re.compile(which)
        except re.error as error:
            raise UpweightError(
                f"parameters={which!r} is no regular expression ({error}) -> escape it with re.escape, or "
                "pass a function"
            ) from error
        chosen = {name: p for name, p in trainable.items() if pattern.search(name)}
    if not chosen:
        some = ", ".join(list(trainable)[:4])
        raise UpweightError(
            f"parameters={which!r} matches none of the {len(trainable)} trainable parameters ({some}, ...) -> name some"
        )
    for name, p in chosen.items():
        if p.dtype not in _SUPPORTED:
            raise UpweightError(
                f"parameter {name} has dtype {p.dtype}, expected float32, float64 or bfloat16 -> model.float()"
            )
        if not bool(torch.isfinite(p).all()):
            count = int((~torch.isfinite(p)).sum())
            raise UpweightError(
                f"parameter {name} holds {count} NaN or infinite values -> load a healthy checkpoint"
            )
    return chosen


def check_model(model: nn.Module) -> None:
    """Raise if a module is in train mode whose output then depends on the batch or on chance, naming the modules."""
    if not isinstance(model, nn.Module):
        raise UpweightError(
            f"the model is {type(model).__name__}, expected a torch.nn.Module -> wrap it in one"
        )
    batchwise = (nn.modules.batchnorm._BatchNorm,)
    norms = [n for n, m in model.named_modules() if isinstance(m, batchwise) and m.training]
    drops = [n for n, m in model.named_modules() if m.training and _drops(m)]
    if norms:
        raise UpweightError(
            f"BatchNorm is in train mode ({_some(norms)}): one example's gradient would depend on the rest of its "
            "batch and is undefined -> call model.eval() first"
        )
    if drops:
        raise UpweightError(
            f"dropout is in train mode ({_some(drops)}): every gradient would be of another random network -> call "
            "model.eval() first"
        )


def check_still_tracked(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Raise if a parameter was frozen or replaced after it was selected: its gradients would all be zero."""
    now = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if now.get(name) is not parameter:
            raise UpweightError(
                f"parameter {name} was replaced since fit, so its gradients can no longer be followed "
                "(load_state_dict(assign=True), a new layer) -> fit again"
            )
        if not parameter.requires_grad:
            raise UpweightError(
                f"parameter {name} was frozen since fit, so it has no gradient any more -> set its requires_grad = "
                "True, or fit again without it"
            )


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    return isinstance(module, nn.MultiheadAttention) and module.dropout > 0


def _some(names: list[str]) -> str:
    listed = ", ".join(name or "the model itself" for name in names[:3])
    return listed + (f" and {len(names) - 3} more" if len(names) > 3 else "")
