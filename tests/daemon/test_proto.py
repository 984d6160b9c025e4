"""The .proto files: what protoc made of them is committed, and nothing in them is left unsaid."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).parents[2]
FOLDER = Path("kvstore/proto")
PROTOS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / FOLDER).glob("*.proto"))


def protoc(*args: str) -> None:
    pytest.importorskip("grpc_tools")
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *args], cwd=ROOT, check=True)


def test_make_proto_would_change_nothing(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    protoc("-I.", *outputs, *PROTOS)
    made = {path.name: path.read_text() for path in (tmp_path / FOLDER).iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / FOLDER).glob("*_pb2*.py*")}
    assert made == committed


def undocumented(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    """Services, methods, messages, fields, enums and values without a comment before them."""
    said = {tuple(at.path) for at in file.source_code_info.location if at.leading_comments.strip()}
    number = descriptor_pb2.FileDescriptorProto.DESCRIPTOR.fields_by_name

    def missing(path: tuple[int, ...], name: str) -> Iterator[str]:
        if path not in said:
            yield name

    for i, message in enumerate(file.message_type):
        path = (number["message_type"].number, i)
        yield from missing(path, message.name)
        for k, field in enumerate(message.field):
            yield from missing((*path, 2, k), f"{message.name}.{field.name}")
    for i, enum in enumerate(file.enum_type):
        path = (number["enum_type"].number, i)
        yield from missing(path, enum.name)
        for k, value in enumerate(enum.value):
            yield from missing((*path, 2, k), f"{enum.name}.{value.name}")
    for i, service in enumerate(file.service):
        path = (number["service"].number, i)
        yield from missing(path, service.name)
        for k, method in enumerate(service.method):
            yield from missing((*path, 2, k), f"{service.name}.{method.name}")


@pytest.mark.parametrize("proto", PROTOS)
def test_everything_is_documented(proto: str, tmp_path: Path) -> None:
    protoc("-I.", "--include_source_info", f"--descriptor_set_out={tmp_path / 'set'}", proto)
    files = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    assert [file.name for file in files] == [proto]
    assert list(undocumented(files[0])) == []
