"""Offline verification finds each kind of damage, says where, and changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvstore.errors import DirectoryError
from kvstore.frame import pack_record
from kvstore.tier import Record
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_records import Put, RecordFile
from kvstore.tiers.nvme_verify import Finding, read_directory, verify
from tests.tiers.subjects import (
    CAPACITY_BYTES,
    MODEL,
    NAMESPACE,
    extent,
    flip_in_file,
    item,
    key,
    run,
)
from tests.tiers.test_nvme_restart import damage

BLOCKS = 50


@pytest.fixture(params=["raw", "zstd"])
def filled(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES, codec=request.param)
        await tier.remember([MODEL])
        await tier.write([item(n, 5000) for n in range(BLOCKS)])
        await tier.close()

    run(body())
    return tmp_path


def findings(path: Path) -> list[Finding]:
    return [finding for step in verify(path) for finding in step.findings]


def places(path: Path) -> dict[bytes, tuple[int, int]]:
    tier = NvmeTier(path, CAPACITY_BYTES)
    found = {key(n): extent(tier, key(n)) for n in range(BLOCKS)}
    tier.close_now()
    return found


def test_nothing_wrong(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.tiers.nvme_verify.STEP_BYTES", 40_000)
    before = {entry.name: entry.read_bytes() for entry in filled.iterdir()}
    steps = list(verify(filled))
    assert not any(step.findings for step in steps)
    assert steps[-1].blocks == steps[-1].blocks_total == BLOCKS
    assert steps[-1].stored_bytes == steps[-1].stored_bytes_total >= BLOCKS * 5000
    counts = [step.stored_bytes for step in steps]
    assert len(counts) > 5
    assert counts == sorted(counts)
    assert before == {entry.name: entry.read_bytes() for entry in filled.iterdir()}


def test_summary(filled: Path) -> None:
    summary = read_directory(filled)
    assert summary.blocks == BLOCKS
    assert summary.damaged_records == 0
    assert summary.slab_bytes < summary.allocated_bytes <= CAPACITY_BYTES
    (only,) = summary.namespaces
    assert only.namespace == MODEL
    assert (only.blocks, only.raw_bytes) == (BLOCKS, BLOCKS * 5000)
    assert only.stored_bytes == summary.stored_bytes


def test_a_flipped_bit_in_the_slab(filled: Path) -> None:
    there = places(filled)
    for n in (0, 7, 49):
        offset, nbytes = there[key(n)]
        flip_in_file(filled / "slab", offset, (8 * nbytes - 1) if n == 7 else n)
    assert {(f.offset, f.key) for f in findings(filled)} == {
        (there[key(n)][0], key(n)) for n in (0, 7, 49)
    }
    assert all("checksum" in f.problem for f in findings(filled))


def test_a_slab_cut_short(filled: Path) -> None:
    there = places(filled)
    end = sorted(offset for offset, _ in there.values())[30]
    os.truncate(filled / "slab", end + 100)
    lost = {name for name, (offset, _) in there.items() if offset >= end}
    assert {f.key for f in findings(filled)} == lost
    assert len(lost) == 20


def test_records_that_contradict_each_other(filled: Path) -> None:
    def forged(n: int, offset: int, namespace: bytes = MODEL.fingerprint) -> Put:
        record = Record(namespace, key(n), NAMESPACE, 9, stored_bytes=9, checksum=1)
        return Put(offset, pack_record(record, offset))

    records = RecordFile(filled / "records.mdb", 1 << 20)
    slab_bytes = (filled / "slab").stat().st_size
    records.put(
        [
            forged(900, 4096),  # within a block that is there: overlap, and no such bytes
            forged(901, slab_bytes),
            forged(1, 600 * 4096),
            forged(902, 610 * 4096, b"an unknown one !"),
            Put(620 * 4096, forged(903, 0).record),
            Put(630 * 4096, b"not a record"),
        ]
    )
    records.close()
    problems = {(f.key, f.problem) for f in findings(filled)}
    for wanted in (
        (key(900), "the block overlaps the one before it"),
        (key(901), "the block reaches beyond the end of the slab"),
        (key(901), "the slab ends within the block"),
        (key(1), "the block is recorded twice"),
        (key(902), "the block's namespace is not known"),
        (key(903), "the record stands under another block's offset"),
        (None, "the record is damaged"),
    ):
        assert wanted in problems
    assert read_directory(filled).damaged_records == 1


@pytest.mark.parametrize("what", ["cut", "zero", "foreign"])
def test_records_that_cannot_be_followed(what: str, filled: Path) -> None:
    damage(what)(filled / "records.mdb")
    with pytest.raises(DirectoryError, match=r"records.mdb is damaged"):
        findings(filled)
    with pytest.raises(DirectoryError, match=r"records.mdb is damaged"):
        read_directory(filled)


def test_a_directory_in_use(filled: Path) -> None:
    tier = NvmeTier(filled, CAPACITY_BYTES)
    with pytest.raises(DirectoryError, match="in use"):
        findings(filled)
    with pytest.raises(DirectoryError, match="in use"):
        read_directory(filled)
    tier.close_now()


def test_no_directory_of_ours(tmp_path: Path) -> None:
    for path, expected in (
        (tmp_path, "not a kvstore NVMe directory"),
        (tmp_path / "missing", "missing does not exist$"),
    ):
        with pytest.raises(DirectoryError, match=expected):
            read_directory(path)
    assert list(tmp_path.iterdir()) == []
