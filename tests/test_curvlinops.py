"""K-FAC and EK-FAC against another library's, curvlinops': the operators themselves and their damped inverses, for the
empirical Fisher, the same sampled targets, and the exact expectation.

curvlinops scales a mean-reduced loss as we do (the mean over the data); of a sum-reduced loss its operator is the
number of examples times larger.
"""

from collections.abc import Callable
from itertools import cycle

import curvlinops
import pytest
import torch
from curvature_oracles import relative
from torch import Tensor, nn

import upweight as uw
from upweight.curvature.operators import Kronecker
from upweight.gradients import Dense, Gradients

N, DAMPING, DRAWS, SEED = 8, 2e-3, 3, 5


class Sequence(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).tanh()).tanh()
        return self.head(h.mT @ torch.linspace(0.5, 1.5, h.shape[1], dtype=h.dtype))


class Images(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.second, self.head = nn.Conv2d(3, 4, (1, 2), dilation=(1, 2)), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).tanh()).tanh().flatten(2)
        return self.head(h @ torch.linspace(0.5, 1.5, h.shape[2], dtype=h.dtype))


MODELS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda outputs: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)), (4,)),
    "sequence": (Sequence, (7, 3)),
    "images": (Images, (2, 5, 5)),
}
FISHERS = {"empirical": "empirical", "sampled": "mc", "exact": "type-2"}


def problem(name: str, kind: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    build, shape = MODELS[name]
    torch.manual_seed(1)
    outputs = {"classification": 3, "regression": 2, "binary": 1}[kind]
    x = torch.randn(N, *shape, dtype=torch.float64)
    if kind == "regression":
        y = torch.randn(N, outputs, dtype=torch.float64)
    elif kind == "binary":
        y = torch.randint(0, 2, (N, 1)).double()
    else:
        y = torch.randint(0, outputs, (N,))
    return build(outputs).double().eval(), (x, y)


def theirs(
    operator: str, model: nn.Module, train: tuple[Tensor, Tensor], kind: str, fisher: str, task: uw.Task
):
    """Their operator, with the targets that our method draws."""
    loss = {
        "classification": nn.CrossEntropyLoss(reduction="mean"),
        "regression": nn.MSELoss(reduction="sum"),
        "binary": nn.BCEWithLogitsLoss(reduction="sum"),
    }[kind]
    base = {"kfac": curvlinops.KFACLinearOperator, "ekfac": curvlinops.EKFACLinearOperator}[operator]

    class SameDraws(base):
        def draw_label(self, output: Tensor) -> Tensor:
            return next(drawn)

    with torch.no_grad():
        outputs, _ = task.forward(model, train)
        targets = task.draw(outputs, DRAWS, torch.Generator().manual_seed(SEED))
    drawn = cycle(
        [targets[:, d].reshape(N, -1) if kind != "classification" else targets[:, d] for d in range(DRAWS)]
    )
    return SameDraws(
        model,
        loss,
        list(model.parameters()),
        [train],
        check_deterministic=False,
        fisher_type=FISHERS[fisher],
        mc_samples=DRAWS if fisher == "sampled" else 1,
        kfac_approx="expand",
        separate_weight_and_bias=False,
        num_data=N,
    )


def ours(
    operator: str, model: nn.Module, train: tuple[Tensor, Tensor], fisher: str, task: uw.Task
) -> uw.Influence:
    method = uw.Influence(
        model, task, curvature=operator, fisher=fisher, draws=DRAWS, seed=SEED, damping=DAMPING, batch_size=3
    )
    return method.fit(train)


def apply(method: uw.Influence, model: nn.Module, vectors: Tensor, inverse: bool) -> Tensor:
    """Our curvature, or its damped inverse, times vectors [parameters, k] in the order of ``model.parameters()``."""
    fitted = method._fitted
    parameters = dict(model.named_parameters())
    eye = {name: torch.eye(layer.numel, dtype=torch.float64) for name, layer in fitted.tracker.layers.items()}
    columns = dict(zip(parameters, vectors.split([p.numel() for p in parameters.values()]), strict=True))
    blocks = {}
    for name, layer in fitted.tracker.layers.items():  # a layer's flat order is what to_parameters undoes
        undo = layer.to_parameters(eye[name])
        blocks[name] = Dense(sum(undo[p].flatten(1) @ columns[p] for p in layer.parameters).T)
    curvature = fitted.curvature
    if inverse:
        applied = curvature.inverse(method.damping) @ Gradients(blocks)
    else:
        applied = Gradients({name: Dense(times(curvature.layers[name], b)) for name, b in blocks.items()})
    found = {}
    for name, layer in fitted.tracker.layers.items():
        found |= layer.to_parameters(applied[name].dense())
    return torch.cat([found[p].flatten(1) for p in parameters], 1).T


def times(kronecker: Kronecker, block: Dense) -> Tensor:
    """``H G`` of gradients [k, parameters]."""
    groups, rows, cols = kronecker.values.shape
    G = block.dense().reshape(-1, groups, rows, cols).transpose(0, 1)
    return (
        kronecker.basis.back(kronecker.basis.rotate_dense(G) * kronecker.values[:, None])
        .transpose(0, 1)
        .flatten(1)
    )


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", ["classification", "regression", "binary"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("operator", ["kfac", "ekfac"])
def test_the_same_operator_and_the_same_inverse(operator: str, name: str, kind: str, fisher: str):
    model, train = problem(name, kind)
    task = {
        "classification": uw.Classification(),
        "regression": uw.Regression(scale=1.0),
        "binary": uw.BinaryClassification(),
    }[kind]
    scale = 1 if kind == "classification" else N  # a sum-reduced loss
    reference = theirs(operator, model, train, kind, fisher, task)
    method = ours(operator, model, train, fisher, task)
    vectors = torch.randn(sum(p.numel() for p in model.parameters()), 6, dtype=torch.float64)
    assert relative(apply(method, model, vectors, inverse=False), reference @ vectors / scale) < 1e-10
    inverse = curvlinops.KFACInverseLinearOperator(reference, damping=DAMPING * scale, use_exact_damping=True)
    assert relative(apply(method, model, vectors, inverse=True), (inverse @ vectors) * scale) < 1e-10


class PerToken(nn.Module):
    """Logits for every token, [batch, class, token] as cross-entropy wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh()).transpose(1, 2)


def test_kfac_of_a_loss_per_token():
    """Each example's loss is the sum over its tokens, as K-FAC "expand" wants it."""
    torch.manual_seed(1)
    model = PerToken().double().eval()
    train = torch.randn(N, 6, 3, dtype=torch.float64), torch.randint(0, 4, (N, 6))

    def loss(model: nn.Module, batch) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y, reduction="none").sum(1)

    method = ours("kfac", model, train, "empirical", uw.Task.from_functions(loss))
    reference = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        list(model.parameters()),
        [train],
        check_deterministic=False,
        fisher_type="empirical",
        separate_weight_and_bias=False,
    )
    vectors = torch.randn(sum(p.numel() for p in model.parameters()), 6, dtype=torch.float64)
    assert relative(apply(method, model, vectors, inverse=False), reference @ vectors / N) < 1e-10
