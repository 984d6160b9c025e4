"""`import kvstore`: light, lazy, and one package wherever it comes from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvstore

ROOT = Path(__file__).parents[1]
HEAVY = {
    *("torch", "cupy", "grpc", "transformers", "tokenizers", "safetensors", "gguf", "jinja2"),
    *("numpy", "lmdb", "zstandard", "msgpack", "pydantic", "rich", "click"),
}


def python(code: str, path: list[Path] | None = None) -> str:
    """What a fresh interpreter prints, with the repository on its path."""
    places = os.pathsep.join(map(str, path or [ROOT]))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": places},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_importing_imports_nothing_else() -> None:
    loaded = json.loads(python("import kvstore, json, sys; print(json.dumps(list(sys.modules)))"))
    assert HEAVY & set(loaded) == set()
    assert [name for name in loaded if name.startswith("kvstore")] == ["kvstore"]


def test_a_store_needs_no_torch() -> None:
    code = "import kvstore, sys; kvstore.open; kvstore.BlockStore; print('torch' in sys.modules)"
    assert python(code).strip() == "False"


def test_every_public_name_is_there() -> None:
    for name in kvstore.__all__:
        assert getattr(kvstore, name) is not None
    assert set(kvstore.__all__) <= set(dir(kvstore))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        kvstore.Nothing  # noqa: B018


def test_the_engine_without_torch_says_what_to_install() -> None:
    code = """
import sys
sys.modules["torch"] = None
import kvstore
try:
    kvstore.Engine
except ImportError as error:
    print(error)
"""
    assert python(code).strip() == (
        "kvstore.Engine needs 'torch', which is not installed: "
        "pip install -e '.[engine]' in its clone"
    )


@pytest.mark.parametrize("name", ["tiers", "kernels", "connectors"])
def test_the_linked_folders_are_parts_of_the_package(name: str) -> None:
    assert os.readlink(ROOT / "kvstore" / name) == f"../{name}"
    assert python(f"import kvstore.{name} as m; print(m.__name__)").strip() == f"kvstore.{name}"


def test_our_kernels_do_not_hide_a_package_of_that_name(tmp_path: Path) -> None:
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("whose = 'theirs'\n")
    assert python("import kernels; print(kernels.whose)", [ROOT, tmp_path]).strip() == "theirs"
