"""What is not a whole GGUF file is refused, wherever it ends and whatever is in it."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.engine.gguf_file import GGUFFile
from kvstore.engine.gguf_header import read_header
from kvstore.engine.loading import open_checkpoint
from kvstore.errors import ModelError
from tests.engine.tiny import tiny_model
from tests.engine.tiny_gguf import TOKENS, tiny_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file. The tests of this module write beside it."""
    home = tmp_path_factory.mktemp("gguf-header")
    folder = tiny_model(home / "folder", vocab_size=len(TOKENS))
    return tiny_gguf(home / "whole.gguf", folder)


@pytest.mark.parametrize("alignment", [None, 8, 1024])
def test_reads_what_the_gguf_package_reads(
    whole: Path, tmp_path: Path, alignment: int | None
) -> None:
    metadata = {"general.tags": ["a", "b"], "numbers": [1, -2, 3], "flag": True, "half": 0.5}
    file = tiny_gguf(
        tmp_path / "tiny.gguf",
        whole.parent / "folder",
        metadata={**metadata, "general.alignment": alignment},
    )
    header, reader = read_header(file), gguf.GGUFReader(file)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert header.metadata == fields
    assert header.nbytes == reader.data_offset
    assert {
        name: (place.shape, place.type, place.offset, place.nbytes)
        for name, place in header.tensors.items()
    } == {
        t.name: (tuple(reversed(t.shape.tolist())), t.tensor_type, t.data_offset, t.n_bytes)
        for t in reader.tensors
    }


def test_every_cut_is_refused(whole: Path, tmp_path: Path) -> None:
    data, file = whole.read_bytes(), tmp_path / "cut.gguf"
    start = read_header(whole).nbytes
    lengths = {*range(0, start, 13), *range(64), start, (start + len(data)) // 2, len(data) - 1}
    for length in lengths:
        file.write_bytes(data[:length])
        with pytest.raises(ModelError, match=r"is cut short|is not a GGUF file") as error:
            open_checkpoint(file)
        assert str(file) in str(error.value)


NOT_GGUF = {
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not a GGUF file"),
    "version 1": (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "is GGUF version 1"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "is GGUF version 50331648"),
    "nothing in it": (struct.pack("<4sIQQ", b"GGUF", 3, 0, 0), "'None' is not supported"),
    "2^64 - 1 fields": (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**64 - 1), "is cut short"),
    "2^64 - 1 tensors": (struct.pack("<4sIQQ", b"GGUF", 3, 2**64 - 1, 0), "is cut short"),
    "a key of 2^63 bytes": (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**63), "is cut short"),
    "2^60 strings": (
        struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 2**60),
        "is cut short",
    ),
    "2^60 numbers": (
        struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 12, 2**60),
        "is cut short",
    ),
    "an array of arrays": (
        struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 1),
        "metadata of unknown type 9",
    ),
    "a field of unknown type": (
        struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 77),
        "metadata of unknown type 77",
    ),
    "a tensor of 2^31 dimensions": (
        struct.pack("<4sIQQQ1sI", b"GGUF", 3, 1, 0, 1, b"t", 2**31),
        "dimensions",
    ),
    "a tensor of no rows": (
        struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"t", 1, 0, 0, 0),
        "impossible shape",
    ),
    "a row that is not whole blocks": (
        struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"t", 1, 33, 8, 0),
        r"impossible shape \(33,\) for Q8_0",
    ),
}


@pytest.mark.parametrize(("data", "message"), NOT_GGUF.values(), ids=list(NOT_GGUF))
def test_what_is_no_model(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(data)
    with pytest.raises(ModelError, match=message) as error:
        open_checkpoint(file)
    assert "\n" not in str(error.value)


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model at"):
        open_checkpoint(tmp_path / "absent.gguf")
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        read_header(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"neither a model folder nor a .gguf file"):
        open_checkpoint(tmp_path / "model.bin")


@given(data=st.data())
def test_damage_is_a_model_error_or_harmless(whole: Path, data: st.DataObject) -> None:
    content = bytearray(whole.read_bytes())
    start = read_header(whole).nbytes
    for _ in range(data.draw(st.integers(1, 3), label="places")):
        at = data.draw(st.integers(4, start - 1), label="at")
        content[at] = data.draw(st.integers(0, 255), label="byte")
    file = whole.with_name("damaged.gguf")
    file.write_bytes(content)
    with suppress(ModelError):
        GGUFFile(file).tokenizer().encode("a cat's 12 <|end|>")
