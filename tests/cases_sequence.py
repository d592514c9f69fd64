"""Cases of sequences of tokens or of time steps: embeddings, recurrent networks, loops, activation checkpointing."""

import torch
import torch.nn.functional as F
from cases import CLASSES, Case, Net, normal, parameter, registry, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

CASES, case = registry()
SPARSE = {"table": "sparse rows"}


# Embeddings


def embedded(**options) -> nn.Module:
    def forward(m, ids):
        return m.out(m.table(ids).tanh().mean(1))

    return Net(forward, table=nn.Embedding(7, 4, **options), out=nn.Linear(4, CLASSES))


CASES += [
    Case("embedding", embedded, tokens(6), how=SPARSE, longer=tokens(9)),
    Case("embedding with a padding row", lambda: embedded(padding_idx=0), tokens(6), how=SPARSE),
    Case(
        "embedding with a padding row from the end", lambda: embedded(padding_idx=-1), tokens(6), how=SPARSE
    ),
    Case("sparse embedding", lambda: embedded(sparse=True), tokens(6), how=SPARSE),
]


@case(lambda n, g: tokens(1)(n, g)[:, 0], how=SPARSE)
def embedding_of_one_token():
    return Net(lambda m, ids: m.out(m.table(ids).tanh()), table=nn.Embedding(7, 4), out=nn.Linear(4, CLASSES))


@case(tokens(6), how=SPARSE)
def embedding_with_time_before_batch():
    return Net(
        lambda m, ids: m.out(m.table(ids.T).tanh().cumsum(0)[-1]),
        table=nn.Embedding(7, 4),
        out=nn.Linear(4, 3),
    )


@case(lambda n, g: (tokens(4)(n, g), tokens(3)(n, g)), how=SPARSE)
def embedding_used_twice():
    def forward(m, left, right):
        return m.out(m.table(left).tanh().mean(1) * m.table(right).mean(1))

    return Net(forward, table=nn.Embedding(7, 4), out=nn.Linear(4, CLASSES))


def positions(place) -> nn.Module:
    """Positions are the same for all examples, so that what is looked up for them has no axis of examples."""

    def forward(m, ids):
        words = m.table(ids)
        return m.out(place(m, words, torch.arange(ids.shape[1])).tanh().cumsum(1)[:, -1])

    return Net(forward, table=nn.Embedding(7, 4), place=nn.Embedding(9, 4), out=nn.Linear(4, CLASSES))


def written_over(m, words, at):
    words = words * 1
    words += m.place(at[None])
    return words


def looked_at_without_gradients(m, words, at):
    place = m.place(at)
    with torch.no_grad():
        scale = (words + place).abs().mean((1, 2), keepdim=True)
    return (words + place) / scale


TABLES = {**SPARSE, "place": "sparse rows"}
CASES += [
    Case(
        f"embedding of positions, {name}",
        lambda p=place: positions(p),
        tokens(6),
        how=TABLES,
        longer=tokens(4),
    )
    for name, place in {
        "added": lambda m, words, at: words + m.place(at),
        "added from the left": lambda m, words, at: m.place(at) + words,
        "with an axis of one": lambda m, words, at: torch.add(words, m.place(at[None])),
        "reshaped": lambda m, words, at: words + m.place(at).view(1, -1, 4),
        "expanded": lambda m, words, at: words * 2 + m.place(at)[None].expand(len(words), -1, -1) * 3,
        "expanded to one": lambda m, words, at: words + m.place(at).expand(1, -1, -1),
        "written over the words": written_over,
        "added without gradients, too": looked_at_without_gradients,
        "added twice": lambda m, words, at: (lambda p: (words + p).tanh() + p)(m.place(at)),
        "with time first": lambda m, words, at: (words.transpose(0, 1) + m.place(at)[:, None]).transpose(
            0, 1
        ),
    }.items()
]
CASES += [
    Case(
        f"embedding of positions, {name}", lambda p=place: positions(p), tokens(6), fallback=("place.weight",)
    )
    for name, place in {
        "cut into heads": lambda m, words, at: words + m.place(at).view(1, -1, 2, 2).flatten(2),
        "added to others first": lambda m, words, at: words + (m.place(at) + m.place(at + 1)),
        "multiplied": lambda m, words, at: words * m.place(at),
        "added and multiplied": lambda m, words, at: (lambda p: (words + p) * p)(m.place(at)),
        "added and used otherwise": lambda m, words, at: (lambda p: (words + p) * (p + 1))(m.place(at)),
        "added with a factor": lambda m, words, at: torch.add(words, m.place(at), alpha=2),
        "doubled in place": lambda m, words, at: words + m.place(at).mul_(2),
        "transposed": lambda m, words, at: words + m.place(at).view(2, 3, 4).transpose(0, 1).reshape(6, 4),
    }.items()
]


