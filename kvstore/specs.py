"""Every setting as people are told of it: its name, default, what it accepts, its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from annotated_types import Ge, Le

from kvstore.quantities import format_size, format_time
from kvstore.settings import Settings

SECRETS = ("tenant.salt", "client.token")  # are not shown, nor repeated in errors


class Spec(NamedTuple):
    """One setting, as people are told about it."""

    key: str  # "ram.capacity_bytes"
    default: str
    accepts: str
    reason: str

    @property
    def variable(self) -> str:
        return "KVSTORE_" + self.key.upper().replace(".", "__")

    @property
    def name(self) -> str:
        """As an argument of `kvstore.open`; with dashes, as a flag."""
        name = self.key.replace(".", "_")
        return SHORT_NAMES.get(name, name)


# The two that everyone sets, and the groups whose field names speak for themselves.
SHORT_NAMES = {"ram_capacity_bytes": "ram_bytes", "nvme_capacity_bytes": "nvme_bytes"}


def specs() -> Iterator[Spec]:
    """Every setting, in the order of this file."""
    for group, outer in Settings.model_fields.items():
        for name, field in outer.default.__class__.model_fields.items():
            default = field.default
            yield Spec(
                key=f"{group}.{name}",
                default="not set" if default in (None, "") else render(name, default),
                accepts=_accepts(name, field),
                reason=field.description or "",
            )


def render(key: str, value: object) -> str:
    """A value as a person would write it: by the unit that ends its key."""
    if isinstance(value, (int, float)) and key.endswith("_bytes"):
        return format_size(value)
    if isinstance(value, (int, float)) and key.endswith("_s"):
        return format_time(value)
    return str(value)


def _accepts(name: str, field: Any) -> str:
    choices = _choices(field.annotation)
    if choices:
        return "one of " + ", ".join(choices)
    low = next((bound.ge for bound in field.metadata if isinstance(bound, Ge)), None)
    high = next((bound.le for bound in field.metadata if isinstance(bound, Le)), None)
    if low is None:
        return "a path" if "Path" in str(field.annotation) else "a text"
    bounds = f"from {render(name, low)} to {render(name, high)}"
    if name.endswith("_bytes"):
        return f'a size {bounds}, such as "500MB" or "1 GiB"'
    if name.endswith("_s"):
        return f'a time {bounds}, such as "500ms" or "2s"'
    return f"a number {bounds}" if field.annotation is float else f"a whole number {bounds}"


def _choices(annotation: Any) -> tuple[str, ...]:
    args = getattr(annotation, "__args__", ())
    return args if args and all(isinstance(arg, str) for arg in args) else ()
