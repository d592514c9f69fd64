"""The audit log: one line of JSON for every action, appended; each line holds the hash of the one before it.

A line that is changed or taken out breaks the chain, which `read` notices. (Whoever rewrites the whole file does
not: to prove more than that, keep the last hash elsewhere.)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from upweight._files import json_text, refuse, refusing
from upweight.errors import StoreError

BEGINNING = "0" * 32


def append(path: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Append an action with the time and the hash of the line before; returns the line as written."""
    with refusing(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with refusing(path, "written"), FileLock(f"{path}.lock"):
        whole = path.read_bytes() if path.exists() else b""
        lines = whole.splitlines()
        line = {
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "previous": _digest(lines[-1]) if lines else BEGINNING,
            **entry,
        }
        text = json_text(line, "the log's entry").encode() + b"\n"
        if whole and not whole.endswith(b"\n"):  # a power cut in the middle of the last line
            text = b"\n" + text
        with open(path, "ab") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    return line


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All actions, oldest first.

    Raises:
        StoreError: the file is missing, or a line was changed, cut or taken out; the error names the line.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> _ = append(file, {"action": "repair"}), append(file, {"action": "verify"})
        >>> [line["action"] for line in read(file)]
        ['repair', 'verify']
    """
    place = Path(path).expanduser()
    try:
        lines = place.read_bytes().splitlines()
    except OSError as error:
        refuse(place, error, "read")
    found, previous = [], BEGINNING
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            same = entry["previous"] == previous
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{place}, line {number} is no entry of an audit log ({type(error).__name__}) -> it was cut or changed"
            ) from error
        if not same:
            raise StoreError(
                f"{place}, line {number} does not follow line {number - 1}: one of them was changed or taken out -> "
                "compare with a copy"
            )
        found.append(entry)
        previous = _digest(line)
    return found


def read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON object with these keys, or an error that says why not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        refuse(path, error, "read")
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {str(error)[:100]} -> write it again") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise StoreError(
            f"{path} holds no {missing[0]!r}: it is damaged, or of another kind -> write it again"
        )
    return content


def _digest(line: bytes) -> str:
    return hashlib.blake2b(line, digest_size=16).hexdigest()
