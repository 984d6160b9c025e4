"""Which device is meant, and whether it is here."""

from __future__ import annotations

import torch

from kvstore.errors import SettingsError


def torch_device(name: torch.device | str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`. Raises SettingsError for one that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise SettingsError(f"device {str(name)!r} is not one of cpu, cuda, cuda:1, ...")
    if device.type == "cpu":
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise SettingsError(
            f"device {device}: this torch ({torch.__version__}) is built for CPUs only; "
            "install the one for your CUDA version"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        there = f"only {count} CUDA devices" if count else "no CUDA device"
        raise SettingsError(f"device {device}: torch sees {there} here")
    return torch.device("cuda", index)
