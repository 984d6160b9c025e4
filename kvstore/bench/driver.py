"""What the driver knows of a GPU and torch does not say: `nvidia-smi`, where it is installed."""

from __future__ import annotations

import subprocess

# The link and the clocks are as they are now, which is less while nothing runs; and at most.
_FIELDS = {
    "driver": "driver_version",
    "pcie_generation": "pcie.link.gen.current",
    "pcie_generation_most": "pcie.link.gen.max",
    "pcie_lanes": "pcie.link.width.current",
    "pcie_lanes_most": "pcie.link.width.max",
    "clock_mhz": "clocks.current.sm",
    "clock_most_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.current.memory",
    "memory_clock_most_mhz": "clocks.max.memory",
    "power_limit_w": "power.limit",
}
_TIMEOUT_S = 10.0


def driver_facts(uuid: str) -> dict[str, str]:
    """Of the GPU with this UUID; nothing where nobody can be asked."""
    command = [
        "nvidia-smi",
        f"--id=GPU-{uuid.removeprefix('GPU-')}",
        f"--query-gpu={','.join(_FIELDS.values())}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(_FIELDS, values, strict=True)) if len(values) == len(_FIELDS) else {}
