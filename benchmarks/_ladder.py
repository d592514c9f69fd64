"""What runs in a process of its own for solver_ladder.py: train and find the truth, or one row of the table.

    python benchmarks/_ladder.py prepare|row|iterations FOLDER SETTINGS_AS_JSON

The truth is made by torch.func and LAPACK alone, in float64: the Jacobian of every training example's outputs, the
Gauss-Newton matrix as their dense sum, Cholesky.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import upweight as uw
from upweight.curvature.datainf import DataInfCurvature
from upweight.curvature.solvers import Arnoldi, Astra, ConjugateGradient, Lissa, Nystrom
from upweight.errors import UpweightError

TRAIN, QUERIES = 1000, 48
PENALTY = 1e-3


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 40), nn.GELU(), nn.Linear(40, 10)),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn}
TITLES = {"mlp": "MLP 64-48-32-10", "cnn": "CNN 8-16-40-10"}


# ------------------------------------------------------------------------------------------ data, training, truth


def data(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(digits.images).to(dtype)[order, None] / 16
    y = torch.from_numpy(digits.target)[order]
    last = TRAIN + QUERIES
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:last], y[TRAIN:last])


def train(name: str) -> tuple[nn.Module, float, float]:
    """The model at a minimum of its penalised loss, the loss, and the gradient's length."""
    torch.manual_seed(0)
    model = MODELS[name]()

    def objective(dtype: torch.dtype) -> tuple[list[Tensor], Callable[[], Tensor]]:
        (x, y), _ = data(dtype)
        parameters = list(model.to(dtype).parameters())

        def closure() -> Tensor:
            model.zero_grad()
            penalty = sum((p.square().sum() for p in parameters), torch.zeros((), dtype=dtype))
            loss = F.cross_entropy(model(x), y) + PENALTY / 2 * penalty
            loss.backward()
            return loss

        return parameters, closure

    parameters, closure = objective(torch.float32)
    adam = torch.optim.Adam(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 400)
    for _ in range(400):
        adam.step(closure)
        schedule.step()
    parameters, closure = objective(torch.float64)
    torch.optim.LBFGS(parameters, max_iter=100, history_size=20, line_search_fn="strong_wolfe").step(closure)
    loss = closure().item()
    length = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm().item()
    model.zero_grad(set_to_none=True)
    return model.eval(), loss, length


class Dense:
    """Everything about a model as dense float64 matrices, by torch.func alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.names = model, dict(model.named_parameters())
        self.at = torch.cat([p.detach().flatten() for p in self.names.values()])

    def outputs(self, flat: Tensor, x: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in self.names.values()])
        named = zip(self.names.items(), parts, strict=True)
        return torch.func.functional_call(self.model, {n: t.reshape(p.shape) for (n, p), t in named}, (x,))

    def loss(self, flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.outputs(flat, x[None]), y[None])

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """[n, p]."""
        return torch.func.vmap(torch.func.grad(self.loss), (None, 0, 0))(self.at, x, y)

    def ggn(self, x: Tensor, chunk: int = 50) -> Tensor:
        """Mean of J^T (diag(pi) - pi pi^T) J [p, p], with the penalty."""
        H = torch.zeros(len(self.at), len(self.at), dtype=torch.float64)
        jacobian = torch.func.vmap(
            torch.func.jacrev(lambda flat, one: self.outputs(flat, one[None])[0]), (None, 0)
        )
        for part in x.split(chunk):
            J, pi = jacobian(self.at, part), self.outputs(self.at, part).softmax(1)  # [chunk, class, p]
            root = pi.sqrt()[:, :, None] * (J - (pi[:, :, None] * J).sum(1, keepdim=True))
            rows = root.flatten(0, 1)
            H.addmm_(rows.T, rows)
        H /= len(x)
        H.diagonal().add_(PENALTY)
        return H


def prepare(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, and keep the weights and the scores by the dense inverse at every damping."""
    started = time.perf_counter()
    model, loss, length = train(settings["model"])
    trained = time.perf_counter() - started
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(folder / "weights.safetensors"))
    (x, y), (xq, yq) = data(torch.float64)
    dense = Dense(model)
    H = dense.ggn(x)
    V, G = dense.gradients(xq, yq), dense.gradients(x, y)
    for damping in settings["dampings"]:
        factor = torch.linalg.cholesky(H + damping * torch.eye(len(H), dtype=torch.float64))
        truth = torch.cholesky_solve(V.T, factor).T @ G.T / len(G)
        np.save(folder / f"truth.{damping:g}.npy", truth.numpy())
    with torch.no_grad():
        right = float((model(xq).argmax(1) == yq).double().mean())
    return {
        "title": TITLES[settings["model"]],
        "parameters": len(dense.at),
        "train": len(G),
        "queries": len(V),
        "l2": PENALTY,
        "loss": loss,
        "gradient": length,
        "accuracy": right,
        "train_seconds": trained,
        "prepare_seconds": time.perf_counter() - started,
    }


# ---------------------------------------------------------------------------------------------------- one row

GGN: dict[str, dict[str, Any]] = {
    "direct": {"solver": "direct"},
    "dual": {"solver": "dual"},
    "block CG, sketch": {"solver": "cg", "preconditioner": "sketch"},
    "block CG": {"solver": "cg", "preconditioner": None},
    "block CG, diagonal": {"solver": "cg", "preconditioner": "diagonal"},
    "block CG, EK-FAC": {"solver": "cg", "preconditioner": "ekfac"},
    "CG, one by one": {"solver": ConjugateGradient(block=False, max_iter=400), "preconditioner": None},
    "ASTRA": {"solver": Astra()},
    "Nystrom, 100": {"solver": Nystrom(rank=100)},
    "Nystrom, 400": {"solver": Nystrom(rank=400)},
    "Arnoldi, 100": {"solver": Arnoldi(rank=100)},
    "LiSSA, 200 terms": {"solver": Lissa(depth=200)},
    "LiSSA, 1000 of 100": {"solver": Lissa(depth=1000, batch_size=100)},
}
STRUCTURED = {"EK-FAC": "ekfac", "K-FAC": "kfac", "diagonal": "diagonal", "identity": "identity"}
ROWS = [*GGN, *STRUCTURED, "DataInf"]


