"""A model in one GGUF file (as llama.cpp stores it)."""
from __future__ import annotations
from pathlib import Path
from typing import Any
from kvstore.errors import ModelError

class GGUFFile:
    config: Any
    def __init__(self, path: Path) -> None:
        raise ModelError("GGUF loading is being written")
