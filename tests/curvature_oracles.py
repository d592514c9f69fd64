"""K-FAC and EK-FAC written out as dense float64 matrices, from layer inputs and output gradients that hooks record one
example at a time. Nothing here knows the engine: it is what the engine must agree with.

A layer's parameters are flattened as the rows of [weight | bias], groups of a convolution one after the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Columns = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""``(outputs of one example [1, ...], its target [1, ...]) -> scalars`` whose squared gradients sum to its Fisher."""


# Fisher columns ------------------------------------------------------------------------------------------------------


def class_expectation(f: Tensor, y: Tensor) -> list[Tensor]:
    """The expectation over classes as its definition says: each class's loss, weighted by its probability."""
    log_p = f[0].log_softmax(0)
    return [-log_p[c] * log_p[c].detach().exp().sqrt() for c in range(len(log_p))]


def bernoulli_expectation(f: Tensor, y: Tensor) -> list[Tensor]:
    z = f.reshape(())
    return [-F.logsigmoid(s * z) * F.logsigmoid(s * z).detach().exp().sqrt() for s in (1, -1)]


def gaussian_expectation(f: Tensor, y: Tensor) -> list[Tensor]:
    """Half squared error: the Hessian in the outputs is the identity."""
    return list(f.reshape(-1))


EXPECTATION: dict[str, Columns] = {
    "classification": class_expectation,
    "binary": bernoulli_expectation,
    "regression": gaussian_expectation,
}


def loss_of(kind: str, f: Tensor, y: Tensor) -> Tensor:
    """The loss of one example."""
    if kind == "classification":
        return -f[0].log_softmax(0)[int(y)]
    if kind == "binary":
        z = f.reshape(())
        return -F.logsigmoid(z if float(y) == 1 else -z)
    return ((f - y.reshape(f.shape)) ** 2).sum() / 2


# Factors -------------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """What hooks saw of one layer: per example and column, (output gradients [group, T, R], inputs [group, T, C])."""

    seen: list[list[tuple[Tensor, Tensor]]]
    weight_shape: tuple[int, ...]
    bias: bool

    @property
    def n(self) -> int:
        return len(self.seen)

    @property
    def groups(self) -> int:
        return self.seen[0][0][0].shape[0]

    def gradients(self) -> Tensor:
        """Per-example gradients of every column, [n, columns, group, R, C]."""
        return torch.stack([torch.stack([d.mT @ a for d, a in columns]) for columns in self.seen])


def record(model: nn.Module, batch: tuple[Tensor, Tensor], columns: Columns) -> dict[str, Layer]:
    """Run the examples one by one; {layer name: what it saw}. A module that is called twice has its calls' positions
    side by side."""
    modules = {
        name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))
    }
    out = {
        name: Layer([], tuple(m.weight.shape), m.bias is not None)
        for name, m in modules.items()
        if m.weight.requires_grad
    }
    for i in range(len(batch[1])):
        calls: list[tuple[str, Tensor, Tensor]] = []
        handles = [
            modules[name].register_forward_hook(
                lambda m, args, z, name=name, calls=calls: calls.append((name, args[0].detach(), z))
            )
            for name in out
        ]
        outputs = model(batch[0][i : i + 1])
        for handle in handles:
            handle.remove()
        scalars = columns(outputs, batch[1][i : i + 1])
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in out}
        for scalar in scalars:
            deltas = torch.autograd.grad(scalar, [z for _, _, z in calls], retain_graph=True)
            for name in out:
                pairs = [
                    positions(modules[name], x, delta)
                    for (n, x, _), delta in zip(calls, deltas, strict=True)
                    if n == name
                ]
                seen[name].append((torch.cat([d for d, _ in pairs], 1), torch.cat([a for _, a in pairs], 1)))
        for name, layer in out.items():
            layer.seen.append(seen[name])
    return out


def positions(module: nn.Module, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """One call of one example as (output gradients [group, T, R], inputs [group, T, C], the bias's one last)."""
    if isinstance(module, nn.Linear):
        a, d = x.reshape(1, -1, x.shape[-1]), delta.reshape(1, -1, delta.shape[-1])
    else:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d))
        pads = list(module._reversed_padding_repeated_twice)
        x = F.pad(x, pads, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        if isinstance(module, nn.Conv1d):  # a line is an image of height 1
            x = x[:, :, None]
            kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
        windows = F.unfold(x, kernel, dilation=dilation, stride=stride)[0]  # [channel * kernel, T]
        a = windows.reshape(module.groups, -1, windows.shape[1]).mT
        maps = delta[0].flatten(1)  # [O, T]
        d = maps.reshape(module.groups, -1, maps.shape[1]).mT
    if module.bias is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    return d, a


# Curvature -----------------------------------------------------------------------------------------------------------


def kronecker_factors(layer: Layer) -> tuple[Tensor, Tensor]:
    """B [group, R, R] and A [group, C, C]: sums over positions for B, the mean over positions for A."""
    B = sum(d.mT @ d for columns in layer.seen for d, _ in columns) / layer.n
    total = sum(columns[0][1].shape[1] for columns in layer.seen)
    A = sum(columns[0][1].mT @ columns[0][1] for columns in layer.seen) / total
    return B, A


def dense_kfac(layer: Layer) -> Tensor:
    B, A = kronecker_factors(layer)
    return torch.block_diag(*(torch.kron(b, a) for b, a in zip(B, A, strict=True)))


def dense_ekfac(layer: Layer) -> Tensor:
    B, A = kronecker_factors(layer)
    G = layer.gradients()
    blocks = []
    for g in range(layer.groups):
        Q = torch.kron(torch.linalg.eigh(B[g])[1], torch.linalg.eigh(A[g])[1])
        rotated = G[:, :, g].flatten(2) @ Q
        Lambda = rotated.square().sum((0, 1)) / layer.n
        blocks.append((Q * Lambda) @ Q.T)
    return torch.block_diag(*blocks)


def dense_fisher(layer: Layer) -> Tensor:
    """The layer's own Fisher block, nothing approximated."""
    G = layer.gradients().flatten(2)
    return torch.einsum("ncp,ncq->pq", G, G) / layer.n


def dense_diagonal(layer: Layer) -> Tensor:
    return dense_fisher(layer).diagonal().diag()


DENSE = {"kfac": dense_kfac, "ekfac": dense_ekfac, "diagonal": dense_diagonal}


# Scores --------------------------------------------------------------------------------------------------------------


def layer_gradients(
    function: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    layers: dict[str, Layer],
) -> dict[str, Tensor]:
    """{layer: [n, parameters]} of a function of one example's outputs and target, by plain autograd."""
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    for i in range(len(batch[1])):
        value = function(model(batch[0][i : i + 1]), batch[1][i : i + 1])
        for name, layer in layers.items():
            module = model.get_submodule(name)
            parameters = [module.weight, module.bias] if layer.bias else [module.weight]
            grads = torch.autograd.grad(value, parameters, retain_graph=True)
            matrices = [g.reshape(g.shape[0], -1) for g in grads]
            rows[name].append(torch.cat(matrices, 1).reshape(-1))
    return {name: torch.stack(r) for name, r in rows.items()}


def solve(H: Tensor, damping: float, V: Tensor, G: Tensor) -> Tensor:
    """``V (H + damping I)^-1 G^T``."""
    eye = torch.eye(len(H), dtype=H.dtype)
    return V @ torch.linalg.solve(H + damping * eye, G.T)


def relative(found: Tensor, truth: Tensor) -> float:
    """Largest absolute error relative to the largest absolute true value."""
    return float((found - truth).abs().max() / truth.abs().max())
