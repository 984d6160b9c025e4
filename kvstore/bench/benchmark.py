"""What a benchmark of the GPU is given and may ask for, and what becomes of one that breaks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from kvstore.bench.card import Card
from kvstore.bench.random_model import random_model
from kvstore.bench.rows import NotHereError, Row, Unmeasured
from kvstore.bench.sizes import Sizes, weight_count
from kvstore.engine.loading import LoadedModel
from kvstore.engine.naming import torch_dtype
from kvstore.machine import free_disk_bytes, memory_bytes
from kvstore.quantities import format_size
from kvstore.verbs import Store

log = logging.getLogger(__name__)

# Of the device: CUDA's own, a step's tensors, captured graphs, fragments.
_HBM_SLACK_BYTES = 4 << 30
_DISK_SLACK_BYTES = 256 << 20
_DEVICE = "on the device"


class Bench:
    """One run. `directory` is on the drive that is measured."""

    def __init__(self, card: Card, sizes: Sizes, directory: Path) -> None:
        self.card = card
        self.sizes = sizes
        self.directory = directory
        self._free_bytes = card.free_bytes()  # before anything was measured
        self._end_s = time.monotonic() + sizes.time_limit_s

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.sizes.dtype)

    @cached_property
    def model(self) -> LoadedModel:
        """Made when it is first asked for; it stays on the device."""
        return random_model(self.sizes.model, self.dtype, self.card.device)

    @property
    def left_s(self) -> float:
        """Until nothing is begun any more."""
        return self._end_s - time.monotonic()

    def pin(self, store: Store, name: str) -> Iterator[Unmeasured]:
        """Let the device reach the store's memory; where it is refused, what `name` then is not.

        Engines pin it as well, but go on without, and nobody would know what was measured.
        """
        memory = store.memory()
        if memory is None or not self.card.pin(memory):
            yield Unmeasured(
                f"{name} with pinned memory",
                "skipped",
                "CUDA does not pin the store's memory: blocks were copied by way of other memory",
            )

    def need(self, *, hbm_bytes: int = 0, ram_bytes: int = 0, disk_bytes: int = 0) -> None:
        """Raises NotHereError where there is not so much.

        RuntimeError where the device had it, and what ran before did not give it back.
        """
        slack_bytes = 0 if self.card.device.type == "cpu" else _HBM_SLACK_BYTES
        wanted = (
            (_DEVICE, hbm_bytes + slack_bytes, self.card.free_bytes()),
            ("of RAM", ram_bytes, memory_bytes()),
            (
                f"on the drive of {self.directory}",
                disk_bytes + _DISK_SLACK_BYTES,
                free_disk_bytes(self.directory),
            ),
        )
        asked = (hbm_bytes, ram_bytes, disk_bytes)
        for (place, bytes_wanted, there), given in zip(wanted, asked, strict=True):
            if given and bytes_wanted > there:
                said = f"needs {format_size(bytes_wanted)} {place}; there are {format_size(there)}"
                if place == _DEVICE and bytes_wanted + slack_bytes <= self._there_should_be():
                    raise RuntimeError(f"{said}, since something before kept what it had")
                raise NotHereError(said)

    def _there_should_be(self) -> int:
        """Bytes of the device when nobody but the model has any."""
        weights = weight_count(self.sizes.model) if "model" in self.__dict__ else 0
        return self._free_bytes - weights * self.dtype.itemsize

    def need_engine(self, *, hbm_bytes: int, ram_bytes: int = 0, disk_bytes: int = 0) -> None:
        """As `need`, for so much KV, and for the weights unless they are there."""
        weights = 0 if "model" in self.__dict__ else weight_count(self.sizes.model)
        self.need(
            hbm_bytes=hbm_bytes + weights * self.dtype.itemsize,
            ram_bytes=ram_bytes,
            disk_bytes=disk_bytes,
        )


class Benchmark(NamedTuple):
    """Some rows that are measured together; `run` raises NotHereError where they cannot be."""

    name: str
    run: Callable[[Bench], Iterator[Row | Unmeasured]]


def measured(
    benchmarks: Sequence[Benchmark], bench: Bench, began: Callable[[str], object]
) -> Iterator[Row | Unmeasured]:
    """The rows of all `benchmarks`; one that cannot run, or breaks, costs its own rows alone.

    `began(name)` is called before each.
    """
    for benchmark in benchmarks:
        if bench.left_s < 0:
            yield Unmeasured(
                benchmark.name,
                "skipped",
                f"{bench.sizes.time_limit_s:.0f} s were over before it began; name it to run it "
                "alone",
            )
            continue
        began(benchmark.name)
        yield from attempted(benchmark.name, benchmark.run(bench))
        bench.card.clear()


def attempted(name: str, rows: Iterator[Row | Unmeasured]) -> Iterator[Row | Unmeasured]:
    """`rows`, as far as they can be measured, and then why the others of `name` cannot."""
    try:
        yield from rows
    except NotHereError as missing:
        yield Unmeasured(name, "skipped", str(missing))
    except Exception as error:  # no room as well: what a benchmark needs it has asked for
        log.debug("%s broke", name, exc_info=True)
        yield Unmeasured(name, "failed", f"{type(error).__name__}: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
