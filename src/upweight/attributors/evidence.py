"""What a score carries to be judged by: method, curvature, damping, coverage, routes, versions, fingerprints."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from upweight.attributors.panel import BEYOND
from upweight.cache import CachePass
from upweight.curvature import Curvature, Inverse
from upweight.curvature.l2 import describe_l2
from upweight.gradients import Coverage, Factored, Gradients, Router, Spectral
from upweight.gradients.separable import exact_scores, query_errors
from upweight.passes import Kept

if TYPE_CHECKING:
    from upweight.attributors.base import Attributor
    from upweight.attributors.fitted import Fitted
    from upweight.attributors.influence import Influence


def influence_info(method: Influence, fitted: Fitted) -> dict[str, Any]:
    """The evidence of one result, JSON-able."""
    kind, columns = fitted.fisher
    coverage = fitted.tracker.coverage
    training = fitted.training
    stored: dict[str, Any] = {"where": "recomputed"}
    if isinstance(training, CachePass):
        stored = {"where": "disk", "precision": training.cache.precision, "relative_error": training.error}
    elif fitted.index is not None:
        stored = {"where": "disk", "precision": "index", **fitted.index.facts}
    elif isinstance(training, Kept) and training.share_in_memory > 0:
        rotated = len(fitted.rotated)
        stored = {"where": "memory", "share": training.share_in_memory, "layers_in_eigenbasis": rotated}
    return {
        "method": "influence",
        "curvature": method.curvature,
        "correction": method.correction,
        **({"left_out_of": left_out_of(fitted)} if method.correction == "rescaled" else {}),
        "fisher": kind if method.curvature not in ("identity", "hessian") else None,
        "fisher_columns": columns,
        "represented": fitted.curvature.info.get("represented", {}),
        "damping": fitted.curvature.info.get("auto_damping", {}).get("damping")
        if method.damping.auto and "auto_damping" in fitted.curvature.info
        else method.damping.describe(),
        "l2": describe_l2(method.l2),
        "layer_damping": fitted.curvature.damping(method.damping),
        **{
            key: fitted.curvature.info[key]
            for key in ("auto_damping", "implicit_l2", "without_effect")
            if fitted.curvature.info.get(key) not in (None, [])
        },
        "higher_is_better": method.task.higher_is_better,
        "convention": "positive = proponent: removing the training example is predicted to make the query worse",
        "coverage": {
            "parameters": coverage.parameters,
            "squared_gradient_norm": coverage.squared_norm,
        },
        "layers": coverage.layers,
        "n": fitted.examples.n,
        "batch_size": fitted.batch_size,
        "training_gradients": stored,
        "seed": method.seed,
        "tolerance": method.tolerance,
        "dtype": str(fitted.dtype).removeprefix("torch."),
        "autocast": str(method.autocast).removeprefix("torch.") if method.autocast is not None else None,
        "fingerprints": dict(fitted.fingerprints),
        "versions": {"upweight": _version(), "torch": torch.__version__, "python": platform.python_version()},
        **fitted.notes,
    }


def left_out_of(fitted: Fitted) -> str:
    """What an example that is removed leaves: all of the curvature, or a structured one's eigenvalues."""
    return "eigenvalues" if isinstance(fitted.curvature, Curvature) else "curvature"


def shared_info(
    name: str,
    method: Attributor,
    coverage: Coverage | None,
    fingerprints: dict[str, str],
    n: int,
    batch_size: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The evidence that every result carries, whatever the method, under the same keys as `influence_info`.

    Args:
        name: the method's name.
        method: its task and options.
        coverage: of the tracked parameters; None for a method that tracks none.
        fingerprints: of model and training data.
        n: training examples.
        batch_size: examples per forward pass.
        dtype: of the scores.
    """
    tracked = {}
    if coverage is not None:
        shares = {"parameters": coverage.parameters, "squared_gradient_norm": coverage.squared_norm}
        tracked = {"coverage": shares, "layers": coverage.layers}
    return {
        "method": name,
        "higher_is_better": method.task.higher_is_better,
        "convention": "positive = proponent: training on the example made the query better, to the method's belief",
        **tracked,
        "n": n,
        "batch_size": batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "autocast": str(method.autocast).removeprefix("torch.") if method.autocast is not None else None,
        "fingerprints": dict(fingerprints),
        "versions": library_versions(),
    }


def measure_separable_error(
    query: Gradients, train: Gradients, inverse: Inverse, router: Router, tolerance: float
) -> float | None:
    """Relative error (Frobenius) of the separable layers' summed scores, real queries against a training sample.

    Of those queries whose scores are separable; None if all of them take exact routes (see `gather_panel`).
    """
    preconditioned = inverse @ query
    kept = (query_errors(preconditioned, inverse, router.terms) <= BEYOND * tolerance).nonzero()[:, 0]
    if len(kept) == 0:
        return None
    difference = norm = None
    for name in router.terms:
        block = preconditioned[name][kept]
        own = train[name]
        if not isinstance(block, Spectral) or not isinstance(own, Factored):
            continue
        approximate = router.contract(name, block, own)
        left, right = block.basis.rotate(own)
        factors = block.left[0, :, 0], block.right[0, :, 0]
        exact = exact_scores(block.filter[0], factors, (left[0, :, 0], right[0, :, 0]))
        difference = approximate - exact if difference is None else difference + approximate - exact
        norm = exact if norm is None else norm + exact
    if difference is None or norm is None:
        return 0.0
    size = float(norm.norm())
    return float(difference.norm()) / size if size > 0 else 0.0


def library_versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    return {"upweight": _version(), "torch": torch.__version__, "python": platform.python_version()}


@cache
def _version() -> str:
    try:
        return version("upweight")
    except PackageNotFoundError:
        return "unknown"
