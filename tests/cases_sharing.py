"""Cases in which one parameter is used in several places: modules called again, tied weights, shared biases."""

import torch.nn.functional as F
from cases import CLASSES, Net, normal, registry, tokens
from cases_basic import FEATURES
from torch import nn

CASES, case = registry()


# Modules called several times


@case(FEATURES, how={"a": "factors"})
def called_twice():
    return Net(lambda m, x: m.b(m.a(m.a(x).tanh()).tanh()), a=nn.Linear(4, 4), b=nn.Linear(4, CLASSES))


@case(FEATURES, how={"a": "factors", "norm.weight": "affine"})
def called_three_times_with_a_norm():
    def forward(m, x):
        for _ in range(3):
            x = x + m.a(m.norm(x)).tanh()
        return m.b(x)

    return Net(forward, a=nn.Linear(4, 4), norm=nn.LayerNorm(4), b=nn.Linear(4, CLASSES))


def two_lengths(n, generator):
    return normal(5, 4)(n, generator), normal(2, 4)(n, generator)


def other_lengths(n, generator):
    return normal(3, 4)(n, generator), normal(7, 4)(n, generator)


@case(two_lengths, how={"a": "factors"}, longer=other_lengths)
def called_on_two_lengths():
    def forward(m, x, z):
        return m.b(m.a(x).tanh().mean(1) * m.a(z).tanh().sum(1))

    return Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, CLASSES))


@case(normal(5, 4), how={"a": "factors"})
def called_on_a_sequence_and_on_its_mean():
    def forward(m, x):
        return m.b(m.a(x).tanh().mean(1) + m.a(x.mean(1)).tanh())

    return Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, CLASSES))


@case(normal(5, 4), how={"a": "factors"})
def called_batch_first_and_time_first():
    def forward(m, x):
        return m.b(m.a(x).tanh().cumsum(1)[:, -1] * m.a(x.transpose(0, 1)).tanh()[0])

    return Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, CLASSES))


@case(normal(2, 6, 6), how={"conv": "factors"})
def convolution_called_on_two_sizes():
    def forward(m, x):
        return m.out(m.conv(x).tanh().mean((2, 3)) * m.conv(F.avg_pool2d(x, 2)).tanh().sum((2, 3)))

    return Net(forward, conv=nn.Conv2d(2, 4, 3, padding=1), out=nn.Linear(4, CLASSES))


@case(normal(2, 6, 6), how={"conv": "factors"})
def convolution_used_with_two_strides():
    def forward(m, x):
        fine = F.conv2d(x, m.conv.weight, m.conv.bias, padding=1)
        coarse = F.conv2d(x, m.conv.weight, m.conv.bias, stride=2, dilation=2)
        return m.out(fine.tanh().mean((2, 3)) * coarse.tanh().sum((2, 3)))

    return Net(forward, conv=nn.Conv2d(2, 4, 3), out=nn.Linear(4, CLASSES))


@case(FEATURES, how={"b": "factors"})
def unused_call():
    """A layer called once for nothing: that use gets no gradient."""

    def forward(m, x):
        m.a(x * 2)
        return m.b(m.a(x).tanh())

    return Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, CLASSES))


# Tied weights


@case(tokens(5), how={"table": "factors"}, longer=tokens(8))
def tied_embedding_and_head():
    def forward(m, ids):
        return m.head(m.mix(m.table(ids)).tanh().mean(1))[:, :CLASSES]

    model = Net(forward, table=nn.Embedding(7, 4), mix=nn.Linear(4, 4), head=nn.Linear(4, 7, bias=False))
    model.head.weight = model.table.weight
    return model


@case(tokens(5), how={"table": "factors", "head.bias": "affine"})
def tied_embedding_and_head_with_bias_and_padding():
    def forward(m, ids):
        return m.head(m.table(ids).tanh().mean(1))[:, :CLASSES]

    model = Net(forward, table=nn.Embedding(7, 4, padding_idx=2), head=nn.Linear(4, 7))
    model.head.weight = model.table.weight
    return model


@case(tokens(5), how={"table": "factors"})
def embedding_used_by_a_function():
    def forward(m, ids):
        return F.linear(m.table(ids).tanh().mean(1), m.table.weight)[:, :CLASSES]

    return Net(forward, table=nn.Embedding(7, 4))


def pair_of_layers() -> nn.Module:
    def forward(m, x):
        return m.c(m.b(m.a(x).tanh()).tanh())

    return Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, CLASSES))


@case(FEATURES, how={"a": "factors", "a.bias": "affine", "b.bias": "affine"})
def tied_pair():
    model = pair_of_layers()
    model.b.weight = model.a.weight
    return model


@case(FEATURES, how={"a": "factors", "b": "factors"})
def shared_bias():
    model = pair_of_layers()
    model.b.bias = model.a.bias
    return model


@case(FEATURES, fallback=("a.weight",))
def transposed_tie_by_t():
    def forward(m, x):
        return m.out(F.linear(m.a(x).tanh(), m.a.weight.t()).tanh())

    return Net(forward, a=nn.Linear(4, 6), out=nn.Linear(4, CLASSES))


@case(FEATURES, how={"a": "factors", "a.bias": "affine"})
def transposed_tie_by_matmul():
    """An autoencoder: in by ``F.linear``, out by ``h @ W``."""

    def forward(m, x):
        return m.out((m.a(x).tanh() @ m.a.weight).tanh())

    return Net(forward, a=nn.Linear(4, 6), out=nn.Linear(4, CLASSES))


@case(normal(2, 5, 5), how={"conv": "factors", "conv.bias": "affine"})
def convolution_tied_to_its_transpose():
    def forward(m, x):
        back = F.conv_transpose2d(m.conv(x).tanh(), m.conv.weight, stride=2, padding=1)
        return m.out(back.tanh().mean((2, 3)))

    return Net(forward, conv=nn.Conv2d(2, 4, 3, stride=2, padding=1), out=nn.Linear(2, CLASSES))


@case(normal(4, 6, 6), fallback=("conv.weight",))
def kernel_shared_by_two_groupings():
    def forward(m, x):
        grouped = F.conv2d(x, m.conv.weight, groups=2)
        return m.out(m.conv(x[:, :2]).tanh().mean((2, 3)) * grouped.tanh().mean((2, 3)))

    return Net(forward, conv=nn.Conv2d(2, 4, 3), out=nn.Linear(4, CLASSES))


@case(FEATURES, fallback=("a.weight",))
def linear_weight_that_also_scales():
    def forward(m, x):
        return m.out(m.a(x).tanh() * m.a.weight.sum())

    return Net(forward, a=nn.Linear(4, 4), out=nn.Linear(4, CLASSES))
