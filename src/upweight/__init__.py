"""Trace what a trained PyTorch model predicts to the training examples that made it predict so."""

from importlib.metadata import version

__version__ = version("upweight")

__all__ = ["__version__"]
