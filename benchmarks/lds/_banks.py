"""The recipes by name with the size of their banks, for scripts that hold other things than methods against them."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Collection
from pathlib import Path

import torch
from _suite import Setting

from upweight.evaluate import Outcomes

BANKS = {
    "digits": ("digits", 50, 3),
    "concrete": ("tabular", 100, 5),
    "parkinsons": ("tabular", 100, 5),
    "fashion": ("fashion", 100, 5),
    "mnist-mlp": ("mnist", 100, 1),
}
"""Module, subsets and seeds."""


def parser_for(names: Collection[str], description: str | None) -> argparse.ArgumentParser:
    """A command line that asks for one of these recipes and its bank."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=list(names))
    parser.add_argument("--bank", type=Path, help="runs/banks/SETTING if not given")
    return parser


def opened(name: str, bank: Path | None) -> tuple[Setting, Outcomes]:
    """The recipe of this name, and what its bank measured of the queries; one thread from here on."""
    torch.set_num_threads(1)
    module, count, seeds = BANKS[name]
    found = importlib.import_module(module)
    setting = found.SETTINGS[name] if hasattr(found, "SETTINGS") else found.SETTING
    return setting, setting.open_bank(bank or Path("runs/banks") / name, count, seeds).outcomes("test")
