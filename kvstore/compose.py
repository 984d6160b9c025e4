"""The composition root: settings -> tiers -> store. The one place that names concrete tiers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from kvstore.client.address import parse
from kvstore.client.client import StoreClient
from kvstore.client.shared_link import SharedLink
from kvstore.client.stream_link import StreamLinks
from kvstore.client.tls import client_tls
from kvstore.errors import SettingsError
from kvstore.hub import Bounds
from kvstore.machine import has_tier
from kvstore.settings import NvmeSettings, Settings
from kvstore.sources import override
from kvstore.store import BlockStore
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_directory import capacity_of
from kvstore.tiers.ram import RamTier

_NOT_OF_A_STORE = ("engine_", "tenant_", "client_", "daemon_")


DIRECTORY_RAM_BYTES = 256 << 20  # of a store that is opened to work on its directory


def open(settings: Settings | None = None, /, **overrides: Any) -> BlockStore:
    """A store, as the settings say: RAM, and NVMe below it where `nvme_path` is given.

        store = kvstore.open(ram_bytes="1 GiB", nvme_path="/mnt/cache", nvme_bytes="10 GiB")

    Overrides are settings by name: `ram_bytes`, `nvme_codec`, `store_deadline_s`;
    `kvstore settings` lists them. Neither files nor the environment are read; for
    that give `kvstore.sources.load()` as `settings`. The caller closes the store
    (it is a context manager). Opening an NVMe directory reads its records. Where nobody gave
    `nvme_bytes`, one that is there keeps the capacity that it was made for; a smaller one drops
    the blocks beyond it, and logs how many.

    Raises SettingsError for sizes that cannot be, DirectoryError for a directory
    that may not be used, is in use, or is of a newer format.
    """
    for name in overrides:
        if name.startswith(_NOT_OF_A_STORE):
            raise SettingsError(f"{name}: no setting of a store, but of the engine or the daemon")
    chosen = override(settings, overrides)
    bounds = Bounds(**chosen.store.model_dump())
    nvme = _open_nvme(chosen)
    try:
        return BlockStore(RamTier(chosen.ram.capacity_bytes), nvme, bounds=bounds)
    except BaseException:
        if nvme is not None:
            nvme.close_now()
        raise


def open_directory(path: Path, settings: Settings) -> BlockStore:
    """The store over an NVMe directory that is there, as large as it is, to work on what it holds.

    Every block is worth a write, and little RAM is taken. Raises DirectoryError as `open`.
    """
    nvme = settings.nvme.model_copy(
        update={
            "path": path,
            "capacity_bytes": capacity_of(path),
            "admission": "all",
            "daily_write_bytes": None,
        }
    )
    ram_bytes = min(settings.ram.capacity_bytes, DIRECTORY_RAM_BYTES)
    ram = settings.ram.model_copy(update={"capacity_bytes": ram_bytes})
    return open(settings.model_copy(update={"nvme": nvme, "ram": ram}))


def connect(
    url: str,
    *,
    token: str = "",
    ca: str | Path | None = None,
    certificate: str | Path | None = None,
    key: str | Path | None = None,
    timeout_s: float = 2.0,
) -> StoreClient:
    """The store of a daemon: the same verbs as that of `open`.

    `unix:///path/to/socket` on this machine, `kvstore://host:port` on another. There
    `token` says who we are, `ca` (PEM) is who must have signed the daemon's certificate and
    turns TLS on, and `certificate` and `key` (PEM) are ours, where it asks for one. A
    connection, and every answer, is waited for `timeout_s` at most.

    A daemon that is away is no error: everything is a miss until it is back. The caller
    closes the client (it is a context manager). Raises SettingsError for what makes no
    sense, RightsError and WireError where a daemon is there but refuses.
    """
    address = parse(url)
    if address.path is not None:
        if token or ca or certificate or key:
            raise SettingsError(f"{url}: a Unix socket needs no token and no certificates")
        return StoreClient(str(address), partial(SharedLink, address, timeout_s))
    tls = client_tls(ca, certificate, key)
    return StoreClient(str(address), StreamLinks(address, token, tls, timeout_s))


def connect_to(url: str, settings: Settings) -> StoreClient:
    """As `connect`; what a daemon elsewhere asks for is in the settings."""
    if parse(url).path is not None:
        return connect(url)
    asked = settings.client
    return connect(
        url, token=asked.token, ca=asked.ca, certificate=asked.certificate, key=asked.key
    )


def _open_nvme(settings: Settings) -> NvmeTier | None:
    asked = settings.nvme
    if asked.path is None:
        return None
    return NvmeTier(
        asked.path,
        _capacity(asked.path, asked),
        durability=asked.durability,
        codec=asked.codec,
        admission=asked.admission,
        daily_write_bytes=asked.daily_write_bytes,
        driver=asked.driver,
    )


def _capacity(path: Path, asked: NvmeSettings) -> int:
    """What was asked for; where nobody did, what is there stays as large as it is."""
    if "capacity_bytes" in asked.model_fields_set or not has_tier(path):
        return asked.capacity_bytes
    return capacity_of(path)
