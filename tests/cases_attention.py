"""Cases of attention: nn.MultiheadAttention in all its forms, transformer layers, attention written by hand."""

import torch
import torch.nn.functional as F
from cases import CLASSES, Case, Net, normal, parameter, registry, tokens
from torch import nn

CASES, case = registry()
SELF = {"attend.in_proj_weight": "factors", "attend.out_proj": "factors"}


def self_attention(**options) -> nn.Module:
    def forward(m, x):
        h = x if m.attend.batch_first else x.transpose(0, 1)
        h = m.attend(h, h, h, need_weights=False)[0]
        return m.out((h if m.attend.batch_first else h.transpose(0, 1)).tanh().cumsum(1)[:, -1])

    return Net(forward, attend=nn.MultiheadAttention(4, 2, **options), out=nn.Linear(4, CLASSES))


def cross_attention(**options) -> nn.Module:
    """Queries from one input, keys and values from another of another length (and width)."""

    def forward(m, x, memory):
        if not m.attend.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        h = m.attend(x, memory, memory)[0]
        return m.out((h if m.attend.batch_first else h.transpose(0, 1)).tanh().cumsum(1)[:, -1])

    return Net(forward, attend=nn.MultiheadAttention(4, 2, **options), out=nn.Linear(4, CLASSES))


def pair(width: int):
    return lambda n, g: (normal(3, 4)(n, g), normal(5, width)(n, g))


PACKED = ("attend.in_proj_weight", "attend.in_proj_bias")
CASES += [
    Case(
        "self-attention",
        lambda: self_attention(batch_first=True),
        normal(5, 4),
        how=SELF,
        longer=normal(7, 4),
    ),
    Case("self-attention, time first", self_attention, normal(5, 4), how=SELF, longer=normal(7, 4)),
    Case(
        "self-attention without bias",
        lambda: self_attention(bias=False, batch_first=True),
        normal(5, 4),
        how=SELF,
    ),
    Case(
        "self-attention with a zero key",
        lambda: self_attention(add_zero_attn=True, batch_first=True),
        normal(5, 4),
        how=SELF,
    ),
    Case(
        "self-attention with learned key and value",
        lambda: self_attention(add_bias_kv=True),
        normal(5, 4),
        how=SELF,
        fallback=("attend.bias_k", "attend.bias_v"),
    ),
    Case("cross-attention", lambda: cross_attention(batch_first=True), pair(4), fallback=PACKED),
    Case("cross-attention, time first", cross_attention, pair(4), fallback=PACKED),
    Case(
        "cross-attention with another width",
        lambda: cross_attention(kdim=6, vdim=6, batch_first=True),
        pair(6),
        how={f"attend.{name}_proj_weight": "factors" for name in "qkv"},
        fallback=("attend.in_proj_bias",),
    ),
]


@case(lambda n, g: {"x": normal(5, 4)(n, g), "pad": torch.rand(n, 5, generator=g).argsort(1) > 2}, how=SELF)
def self_attention_with_a_mask():
    def forward(m, x, pad):
        causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
        causal[:, 0] = False
        pad = pad & (torch.arange(5) > 0)
        h, weights = m.attend(x, x, x, key_padding_mask=pad, attn_mask=causal)
        return m.out(h.tanh().mean(1) + weights.mean())

    return Net(forward, attend=nn.MultiheadAttention(4, 2, batch_first=True), out=nn.Linear(4, CLASSES))


# Transformer layers


def encoder(**options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True, **options)
    return Net(lambda m, x: m.out(m.layer(x).cumsum(1)[:, -1]), layer=layer, out=nn.Linear(4, CLASSES))


ENCODER = {
    "layer.self_attn.in_proj_weight": "factors",
    "layer.linear1": "factors",
    "layer.norm1.weight": "affine",
}
CASES += [
    Case("transformer encoder layer", encoder, normal(5, 4), how=ENCODER, longer=normal(3, 4)),
    Case(
        "transformer encoder layer, norm first", lambda: encoder(norm_first=True), normal(5, 4), how=ENCODER
    ),
]


@case(normal(5, 4))
def transformer_encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1)  # time first
    stack = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(4), enable_nested_tensor=False)
    return Net(lambda m, x: m.out(m.stack(x.transpose(0, 1))[0]), stack=stack, out=nn.Linear(4, CLASSES))


@case(pair(4), fallback=("layer.multihead_attn.in_proj_weight", "layer.multihead_attn.in_proj_bias"))
def transformer_decoder_layer():
    layer = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
    return Net(lambda m, x, memory: m.out(m.layer(x, memory).mean(1)), layer=layer, out=nn.Linear(4, CLASSES))


# Attention by hand


@case(normal(5, 4), how={"q": "factors", "k": "factors", "v": "factors"}, longer=normal(8, 4))
def attention_of_three_linear_layers():
    """The gradient of the key's bias is zero in theory and noise in practice: no reason to leave the fast path."""

    def forward(m, x):
        heads = [layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (m.q, m.k, m.v)]
        h = F.scaled_dot_product_attention(*heads, is_causal=True)
        return m.out(h.transpose(1, 2).flatten(2)[:, -1])

    return Net(forward, q=nn.Linear(4, 4), k=nn.Linear(4, 4), v=nn.Linear(4, 4), out=nn.Linear(4, CLASSES))


@case(normal(3, 4), fallback=("queries",), how={"k": "factors"})
def learned_queries():
    def forward(m, x):
        weights = (m.queries @ m.k(x).mT).softmax(-1)
        return m.out((weights @ x).mean(1))

    return Net(forward, queries=parameter(2, 4), k=nn.Linear(4, 4), out=nn.Linear(4, CLASSES))


def per_token(model, batch):
    ids, _ = batch
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(h.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@case(
    tokens(6, vocabulary=9),
    "functions",
    loss=per_token,
    how={
        "table": "factors",
        "place": "sparse rows",
        "blocks.0.qkv": "factors",
        "blocks.1.norm2.weight": "affine",
    },
    longer=tokens(4, vocabulary=9),
)
def gpt_with_tied_head():
    def forward(m, ids):
        x = m.table(ids) + m.place(torch.arange(ids.shape[1]))
        for block in m.blocks:
            x = block(x)
        return F.linear(m.norm(x), m.table.weight)

    return Net(
        forward,
        table=nn.Embedding(9, 4),
        place=nn.Embedding(8, 4),
        blocks=nn.ModuleList([Block(4), Block(4)]),
        norm=nn.LayerNorm(4),
    )
