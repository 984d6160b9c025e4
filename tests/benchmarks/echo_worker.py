"""A worker for the tests, as chatty as the libraries that real ones import."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.workers.lines import serve


def build() -> dict[str, Callable[..., Any]]:
    print("importing something loud")

    def echo(text: str) -> str:
        print(text)
        return text

    return {
        "arguments": lambda: sys.argv[1:],
        "echo": echo,
        "half": lambda seconds: seconds / 2,
        "divide": lambda: 1 / 0,
        "die": lambda: os._exit(3),
    }


if __name__ == "__main__":
    serve(build)
