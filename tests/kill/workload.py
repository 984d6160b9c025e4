"""What the killed process is asked, over a store that is too small for it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from random import Random
from typing import Literal

MiB = 1 << 20

BLOCK_TOKENS = 16
ANSWER_TOKENS = 6
# A block of the tiny model has 64 KiB: 24 fit in HBM, 32 in RAM, 82 on NVMe; the prompts
# have twice as many.
HBM_BYTES, RAM_BYTES, NVME_BYTES = 24 << 16, 2 * MiB, 6 * MiB


@dataclass(frozen=True, slots=True)
class Orders:
    """One run. `questions` are numbers of PROMPTS; without any the run never ends by itself."""

    seed: int
    directory: str
    driver: Literal["auto", "threads"]
    codec: Literal["raw", "zstd"]
    durability: Literal["cache", "sync"]
    questions: tuple[int, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Orders:
        fields = json.loads(text)
        return cls(**{**fields, "questions": tuple(fields["questions"])})


def _prompts() -> list[list[int]]:
    """Two out of three begin as another one does, for some blocks."""
    random = Random(0)
    prompts: list[list[int]] = []
    for number in range(24):
        prefix: list[int] = []
        if number % 3:
            other = random.choice(prompts)
            prefix = other[: BLOCK_TOKENS * random.randint(1, len(other) // BLOCK_TOKENS)]
        new = random.randint(BLOCK_TOKENS + 1, 10 * BLOCK_TOKENS)
        prompts.append((prefix + [random.randrange(256) for _ in range(new)])[:300])
    return prompts


PROMPTS = _prompts()
