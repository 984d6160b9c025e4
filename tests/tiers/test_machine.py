"""Every tier against a dict: whatever is served is what was written, in any order of verbs."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.tier import Miss, ReadRequest, Tier, WriteItem
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.ram import RamTier
from tests.tiers.subjects import MODEL, NAMESPACE, SUBJECTS, Subject, content, item, key

# Few keys and sizes, so that they meet often; the largest fill the tier in a dozen writes.
numbers = st.integers(0, 24)
batches = st.lists(numbers, min_size=1, max_size=12)
sizes = st.sampled_from([1, 4096, 5000, 300_000])
damages = st.integers(0, 10**6)


class TierMachine(RuleBasedStateMachine):
    """One tier, opened and closed again and again; `written` is what each key was given first."""

    subject: Subject

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.loop = asyncio.new_event_loop()
        self.tier: Tier = self.subject.open(self.folder)
        self.written: dict[int, bytes] = {}
        self.damaged: set[int] = set()
        self.serial = 0

    def run(self, work: object) -> object:
        return self.loop.run_until_complete(work)  # type: ignore[arg-type]

    def held(self, number: int) -> bool:
        return self.run(self.tier.contains([key(number)])) == [True]

    @initialize()
    def remember(self) -> None:
        remember = getattr(self.tier, "remember", None)
        if remember is not None:
            self.run(remember([MODEL]))

    @rule(batch=batches, nbytes=sizes, priority=st.sampled_from([20, 35, 90]))
    def write(self, batch: list[int], nbytes: int, priority: int) -> None:
        items: list[WriteItem] = []
        before = {number: self.held(number) for number in batch}
        for number in dict.fromkeys(batch):
            if not before[number]:
                self.serial += 1
                self.written[number] = content(self.serial, nbytes)
                self.damaged.discard(number)
            data = self.written[number]
            given = item(number, len(data), priority=priority)
            items.append(given._replace(buffer=memoryview(data)))
        self.run(self.tier.write(items))

    @rule(batch=batches)
    def read(self, batch: list[int]) -> None:
        wanted = [self.written.get(number, b"?") for number in batch]
        asked = [
            ReadRequest(key(n), NAMESPACE, len(data), memoryview(bytearray(len(data))))
            for n, data in zip(batch, wanted, strict=True)
        ]
        results = self.run(self.tier.read(asked))
        assert isinstance(results, list)
        for number, data, one, result in zip(batch, wanted, asked, results, strict=True):
            if result.miss is None:
                assert one.buffer == data
                assert number not in self.damaged
            elif result.miss is Miss.CHECKSUM:
                assert number in self.damaged
            else:
                assert result.miss in (Miss.ABSENT, Miss.EVICTED)
                assert not self.held(number)

    @rule(batch=batches)
    def delete(self, batch: list[int]) -> None:
        held = sum(self.held(number) for number in set(batch))
        assert self.run(self.tier.delete([key(number) for number in batch])) == held
        assert not any(self.held(number) for number in batch)

    @rule(number=numbers, where=damages)
    def flip_a_bit(self, number: int, where: int) -> None:
        if self.held(number) and number not in self.damaged:
            bits = 8 * len(self.subject.stored(self.tier, self.folder, key(number)))
            self.subject.flip(self.tier, self.folder, key(number), where % bits)
            self.damaged.add(number)

    @precondition(lambda self: self.subject.name != "ram")
    @rule()
    def reopen(self) -> None:
        held = [self.held(number) for number in range(25)]
        self.run(self.tier.close())
        self.tier = self.subject.open(self.folder)
        assert [self.held(number) for number in range(25)] == held

    @invariant()
    def sound(self) -> None:
        assert isinstance(self.tier, RamTier | NvmeTier)
        self.tier.check_invariants()

    def teardown(self) -> None:
        self.run(self.tier.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.folder)


def machine(subject: Subject) -> type[RuleBasedStateMachine]:
    return type("TierMachine", (TierMachine,), {"subject": subject})


def case(name: str) -> type:
    (subject,) = (subject for subject in SUBJECTS if subject.name == name)
    found = machine(subject).TestCase
    found.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
    return found


TestRam = case("ram")
TestNvme = case("nvme")
TestZstd = case("nvme, zstd")
TestThreads = case("nvme, threads")
