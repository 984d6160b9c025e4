"""How much memory of its device an engine takes for KV when nobody says."""

from __future__ import annotations

from kvstore.errors import SettingsError
from kvstore.quantities import format_size

CPU_BYTES = 512 << 20
FRACTION = 0.9  # the rest is for CUDA graphs, for fragments, and for what libraries take late


def kv_bytes(total_bytes: int, free_bytes: int, workspace_bytes: int, fraction: float) -> int:
    """What is left of `fraction` of a device's memory, once all else has its share.

    `free_bytes` are so with the weights in place, and `workspace_bytes` of them are taken by
    the largest step. Raises SettingsError where nothing is left.
    """
    used_bytes = total_bytes - free_bytes
    left_bytes = int(fraction * total_bytes) - used_bytes - workspace_bytes
    if left_bytes <= 0:
        raise SettingsError(
            f"no memory is left for KV: of {format_size(total_bytes)} on the device "
            f"{format_size(used_bytes)} are in use, {format_size(workspace_bytes)} are for "
            f"computing, and hbm_fraction is {fraction}"
        )
    return left_bytes
