"""Standard output that says so itself when it cannot be written."""

from __future__ import annotations

import io
import os

from kvstore.errors import KVStoreError


class Stdout(io.TextIOWrapper):
    """In place of the stream of that name, from which an error tells nobody what failed.

    Raises KVStoreError, once; what is written later goes nowhere. A reader that
    has left is no fault of the output: BrokenPipeError stays what it is.
    """

    @classmethod
    def over(cls, stream: io.TextIOWrapper) -> Stdout:
        """Takes the stream's place: that is of no use any more."""
        encoding, lines, through = stream.encoding, stream.line_buffering, stream.write_through
        return cls(
            stream.detach(),
            encoding,
            # As stderr has it: what the terminal's encoding lacks is shown as an escape.
            errors="backslashreplace",
            line_buffering=lines,
            write_through=through,
        )

    def write(self, text: str) -> int:
        try:
            # click writes "" to find out what it may write, and takes any error for an answer.
            return super().write(text) if text != "" else 0
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> Exception:
        if isinstance(error, BrokenPipeError):
            return error
        # Not even by the interpreter's own flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        return KVStoreError(f"standard output cannot be written: {error.strerror}")
