"""Every setting: its unit, its bounds, its default, and why it exists.

Frozen values; `kvstore.sources` reads them from flags, environment and TOML.
`ram.capacity_bytes` is `--ram-bytes`, `KVSTORE_RAM__CAPACITY_BYTES`, and
`capacity_bytes` under `[ram]`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kvstore.quantities import parse_size, parse_time

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[float, BeforeValidator(parse_time)]


def _whole(value: object) -> object:
    if isinstance(value, bool):  # which pydantic takes for 0 or 1
        raise ValueError("not a number")
    return value


def _folder(value: object) -> object:
    """A path with its home filled in. An empty one would be the working directory."""
    if not isinstance(value, (str, Path)):
        return value
    expanded = os.path.expanduser(value)
    if not expanded or "\0" in expanded or expanded.startswith("~"):
        raise ValueError("not a path")
    return expanded


Whole = Annotated[int, BeforeValidator(_whole)]
Folder = Annotated[Path, BeforeValidator(_folder)]


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RamSettings(_Group):
    capacity_bytes: Size = Field(
        default=GiB,
        ge=MiB,
        le=64 * TiB,
        description="Size of the RAM arena; every block on its way to or from NVMe passes it.",
    )


class NvmeSettings(_Group):
    path: Folder | None = Field(
        default=None, description="Directory of the NVMe tier; without it there is none."
    )
    capacity_bytes: Size = Field(
        default=10 * GiB,
        ge=MiB,
        le=1024 * TiB,
        description="Space for blocks on the drive; never exceeded, allocated at once. A directory "
        "that is there keeps its own when not set.",
    )
    durability: Literal["cache", "sync"] = Field(
        default="cache",
        description="`cache` survives kill -9; `sync` survives a power cut as well, at the price "
        "of a flush a batch.",
    )
    codec: Literal["raw", "zstd"] = Field(
        default="raw",
        description="`zstd` stores 1.4 times as many blocks and costs a core when they move.",
    )
    admission: Literal["all", "reused", "priority"] = Field(
        default="all",
        description="Which blocks are worth a write: all, those used twice, or those above "
        "default priority.",
    )
    daily_write_bytes: Size | None = Field(
        default=None,
        ge=MiB,
        le=1024 * TiB,
        description="Wear limit of the drive; blocks beyond it stay in RAM. Unlimited when not "
        "set.",
    )
    driver: Literal["auto", "uring", "threads"] = Field(
        default="auto",
        description="How reads and writes reach the drive; `auto` takes io_uring where the kernel "
        "allows it.",
    )


class StoreSettings(_Group):
    """The bounds of the store, field for field `kvstore.hub.Bounds`."""

    demotion_queue_blocks: Whole = Field(
        default=4096,
        ge=1,
        le=1 << 24,
        description="Blocks waiting for NVMe; beyond, a block stays in RAM only, until close.",
    )
    promotion_queue_bytes: Size = Field(
        default=GiB,
        ge=MiB,
        le=64 * TiB,
        description="Blocks being read from NVMe; beyond, leases get shorter, prefetches refused.",
    )
    transfer_bytes: Size = Field(
        default=64 * MiB,
        ge=64 * KiB,
        le=GiB,
        description="One read or write of a tier: large ones are fast, small ones let others pass.",
    )
    transfers_in_flight: Whole = Field(
        default=3,
        ge=1,
        le=64,
        description="Reads of a tier at once, and writes; enough to keep a drive busy.",
    )
    transfer_deadline_s: Duration = Field(
        default=10.0,
        ge=0.1,
        le=3600,
        description="How long one read or write may take; then the tier is left alone until it "
        "answers.",
    )
    deadline_s: Duration = Field(
        default=5.0,
        ge=0.001,
        le=3600,
        description="How long a lease that names no deadline waits; what is late is a miss.",
    )
    protected_bytes: Size = Field(
        default=256 * MiB,
        ge=0,
        le=64 * TiB,
        description="What one namespace may hold above default priority; beyond, it is refused.",
    )
    ttl_max_s: Duration = Field(
        default=7 * 86_400.0,
        ge=1,
        le=3650 * 86_400.0,
        description="The longest time to live of a retention; a longer one is clipped.",
    )
    verify: Literal["media", "always"] = Field(
        default="media",
        description="Whose checksums are compared: of blocks that left RAM, or of all.",
    )


class EngineSettings(_Group):
    store: str | None = Field(
        default=None,
        max_length=4096,
        description="Daemon whose cache to use, such as unix:///run/kvstore/kvstore.sock; a store "
        "of its own when not set.",
    )
    model: str | None = Field(
        default=None, description="A Hugging Face folder, a .gguf file, or the word `smollm2`."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of weights and KV; `auto` is bfloat16."
    )
    kv_dtype: Literal["auto", "fp8", "int8"] = Field(
        default="auto",
        description="How KV is kept, in every tier: `auto` as it is computed; fp8 and int8 take "
        "half the room of bfloat16, and cost some accuracy. Part of the identity.",
    )
    device: str = Field(
        default="cpu",
        max_length=64,
        description="What the engine computes on: `cpu`, `cuda`, or one of several, `cuda:1`.",
    )
    hbm_bytes: Size | None = Field(
        default=None,
        ge=MiB,
        le=64 * TiB,
        description="KV blocks that the engine keeps on its device; allocated once. When not set "
        "512 MiB on a CPU, and on a GPU what `hbm_fraction` leaves.",
    )
    hbm_fraction: float = Field(
        default=0.9,
        ge=0.01,
        le=1,
        description="Of a GPU's memory, for weights, KV and the largest step together.",
    )
    block_tokens: Whole = Field(
        default=16,
        ge=1,
        le=1024,
        description="Tokens in a block: fewer share more, more move faster. Part of the identity.",
    )
    max_batch: Whole = Field(
        default=8, ge=1, le=1024, description="Sequences computed in one step; others wait."
    )
    prefill_chunk_tokens: Whole = Field(
        default=512,
        ge=1,
        le=65536,
        description="Prompt tokens computed in one step, so that decoding goes on between.",
    )
    threads: Whole | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads of the engine; torch's choice when not set.",
    )


class TenantSettings(_Group):
    salt: str = Field(
        default="",
        repr=False,
        max_length=1024,
        description="Secret that separates this tenant's blocks from everyone else's.",
    )


class ClientSettings(_Group):
    """For daemons elsewhere; one of this machine knows its user by the socket."""

    token: str = Field(
        default="",
        repr=False,
        max_length=1024,
        description="What says who we are to the daemon behind kvstore://host:port.",
    )
    ca: Folder | None = Field(
        default=None,
        description="Certificates in PEM, one of which must have signed the daemon's; turns TLS "
        "on.",
    )
    certificate: Folder | None = Field(
        default=None, description="Our own certificate in PEM, where the daemon asks for one."
    )
    key: Folder | None = Field(
        default=None, description="Its private key in PEM, where that is in a file of its own."
    )


class DaemonSettings(_Group):
    socket: Folder | None = Field(
        default=None,
        description="Unix socket of `kvstore daemon`; in $XDG_RUNTIME_DIR/kvstore when not set.",
    )
    http: str | None = Field(
        default=None,
        max_length=256,
        description="Host and port for metrics, health and the live page, such as 127.0.0.1:7421.",
    )
    listen: str | None = Field(
        default=None,
        max_length=256,
        description="Host and port for engines of other machines, such as 0.0.0.0:7420; only this "
        "machine where there are no tokens.",
    )
    grpc: str | None = Field(
        default=None,
        max_length=256,
        description="Host and port for programs in other languages, such as 127.0.0.1:7423; only "
        "this machine where there are no tokens.",
    )
    tokens: Folder | None = Field(
        default=None,
        description="File of tokens, each with a tenant, its rights and limits; without one nobody "
        "is asked for a token.",
    )
    tls_certificate: Folder | None = Field(
        default=None,
        description="The daemon's certificate in PEM, with those that it was signed by; encrypts "
        "the doors to other machines.",
    )
    tls_key: Folder | None = Field(
        default=None, description="Its private key in PEM, where that is in a file of its own."
    )
    tls_client_ca: Folder | None = Field(
        default=None,
        description="Certificates in PEM; clients must show one of their own that one of these "
        "has signed.",
    )
    client_bytes: Size = Field(
        default=4 * GiB,
        ge=MiB,
        le=64 * TiB,
        description="What one client may have leased and reserved; beyond, it gets less.",
    )
    connections: Whole = Field(
        default=256, ge=1, le=65536, description="Clients at once, over all doors; others refused."
    )
    shutdown_s: Duration = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="How long the daemon writes to NVMe after SIGTERM; the rest is dropped.",
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Of the log on stderr: for people, or one JSON object a line."
    )
    event_log_blocks: Whole = Field(
        default=65_536,
        ge=1024,
        le=1 << 26,
        description="Comings and goings kept for who follows the events; further behind, it needs "
        "a snapshot.",
    )
    zmq: str | None = Field(
        default=None,
        max_length=256,
        description="Address on which to publish KV events as vLLM does, such as "
        "tcp://127.0.0.1:5557.",
    )
    zmq_replay: str | None = Field(
        default=None,
        max_length=256,
        description="Address on which to send again what a subscriber of those has missed, such as "
        "tcp://127.0.0.1:5558.",
    )


class Settings(_Group):
    """All settings. Build it with `kvstore.sources.load`, or plain: `Settings()`."""

    ram: RamSettings = RamSettings()
    nvme: NvmeSettings = NvmeSettings()
    store: StoreSettings = StoreSettings()
    engine: EngineSettings = EngineSettings()
    tenant: TenantSettings = TenantSettings()
    client: ClientSettings = ClientSettings()
    daemon: DaemonSettings = DaemonSettings()
