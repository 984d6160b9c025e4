"""Rigs that are taken down again, whatever becomes of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.store.rig import Rig

MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[MakeRig]:
    """Builds a rig over `tmp_path/nvme`, or RAM alone with `nvme=False`; checks it at the end."""
    with ExitStack() as rigs:

        def make(*, nvme: bool = True, **options: Any) -> Rig:
            rig = Rig(tmp_path / "nvme" if nvme else None, **options)
            rigs.callback(rig.finish)
            return rig

        yield make


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    """64 blocks of RAM over plenty of NVMe."""
    return make_rig()


@pytest.fixture
def ram_rig(make_rig: MakeRig) -> Rig:
    """64 blocks of RAM, and nothing below."""
    return make_rig(nvme=False)
