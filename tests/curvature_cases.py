"""Small float64 networks whose curvature is compared with dense matrices, their Fisher columns, and their methods."""

from collections.abc import Callable
from dataclasses import dataclass

import curvature_oracles as oracle
import torch
from torch import Tensor, nn

import upweight as uw
from upweight.gradients import Dense

N, QUERIES = 7, 4
DAMPING = 3e-3


class Pooled(nn.Module):
    """Logits of a sequence or of maps: every position with another weight, so that none may be mixed up."""

    def __init__(self, body: nn.Module, width: int, outputs: int, channels_first: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.channels_first = body, nn.Linear(width, outputs), channels_first

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        h = h.flatten(2) if self.channels_first else h.transpose(1, 2)
        ramp = torch.linspace(0.5, 1.5, h.shape[2], dtype=h.dtype)
        return self.head(h @ ramp / h.shape[2])


class Reused(nn.Module):
    """One layer called on inputs of one, two or three lengths."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.head, self.lengths = nn.Linear(4, 4), nn.Linear(4, 3), lengths

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for length in self.lengths:
            h = self.layer(h[:, :length]).tanh()
        return self.head(h.mean(1))


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kind: str = "classification"
    outputs: int = 3

    def build(self) -> nn.Module:
        torch.manual_seed(1)
        model = self.model().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    def data(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "regression":
            return x, torch.randn(n, self.outputs, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, 2 if self.kind == "binary" else self.outputs, (n,), generator=generator)

    def task(self) -> uw.Task:
        return {
            "classification": uw.Classification,
            "binary": uw.BinaryClassification,
            "regression": uw.Regression,
        }[self.kind]()

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        return oracle.loss_of(self.kind, f, y)


def mlp(outputs: int, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 5, bias), nn.Tanh(), nn.Linear(5, outputs, bias))


def sequence(outputs: int = 3) -> Callable[[], nn.Module]:
    return lambda: Pooled(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)), 4, outputs)


def images(*body: nn.Module, channels: int = 4) -> Callable[[], nn.Module]:
    return lambda: Pooled(nn.Sequential(*body), channels, 3, channels_first=True)


CASES = [
    Case("linear", lambda: nn.Linear(4, 3), (4,)),
    Case("mlp", mlp(3), (4,)),
    Case("mlp without biases", mlp(3, bias=False), (4,)),
    Case("mlp of a binary label", mlp(1), (4,), "binary", 1),
    Case("mlp regression", mlp(2), (4,), "regression", 2),
    Case("sequence of 1", sequence(), (1, 3)),
    Case("sequence of 2", sequence(), (2, 3)),
    Case("sequence of 7", sequence(), (7, 3)),
    Case("sequence regression", sequence(2), (7, 3), "regression", 2),
    Case("conv1d", images(nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2)), (2, 9)),
    Case("conv2d", images(nn.Conv2d(2, 4, 3, padding=1)), (2, 4, 4)),
    Case(
        "conv2d, strided, dilated, uneven", images(nn.Conv2d(2, 4, (2, 3), (2, 1), (1, 2), (1, 2))), (2, 4, 5)
    ),
    Case("conv2d in two groups", images(nn.Conv2d(4, 4, 2, groups=2)), (4, 3, 4)),
    Case("conv2d, depthwise", images(nn.Conv2d(4, 8, 2, groups=4, bias=False), channels=8), (4, 3, 3)),
    # not on 3 pixels: a kernel as large as a circle has shift-invariant inputs, whose eigenvectors are not unique
    Case("conv2d, circular", images(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")), (2, 5, 6)),
    Case("two convolutions", images(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 4, 2)), (2, 4, 4)),
    Case("a layer called twice", lambda: Reused((1, 1)), (1, 4)),
    Case("a layer called three times, shorter each time", lambda: Reused((7, 4, 2)), (7, 4)),
]
FISHERS = ("exact", "sampled", "empirical")
DRAWS, SEED = 3, 11


def columns_of(
    case: Case, model: nn.Module, train: tuple[Tensor, Tensor], fisher: str
) -> list[oracle.Columns]:
    """For each example its Fisher columns; sampled ones with the very targets that the method draws."""
    n = len(train[1])
    if fisher == "exact":
        return [oracle.EXPECTATION[case.kind]] * n
    if fisher == "empirical":
        return [lambda f, y: [case.loss(f, y)]] * n
    task = case.task()
    outputs, _ = task.forward(model, train)
    drawn = task.draw(outputs.detach(), DRAWS, torch.Generator().manual_seed(SEED))

    def of_example(i: int) -> oracle.Columns:
        return lambda f, y: [case.loss(f, drawn[i, d][None]) / DRAWS**0.5 for d in range(DRAWS)]

    return [of_example(i) for i in range(n)]


def recorded(
    case: Case, model: nn.Module, train: tuple[Tensor, Tensor], fisher: str
) -> dict[str, oracle.Layer]:
    whole: dict[str, oracle.Layer] = {}
    for i, columns in enumerate(columns_of(case, model, train, fisher)):
        one = oracle.record(model, (train[0][i : i + 1], train[1][i : i + 1]), columns)
        for name, layer in one.items():
            if name in whole:
                whole[name].seen.extend(layer.seen)
            else:
                whole[name] = layer
    return whole


def influence(case: Case, model: nn.Module, curvature: str, fisher: str, damping, **options) -> uw.Influence:
    return uw.Influence(
        model,
        case.task(),
        curvature=curvature,
        fisher=fisher,
        draws=DRAWS,
        seed=SEED,
        damping=damping,
        **options,
    )


def matrix(layer: oracle.Layer, parameters: dict[str, Tensor], name: str) -> Tensor:
    """A layer's parameters [k, *shape] as rows of [weight | bias], flattened."""
    weight = parameters[f"{name}.weight" if name else "weight"].flatten(2)
    if layer.bias:
        weight = torch.cat([weight, parameters[f"{name}.bias" if name else "bias"][..., None]], -1)
    return weight.flatten(1)


def dense_inverse(method: uw.Influence, layers: dict[str, oracle.Layer]) -> dict[str, Tensor]:
    """``(H + damping I)^-1`` of each layer as a matrix in the oracle's order of parameters."""
    fitted = method._fitted
    assert fitted is not None
    tracked = fitted.tracker.layers
    eye = {name: Dense(torch.eye(layer.numel, dtype=torch.float64)) for name, layer in tracked.items()}
    inverse = fitted.curvature.inverse(method.damping)
    out = {}
    for key, layer in tracked.items():
        applied = inverse.curvature.layers[key].precondition(eye[key], inverse.damping[key]).dense()
        name = key if key in layers else ""
        rows = matrix(layers[name], layer.to_parameters(applied), name)
        order = matrix(layers[name], layer.to_parameters(eye[key].dense()), name).argmax(0)
        out[name] = rows[order]
    return out


def key_of(method: uw.Influence, name: str) -> str:
    return name or next(iter(method._fitted.tracker.layers))  # a lone layer is called by its weight
