"""Cases of parameters that belong to no layer: lone biases, scales, embeddings of positions, matrices by ``@``."""

import torch
from cases import CLASSES, Head, Net, normal, parameter, registry
from cases_basic import FEATURES, mlp
from torch import nn

CASES, case = registry()


# Shifts


@case(FEATURES, how={"bias": "affine"})
def lone_bias():
    return Net(lambda m, x: m.a(x) + m.bias, a=nn.Linear(4, CLASSES, bias=False), bias=parameter(CLASSES))


@case(FEATURES, how={"bias": "affine"})
def lone_bias_on_the_left():
    return Net(lambda m, x: torch.add(m.bias, m.a(x)), a=nn.Linear(4, CLASSES), bias=parameter(1, CLASSES))


@case(FEATURES, how={"bias": "affine"})
def one_shift_for_all_features():
    return Net(
        lambda m, x: m.b((m.a(x) + m.bias).tanh()),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, CLASSES),
        bias=parameter(),
    )


@case(FEATURES, fallback=("bias",))
def lone_bias_added_in_place():
    return Net(lambda m, x: m.a(x).add_(m.bias), a=nn.Linear(4, CLASSES), bias=parameter(CLASSES))


@case(normal(5, 4), how={"position": "affine"})
def position_embedding():
    return Net(lambda m, x: m.head((x + m.position).mT), head=Head(4), position=parameter(5, 4))


@case(normal(5, 4), how={"position": "affine"})
def position_embedding_with_a_leading_axis():
    return Net(lambda m, x: m.head((x + m.position).mT), head=Head(4), position=parameter(1, 5, 4))


@case(normal(5, 4), fallback=("position",), longer=normal(7, 4))
def position_embedding_cut_to_length():
    return Net(lambda m, x: m.head((x + m.position[: x.shape[1]]).mT), head=Head(4), position=parameter(9, 4))


@case(normal(3, 4), fallback=("token",))
def class_token_concatenated():
    def forward(m, x):
        return m.head(torch.cat([m.token.expand(len(x), -1, -1), x], 1).mT)

    return Net(forward, head=Head(4), token=parameter(1, 1, 4))


# Scales


@case(FEATURES, how={"scale": "affine"})
def scale_of_features():
    return Net(lambda m, x: m.a(x * m.scale), a=nn.Linear(4, CLASSES), scale=parameter(4))


@case(normal(4, 3, 3), how={"scale": "affine"})
def scale_of_channels():
    return Net(lambda m, x: m.head(m.scale * x), head=Head(4), scale=parameter(4, 1, 1))


@case(FEATURES, how={"scale": "affine"})
def one_scale_for_all():
    return Net(lambda m, x: m.scale * m.a(x), a=nn.Linear(4, CLASSES), scale=parameter())


@case(FEATURES, how={"scale": "affine"})
def scale_used_twice():
    return Net(lambda m, x: m.a((x * m.scale).tanh() * m.scale), a=nn.Linear(4, CLASSES), scale=parameter(4))


@case(FEATURES, fallback=("scale", "shift"))
def product_of_two_parameters():
    return Net(
        lambda m, x: m.a(x + m.scale * m.shift),
        a=nn.Linear(4, CLASSES),
        scale=parameter(4),
        shift=parameter(4),
    )


# Matrices


@case(FEATURES, how={"W": "factors", "V": "factors"})
def matrix_by_matmul():
    return Net(lambda m, x: (x @ m.W).tanh() @ m.V, W=parameter(4, 6), V=parameter(6, CLASSES))


@case(normal(5, 4), how={"W": "factors", "V": "factors"})
def matrix_by_matmul_on_sequences():
    def forward(m, x):
        return torch.matmul(torch.matmul(x, m.W).tanh().mean(1), m.V)

    return Net(forward, W=parameter(4, 6), V=parameter(6, CLASSES))


@case(FEATURES, how={"W": "factors"}, fallback=("mean", "deviation"))
def mm_subtraction_and_division():
    def forward(m, x):
        return torch.mm(x - m.mean, m.W) / (m.deviation.square() + 1)

    return Net(forward, W=parameter(4, CLASSES), mean=parameter(4), deviation=parameter(CLASSES))


@case(normal(4, 6), fallback=("W",))
def matrix_from_the_left():
    return Net(lambda m, x: m.head(m.W @ x), head=Head(5), W=parameter(5, 4))


@case(normal(5, 4), how={"weight": "factors", "b": "factors"}, longer=normal(3, 4))
def addmm_as_in_gpt2():
    def forward(m, x):
        hidden = torch.addmm(m.bias, x.view(-1, x.shape[-1]), m.weight).view(*x.shape[:2], 6)
        return m.b(hidden.tanh().mean(1))

    return Net(forward, weight=parameter(4, 6), bias=parameter(6), b=nn.Linear(6, CLASSES))


@case(FEATURES, how={"a": "factors", "scale": "affine"})
def casts_that_do_nothing():
    def forward(m, x):
        weight = m.a.weight.to(x.dtype).contiguous()
        return torch.nn.functional.linear(x, weight, m.a.bias.to(x.device)) * m.scale.type_as(x)

    return Net(forward, a=nn.Linear(4, CLASSES), scale=parameter(CLASSES))


@case(FEATURES, fallback=("W",))
def einsum():
    return Net(lambda m, x: torch.einsum("bi,oi->bo", x, m.W), W=parameter(CLASSES, 4))


@case(FEATURES, fallback=("pair.weight", "pair.bias"))
def bilinear():
    return Net(lambda m, x: m.pair(x, x.tanh()), pair=nn.Bilinear(4, 4, CLASSES))


@case(FEATURES, fallback=("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"))
def weight_norm():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


@case(FEATURES, zero=("spare.weight", "spare.bias"))
def unused_layer():
    return Net(lambda m, x: m.a(x), a=nn.Linear(4, CLASSES), spare=nn.Linear(4, 2))


class Doubled(torch.autograd.Function):
    """A product with a weight that no torch function shows."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight

    @staticmethod
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        return 2 * grads[0] @ weight.T, 2 * x.T @ grads[0]


@case(FEATURES, fallback=("W",))
def custom_autograd_function():
    return Net(lambda m, x: Doubled.apply(x, m.W), W=parameter(4, CLASSES))
