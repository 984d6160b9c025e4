"""Who may import whom: imports go down only. Read from the syntax trees, nothing is run.

A new module must be given a place in LAYERS first.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "kvstore"

PURE_STDLIB = {
    *("__future__", "array", "bisect", "collections", "contextlib", "dataclasses", "enum"),
    *("functools", "hashlib", "heapq", "itertools", "json", "math", "operator", "re", "struct"),
    *("sys", "types", "typing"),
}
PURE_PACKAGES = {"numpy", "xxhash", "zstandard"}
# Outside packages, and the only layers that may import them.
PACKAGES: dict[str, str] = {
    **dict.fromkeys(("numpy", "xxhash", "zstandard"), "any layer"),
    "annotated_types": "settings",
    "aiohttp": "daemon",
    "prometheus_client": "daemon connectors",
    "click": "cli",
    "msgspec": "wire daemon",
    "zmq": "daemon",
    "cupy": "kernels connectors",
    "gguf": "engine",
    **dict.fromkeys(("google", "grpc"), "proto daemon"),
    **dict.fromkeys(("grpc_health", "grpc_reflection"), "daemon"),
    "jinja2": "engine",
    "lmdb": "tiers",
    "pydantic": "settings",
    "rich": "cli bench",
    "safetensors": "engine",
    "tokenizers": "engine",
    "torch": "kernels hbm engine bench connectors",
    "transformers": "connectors",
    **dict.fromkeys(("huggingface_hub", "sglang", "vllm"), "connectors"),
}


class Layer(NamedTuple):
    """Modules by name below kvstore; a folder's name stands for all in it not named alone."""

    modules: str
    may_import: str = ""
    pure: bool = False


# From the bottom up. A layer may import itself and the layers named, all of them below it.
LAYERS = {
    "errors": Layer("errors version", pure=True),
    "pure": Layer(
        "identity hashing layout allocator index policy retention planner codec slots "
        "quantities answers breaker admission eviction expiry rowheap tenant chains "
        "hot histogram events",
        "errors",
        pure=True,
    ),
    "clock": Layer("clock"),
    "tier": Layer("tier frame", "errors pure"),
    "verbs": Layer("verbs inventory", "errors pure tier"),
    "wire": Layer("wire stream", "errors pure"),
    "machine": Layer("machine mapping"),
    "settings": Layer("settings specs sources", "errors pure machine"),
    "kernels": Layer("kernels", "errors pure"),
    "tiers": Layer("tiers", "errors pure clock tier machine"),
    "hbm": Layer(
        "tiers.hbm tiers.hbm_copies tiers.hbm_cuda tiers.hbm_staging", "errors pure kernels tiers"
    ),
    "store": Layer(
        "store below hub lease reservation promotion demotion background transfer errands lookup "
        "ending feed measures store_inventory",
        "errors pure clock tier verbs",
    ),
    "client": Layer("client", "errors pure clock tier verbs wire machine"),
    "archive": Layer("archive", "errors pure tier verbs"),
    "engine": Layer("engine", "errors pure clock tier verbs kernels tiers hbm"),
    "compose": Layer("compose", "errors pure clock tier machine settings tiers store client"),
    "proto": Layer("proto"),
    "public": Layer("__init__", "errors pure store client engine compose"),
    "daemon": Layer(
        "daemon", "errors pure clock tier verbs wire machine settings store compose proto"
    ),
    "bench": Layer(
        "bench",
        "errors pure clock tier verbs machine settings kernels tiers hbm store engine compose",
    ),
    "cli": Layer(
        "cli __main__",
        "errors pure clock tier verbs machine settings tiers store client archive engine compose "
        "daemon public bench",
    ),
    "connectors": Layer(
        "connectors", "errors pure tier verbs settings kernels hbm store client engine public"
    ),
    "testing": Layer("testing", "errors pure verbs public"),
}


def layer_of(module: str) -> str | None:
    """The layer of a module named below kvstore, such as "tiers.ram"; None when it has none."""
    top = module.partition(".")[0] or "__init__"
    of = {each: name for name, layer in LAYERS.items() for each in layer.modules.split()}
    return of.get(module) or of.get(top)


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.iterdir()):
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            if file.suffix == ".py":
                parts = file.relative_to(PACKAGE).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports(tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """Full names of imported modules, wherever in the file the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "relative import"
                continue
            source = node.module or ""
            for alias in node.names:
                below = f"{source}.{alias.name}".removeprefix("kvstore.")
                is_module = source.startswith("kvstore") and any(
                    name == below or name.startswith(f"{below}.") for name in known
                )
                yield f"kvstore.{below}" if is_module else source


def violations(module: str, source: str, known: dict[str, Path]) -> list[str]:
    """What the module imports or calls that its layer must not."""
    name = layer_of(module)
    if name is None:
        return [f"{module} is in no layer: give it a place in LAYERS"]
    layer, tree, found = LAYERS[name], ast.parse(source), []
    allowed = {name, *layer.may_import.split()}
    for imported in imports(tree, known):
        top, _, below = imported.partition(".")
        if top == "kvstore":
            target = layer_of(below) or "no layer"
            if target not in allowed:
                found.append(f"imports {imported} ({target})")
        elif layer.pure and top not in PURE_STDLIB | PURE_PACKAGES:
            found.append(f"imports {imported}: a pure module has no I/O, threads or clock")
        elif top in PACKAGES and PACKAGES[top] != "any layer" and name not in PACKAGES[top].split():
            found.append(f"imports {imported}, which belongs to {PACKAGES[top]}")
        elif top not in PACKAGES and top not in sys.stdlib_module_names:
            found.append(f"imports {imported}: give the package a place in PACKAGES")
    if layer.pure:
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        found += [f"uses {name}()" for name in sorted(names & {"open", "print", "input"})]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    assert violations(module, MODULES[module].read_text(), MODULES) == []


def test_the_table_itself_only_looks_down() -> None:
    below: set[str] = set()
    for name, layer in LAYERS.items():
        assert set(layer.may_import.split()) <= below, name
        below.add(name)
    placed = [module for layer in LAYERS.values() for module in layer.modules.split()]
    assert len(placed) == len(set(placed))


def test_the_table_names_nothing_that_is_gone() -> None:
    there = {module.partition(".")[0] for module in MODULES} | set(MODULES)
    placed = {module for layer in LAYERS.values() for module in layer.modules.split()}
    assert placed - there == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("identity", "import os"),
        ("identity", "def late():\n    import torch"),
        ("hashing", "from kvstore.tier import Record"),
        ("hashing", "import time"),
        ("layout", "from threading import Lock"),
        ("layout", "data = open('x')"),
        ("store", "from kvstore.tiers.block_pool import BlockPool"),
        ("store", "from kvstore.tiers import block_pool"),
        ("store", "from kvstore import tiers"),
        ("store", "import kvstore.compose as c"),
        ("store", "import kvstore"),
        ("store", "from . import tier"),
        ("store", "import torch.nn"),
        ("engine.model", "from kvstore.compose import open"),
        ("tiers.block_pool", "if x:\n    from kvstore.store import BlockStore"),
        ("engine.model", "import kvstore.connectors"),
        ("tiers.ram", "from kvstore.kernels import block_copy"),
        ("tiers.ram", "from kvstore.tiers import hbm"),
        ("tiers.ram", "import torch"),
        ("tiers.hbm", "from kvstore.store import BlockStore"),
        ("engine.model", "import requests"),
        ("unheard_of", ""),
    ],
)
def test_a_breach_is_seen(module: str, source: str) -> None:
    assert violations(module, source, MODULES) != []
