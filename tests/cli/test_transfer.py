"""`kvstore export` and `import`: all that a store holds, or a part, into another, sound or not."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import kvstore
from kvstore.archive.file import ArchiveWriter, Block, Damage, End, read
from kvstore.errors import InputError
from kvstore.frame import HEADER_BYTES, checksum
from kvstore.hashing import Chain
from kvstore.identity import Namespace
from kvstore.retention import Retention
from kvstore.tier import Record
from tests.cli.commands import Done, fill, namespace
from tests.cli.test_bad_input import refused
from tests.daemon.data_doors import DataDaemon
from tests.daemon.doors import DaemonProcess
from tests.daemon.tenants import OPERATOR, TENANTS

BLOCK_BYTES = 8192
FRAME_BYTES = HEADER_BYTES + BLOCK_BYTES


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twenty blocks of one model, with a fork whose end may go first; three of another model,
    more firmly kept for a day.
    """
    path = tmp_path / "source"
    with kvstore.open(ram_bytes="4 MiB", nvme_path=path, nvme_bytes="8 MiB") as store:
        fill(store, 12)
        put(store, fork())
        fill(store, 3, model="another model")
        theirs = kvstore.TokenChain(namespace("another model"), range(48)).chain()
        store.retain(theirs, Retention(priority=70, ttl_s=86_400.0))
        store.retain(fork().slice(8), Retention(priority=20))
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    with kvstore.open(ram_bytes="1 MiB", nvme_path=path, nvme_bytes="8 MiB"):
        pass
    return path


def fork() -> Chain:
    """A prompt that shares its first four blocks with the other, and goes on for eight."""
    return kvstore.TokenChain(namespace(), [*range(64), *range(1000, 1128)]).chain()


