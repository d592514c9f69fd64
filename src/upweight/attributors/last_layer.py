"""The last linear layer of a model, found by watching it compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upweight._random import preserved
from upweight.data import Examples, map_tensors
from upweight.errors import UpweightError
from upweight.gradients.operations import Product
from upweight.gradients.select import ParameterFilter, check_model
from upweight.gradients.tap import Tap
from upweight.task import Task

LAST_LAYER = "last_layer"


def parameter_filter(
    parameters: ParameterFilter,
    model: nn.Module,
    task: Task,
    examples: Examples,
    autocast: torch.dtype | None,
) -> ParameterFilter:
    """The filter itself, or, for ``"last_layer"``, one that keeps the last linear layer's weight and bias."""
    if parameters != LAST_LAYER:
        return parameters
    names = last_linear(model, task, examples, autocast)
    return lambda name: name in names


def last_linear(
    model: nn.Module, task: Task, examples: Examples, autocast: torch.dtype | None = None
) -> tuple[str, ...]:
    """Names of the weight, and of the bias if there is one, of the linear layer that the training loss uses last.

    Raises:
        UpweightError: the loss uses no linear layer.
    """
    check_model(model)
    first = next(model.parameters())
    cast = first.dtype in (torch.float32, torch.float64)

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(first.device, first.dtype if cast and tensor.is_floating_point() else tensor.dtype)

    batch = map_tensors(examples.take([0, min(1, examples.alike - 1)]), move)
    names = {id(p): name for name, p in model.named_parameters()}
    devices = [first.device] if first.device.type == "cuda" else []
    precision = torch.autocast(first.device.type, autocast, enabled=autocast is not None)
    with torch.inference_mode(False), torch.enable_grad(), preserved(devices), precision, Tap(names) as tap:
        task.train_loss(model, batch)
    for use in reversed(tap.uses):
        if use.weight is None or not isinstance(use.operation, Product):
            continue
        if model.get_parameter(use.weight).ndim == 2:
            return (use.weight,) if use.bias is None else (use.weight, use.bias)
    raise UpweightError(
        "no linear layer was seen in the training loss, expected one as the model's last layer -> name the parameters "
        "to use with a regular expression"
    )
