"""Writing files so that a crash, a full disk or a flipped byte is never mistaken for a result."""

from __future__ import annotations

import errno
import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upweight._trees import raw_bytes
from upweight.errors import StoreError

_Result = TypeVar("_Result")

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def replace_file(path: Path, write: Callable[[BinaryIO], _Result]) -> _Result:
    """Write a file so that it appears under its name only when it is complete and on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with refusing(path, "written"):
        try:
            with open(temporary, "wb") as file:
                result = write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    return result


def sync_folder(folder: Path) -> None:
    """Make a new name in the folder survive a power cut (Windows has no such call, and needs none)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Write safetensors straight from the tensors' memory, taking the checksum on the way.

    Returns:
        Bytes written and their blake2b.
    """
    # Widest elements first keeps every tensor aligned, which is what lets a reader map the file.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise StoreError(
                f"tensor {name!r} is {tensor.dtype} -> convert it to one of {[*_DTYPES.values()]}"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksum = hashlib.blake2b(digest_size=32)

    def put(data: bytes | memoryview) -> None:
        checksum.update(data)
        file.write(data)

    put(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        put(raw_bytes(tensor))
    return 8 + len(text) + end, checksum.hexdigest()


def save_bundle(path: Path, kind: str, tensors: Mapping[str, Tensor], content: Mapping[str, object]) -> None:
    """Write tensors and JSON content to one safetensors file, sealed with a checksum over both."""
    text = json_text(dict(content), "info")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(path.parent, error, "written")
    metadata = {kind: text, "sha256": _seal(text, tensors)}
    replace_file(path, lambda file: write_tensors(file, tensors, metadata))


def load_bundle(path: Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """Read what `save_bundle` wrote as this kind, or say why the file cannot be trusted."""
    way_out = "name another file, or write it again"
    if not path.is_file():
        raise StoreError(f"there is no file {path} -> check its name")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        refuse(path, error, "read")
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise StoreError(f"{path} is damaged, or not a safetensors file ({error}) -> {way_out}") from error
    if set(metadata) != {kind, "sha256"}:
        raise StoreError(f"{path} is damaged, or does not hold {kind} of ours -> {way_out}")
    if _seal(metadata[kind], tensors) != metadata["sha256"]:
        raise StoreError(f"{path} is damaged: its checksum is wrong -> {way_out}")
    return tensors, json.loads(metadata[kind])


def _seal(text: str, tensors: Mapping[str, Tensor]) -> str:
    checksum = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        checksum.update(raw_bytes(tensor))
    return checksum.hexdigest()


def json_text(value: object, name: str) -> str:
    """JSON, numpy and torch scalars included, or an error that names what holds something else."""
    try:
        return json.dumps(value, default=operator.methodcaller("item"))
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StoreError(
            f"{name} is not JSON: {error} -> keep numbers, text, lists and dicts in it"
        ) from error


def file_digest(path: Path) -> str:
    """The blake2b of a file, as `write_tensors` gives it."""
    checksum = hashlib.blake2b(digest_size=32)
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            checksum.update(buffer[:size])
    return checksum.hexdigest()


def refuse(path: Path, error: OSError, verb: str) -> NoReturn:
    """Say in one line what the operating system would not do, and the way out."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        way_out = "free some space, or name another folder, and run again: finished shards are kept"
    elif verb == "read":
        way_out = "check the file and its permissions"
    else:
        way_out = "name a folder that can be written"
    reason = error.strerror or str(error)
    raise StoreError(f"{path} cannot be {verb}: {reason} -> {way_out}") from error


@contextmanager
def refusing(path: Path, verb: str) -> Iterator[None]:
    """Turn whatever the operating system raises in the block into our one line."""
    try:
        yield
    except OSError as error:
        refuse(path, error, verb)
