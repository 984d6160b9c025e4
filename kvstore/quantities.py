"""Sizes and times as people write them, and back: "1 GiB" is 1073741824 bytes, "500ms" 0.5 s."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

SIZE_UNITS: Mapping[str, float] = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
TIME_UNITS: Mapping[str, float] = {
    "": 1,
    "ms": 1e-3,
    "s": 1,
    "min": 60,
    "m": 60,
    "h": 3600,
    "d": 86400,
}

_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(value: object) -> int:
    """Bytes, rounded down. Raises ValueError that says what is accepted."""
    try:
        return int(_parse(value, SIZE_UNITS))
    except (ValueError, OverflowError):
        raise ValueError(
            'not a size: write a number and a unit, such as "500MB" or "1 GiB", or plain bytes'
        ) from None


def parse_time(value: object) -> float:
    """Seconds. Raises ValueError that says what is accepted."""
    try:
        return float(_parse(value, TIME_UNITS))
    except (ValueError, OverflowError):
        raise ValueError(
            'not a time: write a number and a unit, such as "500ms", "2s" or "1h", or plain seconds'
        ) from None


def _parse(value: object, units: Mapping[str, float]) -> float:
    """Raises ValueError or OverflowError for what is no amount, or none that a number can hold."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(value)
        return value
    matched = _NUMBER_AND_UNIT.fullmatch(value) if isinstance(value, str) else None
    if matched is None:
        raise ValueError(value)
    number, wanted = matched[1], matched[2].lower()
    factor = next((factor for unit, factor in units.items() if unit.lower() == wanted), None)
    if factor is None:
        raise ValueError(value)
    # Whole numbers stay integers: a float would lose the last bytes of a large size.
    return (float(number) if "." in number else int(number)) * factor


def counted(number: int, noun: str) -> str:
    """As people write it: "0 blocks", "1 block", "2 blocks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_size(nbytes: float) -> str:
    """About three figures and a binary unit: "1 GiB", "1.5 MiB", "512 B"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if nbytes >= SIZE_UNITS[unit]:
            return f"{_short(nbytes / SIZE_UNITS[unit])} {unit}"
    return f"{nbytes:.0f} B"


def format_time(seconds: float) -> str:
    """About three figures and a unit: "12.5 ms", "1.5 s", "2 h"."""
    if 0 < seconds < 1:
        return f"{_short(seconds * 1000)} ms"
    for unit in ("d", "h", "min"):
        if seconds >= 2 * TIME_UNITS[unit]:
            return f"{_short(seconds / TIME_UNITS[unit])} {unit}"
    return f"{_short(seconds)} s"


def _short(number: float) -> str:
    decimals = 2 if number < 10 else 1 if number < 100 else 0
    text = f"{number:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text
