"""What an EK-FAC job has to compute at the least, and how fast this machine multiplies matrices.

The bound counts only matrix products, each once and by the cheapest exact route that this project knows, and charges
nothing for memory traffic, storage, elementwise work or Python. For a tracked layer with T positions, O outputs and I
inputs (the bias is one more), per training example:

    capture       forward, and backward to every tracked layer without weight gradients (counted on the real model)
    covariances   T·(O² + I²): both are symmetric, so half of the products are enough
    rotate        the gradient in the eigenbasis, by rotating its factors first or last, whichever is less:
                  min(2T(O² + I²) + 2T·OI, 2T·OI + 2·OI(O + I)); at T = 1 its outer product is left to the next two
    lambda        2·OI at T = 1, where it is one product of squared factors; elementwise otherwise
    scores        2·OI per query and training example, in the eigenbasis, where nothing has to be rotated back

and one capture and one rotation per query, and 10/3·(O³ + I³) per layer for the two eigendecompositions (reduction to
tridiagonal form and back-transformation). The second bound takes the scores at T = 1 by a separable spectrum of rank 4,
2·4·(O + I) each, which is not exact but may be within a tolerance. The bound of 16 more queries assumes that everything
about the training examples is stored.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from _workloads import Workload, per_example_loss
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_RANK = 4


@dataclass
class Layer:
    """Shape of one tracked layer: T positions, O outputs, I inputs with the bias."""

    name: str
    positions: int
    outputs: int
    inputs: int


def gemm_rate(size: int = 1536, repeats: int = 6) -> float:
    """Best measured float32 rate of a square matrix product, in FLOP per second, with the threads torch has now."""
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    torch.mm(a, b, out=out)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def trace(workload: Workload, batch: int = 4) -> tuple[list[Layer], float]:
    """Shapes of the tracked layers, and the FLOPs per example of forward and backward without weight gradients."""
    layers: list[Layer] = []
    handles = []
    anchor = torch.zeros((), requires_grad=True)

    def tap(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            weight: Any = module.weight
            positions = output.numel() // weight.shape[0] // batch
            layers.append(
                Layer(name, positions, weight.shape[0], weight[0].numel() + (module.bias is not None))
            )
            return output + anchor  # makes the loss depend on this output while every parameter stays frozen

        return hook

    modules = dict(workload.model.named_modules())
    for name in workload.tracked:
        handles.append(modules[name].register_forward_hook(tap(name)))
    needs = {p: p.requires_grad for p in workload.model.parameters()}
    for parameter in needs:
        parameter.requires_grad_(False)
    counter = FlopCounterMode(display=False)
    inputs, targets = workload.train
    try:
        # The math kernel, because the counter does not know the fused CPU attention; the products are the same.
        with counter, sdpa_kernel(SDPBackend.MATH):
            loss = per_example_loss(workload.model, (inputs[:batch], targets[:batch])).sum()
            torch.autograd.grad(loss, anchor)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in needs.items():
            parameter.requires_grad_(flag)
    return layers, counter.get_total_flops() / batch


def bound(workload: Workload) -> dict[str, Any]:
    """FLOPs of the lower bound by stage, the measured GEMM rate, and the seconds that follow."""
    layers, capture = trace(workload)
    n, q = workload.spec.train, workload.spec.queries
    flops = {
        "capture": (n + q) * capture,
        "covariances": 0.0,
        "eigh": 0.0,
        "rotate": 0.0,
        "lambda": 0.0,
        "scores": 0.0,
    }
    separable = further = 0.0
    for layer in layers:
        t, o, i = layer.positions, layer.outputs, layer.inputs
        if t == 1:
            rotation = 2 * (o * o + i * i)
            flops["lambda"] += n * 2 * o * i
        else:
            rotation = min(2 * t * (o * o + i * i) + 2 * t * o * i, 2 * t * o * i + 2 * o * i * (o + i))
        flops["covariances"] += n * t * (o * o + i * i)
        flops["eigh"] += 10 / 3 * (o**3 + i**3)
        flops["rotate"] += (n + q) * rotation
        flops["scores"] += n * q * 2 * o * i
        separable += n * q * (min(2 * o * i, 2 * _RANK * (o + i)) if t == 1 else 2 * o * i)
        further += 16 * rotation + 16 * n * 2 * o * i
    rate = gemm_rate()
    exact = sum(flops.values())
    return {
        "layers": [asdict(layer) for layer in layers],
        "flops": flops,
        "gemm_rate": rate,
        "seconds": exact / rate,
        "seconds_separable": (exact - flops["scores"] + separable) / rate,
        "seconds_further": (16 * capture + further) / rate,
    }
