"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Passes text on until a stop string appears, which may span several pieces.

    What could be the beginning of a stop string is held back until it is known
    not to be one, so nothing that was given out has to be taken back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is final now. Sets `stopped` when a stop string is complete."""
        if not self._stop:
            return piece
        self._held += piece
        found = min(self._places(), default=None)
        if found is not None:
            self.stopped = True
            final, self._held = self._held[:found], ""
            return final
        border = len(self._held) - self._overlap()
        final, self._held = self._held[:border], self._held[border:]
        return final

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        final, self._held = self._held, ""
        return final

    def _places(self) -> list[int]:
        places = (self._held.find(stop) for stop in self._stop)
        return [place for place in places if place >= 0]

    def _overlap(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(self._longest - 1, len(self._held))
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
