"""The three models and data sets that the benchmark scores, from a seed, so that both libraries read the same bytes.

A workload is prepared once, in a process of its own, and written to a folder as safetensors. Each library then loads
the same weights and the same tensors, and the memory that training needed is on nobody's bill.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FURTHER = 16  # queries of the second call


@dataclass(frozen=True)
class Spec:
    """Fixed settings of one workload.

    Args:
        title: What the table calls it.
        queries: Number of queries of the first call.
        train: Number of training examples.
        damping: Absolute damping, added to the mean squared gradient in the eigenbasis by both libraries.
        peer_fit_batch: kronfluence's batch size for factors, the fastest of those tried.
        peer_train_batch: kronfluence's batch size for training examples while scoring, likewise.
        lean: upweight's memory budget for the row that must not need more memory than kronfluence.
    """

    title: str
    queries: int
    train: int
    damping: float
    peer_fit_batch: int
    peer_train_batch: int
    lean: str


SPECS = {
    "small": Spec("MLP 64-40-10", 100, 1000, 3e-2, 128, 128, "160MB"),
    "mlp": Spec("MLP 64-256-128-10", 360, 1437, 1e-4, 128, 128, "160MB"),
    "resnet9": Spec("ResNet-9 16-32-64-128", 100, 2000, 1e-3, 100, 32, "500MB"),
    "gpt": Spec("GPT 4 x 128, length 128", 16, 512, 1e-3, 16, 16, "310MB"),
}


@dataclass
class Workload:
    """A prepared workload in memory.

    Args:
        name: Key into SPECS.
        model: The model in eval mode.
        train: (inputs, targets) of the training examples.
        query: (inputs, targets) of the queries of the first call.
        further: (inputs, targets) of 16 other queries.
        tracked: Names of the Linear and Conv2d modules whose weights and biases are scored.
        info: Facts about the data and the training.
    """

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    further: tuple[Tensor, Tensor]
    tracked: list[str] = field(default_factory=list)
    info: dict = field(default_factory=dict)

    @property
    def spec(self) -> Spec:
        """The fixed settings of this workload."""
        return SPECS[self.name]


# ------------------------------------------------------------------------------------------------ models


class MLP(nn.Sequential):
    """64-256-128-10 with ReLU."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def _conv(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    layers = [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class SmallMLP(nn.Sequential):
    """64-40-10 with ReLU: small enough for dense matrices in float64."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))


class ResNet9(nn.Module):
    """The usual ResNet-9 of CIFAR speed runs, narrow: 0.41 M parameters."""

    def __init__(self, widths: tuple[int, int, int, int] = (16, 32, 64, 128)) -> None:
        super().__init__()
        a, b, c, d = widths
        self.prep = _conv(3, a)
        self.layer1 = _conv(a, b, pool=True)
        self.res1 = nn.Sequential(_conv(b, b), _conv(b, b))
        self.layer2 = _conv(b, c, pool=True)
        self.layer3 = _conv(c, d, pool=True)
        self.res3 = nn.Sequential(_conv(d, d), _conv(d, d))
        self.head = nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, 32, 32] to logits [B, 10]."""
        x = self.layer1(self.prep(x))
        x = x + self.res1(x)
        x = self.layer3(self.layer2(x))
        x = x + self.res3(x)
        return self.head(F.adaptive_max_pool2d(x, 1).flatten(1))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.ln1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GPT(nn.Module):
    """A byte-level GPT with an untied output layer."""

    def __init__(self, layers: int = 4, width: int = 128, length: int = 128, vocabulary: int = 256) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, heads=4) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes [B, T] to logits [B, T, vocabulary]."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


MODELS = {"small": SmallMLP, "mlp": MLP, "resnet9": ResNet9, "gpt": GPT}


def per_example_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each example [B]; a sequence counts the sum over its positions."""
    inputs, targets = batch
    logits = model(inputs)
    if logits.ndim == 2:
        return F.cross_entropy(logits, targets, reduction="none")
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)


def tracked_modules(model: nn.Module) -> list[str]:
    """Names of the Linear and Conv2d modules: the only kinds that both libraries handle."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


# ------------------------------------------------------------------------------------------------ data


