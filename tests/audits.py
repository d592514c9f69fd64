"""What tests of the audit share: three classes in the plane, some labels of which are wrong, and a network on them."""

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw

QUIET = {"progress": False}


def blobs(n=150, classes=3, wrong=12, seed=0, held_out=60, dtype=torch.float32):
    """Three clear classes in the plane, some labels moved on by one: (x, y), true labels, (validation)."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]], dtype=dtype)[:classes]
    true = torch.arange(n + held_out) % classes
    x = centres[true] + 0.7 * torch.randn(n + held_out, 2, generator=generator, dtype=dtype)
    given = true[:n].clone()
    flipped = torch.randperm(n, generator=generator)[:wrong]
    given[flipped] = (given[flipped] + 1) % classes
    return (x[:n], given), true[:n], (x[n:], true[n:])


def trained(data, outputs=3, steps=150, kept=None, task=None, width=16, seed=0):
    torch.manual_seed(seed)
    x = data[0]
    model = nn.Sequential(nn.Linear(x.shape[1], width), nn.Tanh(), nn.Linear(width, outputs)).to(x.dtype)
    task = task or uw.Classification()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        task.train_loss(model, data).mean().backward()
        optimizer.step()
        if kept is not None and step in (10, 40, 100):
            kept.append({k: v.clone() for k, v in model.state_dict().items()})
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def case():
    data, true, validation = blobs()
    checkpoints = []
    model = trained(data, kept=checkpoints)
    return data, true, validation, model, checkpoints


def by_position(table, kind, column):
    rows = table.filter(kind).columns
    return rows[column][np.argsort(rows["position"])]
