"""Cases of normalisation layers: their affine parameters are one vector an example."""

import torch
from cases import CLASSES, Case, Head, Net, frozen, normal, parameter, registry
from cases_basic import FEATURES
from torch import nn

CASES, case = registry()
AFFINE = {"norm.weight": "affine"}


def norm_of_features(norm: nn.Module) -> nn.Module:
    def forward(m, x):
        return m.b(m.norm(m.a(x)).tanh())

    return Net(forward, a=nn.Linear(4, 6), norm=norm, b=nn.Linear(6, CLASSES))


def norm_of_maps(norm: nn.Module) -> nn.Module:
    return Net(lambda m, x: m.head(m.norm(m.scale * x)), scale=parameter(1), norm=norm, head=Head(4))


def norm_of_sequences(norm: nn.Module) -> nn.Module:
    return Net(lambda m, x: m.b(m.norm(x).tanh().mean(1)), norm=norm, b=nn.Linear(4, CLASSES))


def used(norm: nn.Module) -> nn.Module:
    """A BatchNorm that has seen data."""
    norm.get_buffer("running_mean").normal_()
    norm.get_buffer("running_var").uniform_(0.5, 2.0)
    return norm


CASES += [
    Case(
        "layer norm",
        lambda: norm_of_features(nn.LayerNorm(6)),
        FEATURES,
        how={**AFFINE, "norm.bias": "affine"},
    ),
    Case(
        "layer norm without bias", lambda: norm_of_features(nn.LayerNorm(6, bias=False)), FEATURES, how=AFFINE
    ),
    Case(
        "layer norm without affine",
        lambda: norm_of_features(nn.LayerNorm(6, elementwise_affine=False)),
        FEATURES,
    ),
    Case("layer norm over two axes", lambda: norm_of_maps(nn.LayerNorm((4, 5))), normal(4, 5), how=AFFINE),
    Case(
        "layer norm frozen in part",
        lambda: frozen(norm_of_features(nn.LayerNorm(6)), "norm.weight"),
        FEATURES,
    ),
    Case(
        "layer norm of sequences",
        lambda: norm_of_sequences(nn.LayerNorm(4, eps=0.1)),
        normal(5, 4),
        longer=normal(7, 4),
        how=AFFINE,
    ),
    Case("rms norm", lambda: norm_of_features(nn.RMSNorm(6)), FEATURES, how=AFFINE),
    Case("rms norm with eps", lambda: norm_of_features(nn.RMSNorm(6, eps=0.1)), FEATURES, how=AFFINE),
    Case("rms norm of sequences", lambda: norm_of_sequences(nn.RMSNorm(4)), normal(5, 4), how=AFFINE),
    Case("group norm of features", lambda: norm_of_features(nn.GroupNorm(2, 6)), FEATURES, how=AFFINE),
    Case(
        "group norm of one group", lambda: norm_of_maps(nn.GroupNorm(1, 4, eps=0.1)), normal(4, 5), how=AFFINE
    ),
    Case("group norm of maps", lambda: norm_of_maps(nn.GroupNorm(2, 4)), normal(4, 3, 3), how=AFFINE),
    Case(
        "instance norm 1d", lambda: norm_of_maps(nn.InstanceNorm1d(4, affine=True)), normal(4, 6), how=AFFINE
    ),
    Case(
        "instance norm 2d",
        lambda: norm_of_maps(nn.InstanceNorm2d(4, affine=True)),
        normal(4, 3, 3),
        how=AFFINE,
    ),
    Case(
        "instance norm 3d",
        lambda: norm_of_maps(nn.InstanceNorm3d(4, affine=True)),
        normal(4, 2, 3, 2),
        how=AFFINE,
    ),
    Case("batch norm of features", lambda: norm_of_features(used(nn.BatchNorm1d(6))), FEATURES, how=AFFINE),
    Case(
        "batch norm 1d",
        lambda: norm_of_maps(used(nn.BatchNorm1d(4))),
        normal(4, 6),
        how=AFFINE,
        longer=normal(4, 9),
    ),
    Case("batch norm 2d", lambda: norm_of_maps(used(nn.BatchNorm2d(4))), normal(4, 3, 3), how=AFFINE),
    Case("batch norm 3d", lambda: norm_of_maps(used(nn.BatchNorm3d(4))), normal(4, 2, 3, 2), how=AFFINE),
]


@case(normal(2, 5, 5))
def biases_whose_gradient_is_zero_in_theory():
    """A convolution's bias before an InstanceNorm: what autograd gives is rounding noise, and no reason to doubt."""

    def forward(m, x):
        return m.head(m.norm(m.conv(x)))

    return Net(forward, conv=nn.Conv2d(2, 4, 3), norm=nn.InstanceNorm2d(4), head=Head(4))


@case(normal(2, 6, 6), how={"first": "factors", "norm.weight": "affine"})
def residual_block():
    def forward(m, x):
        h = m.first(x)
        h = h + torch.relu_(m.norm(m.second(h)))
        return m.head(h)

    first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
    return Net(forward, first=first, second=second, norm=used(nn.BatchNorm2d(4)), head=Head(4))
