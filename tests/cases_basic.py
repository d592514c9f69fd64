"""Cases of networks of linear layers: losses, layouts, in-place steps, forms of batches, frozen parts, filters."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from cases import CLASSES, Case, Head, Net, frozen, normal, registry
from torch import Tensor, nn

CASES, case = registry()
FEATURES = normal(4)


def mlp(activation: type[nn.Module] = nn.Tanh, classes: int = CLASSES, **options) -> nn.Module:
    first, second = activation(**options), activation(**options)
    return nn.Sequential(nn.Linear(4, 6), first, nn.Linear(6, 5), second, nn.Linear(5, classes))


# Losses


CASES += [
    Case("linear", lambda: nn.Linear(4, CLASSES), FEATURES, how={"weight": "factors"}),
    Case("linear without bias", lambda: nn.Linear(4, CLASSES, bias=False), FEATURES),
    Case("linear regression", lambda: nn.Linear(4, 2), FEATURES, "regression"),
    Case("logistic", lambda: nn.Linear(4, 1), FEATURES, "binary"),
    Case("mlp", mlp, FEATURES, how={"0": "factors", "2": "factors", "4": "factors"}),
    Case("mlp regression", lambda: mlp(classes=2), FEATURES, "regression"),
    Case("mlp logistic", lambda: mlp(classes=1), FEATURES, "binary"),
    Case("relu mlp", lambda: mlp(nn.ReLU), FEATURES),
    Case("in-place relu mlp", lambda: mlp(nn.ReLU, inplace=True), FEATURES),
]


@case(FEATURES, "binary")
def logistic_whose_outputs_have_no_axis():
    return Net(lambda m, x: m.a(x)[:, 0], a=nn.Linear(4, 1))


def absolute(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y[:, None]).abs().sum(1) + 0.1 * model(x).square().sum(1)


def siamese(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    left, right, _ = batch
    return (model(left) - model(right)).square().sum(1)


def penalised(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    fit = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return fit + 0.1 * model.get_parameter("0.weight").square().sum()


CASES += [
    Case("absolute loss", mlp, FEATURES, "functions", absolute),
    Case("siamese loss", mlp, lambda n, g: (normal(4)(n, g), normal(4)(n, g)), "functions", siamese),
    Case("weight decay inside the loss", mlp, FEATURES, "functions", penalised, fallback=("0.weight",)),
]


# Where the examples are in the tensors


@case(normal(5, 4), longer=normal(8, 4))
def linear_on_sequences():
    return Net(lambda m, x: m.b(m.a(x).tanh().mean(1)), a=nn.Linear(4, 6), b=nn.Linear(6, CLASSES))


@case(normal(2, 3, 4))
def linear_on_grids():
    return Net(lambda m, x: m.b(m.a(x).tanh().mean((1, 2))), a=nn.Linear(4, 6), b=nn.Linear(6, CLASSES))


@case(normal(5, 4), longer=normal(8, 4))
def time_before_batch():
    def forward(m, x):
        return m.b(m.a(x.transpose(0, 1)).tanh().cumsum(0)[-1])

    return Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, CLASSES))


@case(normal(3, 4))
def positions_merged_into_the_batch():
    def forward(m, x):
        return m.b(m.a(x.flatten(0, 1)).tanh().reshape(-1, 3, 6).sum(1))

    return Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, CLASSES))


@case(normal(3, 4))
def batch_merged_into_the_positions():
    def forward(m, x):
        return m.b(m.a(x.transpose(0, 1).flatten(0, 1)).tanh().reshape(3, -1, 6)[1])

    return Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, CLASSES))


@case(normal(3, 5))
def non_contiguous_input():
    return Net(
        lambda m, x: m.b(m.a(x.transpose(1, 2)).tanh().mean(1)), a=nn.Linear(3, 6), b=nn.Linear(6, CLASSES)
    )


# Steps that overwrite


@case(FEATURES)
def in_place_steps():
    def forward(m, x):
        h = m.a(x)
        h += x
        h = m.b(h)
        h.mul_(0.5).relu_()
        return m.c(h)

    return Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, CLASSES))


@case(FEATURES)
def in_place_skip_connection():
    def forward(m, x):
        h = m.a(x).tanh()
        g = m.b(h)
        g += h
        return m.c(g)

    return Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, CLASSES))


@case(FEATURES)
def frozen_weight_whose_input_is_overwritten():
    def forward(m, x):
        h = m.a(x).tanh()
        g = m.b(h)
        h.mul_(2.0)  # nobody needs h any more: b's weight is frozen, and tanh was read before
        return m.c(g)

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, CLASSES))
    return frozen(model, "a.weight", "a.bias", "b.weight")


# Forms of calls and batches


@case(FEATURES)
def layers_called_by_keyword():
    def forward(m, x):
        return m.b(input=m.norm(input=m.a(input=x)))

    return Net(forward, a=nn.Linear(4, 6), norm=nn.LayerNorm(6), b=nn.Linear(6, CLASSES))


@case(FEATURES, how={"a": "factors", "norm.weight": "affine", "norm.bias": "affine"})
def functions_called_by_keyword():
    def forward(m, x):
        h = F.layer_norm(input=x, normalized_shape=(4,), weight=m.norm.weight, bias=m.norm.bias)
        return F.linear(input=h, weight=m.a.weight, bias=m.a.bias)

    return Net(forward, a=nn.Linear(4, CLASSES), norm=nn.LayerNorm(4))


def masked(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "values": normal(3, 4)(n, generator),
        "mask": (torch.rand(n, 3, generator=generator) > 0.3).double(),
    }


@case(masked)
def dict_batches():
    return Net(lambda m, values, mask: m.a((values * mask[..., None]).sum(1)), a=nn.Linear(4, CLASSES))


@case(lambda n, g: {"x": normal(4)(n, g)})
def outputs_with_logits():
    return Net(lambda m, x: SimpleNamespace(logits=m.a(x)), a=nn.Linear(4, CLASSES))


@case(lambda n, g: (normal(4)(n, g), normal(3)(n, g)))
def several_inputs():
    return Net(lambda m, x, z: m.a(x) + m.b(z), a=nn.Linear(4, CLASSES), b=nn.Linear(3, CLASSES))


CASES += [
    Case("autocast mlp", mlp, FEATURES, autocast=torch.bfloat16),
    Case(
        "autocast convolution",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), Head(4)),
        normal(2, 5, 5),
        autocast=torch.bfloat16,
    ),
]


# Parts of the parameters


REST = ("2.weight", "2.bias", "4.weight", "4.bias")
CASES += [
    Case("only weights", mlp, FEATURES, parameters=r"weight$", how={"0": "factors"}),
    Case("only biases", mlp, FEATURES, parameters=r"bias$", how={"0.bias": "affine", "4.bias": "affine"}),
    Case("only the last layer", mlp, FEATURES, parameters=r"^4\."),
    Case("first layer frozen", lambda: frozen(mlp(), "0.weight", "0.bias"), FEATURES),
    Case("weight frozen, bias not", lambda: frozen(mlp(), "2.weight"), FEATURES, how={"2.bias": "affine"}),
    Case("bias frozen, weight not", lambda: frozen(mlp(), "2.bias"), FEATURES, how={"2": "factors"}),
    Case("only the first layer trained", lambda: frozen(mlp(), *REST), FEATURES, how={"0": "factors"}),
]
