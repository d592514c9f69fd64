"""LDS of a character-level GPT on tiny Shakespeare, half-subsets x seeds of real retraining, with BM25 beside it.

    UPWEIGHT_DATA=FOLDER python benchmarks/lds/gpt.py [--bank runs/banks/gpt] [--subsets 50 --seeds 3]

1,024 windows of 64 characters to train on, which do not overlap; 100 windows from the end of the text are measured.
Two blocks of width 64 with four heads, AdamW at rate 3e-3 with weight decay .01, batches of 32, 12 epochs. A window is
one example, and its loss is the sum over its characters. BM25 reads the windows' words, gradients its characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _data import Data, shakespeare
from _methods import CONTROLS, CURVATURES, GRADIENTS, Explained, influence
from _suite import Setting, main
from _training import Checkpoint
from torch import Tensor, nn

import upweight as uw

LENGTH, TRAIN, QUERIES = 64, 1024, 100
RECIPE: dict[str, Any] = {"rate": 3e-3, "decay": 0.01, "batch": 32, "epochs": 12}


def data() -> tuple[Data, Data]:
    """Characters [windows, 64] and the characters after each of them, to train on and to ask about."""
    train, query, _ = shakespeare(LENGTH, TRAIN, QUERIES)
    return (train[:, :-1], train[:, 1:]), (query[:, :-1], query[:, 1:])


class Block(nn.Module):
    """Causal attention and a perceptron, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_mixing, self.before_thinking = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.before_mixing(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.before_thinking(x))))


class GPT(nn.Module):
    """Characters [batch, 64] to logits [batch, 64, characters]."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        characters = len(shakespeare(LENGTH, TRAIN, QUERIES)[2])
        self.token, self.position = nn.Embedding(characters, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.token(characters) + self.position(torch.arange(LENGTH, device=characters.device))
        return self.head(self.norm(self.blocks(x)))


def window_loss(model: nn.Module, batch: Data) -> Tensor:
    """Cross-entropy of each window [batch], the sum over its characters."""
    characters, following = batch
    return F.cross_entropy(model(characters).transpose(1, 2), following, reduction="none").sum(1)


def sampled_loss(model: nn.Module, batch: Data, generator: torch.Generator) -> Tensor:
    """The same for characters drawn from the model, for the true Fisher."""
    logits = model(batch[0])
    drawn = torch.multinomial(logits.detach().softmax(-1).flatten(0, 1), 1, generator=generator)
    return F.cross_entropy(logits.transpose(1, 2), drawn.view(batch[0].shape), reduction="none").sum(1)


def train(
    indices: np.ndarray, seed: int, keep_after: tuple[int, ...] = ()
) -> tuple[nn.Module, list[Checkpoint]]:
    """A model trained on these windows from the seed's weights, and its checkpoints after these epochs."""
    chosen = torch.from_numpy(indices)
    x, y = (part[chosen] for part in data()[0])
    torch.manual_seed(seed)
    model, generator = GPT(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), RECIPE["rate"], weight_decay=RECIPE["decay"], fused=True
    )
    kept: list[Checkpoint] = []
    for epoch in range(1, RECIPE["epochs"] + 1):
        for batch in torch.randperm(len(y), generator=generator).split(RECIPE["batch"]):
            optimizer.zero_grad()
            (window_loss(model, (x[batch], y[batch])).mean() / LENGTH).backward()
            optimizer.step()
        if epoch in keep_after:
            kept.append(({k: v.detach().clone() for k, v in model.state_dict().items()}, RECIPE["rate"]))
    return model.eval(), kept


def train_fn(indices: np.ndarray, seed: int) -> nn.Module:
    return train(indices, seed)[0]


def bm25(run: Explained) -> Iterator[tuple[str, Any]]:
    """The windows' words in common."""
    alphabet = shakespeare(LENGTH, TRAIN, QUERIES)[2]

    def words(batch: Data) -> list[str]:
        return ["".join(alphabet[number] for number in window) for window in batch[0].tolist()]

    yield "", uw.BM25(None, None, text=words).fit(run.train).attribute(run.query)


SLOW = ("diagonal", "DataInf", "GGN, one sampled label, dual", "empirical Fisher, dual")
METHODS = {
    **CONTROLS,
    "BM25": bm25,
    **GRADIENTS,
    **{name: method for name, method in CURVATURES.items() if name not in SLOW},
    "EK-FAC": influence("ekfac", fisher="sampled"),
}

SETTING = Setting(
    "Tiny Shakespeare, GPT 2 x 64",
    uw.Task.from_functions(window_loss, sampled_loss=sampled_loss, unit="nats a window"),
    data,
    GPT,
    train,
    train_fn,
    METHODS,
    {"recipe": "adamw", **RECIPE, "data": "tinyshakespeare, 65 characters a window", "network": "GPT 2 x 64"},
    l2=0.0,
    dampings=(1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    few_dampings=(1e-2,),
    checkpoints=(2, 4, 6, 8, 10, 12),
)

if __name__ == "__main__":
    main({"gpt": SETTING}, 50, 3, 1)
