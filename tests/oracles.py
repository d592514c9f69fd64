"""What the engine must agree with, written down as plainly as possible and without the engine: autograd, one example at
a time, and the explicit Fisher of a softmax, a Bernoulli and a Gaussian."""

import random
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


def one(batch, position: int):
    """The batch that holds only the example at this position."""
    if isinstance(batch, Tensor):
        return batch[position : position + 1]
    if isinstance(batch, Mapping):
        return {key: one(value, position) for key, value in batch.items()}
    return tuple(one(value, position) for value in batch)


def call(model: nn.Module, batch) -> tuple[Tensor, Tensor]:
    """Outputs and targets of a batch ``(inputs..., targets)`` or ``{inputs..., "labels": targets}``."""
    if isinstance(batch, Mapping):
        outputs = model(**{key: value for key, value in batch.items() if key != "labels"})
        return getattr(outputs, "logits", outputs), batch["labels"]
    outputs = model(*batch[:-1])
    return getattr(outputs, "logits", outputs), batch[-1]


# Losses and measurements, of outputs and targets of one example ----------------------------------------------------


def cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    return torch.logsumexp(f[0], 0) - f[0, int(y)]


def class_logit(f: Tensor, y: Tensor) -> Tensor:
    return f[0, int(y)]


def class_margin(f: Tensor, y: Tensor) -> Tensor:
    probability = f[0].softmax(0)[int(y)]
    return torch.log(probability) - torch.log(1 - probability)


def logistic(f: Tensor, y: Tensor) -> Tensor:
    z = f.reshape(())
    return -torch.log(torch.sigmoid(z if float(y) == 1 else -z))


def signed_logit(f: Tensor, y: Tensor) -> Tensor:
    return f.reshape(()) if float(y) == 1 else -f.reshape(())


def half_squared(f: Tensor, y: Tensor) -> Tensor:
    return ((f.reshape(-1) - y.reshape(-1)) ** 2).sum() / 2


def prediction(f: Tensor, y: Tensor) -> Tensor:
    return f.sum()


LOSS = {"classification": cross_entropy, "binary": logistic, "regression": half_squared}
MEASURE = {
    "classification": {"loss": cross_entropy, "margin": class_margin, "logit": class_logit},
    "binary": {"loss": logistic, "margin": signed_logit, "logit": signed_logit},
    "regression": {"loss": half_squared, "prediction": prediction},
}
HIGHER_IS_BETTER = {"loss": False, "margin": True, "logit": True, "prediction": True}


# Gradients -----------------------------------------------------------------------------------------------------------


def tracked(model: nn.Module, pattern: str | None = None) -> dict[str, Tensor]:
    """Trainable parameters whose name a regular expression finds."""
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and (pattern is None or re.search(pattern, name))
    }


def gradients(
    function: Callable[[nn.Module, object], Tensor],
    model: nn.Module,
    batch,
    n: int,
    pattern: str | None = None,
) -> dict[str, Tensor]:
    """{parameter: [n, *shape]}: gradients of ``function(model, batch of one example)``, one example at a time."""
    parameters = tracked(model, pattern)
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for position in range(n):
        value = function(model, one(batch, position)).sum()
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
            rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient.to_dense())
    return {name: torch.stack(values) for name, values in rows.items()}


def of_outputs(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, object], Tensor]:
    """A function of outputs and targets as a function of model and batch."""
    return lambda model, batch: function(*call(model, batch))


def flat(per_parameter: Mapping[str, Tensor]) -> Tensor:
    """{parameter: [n, *shape]} as one matrix [n, parameters]."""
    return torch.cat([g.reshape(len(g), -1) for g in per_parameter.values()], 1)


# Fisher --------------------------------------------------------------------------------------------------------------


def output_hessian(kind: str, f: Tensor) -> Tensor:
    """Hessian of one example's loss in its outputs: ``diag(p) - p p^T``, ``p (1 - p)``, or the identity."""
    f = f.reshape(-1)
    if kind == "classification":
        p = f.softmax(0)
        return torch.diag(p) - torch.outer(p, p)
    if kind == "binary":
        p = torch.sigmoid(f)
        return (p * (1 - p))[:, None]
    return torch.eye(len(f), dtype=f.dtype)


def jacobian(model: nn.Module, batch, position: int, pattern: str | None = None) -> tuple[Tensor, Tensor]:
    """One example's outputs [o] and their Jacobian [o, parameters]."""
    outputs = call(model, one(batch, position))[0].reshape(-1)
    rows = []
    for k in range(len(outputs)):
        of_output = lambda model, batch, k=k: call(model, batch)[0].reshape(-1)[k]  # noqa: E731
        rows.append(flat(gradients(of_output, model, one(batch, position), 1, pattern))[0])
    return outputs.detach(), torch.stack(rows)


def fisher(kind: str, model: nn.Module, batch, position: int, pattern: str | None = None) -> Tensor:
    """One example's Fisher matrix ``J^T H J`` [parameters, parameters]."""
    outputs, J = jacobian(model, batch, position, pattern)
    return J.T @ output_hessian(kind, outputs) @ J


# Comparison ----------------------------------------------------------------------------------------------------------


def worst_error(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], floor: float
) -> tuple[float, str]:
    """Largest relative error over parameters and examples, and the parameter it belongs to.

    Relative to that parameter's gradient for that example, or to `floor` times the example's whole gradient where
    that is larger: the gradient of a key's bias is zero in theory and rounding noise in practice.
    """
    assert found.keys() == expected.keys(), f"{sorted(found)} are not {sorted(expected)}"
    total = flat(expected).norm(dim=1)
    worst = (0.0, "")
    for name, truth in expected.items():
        assert found[name].shape == truth.shape, f"{name}: {found[name].shape} is not {truth.shape}"
        n = len(truth)
        scale = torch.maximum(truth.reshape(n, -1).norm(dim=1), floor * total).clamp_min(1e-300)
        error = float(((found[name] - truth).reshape(n, -1).norm(dim=1) / scale).max())
        worst = max(worst, (error, name))
    return worst


@contextmanager
def untouched(model: nn.Module):
    """Check that nothing about a model or a global random state is different at the end, whatever happens inside."""
    before = snapshot(model)
    try:
        yield
    finally:
        after = snapshot(model)
        changed = [key for key in before if before[key] != after.get(key)] + [
            k for k in after if k not in before
        ]
        assert changed == [], f"changed: {changed}"


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a model and the global random states that somebody could look at."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    seen: dict[str, object] = {
        "torch random state": torch.get_rng_state().numpy().tobytes(),
        "numpy random state": (numpy_state[1].tobytes(), *numpy_state[2:]),
        "python random state": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
    }
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue
        seen[f"state {name}"] = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        seen[f"identity {name}"] = (
            id(value),
            value.data_ptr(),
            value._version,
            value.dtype,
            tuple(value.shape),
        )
        seen[f"requires_grad {name}"] = value.requires_grad
        seen[f"grad {name}"] = None if value.grad is None else (id(value.grad), value.grad.tolist())
        seen[f"tensor hooks {name}"] = str(value._backward_hooks)
    for name, module in model.named_modules():
        seen[f"module {name}"] = (id(module), type(module))
        seen[f"training {name}"] = module.training
        seen[f"attributes {name}"] = sorted(vars(module))
        seen[f"forward {name}"] = getattr(module.forward, "__func__", module.forward)
        for attribute, value in vars(module).items():
            if "hook" in attribute:
                seen[f"{attribute} of {name}"] = list(value.items()) if isinstance(value, dict) else value
    return seen
