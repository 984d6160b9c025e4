"""Saves beside the model, of pages that vLLM may take back at any moment."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from kvstore.connectors.convert import Pages
from kvstore.connectors.vllm_jobs import Job
from kvstore.errors import LayoutError


class TakenBackError(LayoutError):
    """The pages are another request's by now."""


class LentPages(Pages):
    """Pages to be read from, until they are taken back.

    That waits for one block at most, and on a GPU for the step that has computed it.
    """

    def __init__(self, pages: Pages) -> None:
        self.layout = pages.layout
        self._pages = pages
        self._lock = threading.Lock()
        self.is_over = False

    def take_back(self) -> None:
        """When this returns, nobody reads them any more."""
        with self._lock:
            self.is_over = True

    def copy_out(
        self, table: Sequence[int], first: int, views: Sequence[memoryview], block_tokens: int
    ) -> None:
        """As for any pages, but raises TakenBackError as soon as they are."""
        for i, view in enumerate(views):
            with self._lock:
                if self.is_over:
                    raise TakenBackError("the pages have been taken back")
                self._pages.copy_out(table, first + i * block_tokens, [view], block_tokens)


class Save(NamedTuple):
    """One that was begun or waits its turn."""

    blocks: int
    pages: LentPages
    future: Future[None]


class Saves:
    """A thread that saves, one job after the other. The rest belongs to vLLM's worker thread."""

    def __init__(self, save: Callable[[Job, Pages], None]) -> None:
        """`save` is run in the thread, and raises nothing."""
        self._save = save
        self._thread = ThreadPoolExecutor(1, "kvstore-save")
        self._of: defaultdict[str, list[Save]] = defaultdict(list)

    @property
    def blocks(self) -> int:
        """Of all saves that are still to be made."""
        saves = [save for saves in self._of.values() for save in saves]
        return sum(save.blocks for save in saves if not (save.future.done() or save.pages.is_over))

    def add(self, job: Job, pages: Pages) -> None:
        lent = LentPages(pages)
        future = self._thread.submit(self._save, job, lent)
        self._of[job.request_id].append(Save(job.blocks, lent, future))

    def take_back(self, request_ids: Iterable[str]) -> None:
        """These requests' pages are read no more. Waits for a block that is just being copied."""
        for request_id in request_ids:
            for save in self._of.get(request_id, ()):
                if not save.future.cancel():
                    save.pages.take_back()

    def ended(self) -> dict[str, int]:
        """How many saves of each request have ended since the last call."""
        ended: dict[str, int] = {}
        for request_id, saves in list(self._of.items()):
            left = [save for save in saves if not save.future.done()]
            if len(left) < len(saves):
                ended[request_id] = len(saves) - len(left)
            if left:
                self._of[request_id] = left
            else:
                del self._of[request_id]
        return ended

    def of(self, request_ids: Iterable[str]) -> list[Future[None]]:
        """What has not ended, or not been told by `ended`, of these requests."""
        return [save.future for each in request_ids for save in self._of.get(each, ())]

    def close(self) -> None:
        """Waits for all of them."""
        self._thread.shutdown()
