"""Which device, how much of its memory, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvstore.engine.device import HostDevice, device_of
from kvstore.engine.device_name import torch_device
from kvstore.engine.engine import Engine
from kvstore.engine.hbm_size import CPU_BYTES, kv_bytes
from kvstore.engine.loading import LoadedModel, load
from kvstore.errors import SettingsError

GIB = 1 << 30
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_what_is_left_is_for_kv() -> None:
    assert kv_bytes(80 * GIB, 60 * GIB, 2 * GIB, 0.9) == 50 * GIB
    assert kv_bytes(80 * GIB, 60 * GIB, 2 * GIB, 0.5) == 18 * GIB
    with pytest.raises(SettingsError, match=r"no memory is left for KV: .* hbm_fraction is 0.25"):
        kv_bytes(80 * GIB, 60 * GIB, 0, 0.25)


@pytest.mark.parametrize("name", ["gpu", "", "tpu:0", "mps", "cuda:x", "meta"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(SettingsError, match=r"is not one of cpu, cuda, cuda:1"):
        torch_device(name)


@no_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_device_that_is_not_here(name: str, tiny_path: Path, tmp_path: Path) -> None:
    said = rf"device {name}: (this torch \(.*\) is built for CPUs|torch sees no CUDA device)"
    with pytest.raises(SettingsError, match=said):
        Engine.from_pretrained(tiny_path, device=name)
    with pytest.raises(SettingsError, match=said):
        load(tmp_path / "not even looked for", device=name)


def test_the_cpu_by_any_name() -> None:
    assert torch_device("cpu") == torch_device(torch.device("cpu", 0)) == torch.device("cpu")


def test_an_engine_on_a_cpu_takes_what_it_always_took(tiny: LoadedModel) -> None:
    device = device_of(tiny.decoder, max_batch=8)
    assert isinstance(device, HostDevice)
    with Engine(tiny) as engine:
        layout = engine.namespace.layout
        assert device.hbm_bytes(layout, 512, 0.9) == CPU_BYTES == 512 << 20
        assert engine.stats().hbm_blocks == CPU_BYTES // layout.block_bytes


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01])
def test_fractions_that_are_none(tiny: LoadedModel, fraction: float) -> None:
    with pytest.raises(SettingsError, match="hbm_fraction"):
        Engine(tiny, hbm_fraction=fraction)
