"""Sizes and habits, checked rather than hoped for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ("kvstore", "tiers", "kernels", "connectors")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70

# rglob does not follow the symlinks in kvstore/, so each file is listed once.
FILES = {
    str(path.relative_to(ROOT)): path
    for folder in (*LIBRARY, "tests", "benchmarks")
    for pattern in ("*.py", "*.cu", "*.cuh")
    for path in sorted((ROOT / folder).rglob(pattern))
    if not any(part.is_symlink() for part in path.parents)
    and not path.stem.endswith(("_pb2", "_pb2_grpc"))  # protoc wrote it
}
PYTHON = {name: path for name, path in FILES.items() if path.suffix == ".py"}
QUIET = [
    name
    for name in PYTHON
    if name.startswith(tuple(f"{folder}/" for folder in LIBRARY))
    and not name.startswith("kvstore/cli/")
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_can_be_read_in_one_sitting(name: str) -> None:
    lines = FILES[name].read_text().count("\n")
    assert lines < MAX_FILE_LINES


@pytest.mark.parametrize("name", PYTHON)
def test_a_function_fits_on_a_screen(name: str) -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = {
        node.name: length
        for node in ast.walk(ast.parse(PYTHON[name].read_text()))
        if isinstance(node, functions)
        and (length := (node.end_lineno or 0) - node.lineno + 1) >= MAX_FUNCTION_LINES
    }
    assert long == {}


@pytest.mark.parametrize("name", QUIET)
def test_the_library_does_not_print(name: str) -> None:
    called = {
        node.func.id
        for node in ast.walk(ast.parse(PYTHON[name].read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "print" not in called


@pytest.mark.parametrize("name", [name for name in PYTHON if name in QUIET])
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(ast.parse(PYTHON[name].read_text()))


def test_the_files_are_found() -> None:
    assert {"kvstore/identity.py", "tiers/__init__.py", "tests/test_tidy.py"} <= FILES.keys()
    assert not any(name.startswith("kvstore/tiers/") for name in FILES)
