"""The exact Gauss-Newton matrix or Hessian of the mean training loss, by its products with vectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from upweight.budget import (
    BATCH_BYTES,
    BATCH_SHARE,
    KEEP_SHARE,
    batch_size_for,
    memory_text,
    parse_memory,
)
from upweight.curvature.curvature import Curvature
from upweight.curvature.fit import fit_curvature
from upweight.curvature.l2 import L2, l2_vector
from upweight.curvature.products import TwiceDifferentiated
from upweight.curvature.root import Root, RootPass, joined
from upweight.curvature.sums import Sum
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Tracker
from upweight.gradients.checks import is_finite
from upweight.gradients.layers import from_parameters, to_parameters
from upweight.gradients.probe import largest_losses
from upweight.passes import FisherPass, Kept, LoadedSteps, counted
from upweight.progress import progress_bar
from upweight.task import FisherKind, OutputTask, resolve_fisher
from upweight.task.base import MOST_EXACT_COLUMNS

EXACT_KINDS = ("ggn", "hessian")
DENSE_SHARE = 0.5
"""A dense matrix, with the copies that its inverse takes, may fill this share of the memory budget."""
DENSE_COPIES = 3
VECTORS = 64
"""Vectors that a product of the root takes at a time: the fastest of 64, 128 and 384, as measured on an MLP."""
UNITS = 384
"""Columns of the identity that a dense matrix is made from at a time."""
SYMMETRY_EXAMPLES = 8
PRODUCT_BYTES = 64 << 20
"""Working memory of differentiating twice."""
SLOW = 1.0
"""Seconds from which on a product shows its progress."""
ACTIVATION_COPIES = 8
"""Differentiating twice holds about this many times the bytes of a batch's factors for every vector."""


