"""Text of the data, made fit to be shown."""

from __future__ import annotations

LONGEST = 400
"""Characters of a text that are shown."""


def short(text: object, longest: int = LONGEST) -> str:
    r"""A text on one line, cut with a note of what is missing; controls and writing direction marks as ``?``.

    >>> short("cat" + chr(0x202E) + "\n dog"), short("a" * 500)[-25:]
    ('cat? dog', 'aaa (100 more characters)')
    """
    whole = str(text)
    cut = " ".join(whole[: longest * 4].split())[:longest]
    shown = "".join(letter if letter.isprintable() else "?" for letter in cut)
    more = len(whole) - longest
    return f"{shown} ({more:,} more characters)" if more > 0 else shown
