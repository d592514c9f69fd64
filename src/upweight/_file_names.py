"""A name that somebody chose as that of a file or folder, on any system's disk."""

from __future__ import annotations

import hashlib
import re
import unicodedata

LONGEST = 120
"""Bytes that are kept of a name: file systems take 255, with the ending."""

_OF_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\.|$)", re.IGNORECASE)
"""What Windows takes for a device, with any ending."""


def folder_name(name: str) -> str:
    """The name as that of a folder, for people to read: names that differ in signs alone may share one.

    >>> folder_name("my photos (2)"), folder_name(".."), folder_name("NUL")
    ('my-photos--2-', '_', '_NUL')
    """
    kept = "".join(letter if letter.isalnum() or letter in "=._-" else "-" for letter in name)
    kept = kept.encode()[:LONGEST].decode(errors="ignore").strip(".") or "_"
    return f"_{kept}" if _OF_DEVICES.match(kept) else kept


def file_name(spec: str) -> str:
    """A method's name as that of a file without its ending: no two methods share one, on any disk.

    ``:`` is written as ``+``. What cannot be written as it is, or could differ from another name by case alone, is told
    apart by a hash after ``~``; neither sign is ever left as it is.

    >>> file_name("grad-dot"), file_name("ggn:damping=0.01"), file_name("inf (1)")
    ('grad-dot', 'ggn+damping=0.01', 'inf--1-~d4de3375')
    """
    kept = "+".join(folder_name(part) for part in spec.split(":"))
    # Disks may ignore case, and may spell letters with accents in a way of their own.
    told_apart = unicodedata.normalize("NFKC", spec).casefold() == spec and not spec.endswith(".safetensors")
    if told_apart and kept.replace("+", ":") == spec and len(kept.encode()) <= LONGEST:
        return kept
    digest = hashlib.blake2b(spec.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    return f"{folder_name(kept)}~{digest}"
