"""Stores for connectors: in this process, and of a daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import kvstore
from kvstore.store import BlockStore
from kvstore.verbs import Store
from tests.connectors.memory import Memory
from tests.daemon.doors import Daemon


@pytest.fixture
def block_store(tmp_path: Path) -> Iterator[BlockStore]:
    """16 MiB of RAM over 16 MiB of NVMe."""
    with kvstore.open(
        ram_bytes="16 MiB", nvme_path=tmp_path / "nvme", nvme_bytes="16 MiB"
    ) as store:
        yield store


@pytest.fixture(params=["in process", "daemon"])
def store(
    request: pytest.FixtureRequest, block_store: BlockStore, tmp_path: Path
) -> Iterator[Store]:
    """The same store, directly and through a daemon."""
    if request.param == "in process":
        yield block_store
        return
    with Daemon(block_store, tmp_path / "kvstore.sock") as daemon, daemon.connect() as client:
        yield client


@pytest.fixture
def source() -> Memory:
    return Memory()
