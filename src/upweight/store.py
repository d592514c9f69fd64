"""A folder of tensors that survives being killed: sharded, checksummed and resumable.

    folder/
      manifest.json            what the shards belong to: model, data and settings
      ledger.jsonl             one line for every finished shard: key, file, bytes, blake2b, seconds, meta
      parts/KEY.safetensors    the shards, never changed once finished

A shard counts as finished when its ledger line is on disk, and that line is written last. Killing the process
at any point therefore loses at most the shard it was working on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from upweight._files import file_digest, json_text, refuse, refusing, replace_file, sync_folder, write_tensors
from upweight.errors import CacheMismatchError, StoreError

__all__ = ["ShardStore"]

_SCHEMA = 1
_REBUILD = "-> name another folder, or delete this one to have it rebuilt"

_ABSENT = object()


class ShardStore:
    """Named groups of tensors in a folder, each written once, in any order, by one process at a time.

    Open it with ``ShardStore.open``. Until ``close`` (or the end of a ``with`` block) it holds the folder's
    lock; reading works before and after. ``write`` and ``read`` may be called from several threads.

    Attributes:
        folder: Where the shards are.
        manifest: What they belong to, as it was read back from JSON (tuples have become lists).

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> with ShardStore.open(folder, {"model": "3f9a", "n": 2}) as store:
        ...     for row in range(2):
        ...         if not store.has(f"row-{row}"):  # a second run skips what the first one finished
        ...             store.write(f"row-{row}", {"scores": torch.full((2,), float(row))}, {"row": row})
        >>> store = ShardStore.open(folder, {"model": "3f9a", "n": 2}, read_only=True)
        >>> sorted(store.keys_done), store.read("row-1")["scores"].tolist(), store.meta("row-1")
        (['row-0', 'row-1'], [1.0, 1.0], {'row': 1})
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Mapping[str, object]) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest = json.loads(json_text(dict(manifest), "manifest"))
        self._entries: dict[str, dict] = {}
        self._verified: set[str] = set()
        self._ledger_size = 0
        self._lock: FileLock | None = None
        self._appending = threading.Lock()

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], manifest: Mapping[str, object], *, read_only: bool = False
    ) -> ShardStore:
        """Create the folder, or resume what an earlier run left in it.

        Args:
            folder: Made with its parents if it does not exist.
            manifest: Whatever must be equal for old shards to be used again (JSON-able).
            read_only: Take no lock and change nothing, so that any number of processes may read at once.

        Returns:
            The store, knowing which shards are finished.

        Raises:
            CacheMismatchError: The folder holds shards of another manifest.
            StoreError: The folder cannot be used, is damaged, or is being written by another process.
        """
        store = cls(folder, manifest)
        exists = store._check_manifest()
        if read_only:
            if not exists:
                raise StoreError(f"{store.folder} has no manifest.json -> check the folder's name")
            store._entries, store._ledger_size = store._read_ledger()
            return store
        store._acquire()
        try:
            # Checked again under the lock: two processes may have found the folder empty at the same time.
            if not store._check_manifest():
                store._write_manifest()
            store._entries, store._ledger_size = store._read_ledger()
            store._remove_leftovers()
        except BaseException:
            store.close()
            raise
        return store

    @property
    def keys_done(self) -> set[str]:
        """Keys of the finished shards."""
        return set(self._entries)

    def has(self, key: str) -> bool:
        """Whether the shard is finished."""
        return key in self._entries

    def write(
        self, key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, object] | None = None
    ) -> None:
        """Write one shard; once this returns, it survives a crash of the process or the machine.

        Args:
            key: Its name, any non-empty string; the file is named after it.
            tensors: Any shapes and devices; saved as they are, one contiguous CPU copy at a time and only
                where the tensor is not already that.
            meta: Facts to keep beside it (JSON-able), given back by ``meta(key)``.

        Raises:
            StoreError: Disk full, folder not writable, shard already finished, or store not open for writing.
                Shards finished before stay valid.
        """
        if self._lock is None:
            raise StoreError(f"{self.folder} is not open for writing -> open it without read_only")
        if self.has(key):
            raise StoreError(f"shard {key!r} of {self.folder} is already finished -> ask has({key!r}) first")
        meta = json.loads(json_text(dict(meta or {}), "meta"))
        started = time.perf_counter()
        path = self._part(key)
        size, checksum = replace_file(path, lambda file: write_tensors(file, tensors))
        entry = {
            "key": key,
            "file": f"parts/{path.name}",
            "bytes": size,
            "blake2b": checksum,
            "seconds": round(time.perf_counter() - started, 6),
            "meta": meta,
        }
        with self._appending:
            self._append(_ledger_line(entry))
            self._entries[key] = entry
            self._verified.discard(key)

    def read(self, key: str, *, verify: bool = True) -> dict[str, Tensor]:
        """Return the shard's tensors, on the CPU; they are mapped from the file, so unused ones cost nothing.

        Args:
            key: A finished shard.
            verify: Compare the file with its checksum the first time this store reads it.

        Raises:
            StoreError: The shard is not finished, or its file is damaged or missing.
        """
        entry = self._entry(key)
        path = self.folder / entry["file"]
        if verify and key not in self._verified:
            self._check_part(entry)
            self._verified.add(key)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, str(error)) from error

    def meta(self, key: str) -> dict:
        """Return the facts that were written with the shard.

        Raises:
            StoreError: The shard is not finished.
        """
        return dict(self._entry(key)["meta"])

    def verify(self) -> None:
        """Read every file again and compare it with its checksum.

        Raises:
            StoreError: Names the damaged file, or the first one and how many more there are.
        """
        self._check_manifest()
        entries, _ = self._read_ledger(keep_missing=True)
        problems = []
        for entry in entries.values():
            try:
                self._check_part(entry)
                self._verified.add(entry["key"])
            except StoreError as error:
                problems.append(str(error))
        if problems:
            more = f" (and {len(problems) - 1} more shards like it)" if len(problems) > 1 else ""
            raise StoreError(problems[0] + more)

    def close(self) -> None:
        """Release the folder's lock, so that another process may write. Reading goes on working."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> ShardStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "open for writing" if self._lock is not None else "reading only"
        return f"ShardStore({str(self.folder)!r}, {len(self._entries)} shards done, {state})"

    # Manifest

    def _check_manifest(self) -> bool:
        """Compare the manifest on disk with ours; False when there is none yet."""
        path = self.folder / "manifest.json"
        try:
            found = json.loads(path.read_bytes())
            if found.pop("blake2b") != _digest(json.dumps(found, sort_keys=True)):
                raise ValueError("wrong checksum")
        except (FileNotFoundError, NotADirectoryError):
            orphans = [name for name in ("ledger.jsonl", "parts") if (self.folder / name).exists()]
            if orphans:
                raise StoreError(
                    f"{self.folder} has {orphans[0]} but no manifest.json to say what run it belongs to {_REBUILD}"
                ) from None
            return False
        except OSError as error:
            refuse(path, error, "read")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise StoreError(f"{path} is damaged, or not a manifest of ours {_REBUILD}") from None
        if found["schema"] != _SCHEMA:
            raise CacheMismatchError(
                f"{self.folder} is in format {found['schema']}, this version reads {_SCHEMA} {_REBUILD}"
            )
        difference = _first_difference(self.manifest, found["manifest"])
        if difference is not None:
            name, ours, theirs = difference
            raise CacheMismatchError(
                f"{self.folder} belongs to another run: {name} is {theirs} there but {ours} here {_REBUILD}"
            )
        return True

    def _write_manifest(self) -> None:
        content: dict[str, object] = {"schema": _SCHEMA, "manifest": self.manifest}
        content["blake2b"] = _digest(json.dumps(content, sort_keys=True))
        text = json.dumps(content, indent=2) + "\n"
        replace_file(self.folder / "manifest.json", lambda file: file.write(text.encode()))

    # Ledger

    def _read_ledger(self, *, keep_missing: bool = False) -> tuple[dict[str, dict], int]:
        """Finished shards by key, and how many bytes of the ledger are whole lines.

        A shard whose file was deleted is left out, unless asked for, because it can simply be redone.
        """
        path = self.folder / "ledger.jsonl"
        try:
            *lines, torn = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}, 0
        except OSError as error:
            refuse(path, error, "read")
        entries: dict[str, dict] = {}
        for number, line in enumerate(lines, start=1):
            entry = _parse_ledger_line(line)
            if entry is None:
                raise StoreError(f"{path} is damaged in line {number} -> delete that line and run again")
            entries[entry["key"]] = entry
        # A kill in the middle of an append leaves the beginning of a line. A whole line and one byte more is
        # something else: a line end that has changed.
        if _parse_ledger_line(torn[:-1]) is not None:
            raise StoreError(f"{path} is damaged in its last byte -> delete its last line and run again")
        if not keep_missing:
            entries = {key: entry for key, entry in entries.items() if (self.folder / entry["file"]).exists()}
        return entries, sum(len(line) + 1 for line in lines)

    def _append(self, line: bytes) -> None:
        """Add a line so that it is either there in full or not at all, as far as this process can tell."""
        path = self.folder / "ledger.jsonl"
        with refusing(path, "written"):
            try:
                with open(path, "ab", buffering=0) as file:
                    if file.write(line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
            except OSError:
                # The next line must not be glued to half of this one.
                with suppress(OSError):
                    os.truncate(path, self._ledger_size)
                raise
            if not self._ledger_size:
                sync_folder(self.folder)
        self._ledger_size += len(line)

    def _remove_leftovers(self) -> None:
        """Remove what a killed run left half done."""
        with refusing(self.folder, "written"):
            parts = self.folder / "parts"
            parts.mkdir(exist_ok=True)
            for leftover in [*parts.glob(".*.tmp"), *self.folder.glob(".*.tmp")]:
                leftover.unlink()
            ledger = self.folder / "ledger.jsonl"
            if ledger.exists() and ledger.stat().st_size > self._ledger_size:
                os.truncate(ledger, self._ledger_size)

    # Shards

    def _part(self, key: str) -> Path:
        # Percent-encoding keeps every key apart and inside the folder, whatever it contains.
        name = quote(key, safe="")
        if not 0 < len(name) <= 200:
            raise StoreError(f"shard key {key[:40]!r} has {len(name)} characters -> use 1 to 200")
        return self.folder / "parts" / f"{name}.safetensors"

    def _entry(self, key: str) -> dict:
        if key not in self._entries:
            raise StoreError(
                f"{self.folder} has no finished shard {key!r} (of {len(self._entries)}) -> write it first"
            )
        return self._entries[key]

    def _check_part(self, entry: dict) -> None:
        path = self.folder / entry["file"]
        try:
            checksum = file_digest(path)
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing -> run again: it will be recomputed") from error
        except OSError as error:
            refuse(path, error, "read")
        if checksum != entry["blake2b"]:
            raise _damaged(path, "its checksum is not the one in the ledger")

    def _acquire(self) -> None:
        with refusing(self.folder, "written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock", thread_local=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise StoreError(
                    f"{self.folder} is being written by another process -> wait for it, or name another "
                    "folder; if it was this process, close() the earlier store"
                ) from None
            except NotImplementedError:
                raise StoreError(f"{self.folder} cannot be locked -> name a folder on a local disk") from None
        self._lock = lock


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _ledger_line(entry: dict) -> bytes:
    return json.dumps({**entry, "line": _digest(json.dumps(entry))}).encode() + b"\n"


def _parse_ledger_line(line: bytes) -> dict | None:
    """The entry, or None unless the line is byte for byte what we write."""
    try:
        entry = json.loads(line)
        del entry["line"]
    except (ValueError, KeyError, TypeError):
        return None
    return entry if _ledger_line(entry) == line + b"\n" else None


def _first_difference(ours: object, theirs: object, name: str = "") -> tuple[str, str, str] | None:
    """Dotted name and both values, shortened, of the first thing that differs."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            inner_name = f"{name}.{key}" if name else key
            inner = _first_difference(ours.get(key, _ABSENT), theirs.get(key, _ABSENT), inner_name)
            if inner is not None:
                return inner
        return None
    ours, theirs = _show(ours), _show(theirs)
    # Compared as text, because NaN is a different number every time.
    return None if ours == theirs else (name, _shorten(ours), _shorten(theirs))


def _show(value: object) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged: {why} -> delete it and run again: it will be recomputed")
