"""Text and numbers as the page shows them: nothing in a user's data can break it, however long or odd."""

from __future__ import annotations

import json
import math
import shlex
import unicodedata
from typing import Any

__all__ = [
    "compact_json",
    "figure",
    "finite",
    "known",
    "listed",
    "percent",
    "plain",
    "quoted",
    "short",
    "signed",
]

LONGEST = 2000
"""Characters of one text that are shown."""

_HIDDEN = {"Cc", "Cs", "Co", "Cn"}
"""Unicode categories that are not shown: control characters, lone surrogates, and what has no meaning of its own."""

_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that reorder what stands around them; text that needs no trick to be read has none."""


def plain(text: object, most: int = LONGEST) -> str:
    r"""A text that is safe to show: at most so many characters, and none that cannot be seen.

    Example:
        >>> plain("abc" * 5, 6)
        'abcabc … (15 characters, the first 6 shown)'
        >>> plain("a\u202eb\x00c\ud800")
        'a�b�c�'
    """
    whole = text if isinstance(text, str) else str(text)
    shown = "".join(letter if _visible(letter) else "�" for letter in whole[:most])
    return shown if len(whole) <= most else f"{shown} … ({len(whole):,} characters, the first {most:,} shown)"


def _visible(letter: str) -> bool:
    if letter in "\n\t" or " " <= letter <= "~":
        return True
    return letter not in _BIDI and unicodedata.category(letter) not in _HIDDEN


def short(value: object, most: int = 120) -> str:
    """A value of JSON in a few words.

    >>> short({"damping": 0.00012345, "layers": ["a", "b"]})
    'damping: 0.000123, layers: a, b'
    """
    if isinstance(value, bool) or value is None:
        return "–" if value is None else ("yes" if value else "no")
    if isinstance(value, float):
        return f"{value:.3g}".replace("-", "−")
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return plain(", ".join(f"{key}: {short(one)}" for key, one in list(value.items())[:40]), most)
    if isinstance(value, (list, tuple)):
        return plain(", ".join(short(one) for one in value[:12]) + (", …" if len(value) > 12 else ""), most)
    return plain(value, most)


def figure(value: Any, digits: int = 3) -> str:
    """A number with so many decimals and a true minus; a dash for what is not defined.

    >>> figure(-0.1234), figure(None), figure(float("nan"))
    ('−0.123', '–', '–')
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def percent(value: Any, digits: int = 0) -> str:
    """A share in percent; a dash for what is not defined."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}%}".replace("-", "−")


def signed(value: Any) -> str:
    """A change with its sign and two or three significant digits.

    >>> signed(0.2), signed(-3.21e-05), signed(0.0), signed(1234.5), signed(None)
    ('+0.20', '−3.2e-5', '0', '+1,234', '–')
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    text = (
        f"{value:+,.0f}" if abs(value) >= 99.5 else f"{value:+#.2g}" if abs(value) < 9.95 else f"{value:+.1f}"
    )
    return text.replace("e-0", "e-").replace("-", "−", 1 if value < 0 else 0)


def compact_json(value: object) -> str:
    r"""JSON that may stand inside a script element: no ``<`` can end it, and no number is not one.

    >>> compact_json(["</script>", 1.5])
    '["\\u003c/script\\u003e",1.5]'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def finite(value: Any) -> bool:
    """Whether it is a finite number (True and False are none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def known(value: Any) -> float | None:
    """The number, or None for whatever is none."""
    return value if finite(value) else None


def quoted(word: object) -> str:
    """A word of a command line as a shell takes it for one.

    >>> quoted("my.py:experiment"), quoted("my run")
    ('my.py:experiment', "'my run'")
    """
    return shlex.quote(str(word))


def listed(parts: list[str]) -> str:
    """``"a, b and c"``."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
