"""Small problems of Banzhaf influence, and ridge regression in closed form."""

import torch
from torch import nn

import upweight as uw


def ridge(x, y, ids, shift):
    """The minimum of sum over ids of (1/2)|Wx - y|^2 + (shift/2)|W|^2."""
    a, b = x[ids], y[ids]
    return torch.linalg.solve(a.T @ a + shift * torch.eye(x.shape[1]).double(), a.T @ b).T


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def classified():
    torch.manual_seed(6)
    return torch.randn(20, 4), torch.randint(3, (20,))


def fitted(**changes):
    """Of the network on half of its data, with a damping that is given."""
    options = {"checkpoints": [network()], "subsets": [range(10)], "l2": 0.1, "damping": 0.1, **changes}
    return uw.BanzhafInfluence(network(), uw.Classification(), progress=False, **options).fit(classified())