@case(tokens(6), fallback=("bag.weight",))
def embedding_bag():
    return Net(lambda m, ids: m.out(m.bag(ids).tanh()), bag=nn.EmbeddingBag(7, 4), out=nn.Linear(4, CLASSES))


# Time


def recurrent(layer: type[nn.Module], **options) -> nn.Module:
    def forward(m, x):
        return m.out(m.cells(x)[0][:, -1])

    return Net(forward, cells=layer(4, 5, batch_first=True, **options), out=nn.Linear(5, CLASSES))


KERNELS = ("cells.weight_ih_l0", "cells.weight_hh_l0", "cells.bias_ih_l0", "cells.bias_hh_l0")
CASES += [
    Case("lstm", lambda: recurrent(nn.LSTM), normal(5, 4), fallback=KERNELS, longer=normal(7, 4)),
    Case("gru", lambda: recurrent(nn.GRU), normal(5, 4), fallback=KERNELS, longer=normal(7, 4)),
    Case(
        "elman network in two layers",
        lambda: recurrent(nn.RNN, num_layers=2, bias=False),
        normal(5, 4),
        fallback=tuple(f"cells.weight_{kind}_l{k}" for k in (0, 1) for kind in ("ih", "hh")),
    ),
]


@case(normal(5, 4), longer=normal(8, 4), how={"step": "factors", "read": "factors"})
def loop_over_time():
    def forward(m, x):
        state = x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            state = (m.step(state) + m.read(x[:, t])).tanh()
        return m.out(state)

    step = nn.Linear(5, 5, bias=False)
    return Net(forward, step=step, read=nn.Linear(4, 5), out=nn.Linear(5, CLASSES))


@case(normal(3, 4), fallback=("cell.weight_ih", "cell.weight_hh", "cell.bias_ih", "cell.bias_hh"))
def loop_over_a_gru_cell():
    def forward(m, x):
        state = x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
        return m.out(state)

    return Net(forward, cell=nn.GRUCell(4, 5), out=nn.Linear(5, CLASSES))


@case(normal(6, 4), longer=normal(9, 4), how={"mix": "factors", "out": "factors"})
def causal_convolution_with_state_space_scan():
    """An elementwise recurrence by scale and shift, which are uses of one parameter at every step."""

    def forward(m, x):
        hidden = m.mix(F.pad(x.mT, (2, 0))).mT
        state = torch.zeros_like(hidden[:, 0])
        for t in range(hidden.shape[1]):
            state = state * m.decay + hidden[:, t]
        return m.out(state.tanh())

    return Net(forward, mix=nn.Conv1d(4, 5, 3), decay=parameter(5), out=nn.Linear(5, CLASSES))


# Activation checkpointing


def checkpointed(body: nn.Module) -> nn.Module:
    def forward(m, x):
        for block in m.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return m.out(x.mean(1))

    return Net(
        forward,
        blocks=nn.ModuleList([body, nn.Sequential(nn.Linear(4, 4), nn.GELU())]),
        out=nn.Linear(4, CLASSES),
    )


CASES += [
    Case(
        "checkpointed blocks",
        lambda: checkpointed(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh())),
        normal(5, 4),
        how={"blocks.0.1": "factors", "blocks.1.0": "factors"},
        longer=normal(3, 4),
    ),
    Case(
        "checkpointed block with in-place steps",
        lambda: checkpointed(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))),
        normal(5, 4),
        how={"blocks.0.0": "factors", "blocks.0.2": "factors"},
    ),
]


@case(
    normal(5, 4),
    fallback=("cells.weight_ih_l0", "cells.weight_hh_l0", "cells.bias_ih_l0", "cells.bias_hh_l0"),
)
def checkpointed_block_on_the_fallback():
    def forward(m, x):
        hidden = checkpoint(lambda h: m.cells(h)[0], x, use_reentrant=False)
        return m.out(hidden[:, -1])

    return Net(forward, cells=nn.GRU(4, 5, batch_first=True), out=nn.Linear(5, CLASSES))
