"""Which models a repair certifies: those that are one linear layer, and no other; and it refuses none for that."""

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from torch import nn

import upweight as uw

N, D = 60, 4
OPTIONS = {"l2": 0.05, "damping": 0.1, "progress": False}


class Using(nn.Module):
    """One 4 x 4 linear layer, used as a function says."""

    def __init__(self, forward):
        super().__init__()
        self.layer, self.use = nn.Linear(D, D), forward

    def forward(self, x):
        return self.use(self.layer, x)


class Cosine(nn.Linear):
    def forward(self, input):
        return 5 * F.linear(F.normalize(input), F.normalize(self.weight), self.bias)


def hooked():
    layer = nn.Linear(D, D)
    layer.register_forward_hook(lambda module, args, out: out.tanh())
    return layer


def deep(*last):
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D), *last)


def with_frozen_head():
    net = deep()
    net[2].requires_grad_(False)
    return net


NOT_LINEAR = {
    "log-softmax": lambda: nn.Sequential(nn.Linear(D, D), nn.LogSoftmax(1)),
    "temperature": lambda: Using(lambda layer, x: layer(x) / 2),
    "residual": lambda: Using(lambda layer, x: x + layer(x)),
    "tanh": lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh()),
    "recurrent": lambda: Using(lambda layer, x: torch.tanh(layer(torch.tanh(layer(x))))),
    "used twice": lambda: Using(lambda layer, x: layer(torch.tanh(layer(x)))),
    "its own input": lambda: Using(lambda layer, x: layer(torch.tanh(x @ layer.weight.mT))),
    "a scale of its weight": lambda: Using(lambda layer, x: layer(x / layer.weight.detach().norm())),
    "functional": lambda: Using(lambda layer, x: F.linear(F.normalize(x), F.normalize(layer.weight))),
    "by position": lambda: Using(lambda layer, x: layer(x[:, None]).mean(1)),
    "fewer outputs": lambda: Using(lambda layer, x: F.pad(layer(x)[:, :3], (0, 1))),
    "rectified": lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU()),
    "cosine": lambda: Cosine(D, D),
    "hook": hooked,
    "frozen head": with_frozen_head,
}


def problem(regression=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator)
    y = torch.randn(N, D, generator=generator) if regression else torch.arange(N) % D
    torch.manual_seed(0)
    return x, y


@pytest.mark.parametrize("method", ["newton", "gradient"])
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_layer_that_is_not_the_model_is_repaired_without_a_certificate(name, method):
    for task, regression in ((uw.Classification(), False), (uw.Regression(), True)):
        data = problem(regression)
        repair = uw.unlearn(NOT_LINEAR[name](), task, data, [3, 4], method=method, **OPTIONS)
        assert repair.certificate is None and repair.evidence["certificate"] is None


def test_the_first_layer_of_a_network_has_none():
    """Its head has other outputs, and no bias among what is repaired."""
    data = problem()
    net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D))
    repair = uw.unlearn(net, uw.Classification(), data, [3], parameters="^0", **OPTIONS)
    assert repair.certificate is None
    assert torch.equal(repair.model[2].weight, net[2].weight)
    assert not torch.equal(repair.model[0].weight, net[0].weight)


def test_every_example_is_looked_at():
    """A rectifier that cuts nothing but one late example's output."""
    x, y = problem()
    x = x.abs()
    x[50] = -x[50]
    net = nn.Sequential(nn.Linear(D, D), nn.ReLU())
    with torch.no_grad():
        net[0].weight.abs_().add_(1)
        net[0].bias.fill_(0.1)
    options = {**OPTIONS, "damping": 100.0, "batch_size": 8}
    assert uw.unlearn(net, uw.Classification(), (x, y), [3], **options).certificate is None
    with refused("outputs are not those of its last linear layer 0, expected nothing after it -> use"):
        uw.unlearn(
            net, uw.Classification(), (x, y), [3], l2=0.05, method="last_layer", batch_size=8, progress=False
        )


def test_the_last_layer_alone_needs_inputs_that_stay():
    """A layer before it that has its weight would move what goes into it."""
    model = NOT_LINEAR["its own input"]()
    with refused("goes into the last linear layer layer depends on its own weights"):
        uw.unlearn(model, uw.Classification(), problem(), [3], l2=0.05, method="last_layer", progress=False)


LINEAR = {
    "linear": (lambda: nn.Linear(D, D), {}),
    "in a module": (lambda: Using(lambda layer, x: layer(x)), {}),
    "by keyword": (lambda: Using(lambda layer, x: layer(input=x)), {}),
    "after what stays": (deep, {"parameters": "^2"}),
    "its weight alone": (deep, {"parameters": r"^2\.weight"}),
    "its bias alone": (deep, {"parameters": r"^2\.bias"}),
    "flattened": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(D, D), nn.Dropout()).eval(), {}),
    "last layer": (deep, {"method": "last_layer"}),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_model_keeps_its_certificate(name):
    make, options = LINEAR[name]
    for task, regression in ((uw.Classification(), False), (uw.Regression(), True)):
        model = make()
        before = [p.clone() for p in model.parameters()]
        repair = uw.amend(
            model, task, problem(regression), remove=[3, 4], weights={5: 0.5}, **OPTIONS, **options
        )
        proof = repair.certificate
        assert proof is not None and 0 < proof.measured <= proof.bound
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert proof.measured == pytest.approx(repair.evidence["residual_gradient_norm"]["after"], rel=1e-3)