def scored(name: str, method_of: Callable[..., uw.Influence], damping: float) -> tuple[Any, Any, Any]:
    """(fit, score, what the scores' evidence says about the solve)."""
    if name in GGN:
        method = method_of(curvature="ggn", damping=damping, l2=PENALTY, **GGN[name])
    elif name in STRUCTURED:  # these do not see the penalty: it is damping to them
        method = method_of(curvature=STRUCTURED[name], damping=damping + PENALTY)
    else:
        return data_inf(method_of(curvature="identity"), damping + PENALTY)

    def score(query: Any) -> Tensor:
        found = method.attribute(query)
        method.evidence = {  # type: ignore[attr-defined]
            **found.info.get("solve", {}),
            "unit": found.unit,
            "all_products": getattr(getattr(method._fitted.curvature, "operator", None), "products", 0),  # type: ignore[union-attr]
        }
        return found.values

    return method.fit, score, method


def data_inf(plain: uw.Influence, damping: float) -> tuple[Any, Any, Any]:
    """DataInf's inverse on the gradients of a fitted plain method."""

    def fit(train: Any) -> None:
        fitted = plain.fit(train)._ready()
        plain.data_inf = DataInfCurvature.fit(fitted.training, fitted.tracker.layers)  # type: ignore[attr-defined]

    def score(query: Any) -> Tensor:
        fitted, examples = plain._ready(), uw.Examples(query)
        inverse = plain.data_inf.inverse(uw.Damping(damping))  # type: ignore[attr-defined]
        queries = inverse @ plain._query_gradients(examples, range(examples.n))
        parts = [queries @ step.load().T / fitted.examples.n for step in fitted.training]
        plain.evidence = {"unit": None}  # type: ignore[attr-defined]
        return torch.cat(parts, 1)

    return fit, score, plain


def row(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fit and score once, and compare with the truth."""
    dtype = getattr(torch, settings["dtype"])
    model = MODELS[settings["model"]]().to(dtype).eval()
    weights = load_file(str(folder / "weights.safetensors"))
    model.load_state_dict({k: v.to(dtype) for k, v in weights.items()})
    training, query = data(dtype)
    truth = np.load(folder / f"truth.{settings['damping']:g}.npy")

    def method_of(**options: Any) -> uw.Influence:
        return uw.Influence(model, uw.Classification(), progress=False, **options)

    # what the first call of anything costs is nobody's: kernels, thread pools
    method_of(curvature="ekfac").fit(first(training, 32)).attribute(first(query, 2))
    fit, score, method = scored(settings["row"], method_of, settings["damping"])
    start_bytes, started = peak(), time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(training)
            fitted = time.process_time()
            values = score(query).double().numpy()
        except UpweightError as error:
            return {"refused": str(error)}
    done = time.process_time()
    evidence = method.evidence  # type: ignore[attr-defined]
    ranks = [np.argsort(np.argsort(s, 1), 1) - (s.shape[1] - 1) / 2 for s in (values, truth)]
    spearman = (ranks[0] * ranks[1]).sum(1) / np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    return {
        "error": float(np.linalg.norm(values - truth) / np.linalg.norm(truth)) if evidence["unit"] else None,
        "spearman": float(spearman.mean()),
        "spearman_least": float(spearman.min()),
        "products": evidence.get("all_products", 0),
        "iterations": evidence.get("iterations", 0),
        "residual": evidence.get("residual_max"),
        "converged": evidence.get("converged"),
        "fit": fitted - started,
        "score": done - fitted,
        "peak_bytes": peak(),
        "start_bytes": start_bytes,
        "warnings": [str(w.message) for w in caught],
    }


# -------------------------------------------------------------------------------------- iterations to a residual


def iterations(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Iterations and products of conjugate gradients to a true residual of 1e-6, float64, by preconditioner."""
    model = MODELS[settings["model"]]().double().eval()
    model.load_state_dict(load_file(str(folder / "weights.safetensors")))
    training, query = data(torch.float64)
    out: dict[str, Any] = {}
    for label, block, preconditioner in (
        ("CG, one by one", False, None),
        ("block CG", True, None),
        ("block CG, diagonal", True, "diagonal"),
        ("block CG, EK-FAC", True, "ekfac"),
        ("CG one by one, sketch", False, "sketch"),
        ("block CG, sketch", True, "sketch"),
    ):
        solver = ConjugateGradient(rtol=1e-6, max_iter=400, block=block)
        method = uw.Influence(
            model,
            uw.Classification(),
            curvature="ggn",
            solver=solver,
            preconditioner=preconditioner,
            l2=PENALTY,
            damping=settings["dampings"][0],
            progress=False,
        )
        method.fit(training)
        for damping in settings["dampings"]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                info = method.with_damping(damping).attribute(query).info["solve"]
            out.setdefault(label, {})[f"{damping:g}"] = {
                key: info[key] for key in ("iterations", "products", "seconds", "residual_max", "converged")
            }
    return out


def first(pair: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    return pair[0][:count], pair[1][:count]


def peak() -> int:
    """Bytes of the greatest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS and KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    work, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(settings["threads"])
    found = {"prepare": prepare, "row": row, "iterations": iterations}[work](settings, folder)
    (folder / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