def put(store: kvstore.BlockStore, chain: Chain) -> None:
    with store.reserve(chain) as reservation:
        for index, view in zip(reservation.indices, reservation.views, strict=True):
            view[:] = hashlib.sha256(chain.keys[index]).digest() * (len(view) // 32)
        reservation.commit()


def check(store: kvstore.BlockStore, *, lost: int = 0) -> None:
    """All but `lost` blocks are served, and every served byte is right."""
    plain = kvstore.TokenChain(namespace(), range(16 * 12)).chain()
    theirs = kvstore.TokenChain(namespace("another model"), range(48)).chain()
    served = 0
    for chain in (plain, theirs, fork()):
        held = [i for i, tier in enumerate(store.probe(chain).tiers) if tier is not None]
        for i in held:
            with store.acquire(chain.slice(i, i + 1)) as lease:
                assert lease.wait() == 1
                is_fork = chain.keys[i] not in plain.keys and chain is not theirs
                expected = (
                    hashlib.sha256(chain.keys[i]).digest() * (BLOCK_BYTES // 32)
                    if is_fork
                    else bytes([i]) * BLOCK_BYTES
                )
                assert bytes(lease.views[0]) == expected
        served += len(held)
    assert served == 12 + 3 + 12 - lost


def opened(path: Path) -> kvstore.BlockStore:
    return kvstore.open(ram_bytes="4 MiB", nvme_path=path, nvme_bytes="8 MiB")


def blocks_of(here: Callable[..., Done], place: Path) -> dict[str, tuple[str, int, float]]:
    listed = here("ls", "--blocks", place, "--json").data["blocks"]
    return {each["key"]: (each["parent"], each["priority"], each["expires_s"]) for each in listed}


def test_everything_from_one_directory_to_another(
    here: Callable[..., Done], source: Path, target: Path, tmp_path: Path
) -> None:
    file = tmp_path / "all.kv"
    exported = here("export", file, source, "--json")
    assert exported.status == 0
    assert exported.data == {
        "store": str(source),
        "file": str(file),
        "blocks": 23,
        "raw_bytes": 23 * BLOCK_BYTES,
        "file_bytes": file.stat().st_size,
        "missed": {},
    }
    imported = here("import", file, target, "--json")
    assert imported.status == 0
    assert imported.data["ok"] is True
    assert (imported.data["blocks"], imported.data["lost"]) == (23, 0)
    before, after = blocks_of(here, source), blocks_of(here, target)
    assert after.keys() == before.keys()
    for key, (parent, priority, expires_s) in before.items():
        assert after[key][:2] == (parent, priority)
        assert (after[key][2] or 0) == pytest.approx(expires_s or 0, abs=60)
    priorities = Counter(priority for _, priority, _ in after.values())
    assert priorities == {35: 16, 20: 4, 70: 3}
    with opened(target) as store:
        check(store)
    again = here("import", file, target)
    assert again == Done(0, "0 new blocks, 23 there already\n", "")
    assert [path.name for path in tmp_path.iterdir() if "all.kv" in path.name] == ["all.kv"]


def test_between_daemons(here: Callable[..., Done], source: Path, tmp_path: Path) -> None:
    file, folders = tmp_path / "all.kv", [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    args = ("--ram-bytes", "1 MiB", "--nvme-bytes", "8 MiB", "--nvme-path")
    with (
        DaemonProcess(folders[0], *args, str(source)) as one,
        DaemonProcess(folders[1], *args, str(folders[1] / "nvme")) as two,
    ):
        done = here("export", file, "--store", one.url)
        assert done == Done(0, f"23 blocks, 184 KiB: {file}\n", "")
        assert here("import", file, "--store", two.url).stdout == "23 new blocks, 0 there already\n"
        with two.connect() as client:
            plain = kvstore.TokenChain(namespace(), range(16 * 12)).chain()
            with client.acquire(plain) as lease:
                assert lease.wait() == 12
                assert [bytes(v) for v in lease.views] == [bytes([i]) * 8192 for i in range(12)]
        two.kill()
        assert here("import", file, "--store", two.url).status == 1
    with opened(folders[1] / "nvme") as store:
        check(store)


def test_one_namespace(
    here: Callable[..., Done], source: Path, target: Path, tmp_path: Path
) -> None:
    file = tmp_path / "one.kv"
    name = namespace("another model").fingerprint.hex()
    assert here("export", file, source, "--namespace", name[:6], "--json").data["blocks"] == 3
    assert here("import", file, target, "--json").data["blocks"] == 3
    (only,) = here("ls", target, "--json").data["namespaces"]
    assert (only["fingerprint"], only["blocks"]) == (name, 3)


def test_a_directory_is_made(here: Callable[..., Done], archive: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    done = here("import", archive, made, "--nvme-bytes", "3 MiB")
    assert done.stdout == "23 new blocks, 0 there already\n"
    assert sum(path.stat().st_size for path in made.iterdir()) <= 3 << 20
    refused(here("import", archive, archive / "below", "--nvme-bytes", "3 MiB"), "Not a directory")
    refused(here("import", archive, tmp_path / "x", "--nvme-bytes", "900 TiB"), "more than the")


@pytest.fixture
def archive(here: Callable[..., Done], source: Path, tmp_path: Path) -> Path:
    file = tmp_path / "archive.kv"
    assert here("export", file, source).status == 0
    return file


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 4
    file.write_bytes(data)


def entries(file: Path) -> list[Block | Namespace | Damage | End]:
    with open(file, "rb") as opened_file:
        return list(read(opened_file, file.stat().st_size))


@pytest.mark.parametrize("within", [HEADER_BYTES + 1000, 30, 3, HEADER_BYTES - 1])
def test_a_flipped_bit_loses_one_block(
    here: Callable[..., Done], archive: Path, target: Path, within: int
) -> None:
    """In its bytes, its record, its magic, its seal."""
    starts = [entry.start for entry in entries(archive) if isinstance(entry, Block)]
    flip(archive, starts[9] + within)
    done = here("import", archive, target, "--json")
    assert (done.status, done.data["ok"]) == (1, False)
    assert (done.data["blocks"], done.data["lost"], done.data["promised"]) == (22, 1, 23)
    (damage,) = done.data["damage"]
    assert damage["offset"] == starts[9]
    plain = here("import", archive, target)
    assert plain.status == 1
    assert f"damaged at offset {starts[9]}: " in plain.stdout
    assert "1 of the file's 23 blocks lost\n" in plain.stdout


def test_a_flipped_bit_in_what_is_no_block_loses_none(
    here: Callable[..., Done], archive: Path, target: Path
) -> None:
    sound = archive.read_bytes()
    end = next(entry.start for entry in entries(archive) if isinstance(entry, End))
    for offset in (0, 15, 20, 24 + 5, 24 + HEADER_BYTES + 5):
        archive.write_bytes(sound)
        flip(archive, offset)
        done = here("import", archive, target, "--json")
        assert (done.status, done.data["lost"], len(done.data["damage"])) == (1, 0, 1)
    archive.write_bytes(sound)
    flip(archive, end + 40)
    done = here("import", archive, target, "--json")
    assert (done.status, done.data["promised"], done.data["present"]) == (1, None, 23)


def test_a_file_that_was_cut_off(here: Callable[..., Done], archive: Path, target: Path) -> None:
    starts = [entry.start for entry in entries(archive) if isinstance(entry, Block)]
    for length, blocks in (
        (starts[20] + 5000, 20),
        (starts[15], 15),
        (starts[12] + 20, 12),
        (24, 0),
    ):
        archive.write_bytes(archive.read_bytes()[:length])
        here("gc", target, "--older-than", "1ms")
        done = here("import", archive, target, "--json")
        assert (done.status, done.data["blocks"], done.data["lost"]) == (1, blocks, None)
        assert "the file is cut off" in here("import", archive, target).stdout


def test_any_damage_is_survived(archive: Path) -> None:
    """A bit flipped, or a piece missing, anywhere: what is served is what was written."""
    sound = archive.read_bytes()
    whole = {
        entry.record.key: entry.stored for entry in entries(archive) if isinstance(entry, Block)
    }
    assert len(whole) == 23
    for offset in range(0, len(sound), 997):
        flipped = bytearray(sound)
        flipped[offset] ^= 1 << (offset % 8)
        for data, touched in ((bytes(flipped), 1), (sound[:offset] + sound[offset + 50 :], 2)):
            try:
                found = list(read(io.BytesIO(data), len(data)))
            except InputError:
                assert offset < 24
                continue
            blocks = [entry for entry in found if isinstance(entry, Block)]
            assert len(blocks) >= 23 - touched
            assert all(whole[block.record.key] == block.stored for block in blocks)


def test_a_store_without_room(here: Callable[..., Done], tmp_path: Path) -> None:
    """What is in an archive but not in the store afterwards is said."""
    big, small = tmp_path / "big", tmp_path / "small"
    with opened(big) as store:
        fill(store, 400)
    with kvstore.open(ram_bytes="1 MiB", nvme_path=small, nvme_bytes="1 MiB"):
        pass
    file = tmp_path / "big.kv"
    assert here("export", file, big).status == 0
    done = here("import", file, small, "--json")
    held = here("stat", small, "--json").data["blocks"]
    assert done.status == 1
    assert done.data["lost"] == 0
    assert done.data["blocks"] + done.data["refused"] == 400
    assert held == done.data["blocks"] - done.data["evicted"]
    assert "the store" in here("import", file, small).stdout


def test_files_that_cannot_be(
    here: Callable[..., Done], source: Path, target: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("hello " * 100)
    (tmp_path / "empty").write_text("")
    newer = bytearray(b"kvstore archive\x02")
    newer += checksum(bytes(newer)).to_bytes(8, "little")
    (tmp_path / "newer").write_bytes(newer)
    refused(here("import", tmp_path / "text", target), "text: not a file that `kvstore export`")
    refused(here("import", tmp_path / "empty", target), "empty: not a file that `kvstore export`")
    refused(here("import", tmp_path / "newer", target), "newer kvstore (version 2")
    refused(here("import", tmp_path / "absent", target), "absent cannot be read: No such file")
    refused(here("import", tmp_path, target), "cannot be read: Is a directory")
    refused(here("export", tmp_path, source), "is a folder")
    os.mkfifo(tmp_path / "pipe")
    refused(here("export", tmp_path / "pipe", source), "is no ordinary file")
    refused(here("export", tmp_path / "no" / "file", source), "cannot be written: No such file")
    refused(here("export", tmp_path / "x", source, "--namespace", "0123"), "there is none")
    refused(here("export", tmp_path / "x", tmp_path / "absent"), "absent does not exist")
    assert not (tmp_path / "x").exists()
    assert here("import").status == 2


def test_a_failed_export_leaves_what_was_there(
    here: Callable[..., Done], archive: Path, tmp_path: Path
) -> None:
    before = archive.read_bytes()
    refused(here("export", archive, tmp_path / "nowhere"), "nowhere does not exist")
    assert archive.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if "archive" in path.name] == ["archive.kv"]


def test_a_hostile_file_cannot_ask_for_memory(tmp_path: Path) -> None:
    file = tmp_path / "hostile.kv"
    with open(file, "wb") as opened_file:
        writer = ArchiveWriter(opened_file)
        writer.namespace(namespace())
        record = Record(bytes(16), b"k" * 16, bytes(16), 1, stored_bytes=1 << 60)
        writer.block(record, memoryview(b"x"))
    found = [type(entry) for entry in entries(file)]
    assert found == [Namespace, Namespace, Damage]


def test_who_may_list_blocks_but_not_read_them_cannot_export(
    here: Callable[..., Done], archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant's keys are re-made with its secret, also those of blocks that it may list."""
    before = archive.read_bytes()
    monkeypatch.setenv("KVSTORE_CLIENT__TOKEN", OPERATOR)
    with kvstore.open(ram_bytes="4 MiB") as store, DataDaemon(store, TENANTS) as daemon:
        fill(store, 3)
        refused(here("export", archive, "--store", daemon.url), "a tenant behind a token cannot")
    assert archive.read_bytes() == before


def test_an_export_of_which_nothing_can_be_read_replaces_nothing(
    here: Callable[..., Done], archive: Path, source: Path
) -> None:
    before = archive.read_bytes()
    slab = source / "slab"
    slab.write_bytes(b"\xff" * slab.stat().st_size)
    done = here("export", archive, source)
    assert (done.status, done.stdout) == (1, "")
    assert "nothing was exported: 23 blocks listed" in done.stderr
    assert done.stderr.count("\n") == 1
    assert archive.read_bytes() == before


def test_an_export_of_nothing_replaces_nothing(
    here: Callable[..., Done], archive: Path, target: Path
) -> None:
    before = archive.read_bytes()
    done = here("export", archive, target)
    assert (done.status, done.stdout) == (1, "")
    assert "nothing was exported: no such block is stored" in done.stderr
    assert archive.read_bytes() == before


def test_an_export_needs_a_file(here: Callable[..., Done], source: Path) -> None:
    refused(here("export", "-", source), "a file is needed, not a pipe")
    assert not Path("-").exists()
