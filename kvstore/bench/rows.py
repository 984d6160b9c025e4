"""One measured figure and what it is judged by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Row:
    """`value` in `unit`, beside `ceiling` in the same unit: what was measured next to it.

    `ratio` is value over ceiling, and the row is judged by the bound that it has:
    `at_least` where more is better, `at_most` where less is. A row with neither
    is there for information. `checksums` says who computed one over the bytes.
    """

    name: str
    group: str
    value: float
    unit: str
    ceiling: float | None = None
    against: str = ""
    at_least: float | None = None
    at_most: float | None = None
    checksums: str = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """None without a ceiling to compare with."""
        return self.value / self.ceiling if self.ceiling else None

    @property
    def ok(self) -> bool | None:
        """Whether the bound is kept; None where there is no bound, or nothing to compare with."""
        if self.ratio is None or (self.at_least is None and self.at_most is None):
            return None
        above = self.at_least is None or self.ratio >= self.at_least
        below = self.at_most is None or self.ratio <= self.at_most
        return above and below

    def unjudged(self) -> Row:
        """The same for information."""
        return replace(self, at_least=None, at_most=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "group": self.group,
            "value": self.value,
            "unit": self.unit,
            "ceiling": self.ceiling,
            "against": self.against,
            "ratio": self.ratio,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "ok": self.ok,
            "checksums": self.checksums,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """A benchmark without rows: "skipped" where it cannot run here, "failed" where it broke."""

    name: str
    outcome: Literal["skipped", "failed"]
    reason: str

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "outcome": self.outcome, "reason": self.reason}


class NotHereError(Exception):
    """Raised by a benchmark that needs what this machine does not have; says what."""
