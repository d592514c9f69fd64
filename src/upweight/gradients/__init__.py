"""Per-example gradients of a model, as the factors they are made of, captured without touching the model."""

from upweight.gradients.blocks import Dense, Eigenbasis, Factored, Rotated, Sparse, Spectral
from upweight.gradients.contraction import Router
from upweight.gradients.gradients import Gradients
from upweight.gradients.probe import Coverage
from upweight.gradients.tracker import Tracker

__all__ = [
    "Coverage",
    "Dense",
    "Eigenbasis",
    "Factored",
    "Gradients",
    "Rotated",
    "Router",
    "Sparse",
    "Spectral",
    "Tracker",
]
