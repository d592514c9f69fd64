"""One row of solvers_vs_peers.py in a process of its own: prepare a workload, or score with one method and measure it.

    python benchmarks/_peers.py prepare|ROW FOLDER SETTINGS_AS_JSON

The result is FOLDER/ROW.json, and the scores are FOLDER/ROW.npy, as predicted changes on removal [query, train].
Only the library that the row names is imported.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _runners import Phases
from _workloads import Workload, load, prepare
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

RANK, DEPTH, BATCH, CG_STEPS = 100, 500, 100, 100
"""Low-rank methods keep as many pairs; LiSSA takes as many steps of as many examples; peers' CG takes at most so many
steps. (Lanczos takes twice the rank in steps; our CG stops at its own residual.)"""
OWN_DEPTH = 280
"""Steps of our LiSSA, which are 0.9 over the largest eigenvalue of a batch long instead of 0.5 over the Hessian's:
both sums have about the same length."""


# ------------------------------------------------------------------------------------------------ the dense truth


class Flat:
    """The model as a function of one flat float64 vector, with its gradients and dense curvatures.

    Written with torch.func alone: it shares no code with what is measured.
    """

    def __init__(self, workload: Workload) -> None:
        self.model = workload.model.double()
        parameters = dict(self.model.named_parameters())
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.sizes = [p.numel() for p in parameters.values()]
        self.theta = torch.cat([p.detach().flatten() for p in parameters.values()])
        (x, self.y), (qx, self.qy) = workload.train, workload.query
        self.x, self.qx = x.double(), qx.double()

    def logits(self, theta: Tensor, x: Tensor) -> Tensor:
        parts = zip(self.shapes.items(), theta.split(self.sizes), strict=True)
        return functional_call(self.model, {name: part.view(shape) for (name, shape), part in parts}, (x,))

    def loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(theta, x), y)

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """Of each example's loss [n, p]."""
        one = grad(lambda theta, x, y: self.loss(theta, x[None], y[None]))
        return vmap(one, (None, 0, 0))(self.theta, x, y)

    def hessian_product(self, v: Tensor) -> Tensor:
        return jvp(lambda theta: grad(self.loss)(theta, self.x, self.y), (self.theta,), (v,))[1]

    def hessian(self) -> Tensor:
        """Of the mean loss [p, p]."""
        return vmap(self.hessian_product, chunk_size=64)(torch.eye(len(self.theta), dtype=torch.float64))

    def ggn(self) -> Tensor:
        """``(1/n) sum_i J_i^T (diag(p) - p p^T) J_i`` [p, p]."""
        total = torch.zeros(len(self.theta), len(self.theta), dtype=torch.float64)
        for x in self.x.split(100):
            jacobian = vmap(jacrev(lambda theta, x: self.logits(theta, x[None])[0]), (None, 0))(self.theta, x)
            p = self.logits(self.theta, x).softmax(1)
            centred = p.sqrt()[:, :, None] * (jacobian - torch.einsum("nc,ncp->np", p, jacobian)[:, None])
            flat = centred.flatten(0, 1).detach()
            total.addmm_(flat.mT, flat)
        return total / len(self.x)

    def top_eigenvalue(self, steps: int = 20) -> float:
        """Of the Hessian, by power iteration."""
        v = torch.randn(len(self.theta), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        value = 0.0
        for _ in range(steps):
            v = self.hessian_product(v / v.norm()).detach()
            value = float(v.norm())
        return value


def datainf(train: Tensor, query: Tensor, layers: list[int], damping: float) -> Tensor:
    """DataInf's scores [query, train] with the same damping in every layer, each a weight and its bias."""
    out = torch.zeros(len(query), len(train), dtype=train.dtype)
    for g, v in zip(train.split(layers, 1), query.split(layers, 1), strict=True):
        gram, products = g @ g.mT, v @ g.mT
        share = products / (damping + gram.diagonal())
        out += (products - share @ gram / len(g)) / damping
    return out / len(train)


def write_truth(workload: Workload, folder: Path, damping: float) -> dict[str, float]:
    """The scores of each operator in float64, by dense matrices; what is known of the spectra."""
    import numpy as np

    flat = Flat(workload)
    known = {"hessian_top": flat.top_eigenvalue()}
    if workload.name != "small":
        return known
    train, query = flat.gradients(flat.x, flat.y), flat.gradients(flat.qx, flat.qy)
    n, identity = len(train), torch.eye(len(flat.theta), dtype=torch.float64)
    matrices = {"hessian": flat.hessian(), "ggn": flat.ggn(), "fisher": train.mT @ train / n}
    for name, matrix in matrices.items():
        values = torch.linalg.eigvalsh(matrix)
        known |= {f"{name}_least": float(values[0]), f"{name}_top": float(values[-1])}
        scores = torch.linalg.solve(matrix + damping * identity, query.mT).mT @ train.mT / n
        np.save(folder / f"truth.{name}.npy", scores.detach().numpy())
    widths = [
        sum(p.numel() for p in module.parameters()) for module in workload.model if list(module.parameters())
    ]
    np.save(folder / "truth.datainf.npy", datainf(train, query, widths, damping).detach().numpy())
    return known


# ------------------------------------------------------------------------------------------------ the libraries


def loader(data: tuple[Tensor, Tensor], batch: int) -> Any:
    from torch.utils.data import DataLoader, TensorDataset

    return DataLoader(TensorDataset(*data), batch_size=batch)


def run_upweight(
    workload: Workload, curvature: str, solver: str | None, settings: dict
) -> tuple[Tensor, dict]:
    """``Influence`` as a user calls it; LiSSA, Arnoldi and Nyström with the peers' steps and rank."""
    import upweight as uw
    from upweight.curvature.solvers import Arnoldi, Lissa, Nystrom

    chosen: Any = solver
    if solver == "lissa":
        chosen = Lissa(depth=OWN_DEPTH, batch_size=BATCH)  # finds its own scale
    elif solver in ("arnoldi", "nystrom"):
        chosen = {"arnoldi": Arnoldi, "nystrom": Nystrom}[solver](rank=RANK)
    method = uw.Influence(
        workload.model,
        uw.Classification(),
        curvature="ggn" if curvature == "fisher" else curvature,
        fisher="empirical" if curvature == "fisher" else "auto",
        solver=chosen,
        damping=settings["damping"],
        progress=False,
    )
    scores = method.fit(workload.train).attribute(workload.query)
    return scores.values, {"version": uw.__version__, "solve": scores.info.get("solve", {})}


def run_dattri(workload: Workload, method: str, settings: dict) -> tuple[Tensor, dict]:
    """Its score is that of the mean-loss Hessian (or DataInf) without the 1/n, and [train, query]."""
    from importlib.metadata import version

    from dattri.algorithm.influence_function import (
        IFAttributorArnoldi,
        IFAttributorCG,
        IFAttributorDataInf,
        IFAttributorLiSSA,
    )
    from dattri.task import AttributionTask

    model, damping = workload.model, settings["damping"]

    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        return F.cross_entropy(functional_call(model, params, x), y.long())  # LiSSA casts labels to float

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    if method == "cg":
        attributor: Any = IFAttributorCG(task, max_iter=CG_STEPS, regularization=damping)
    elif method == "arnoldi":
        attributor = IFAttributorArnoldi(task, proj_dim=RANK, max_iter=2 * RANK, regularization=damping)
    elif method == "datainf":
        attributor = IFAttributorDataInf(task, regularization=damping)
    else:  # its fixed point is (H + damping * scaling I)^-1 v
        scale = settings["lissa_scale"]
        attributor = IFAttributorLiSSA(
            task, batch_size=BATCH, recursion_depth=DEPTH, damping=damping / scale, scaling=scale
        )
    # One batch: it adds the inverses of the batches' own Hessians, which is not the inverse of their mean.
    train, query = (
        loader(workload.train, workload.spec.train),
        loader(workload.query, settings["queries_at_once"]),
    )
    attributor.cache(train)
    scores = attributor.attribute(train, query)
    return scores.T / workload.spec.train, {"version": version("dattri")}


def run_captum(workload: Workload, method: str, settings: dict) -> tuple[Tensor, dict]:
    """Its Hessian is that of the summed loss: with n damping its score is ours, the 1/n included."""
    from importlib.metadata import version

    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
    from captum.influence._core.influence_function import NaiveInfluenceFunction

    n, p = workload.spec.train, sum(p.numel() for p in workload.model.parameters())
    arguments: dict[str, Any] = {
        "train_dataset": loader(workload.train, n),
        "checkpoint": "",
        "checkpoints_load_func": lambda model, checkpoint: 1.0,  # the weights are loaded
        "loss_fn": nn.CrossEntropyLoss(reduction="sum"),
        "sample_wise_grads_per_batch": True,  # its faster way
        "hessian_reg": n * settings["damping"],
        "hessian_inverse_tol": 0.0,
    }
    if method == "arnoldi":
        influence: Any = ArnoldiInfluenceFunction(
            workload.model, projection_dim=RANK, arnoldi_dim=2 * RANK, arnoldi_tol=1e-6, **arguments
        )
    else:
        influence = NaiveInfluenceFunction(workload.model, projection_dim=p, **arguments)
    return influence.influence(workload.query), {"version": version("captum")}


def run_pydvl(workload: Workload, method: str, settings: dict) -> tuple[Tensor, dict]:
    """Its score is without the 1/n.

    Its "Gauss-Newton" matrix is the empirical Fisher F, with a factor that 0.10.0 gets wrong and that is undone here
    where it is constant: with one batch, products with k vectors side by side are those of F / k (F / p for one
    vector), and its dense matrix, which takes two batches not to divide by zero, is F n / p. Its simultaneous CG, whose
    k shrinks as it goes, is left out for F.
    """
    from importlib.metadata import version

    from pydvl.influence.torch import (
        ArnoldiInfluence,
        CgInfluence,
        DirectInfluence,
        EkfacInfluence,
        LissaInfluence,
        NystroemSketchInfluence,
        SecondOrderMode,
    )

    model, loss = workload.model, F.cross_entropy
    n, p = workload.spec.train, sum(q.numel() for q in model.parameters())
    name, _, fisher = method.partition("-")
    mode = SecondOrderMode.GAUSS_NEWTON if fisher else SecondOrderMode.HESSIAN
    factor = {"direct": n / p, "cg": 1 / p, "nystrom": 1 / RANK}[name] if fisher else 1.0
    common: dict[str, Any] = {"regularization": factor * settings["damping"], "second_order_mode": mode}
    batch = n if fisher else settings["pydvl_batch"]
    if name == "direct":
        influence: Any = DirectInfluence(model, loss, **common)
        batch = -(-n // 2) if fisher else batch
    elif name == "cg":  # stops where the residual is rtol^2 |b|: 1e-4 of it, as ours
        together = not fisher
        influence = CgInfluence(
            model, loss, rtol=1e-2, maxiter=CG_STEPS, solve_simultaneously=together, **common
        )
    elif name == "lissa":
        batch = BATCH
        influence = LissaInfluence(model, loss, maxiter=DEPTH, scale=settings["lissa_scale"], **common)
    elif name == "arnoldi":
        influence = ArnoldiInfluence(model, loss, rank=RANK, use_woodbury=True, **common)
    elif name == "nystrom":
        influence = NystroemSketchInfluence(model, loss, rank=RANK, **common)
    else:
        influence = EkfacInfluence(model, update_diagonal=True, hessian_regularization=settings["damping"])
    fitted = influence.fit(loader(workload.train, batch))
    scores = fitted.influences(*workload.query, *workload.train)
    return factor * scores / n, {"version": version("pyDVL")}


IMPORTS = {
    "upweight": ("upweight", "upweight.attributors.influence", "upweight.curvature.solvers"),
    "dattri": ("dattri.algorithm.influence_function", "dattri.task"),
    "captum": ("captum.influence._core.arnoldi_influence_function",),
    "pydvl": ("pydvl.influence.torch",),
}
"""What a row imports before its clock starts."""
FIRST_USE = ("torch.fx.experimental.symbolic_shapes",)
"""What torch imports when it first differentiates with given output gradients, which most rows do."""

RUNNERS: dict[str, Callable[[Workload, str, dict], tuple[Tensor, dict]]] = {
    "dattri": run_dattri,
    "captum": run_captum,
    "pydvl": run_pydvl,
}


def run(row: str, workload: Workload, settings: dict) -> tuple[Tensor, dict]:
    """Score with the method that a row names: LIBRARY:METHOD, or upweight:CURVATURE[-SOLVER]."""
    library, _, method = row.partition(":")
    if library == "upweight":
        curvature, _, solver = method.partition("-")
        return run_upweight(workload, curvature, solver or None, settings)
    return RUNNERS[library](workload, method, settings)


def main() -> None:
    """Do what the command line says and write the result."""
    row, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(settings["threads"])
    if row == "prepare":
        if not (folder / "workload.json").exists():
            prepare(settings["workload"], folder)
        workload = load(folder)
        known = write_truth(workload, folder, settings["damping"])
        (folder / "prepare.json").write_text(json.dumps({"workload": workload.info, "known": known}))
        return
    if settings["memory_limit"]:  # an allocation that is too large is then an error of this process
        resource.setrlimit(resource.RLIMIT_DATA, (settings["memory_limit"],) * 2)
    warnings.simplefilter("ignore")
    workload, phases = load(folder), Phases()
    torch.manual_seed(0)
    names = (*IMPORTS[row.partition(":")[0]], *FIRST_USE)
    phases.mark("import", lambda: [import_module(name) for name in names])
    phases.mark("start")
    (folder / f"{row}.started").touch()
    scores, extra = phases.mark("score", lambda: run(row, workload, settings))
    import numpy as np  # after the measurement

    np.save(folder / f"{row}.npy", scores.detach().double().numpy())
    result = {"phases": phases.rows, "torch": torch.__version__, **extra}
    (folder / f"{row}.json").write_text(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