class ExactCurvature:
    """``H = (1/n) sum_i d2 l_i + l2 I``, or its Gauss-Newton part ``(1/n) sum_i J_i^T l_i'' J_i + l2 I``.

    Vectors are flat, [p, k], in the order of `Gradients.dense`: the tracked layers side by side.

    Args:
        tracker: of the model; its parameters are those of H.
        examples: the training data.
        kind: ``"ggn"`` or ``"hessian"``.
        l2: the regulariser ``(1/2) sum_j l2_j theta_j^2`` that was part of the training objective: one coefficient, or
            {regular expression of parameter names: coefficient}, or a tensor [p].
        batch_size: examples a batch; chosen from the memory budget if None. The data is always cut the same way.
        blocks: leave out what couples different layers.
        fisher: ``"exact"`` for the Gauss-Newton matrix itself; ``"sampled"`` (targets drawn from the model, `draws` an
            example) or ``"empirical"`` (the data's targets) for the Fisher of that kind in its place.
        draws: targets an example for ``"sampled"``.
        seed: of the sampled targets.
        memory: bytes to stay within: an int, ``"2GB"``, or ``"auto"`` (half of what is free).
        progress: show a progress bar for every product that takes long.

    Cost: a product with k vectors takes, for the Gauss-Newton matrix of a model with up to 32 outputs, about 4 n p k
    multiply-adds (min(positions, outputs) times that where layers see several positions), all of them in large matrix
    products; else a forward and backward pass and k second backward passes.

    Raises:
        UpweightError: a Gauss-Newton matrix is asked for of a task that does not say what the model's outputs are.

    Source: "Fast Exact Multiplication by the Hessian" (Pearlmutter 1994), "Fast Curvature Matrix-Vector Products for
    Second-Order Gradient Descent" (Schraudolph 2002).

    Example:
        >>> import torch, upweight as uw
        >>> from upweight.gradients import Tracker
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = uw.Examples((x, y))
        >>> tracker = Tracker(model, uw.Regression(), data)
        >>> H = ExactCurvature(tracker, data, l2=0.5)  # (1 + 9) / 2 + 0.5
        >>> H.product(torch.ones(1, 1)).item()
        5.5
    """

    def __init__(
        self,
        tracker: Tracker,
        examples: Examples,
        kind: str = "ggn",
        l2: L2 = 0.0,
        batch_size: int | None = None,
        blocks: bool = False,
        *,
        fisher: FisherKind = "exact",
        draws: int = 4,
        seed: int = 0,
        memory: int | str = "auto",
        progress: bool = False,
    ) -> None:
        if kind not in EXACT_KINDS:
            raise UpweightError(f"kind={kind!r} is unknown -> use one of {list(EXACT_KINDS)}")
        self.tracker, self.data, self.kind, self.blocks = tracker, examples, kind, blocks
        self.ridge = l2_vector(l2, tracker)  # [p]
        self.l2 = float(self.ridge.mean())  # one number, for what only needs the scale
        self.floor = float(self.ridge.min())
        self.fisher: FisherKind = fisher
        self.draws, self.seed, self.memory = draws, seed, parse_memory(memory)
        self.size = sum(layer.numel for layer in tracker.layers.values())
        self.positive = kind == "ggn"
        self.products = 0.0
        self.progress, self._calls, self._seconds = progress, 0, 0.0
        self._widths = [layer.numel for layer in tracker.layers.values()]
        probe = tracker.train(examples.take([0]), examples.ids[:1])
        self._example_bytes = float(max(1, probe.nbytes))
        self.columns = self._count_columns()
        per_example = self._example_bytes * max(1, self.columns)
        chosen = batch_size_for(per_example, examples.n, self.memory)
        self.batch_size = examples.preferred_batch_size or batch_size or chosen
        self._twice: TwiceDifferentiated | None = None
        self._roots: Kept[Root] | None = None
        self._roots_fit = per_example * examples.n <= self.memory * KEEP_SHARE
        if self.columns:
            self._roots = Kept(
                RootPass(self.fisher_pass()), self.memory * KEEP_SHARE, lambda root: root.nbytes
            )
        else:
            groups = (
                [layer.parameters for layer in tracker.layers.values()] if blocks else [[*tracker.parameters]]
            )
            self._twice = TwiceDifferentiated(tracker, kind, groups)
            self._check_symmetric()

    def fisher_pass(self) -> FisherPass:
        """Passes over the columns of a Gauss-Newton matrix's root, by the model."""
        return FisherPass(self.tracker, self.data, self.batch_size, self.fisher, self.columns, self.seed)

    @property
    def examples(self) -> int:
        """Training examples n."""
        return self.data.n

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that products are computed in."""
        return self.tracker.dtype

    # Products ----------------------------------------------------------------------------------------------------

    def product(self, x: Tensor) -> Tensor:
        """``H x`` [p, k] for x [p, k], in x's dtype: over all the data, the same bits each time."""
        self._check(x)
        self.products += x.shape[1]
        self._calls, started = self._calls + 1, time.perf_counter()
        product = self._regularised(self._full(x), x)
        self._seconds = time.perf_counter() - started
        return product

    def sampled_product(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """``H_batch x`` [p, k]: the mean over the training examples at these positions, and the regulariser."""
        self._check(x)
        count = len(positions)
        self.products += x.shape[1] * count / self.data.n
        if self._twice is not None:
            batch, ids = self.data.take(positions), [self.data.ids[p] for p in positions]
            return self._regularised(self._differentiated([(batch, ids)], x, count, self.dtype), x)
        roots = self._sampled_roots(positions)
        return self._regularised(self._of_roots(roots, x, self.dtype).div_(count), x)

    def _full(self, x: Tensor) -> Tensor:
        what = f"{self.kind}, product {self._calls} with {x.shape[1]} vectors"
        with progress_bar(what, self.data.n, self.progress and self._seconds > SLOW) as advance:
            if self._roots is None:
                batches = counted(self.data.batches(self.batch_size), advance)
                with_ids = ((rows.batch, self.data.ids[rows.start : rows.stop]) for rows in batches)
                return self._differentiated(with_ids, x, self.data.n)
            roots = (step.load() for step in self._roots)
            return self._of_roots(roots, x, advance=advance).div_(self.data.n)

    def _of_roots(
        self,
        roots: Iterable[Root],
        x: Tensor,
        dtype: torch.dtype = torch.float64,
        advance: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """``sum over roots of S^T S x``: sums within a batch in the model's precision, over batches in this one."""
        out = torch.zeros(x.shape, dtype=dtype, device=self.tracker.device)
        width = min(VECTORS, x.shape[1])
        most = min(
            self.memory * BATCH_SHARE / 2, self.size * width * x.element_size()
        )  # beside what is joined
        for root in joined(roots, most):
            for a in range(0, x.shape[1], VECTORS):
                parts = x[:, a : a + VECTORS].to(self.dtype).split(self._widths)
                named = dict(zip(self.tracker.layers, parts, strict=True))
                found = root.product(named, self.blocks)
                for (start, stop), part in zip(self.spans(), found.values(), strict=True):
                    out[start:stop, a : a + VECTORS] += part
            advance(root.batch)
            del root  # before the next one is joined
        return out

    def _differentiated(
        self, batches: Any, x: Tensor, count: int, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        assert self._twice is not None
        layers = self.tracker.layers
        named = to_parameters(layers, x.T.to(self.dtype))
        parameters = self.tracker.parameters
        vectors = {name: v.to(parameters[name].dtype) for name, v in named.items()}
        total: Tensor | None = None
        for batch, ids in batches:
            size = ACTIVATION_COPIES * self._example_bytes * len(ids) + 4 * x.element_size() * self.size
            chunk = max(1, int(min(PRODUCT_BYTES, self.memory * BATCH_SHARE) / size))
            found = self._twice.product(batch, ids, vectors, chunk)
            flat = from_parameters(layers, found).to(dtype)
            total = flat if total is None else total.add_(flat)
        assert total is not None
        return total.div_(count).T.contiguous()

    def _check_symmetric(self) -> None:
        """Raise if ``x . H y`` is not ``y . H x``: torch's second derivative of some operation is then wrong."""
        positions = largest_losses(self.tracker, self.data, SYMMETRY_EXAMPLES)  # else H is rounding noise
        x = torch.randn(self.size, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = x.to(self.tracker.device, self.dtype)
        batch, ids = self.data.take(positions), [self.data.ids[p] for p in positions]
        Hx = self._differentiated([(batch, ids)], x, len(ids))
        products = x.T.double() @ Hx
        gap = float((products[0, 1] - products[1, 0]).abs())
        size = float(torch.linalg.vector_norm(x[:, 0].double()) * torch.linalg.vector_norm(Hx[:, 1]))
        if size > 0 and gap > (1e-9 if self.dtype == torch.float64 else 1e-3) * size:
            raise UpweightError(
                f"the second derivative that torch computes is not symmetric (x.Hy and y.Hx differ by {gap / size:.1e} "
                "of |x| |Hy|): an operation's double backward is wrong, as weight_norm's is -> use curvature='ggn', "
                "fold the parametrisation into the weight (parametrize.remove_parametrizations), or leave it out with "
                "parameters="
            )

    def _sampled_roots(self, positions: Sequence[int]) -> Iterator[Root]:
        assert self._roots is not None
        if self._roots.share_in_memory < 1 and self._roots_fit:
            self._roots_fit = False  # asked once
            for step in self._roots:
                step.load()
        if self._roots.share_in_memory < 1:
            batch, ids = self.data.take(positions), [self.data.ids[p] for p in positions]
            generator = torch.Generator().manual_seed(self.seed)
            yield Root.of(self.tracker.fisher(batch, ids, self.fisher, self.columns, generator))
            return
        wanted = torch.as_tensor(positions, device=self.tracker.device)
        for step in self._roots:
            here = wanted[(wanted >= step.start) & (wanted < step.stop)] - step.start
            if len(here):
                yield step.load().take(here)

    def _regularised(self, product: Tensor, x: Tensor) -> Tensor:
        if not is_finite(product):
            raise UpweightError(
                f"a {self.kind} product is not finite -> look for exploding activations, or use float64"
            )
        return (product.addcmul_(x, self.ridge.to(x)[:, None]) if self.l2 else product).to(x.dtype)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or len(x) != self.size:
            raise UpweightError(
                f"vectors have shape {tuple(x.shape)}, expected [{self.size}, k] -> transpose Gradients.dense()"
            )

    # Dense -------------------------------------------------------------------------------------------------------

    def dense(self) -> Tensor:
        """H [p, p], float64, symmetric.

        Raises:
            UpweightError: the matrix and its inverse do not fit the memory budget.
        """
        self.check_dense()
        H = self._gram() if self._by_gram() else self._by_columns()
        H = (H + H.T).mul_(0.5)
        H.diagonal().add_(self.ridge.to(H))
        return H

    def dense_bytes(self) -> int:
        """Bytes that the dense matrix and its inverse take."""
        return DENSE_COPIES * 8 * self.size**2

    def check_dense(self) -> None:
        """Raise if a dense matrix does not fit the memory budget."""
        if not self.fits_dense():
            raise UpweightError(
                f"the dense {self.kind} of {self.size:,} parameters takes {memory_text(self.dense_bytes())} with its "
                f"inverse, more than the {memory_text(self.memory * DENSE_SHARE)} of the memory budget for it -> "
                "use solver='cg' or 'dual', curvature='ekfac', fewer parameters=, or a larger memory="
            )

    def fits_dense(self) -> bool:
        """Whether a dense matrix and its inverse fit the memory budget."""
        return self.dense_bytes() <= self.memory * DENSE_SHARE

    def _by_columns(self) -> Tensor:
        """Products with the identity, without the regulariser."""
        H = torch.empty(self.size, self.size, dtype=torch.float64, device=self.tracker.device)
        for a in range(0, self.size, UNITS):
            width = min(UNITS, self.size - a)
            units = torch.zeros(self.size, width, dtype=self.dtype, device=H.device)
            units[a : a + width].fill_diagonal_(1)
            H[:, a : a + width] = self._full(units)
        self.products += self.size
        return H

    def _gram(self) -> Tensor:
        """``S^T S / n`` from the root's columns, formed a batch at a time."""
        assert self._roots is not None
        total = Sum(gather=1)
        for root in self._formed():
            total.add_gram(root.dense()[None])
        self.products += self.size
        gram = total.symmetric()
        assert gram is not None
        H = gram[0] / self.data.n
        return torch.block_diag(*(H[a:b, a:b] for a, b in self.spans())) if self.blocks else H

    def _formed(self) -> Iterator[Root]:
        """The roots, cut so that their columns can be formed."""
        assert self._roots is not None
        item = torch.finfo(self.dtype).bits // 8
        step = max(1, int(BATCH_BYTES / (self.columns * self.size * item)))
        for part in self._roots:
            root = part.load()
            for a in range(0, root.batch, step):
                yield root.take(torch.arange(a, min(a + step, root.batch), device=self.tracker.device))

    def _by_gram(self) -> bool:
        """Whether forming the root's columns takes fewer operations than products with the identity."""
        if self._roots is None:
            return False
        root = next(iter(self._roots)).load()
        by_products = sum(
            4 * layer.work * w for layer, w in zip(root.layers.values(), self._widths, strict=True)
        )
        return 1.25 * self.columns * self.size < by_products

    def spans(self) -> list[tuple[int, int]]:
        """First and last parameter of each layer in a flat vector."""
        stops = torch.tensor(self._widths).cumsum(0).tolist()
        return [(stop - width, stop) for stop, width in zip(stops, self._widths, strict=True)]

    def trace(self) -> float | None:
        """The trace of H from the root's columns; None where there is no root."""
        if self._roots is None:
            return None
        total = sum(
            float(part.double().square().sum()) for root in self._formed() for part in (root.dense(),)
        )
        return total / self.data.n + self.l2 * self.size

    def structured(self, kind: str) -> Curvature:
        """A block-diagonal curvature (``"ekfac"``, ``"diagonal"``) of the same model and data, for a preconditioner."""
        task, model = self.tracker.task, self.tracker.model
        with torch.no_grad(), self.tracker.quietly():
            batch = self.tracker.move(self.data.take([0]))
            fisher, columns = resolve_fisher(task, model, batch, "auto", self.draws)
        source = FisherPass(self.tracker, self.data, self.batch_size, fisher, columns, self.seed)
        kept = Kept(source, self.memory * KEEP_SHARE, lambda found: sum(g.nbytes for g in found))
        return fit_curvature(kind, self.tracker.layers, LoadedSteps(kept), self.data.n, self.dtype)

    # Columns -----------------------------------------------------------------------------------------------------

    def _count_columns(self) -> int:
        """Columns an example of the root that products go by; 0 to differentiate twice instead."""
        if self.kind == "hessian":
            return 0
        task, model = self.tracker.task, self.tracker.model
        with torch.no_grad(), self.tracker.quietly():
            batch = self.tracker.move(self.data.take([0]))
            try:
                columns = task.fisher_columns(model, batch, self.fisher, self.draws)
            except NotImplementedError:  # a task of outputs that only says its loss
                return 0
        if not columns:
            raise UpweightError(
                f"a Gauss-Newton matrix (fisher={self.fisher!r}) needs to know the model's outputs, which this task "
                "does not say -> use curvature='hessian', give Task.from_functions a sampled_loss= and "
                "fisher='sampled', or use one of the tasks of outputs (Classification, Regression)"
            )
        if self.fisher == "exact" and columns > MOST_EXACT_COLUMNS and isinstance(task, OutputTask):
            return 0
        return columns
