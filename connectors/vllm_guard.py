"""What must not end vLLM's scheduler with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger("vllm.kvstore")

Result = TypeVar("Result")


class Guard:
    """Calls until one of them raises, which is said in the log; then nothing is called any more."""

    def __init__(self) -> None:
        self.is_over = False

    def __call__(
        self, otherwise: Result, verb: Callable[..., Result], *arguments: object
    ) -> Result:
        """What `verb` returns, or `otherwise`."""
        if self.is_over:
            return otherwise
        try:
            return verb(*arguments)
        except Exception:
            self.is_over = True
            log.exception("kvstore: running without it from now on, this should not have happened")
            return otherwise
