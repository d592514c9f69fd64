"""Flat gradients and named parameters: each is the other's exact inverse, for every layer of the registry."""

import torch
from cases_all import EXACT, each, track

from upweight.gradients.layers import from_parameters, to_parameters


@each(EXACT)
def test_flat_order_and_named_parameters_undo_each_other(case):
    _, _, tracker = track(case)
    p = sum(layer.numel for layer in tracker.layers.values())
    flat = torch.arange(2.0 * p, dtype=torch.float64).reshape(2, p)  # every number another: none may move
    named = to_parameters(tracker.layers, flat)
    assert {name: tuple(t.shape[1:]) for name, t in named.items()} == {
        name: tuple(t.shape) for name, t in tracker.parameters.items()
    }
    assert torch.equal(from_parameters(tracker.layers, named), flat)
    again = to_parameters(tracker.layers, from_parameters(tracker.layers, named))
    assert all(torch.equal(again[name], t) for name, t in named.items())


@each(EXACT)
def test_named_gradients_flatten_to_the_trackers_order(case):
    """The parameters' own gradients, by autograd, come out where the tracker puts them."""
    model, batch, tracker = track(case)
    loss = tracker.task.train_loss(model, batch).sum()
    grads = torch.autograd.grad(loss, list(tracker.parameters.values()), allow_unused=True)
    named = {
        name: (torch.zeros_like(p) if g is None else g.to_dense())[None]
        for (name, p), g in zip(tracker.parameters.items(), grads, strict=True)
    }
    expected = tracker.train(batch, range(5)).dense().sum(0)
    found = from_parameters(tracker.layers, named)[0]
    assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())
