"""The command line. Nothing here imports PyTorch before a command needs it."""

from upweight.cli.app import app, main

__all__ = ["app", "main"]
