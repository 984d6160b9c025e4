"""Rules that hold for every test."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.leaks import Held, leaks, watch_event_loops

watch_event_loops()

# A shell that starts us in the background has Ctrl-C ignored, and nohup the hangup, which
# programs hand on to those they start. A handler they do not hand on.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)

# The same examples on every machine and every run; `make soak` looks for new ones.
settings.register_profile("default", deadline=None, derandomize=True, database=None)
settings.register_profile("soak", deadline=None, max_examples=2_000, print_blob=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """Fails the test that left a file, thread, task, process or shared memory behind.

    What fixtures of a wider scope hold was there before the test, and is not its doing.
    """
    before = Held.now()
    yield
    left = leaks(before)
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _open_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _open_gpu() -> bool:
    """Whether there is one. Its driver opens files that it keeps: here, and not in some test."""
    import torch

    if not torch.cuda.is_available():
        return False
    ones = torch.ones((8, 8), pin_memory=True).to("cuda", non_blocking=True)
    torch.mm(ones, ones)
    torch.cuda.synchronize()
    return True