def _loader():
    """The module load.py of the folder that UPWEIGHT_DATA names, or None."""
    folder = os.environ.get("UPWEIGHT_DATA")
    if not folder:
        return None
    path = Path(folder) / "load.py"
    if not path.is_file():
        raise SystemExit(f"UPWEIGHT_DATA={folder} holds no load.py -> name a folder that does, or unset it")
    spec = importlib.util.spec_from_file_location("upweight_data_load", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _digits(generator: torch.Generator) -> tuple[Tensor, Tensor, str]:
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs, targets = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(inputs), generator=generator)
    inputs, targets = inputs[order], targets[order]
    # All 1,797 images are taken, so the 16 further queries are images moved by one pixel.
    moved = inputs[1437 : 1437 + FURTHER].view(-1, 8, 8).roll(1, dims=2).reshape(-1, 64)
    return (
        torch.cat([inputs, moved]),
        torch.cat([targets, targets[1437 : 1437 + FURTHER]]),
        "scikit-learn digits",
    )


def _images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, str]:
    loader = _loader()
    if loader is not None:
        images, labels, _ = loader.images("cifar10", "train", n=count)
        inputs = (
            torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).sub(0.47).div(0.25).contiguous()
        )
        return inputs, torch.from_numpy(labels), "CIFAR-10"
    targets = torch.randint(10, (count,), generator=generator)
    coarse = torch.randn(10, 3, 4, 4, generator=generator)
    inputs = F.interpolate(coarse[targets], size=32, mode="bilinear") + torch.randn(
        count, 3, 32, 32, generator=generator
    )
    return inputs, targets, "SYNTHETIC images (UPWEIGHT_DATA is not set)"


def _sequences(count: int, generator: torch.Generator, length: int = 128) -> tuple[Tensor, Tensor, str]:
    loader = _loader()
    if loader is not None:
        text, source = loader.text("tinyshakespeare").encode(), "tiny Shakespeare"
    else:
        words = [
            "".join(chr(97 + int(c)) for c in torch.randint(26, (n,), generator=generator))
            for n in [2, 3, 4, 5] * 50
        ]
        picks = torch.randint(len(words), (count * length,), generator=generator)
        text, source = (
            " ".join(words[int(i)] for i in picks).encode(),
            "SYNTHETIC text (UPWEIGHT_DATA is not set)",
        )
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randperm((len(data) - 1) // length, generator=generator)[:count] * length
    windows = torch.stack([data[s : s + length + 1] for s in starts.tolist()])
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), source


# ------------------------------------------------------------------------------------------------ prepare, save, load

_TRAINING = {
    "small": (60, 64, 3e-3),
    "mlp": (15, 64, 1e-3),
    "resnet9": (2, 100, 2e-3),
    "gpt": (1, 16, 1e-3),
}  # epochs, batch size, learning rate


def prepare(name: str, folder: Path) -> None:
    """Train the model of a workload briefly from seed 0 and write weights and data to `folder`."""
    spec = SPECS[name]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    total = spec.train + spec.queries + FURTHER
    if name in ("small", "mlp"):
        inputs, targets, source = _digits(generator)
    elif name == "resnet9":
        inputs, targets, source = _images(total, generator)
    else:
        inputs, targets, source = _sequences(total, generator)
    model = MODELS[name]()
    epochs, batch, rate = _TRAINING[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(epochs):
        for rows in torch.randperm(spec.train, generator=generator).split(batch):
            optimizer.zero_grad()
            per_example_loss(model, (inputs[rows], targets[rows])).mean().backward()
            optimizer.step()
    model.eval()
    cut = spec.train + spec.queries
    with torch.no_grad():
        held_out = (
            per_example_loss(model, (inputs[spec.train : cut], targets[spec.train : cut])).mean().item()
        )
    tensors = {"model." + key: value for key, value in model.state_dict().items()}
    for part, rows in {
        "train": slice(0, spec.train),
        "query": slice(spec.train, cut),
        "further": slice(cut, cut + FURTHER),
    }.items():
        tensors[part + ".inputs"], tensors[part + ".targets"] = inputs[rows].clone(), targets[rows].clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "workload.safetensors")
    parameters = sum(p.numel() for p in model.parameters())
    info = {"name": name, "title": spec.title, "source": source, "parameters": parameters}
    info |= {"queries": spec.queries, "train": spec.train, "query_loss": held_out}
    (folder / "workload.json").write_text(json.dumps(info))


def load(folder: Path) -> Workload:
    """Read back what `prepare` wrote."""
    info = json.loads((folder / "workload.json").read_text())
    tensors = load_file(folder / "workload.safetensors")
    model = MODELS[info["name"]]()
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    model.eval()
    train, query, further = (
        (tensors[part + ".inputs"], tensors[part + ".targets"]) for part in ("train", "query", "further")
    )
    return Workload(info["name"], model, train, query, further, tracked_modules(model), info)
