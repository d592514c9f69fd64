"""Curvature times vectors by differentiating twice: any model, any loss, any number of outputs.

Both products use reverse mode only, so that whatever has a second derivative in torch works, in-place modules and tied
weights included, and nothing on the model is replaced:

    Hessian        H x = grad(grad(l) . x)                        [double backward]
    Gauss-Newton   J x = grad(grad(f . u) . x) in u,  H x = J^T (l'' (J x))    [l'' again by double backward]

All k vectors go through the second backward pass at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from upweight.errors import UpweightError
from upweight.gradients import Tracker
from upweight.gradients.checks import check_per_example, explained
from upweight.task import OutputTask

Named = dict[str, Tensor]
"""{parameter name: [k, *parameter shape]}."""


class TwiceDifferentiated:
    """Products of a batch's summed curvature with vectors.

    Args:
        tracker: of the model.
        kind: ``"hessian"`` or ``"ggn"``.
        groups: parameter names by block; products never couple two groups.
    """

    def __init__(self, tracker: Tracker, kind: str, groups: Sequence[Sequence[str]]) -> None:
        self.tracker, self.groups = tracker, groups
        self._of_batch = self._hessian if kind == "hessian" else self._gauss_newton
        self._vectorises = True

    @torch.inference_mode(False)
    @torch.enable_grad()
    def product(self, batch: Any, ids: Sequence[Any], x: Mapping[str, Tensor], chunk: int) -> Named:
        """``sum over the batch of (curvature of one example) x``, `chunk` vectors at a time."""
        tracker = self.tracker
        tracker.task.check_targets(batch, ids, tracker.output_shape)
        batch = tracker.move(batch)
        # Fused attention kernels have no second derivative; the plain one has.
        with tracker.quietly(), sdpa_kernel(SDPBackend.MATH), explained(), _twice():
            return self._of_batch(batch, len(ids), x, chunk)

    def _hessian(self, batch: Any, n: int, x: Mapping[str, Tensor], chunk: int) -> Named:
        losses = self.tracker.task.train_loss(self.tracker.model, batch)
        check_per_example(losses[..., None], n)
        grads = self._grads(losses.sum(), create_graph=True)
        return self._by_chunks(
            x, chunk, lambda names, part: self._pull([grads[name] for name in names], names, part)
        )

    def _gauss_newton(self, batch: Any, n: int, x: Mapping[str, Tensor], chunk: int) -> Named:
        task = self.tracker.task
        assert isinstance(task, OutputTask)
        outputs, targets = task.forward(self.tracker.model, batch)
        u = torch.zeros_like(outputs, requires_grad=True)
        pulled = self._grads(outputs, u, create_graph=True)  # J^T u, linear in u
        f = outputs.detach().requires_grad_()
        slope = torch.autograd.grad(task.loss(f, targets).sum(), f, create_graph=True)[0]

        def pushed_and_pulled(names: Sequence[str], part: list[Tensor]) -> Named:
            pushed = self._pull([pulled[name] for name in names], u, part)
            return self._pull([outputs], names, [self._pull([slope], f, [pushed])])

        return self._by_chunks(x, chunk, pushed_and_pulled)

    def _by_chunks(
        self, x: Mapping[str, Tensor], chunk: int, product: Callable[[Sequence[str], list[Tensor]], Named]
    ) -> Named:
        """The products of every group with its part of x, `chunk` vectors at a time."""
        k = len(next(iter(x.values())))
        if 0 < k <= chunk:
            parts = [product(names, [x[name] for name in names]) for names in self.groups]
            return {name: value for part in parts for name, value in part.items()}
        out = {name: torch.empty_like(vectors) for name, vectors in x.items()}
        for names in self.groups:
            for start in range(0, k, chunk):
                rows = slice(start, start + chunk)
                for name, value in product(names, [x[name][rows] for name in names]).items():
                    out[name][rows] = value
        return out

    def _grads(self, value: Tensor, weight: Tensor | None = None, create_graph: bool = False) -> Named:
        """Gradients in the tracked parameters, zero where nothing depends on one."""
        parameters = self.tracker.parameters
        found = torch.autograd.grad(
            value, list(parameters.values()), weight, create_graph=create_graph, allow_unused=True
        )
        named = zip(parameters.items(), found, strict=True)
        return {name: torch.zeros_like(p) if g is None else _strided(g, name) for (name, p), g in named}

    def _pull(self, sources: Sequence[Tensor], into: Any, vectors: Sequence[Tensor]) -> Any:
        """``sum_j (d sources_j / d into)^T vectors_j`` for vectors [k, ...] that share k; zero where unconnected."""
        single = isinstance(into, Tensor)
        targets = [into] if single else [self.tracker.parameters[name] for name in into]
        pairs = [(s, v) for s, v in zip(sources, vectors, strict=True) if s.requires_grad]
        k = len(vectors[0])
        if pairs:
            found = self._vector_jacobian([s for s, _ in pairs], targets, [v for _, v in pairs])
        else:
            found = [None] * len(targets)
        filled = [
            t.new_zeros(k, *t.shape) if g is None else g.detach() for t, g in zip(targets, found, strict=True)
        ]
        return filled[0] if single else dict(zip(into, filled, strict=True))

    def _vector_jacobian(self, sources: list[Tensor], targets: list[Tensor], vectors: list[Tensor]) -> Any:
        def once(*weights: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(sources, targets, weights, retain_graph=True, allow_unused=True)

        if self._vectorises:
            try:
                return _vectorised(once, vectors)
            except (RuntimeError, NotImplementedError) as error:
                if "not implemented" in str(error) and "derivative" in str(error):
                    raise
                self._vectorises = False  # some kernel cannot be vectorised: one vector at a time
        rows = [once(*(v[j] for v in vectors)) for j in range(len(vectors[0]))]
        return [None if parts[0] is None else torch.stack(parts) for parts in zip(*rows, strict=True)]


def _vectorised(once: Callable[..., tuple[Tensor | None, ...]], vectors: list[Tensor]) -> list[Tensor | None]:
    """`once` for every row of the vectors together; None where it gives None.

    By torch.func's vmap: the one behind ``is_grads_batched`` goes through GELU's and softmax's second derivatives one
    row at a time.
    """
    connected: list[bool] = []

    def tensors(*weights: Tensor) -> list[Tensor]:
        found = once(*weights)
        connected[:] = [part is not None for part in found]
        return [part for part in found if part is not None]

    values = iter(torch.func.vmap(tensors)(*(v.contiguous() for v in vectors)))
    return [next(values) if there else None for there in connected]


def _strided(gradient: Tensor, name: str) -> Tensor:
    if gradient.layout != torch.strided:
        raise UpweightError(
            f"the gradient of {name} is sparse, which has no second derivative -> set sparse=False on the embedding, "
            "or leave it out with parameters="
        )
    return gradient


@contextmanager
def _twice() -> Iterator[None]:
    """Name the operation that has no second derivative; hide torch's remarks on what it vectorises slowly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (RuntimeError, NotImplementedError) as error:
            text = str(error).splitlines()[0]
            if "derivative" in text and "not implemented" in text:
                raise UpweightError(
                    f"the model or the loss has no second derivative ({text[:100]}) -> use curvature='ggn' or "
                    "'ekfac', or write that operation with others"
                ) from error
            raise
