"""Keeps the attention keys and values that an LLM engine has already computed.

Names are imported on first use, so that `import kvstore` costs next to nothing
and never brings torch in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.client.client import StoreClient
    from kvstore.compose import connect, open
    from kvstore.engine.engine import Engine
    from kvstore.engine.naming import model_namespace
    from kvstore.hashing import Chain, TokenChain
    from kvstore.identity import Namespace
    from kvstore.retention import Retention
    from kvstore.store import BlockStore
    from kvstore.version import __version__ as __version__


# Public name -> the module that defines it.
_MODULE_OF = {
    "BlockStore": "kvstore.store",
    "Chain": "kvstore.hashing",
    "Engine": "kvstore.engine.engine",
    "Namespace": "kvstore.identity",
    "Retention": "kvstore.retention",
    "StoreClient": "kvstore.client.client",
    "TokenChain": "kvstore.hashing",
    "__version__": "kvstore.version",
    "connect": "kvstore.compose",
    "model_namespace": "kvstore.engine.naming",
    "open": "kvstore.compose",
}

__all__ = [
    "BlockStore",
    "Chain",
    "Engine",
    "Namespace",
    "Retention",
    "StoreClient",
    "TokenChain",
    "connect",
    "errors",
    "model_namespace",
    "open",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("kvstore.errors")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "kvstore":
            raise
        raise ImportError(
            f"kvstore.{name} needs {error.name!r}, which is not installed: "
            f"pip install -e '.[engine]' in its clone"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
