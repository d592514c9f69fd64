"""A small store to write, read and damage."""

import os
from pathlib import Path

import torch

from upweight.store import ShardStore

MANIFEST = {"model": "3f9a", "data": {"n": 12, "ids": [1, 2]}, "damping": 1e-3}


def shard(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"scores": torch.randn(50, 40, generator=generator), "ids": torch.arange(number, number + 40)}


def filled(folder: Path, count: int = 3) -> ShardStore:
    with ShardStore.open(folder, MANIFEST) as store:
        for number in range(count):
            store.write(f"part-{number}", shard(number), {"number": number})
    return store


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position, os.SEEK_END if position < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
