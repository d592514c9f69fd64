"""Bytes: how many may be used, and what fits into them."""

from __future__ import annotations

import math
import re

import psutil

from upweight.errors import UpweightError

AUTO_SHARE = 0.5
"""``memory="auto"`` is this share of the memory that is free."""
BATCH_BYTES = 256 << 20
"""Working memory of one batch: larger batches gain no speed, and smaller ones stay in the processor's caches."""
WORKING_COPIES = 3
"""A batch needs about this many times the bytes of its factors: activations, their gradients and windows."""

BATCH_SHARE, KEEP_SHARE, PANEL_SHARE = 0.4, 0.3, 0.3
"""Shares of the budget: one batch with its working copies, what a pass keeps in memory, and a panel of queries."""

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_memory(memory: int | str) -> int:
    """Bytes of ``"auto"``, an int, or a string such as ``"2GB"`` or ``"500 MiB"`` (powers of 1,024).

    Example:
        >>> parse_memory("2GB"), parse_memory("512k")
        (2147483648, 524288)
    """
    if memory == "auto":
        return int(psutil.virtual_memory().available * AUTO_SHARE)
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmgt]?)i?b?\s*", memory.lower())
        if match is None:
            raise UpweightError(f"memory={memory!r} is no size -> write 'auto', a number of bytes, or '2GB'")
        memory = int(float(match[1]) * _UNITS[match[2]])
    if not isinstance(memory, (int, float)) or math.isnan(memory):
        raise UpweightError(f"memory={memory!r} is no size -> write 'auto', a number of bytes, or '2GB'")
    if memory <= 0:
        raise UpweightError(f"memory={memory} must be positive -> write 'auto', a number of bytes, or '2GB'")
    return int(memory)


def memory_text(nbytes: float) -> str:
    """A number of bytes to be read, as `parse_memory` reads it.

    Example:
        >>> memory_text(1.5 * 2**30), memory_text(300)
        ('1.5 GiB', '300 B')
    """
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"


def batch_size_for(example_bytes: float, n: int, memory: int) -> int:
    """Examples per forward pass: a power of two (or all n) whose working memory fits its share of the budget."""
    most = min(BATCH_BYTES, memory * BATCH_SHARE) / (WORKING_COPIES * example_bytes)
    if most >= n:
        return n
    return 1 << max(0, int(most).bit_length() - 1)
