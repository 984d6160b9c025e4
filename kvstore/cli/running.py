"""An engine over a store, as the settings say, for as long as a command runs."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from kvstore.cli.console import progress
from kvstore.cli.model_package import fetch_demo_model
from kvstore.engine.hbm_size import CPU_BYTES
from kvstore.errors import InputError, ModelError, SettingsError
from kvstore.machine import memory_bytes
from kvstore.quantities import format_size, format_time

if TYPE_CHECKING:
    from kvstore.engine.engine import Engine
    from kvstore.engine.output import Output, Usage
    from kvstore.engine.prompts import Prompt
    from kvstore.engine.sampling_params import SamplingParams
    from kvstore.settings import Settings


def model_path(model: str | None) -> Path:
    """The folder or file that `model` names; `smollm2` is fetched. Raises ModelError."""
    if model is None:
        raise ModelError(
            "which model? give --model a Hugging Face folder, a .gguf file, or the word smollm2"
        )
    path = Path(os.path.expanduser(model))
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        if model == "smollm2":
            return fetch_demo_model()
        raise ModelError(f"there is no model at {path}") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    return path


def set_threads(settings: Settings) -> None:
    """To be called before torch is imported, which reads this once, as do child processes."""
    if settings.engine.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(settings.engine.threads)
    # A thread of libgomp that has to wait for the others spins for a while that suits cores
    # of its own. On shared cores it keeps the very thread it waits for from running: a
    # prefill of 3 s took 62 s. With so few turns it sleeps soon, for next to nothing on
    # a quiet machine.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@contextmanager
def engine_extra() -> Iterator[None]:
    """Around imports that need torch and its company. InputError says how to get them."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("kvstore"):
            raise
        raise InputError(
            f"this needs {error.name}, which is not installed: "
            "pip install -e '.[engine]' in its clone"
        ) from error


@contextmanager
def running_engine(settings: Settings) -> Iterator[Engine]:
    """Open the store, load the model, and close both at the end, whatever happens.

    Raises InputError for what a person can mend.
    """
    asked = settings.engine
    if asked.store is None:
        _check_both_fit(settings)
    path = model_path(asked.model)
    with engine_extra():
        from kvstore.engine.engine import Engine
    from kvstore import compose

    with (
        compose.open(settings)
        if asked.store is None
        else compose.connect_to(asked.store, settings) as store
    ):
        with progress(f"Loading {path.name}") as report:
            engine = Engine.from_pretrained(
                path,
                store=store,
                dtype=asked.dtype,
                kv_dtype=asked.kv_dtype,
                device=asked.device,
                hbm_bytes=asked.hbm_bytes or "auto",
                hbm_fraction=asked.hbm_fraction,
                block_tokens=asked.block_tokens,
                max_batch=asked.max_batch,
                prefill_chunk_tokens=asked.prefill_chunk_tokens,
                salt=settings.tenant.salt,
                progress=report,
            )
        with engine:
            yield engine


def _check_both_fit(settings: Settings) -> None:
    """Each fits alone, or the settings would have been refused."""
    if settings.engine.device != "cpu":
        return
    ram_bytes, hbm_bytes, room = (
        settings.ram.capacity_bytes,
        settings.engine.hbm_bytes or CPU_BYTES,
        memory_bytes(),
    )
    if ram_bytes + hbm_bytes > room:
        raise SettingsError(
            f"--ram-bytes {format_size(ram_bytes)} and --hbm-bytes {format_size(hbm_bytes)} are "
            f"together more than the {format_size(room)} of memory here: on a CPU both come from it"
        )


def answer(
    engine: Engine, prompt: Prompt, params: SamplingParams, write: Callable[[str], object]
) -> Output:
    """Generate; `write` gets the text of the first completion piece by piece."""
    from kvstore.engine.output import assemble

    deltas = []
    with _ended_between_steps() as check:
        with progress("Reading the prompt") as report:

            def read(tokens: int, total: int) -> None:
                check()
                report(tokens, total)

            stream = engine.stream(prompt, params, progress=read)
            first = next(stream)
        with contextlib.closing(stream):
            for delta in itertools.chain([first], stream):
                deltas.append(delta)
                if delta.index == 0:
                    write(delta.text)
                check()
    return assemble(deltas)


@contextmanager
def _ended_between_steps() -> Iterator[Callable[[], None]]:
    """Signals take effect when `check` is called, so that no step of the engine is cut in two.

    A second Ctrl-C does not wait for that.
    """
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if callable(handler := signal.getsignal(number))
    }
    arrived: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)
        signal.signal(number, handlers[number])

    def check() -> None:
        if arrived:
            number = arrived.pop(0)
            handlers[number](number, None)

    for number in handlers:
        signal.signal(number, remember)
    try:
        yield check
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    check()  # what came after the last step


def summary(usage: Usage) -> str:
    """One line: where the prompt came from, and how fast it went."""
    parts = {
        "HBM": usage.hbm_tokens,
        "RAM": usage.ram_tokens,
        "NVMe": usage.nvme_tokens,
        "remote": usage.remote_tokens,
        "computed": usage.recomputed_tokens,
    }
    came = ", ".join(f"{tokens} {place}" for place, tokens in parts.items() if tokens)
    decode_s = usage.total_s - usage.ttft_s
    rate = f", {(usage.completion_tokens - 1) / decode_s:.1f} tokens/s" if decode_s > 0 else ""
    return (
        f"{usage.prompt_tokens} prompt tokens ({came}), first token after "
        f"{format_time(usage.ttft_s)}, then {usage.completion_tokens - 1} more{rate}"
    )
