"""The engine: a decoder, its paged KV, and the loop that serves many requests at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Self

from kvstore.engine.calibration import quantised
from kvstore.engine.checkpoint import Progress
from kvstore.engine.device import device_of
from kvstore.engine.hbm_size import FRACTION
from kvstore.engine.loading import LoadedModel, load
from kvstore.engine.loop import Loop
from kvstore.engine.naming import namespace_of, torch_dtype
from kvstore.engine.output import Delta, EngineStats, Output, assemble
from kvstore.engine.prompts import Prompt, prompt_tokens, sequence_limit
from kvstore.engine.request import Request
from kvstore.engine.sampling import SamplingParams
from kvstore.engine.sequence import TokenSequence
from kvstore.errors import ClosedError, RequestError, SettingsError
from kvstore.quantities import parse_size
from kvstore.tiers.hbm import HbmTier
from kvstore.verbs import Store


class Engine:
    """Generates text, and computes no block twice that HBM or the store still has.

    Belongs to one thread: every method must be called from the same one, or under
    a lock of the caller's. Two `stream`s may be read in turns. The store may be
    shared with other engines; it is the caller's to close, after the engine.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        store: Store | None = None,
        hbm_bytes: int | str = "auto",
        hbm_fraction: float = FRACTION,
        kv_dtype: str = "auto",
        block_tokens: int = 16,
        max_batch: int = 8,
        prefill_chunk_tokens: int = 512,
        salt: str = "",
    ) -> None:
        """`hbm_bytes` of KV are allocated here, once. For the rest see `from_pretrained`.

        Raises SettingsError for values that cannot be, KernelError where CUDA's tools are
        missing.
        """
        for name, value in (
            ("max_batch", max_batch),
            ("prefill_chunk_tokens", prefill_chunk_tokens),
        ):
            if value < 1:
                raise SettingsError(f"{name} is {value}, it must be at least 1")
        self.model = model
        kept = quantised(model, kv_dtype)
        self.namespace = namespace_of(
            model, model.decoder.dtype, block_tokens=block_tokens, salt=salt, kept=kept
        )
        layout = self.namespace.layout
        device = device_of(model.decoder, max_batch, None if kept is None else kept.scales)
        if not 0 < hbm_fraction <= 1:
            raise SettingsError(f"hbm_fraction is {hbm_fraction}, it must be above 0 and at most 1")
        if hbm_bytes == "auto":
            hbm_bytes = device.hbm_bytes(layout, prefill_chunk_tokens, hbm_fraction)
        hbm = HbmTier(layout, _capacity(hbm_bytes), model.decoder.device)
        self._loop = Loop(
            device,
            hbm,
            store,
            max_batch=max_batch,
            chunk_tokens=prefill_chunk_tokens,
        )
        self._hbm_tokens = hbm.capacity_tokens
        self._max_batch = max_batch
        self._inboxes: dict[int, deque[Delta]] = {}  # of `generate` and `stream`
        self._undelivered: list[Delta] = []  # of `add_request`, for the next `step`
        self._arrivals = 0
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        store: Store | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        hbm_bytes: int | str = "auto",
        hbm_fraction: float = FRACTION,
        kv_dtype: str = "auto",
        block_tokens: int = 16,
        max_batch: int = 8,
        prefill_chunk_tokens: int = 512,
        salt: str = "",
        progress: Progress | None = None,
    ) -> Engine:
        """Load a Hugging Face folder or a GGUF file, and make an engine of it. Takes seconds.

        `dtype` is that of weights and KV ("auto": bfloat16). `device` is "cpu", "cuda" or
        "cuda:N". `hbm_bytes` of KV are kept there; "auto" is 512 MiB on a CPU, and on a GPU
        what `hbm_fraction` of its memory leaves beside the weights and the largest step. At most
        `max_batch` sequences are computed in one step, and `prefill_chunk_tokens` tokens of their
        prompts.
        `kv_dtype` is how KV is kept: "auto" as it is computed, "fp8" and "int8" in one byte an
        element, half of bfloat16, at the price of some accuracy
        (docs/adr/0054-quantised-kv.md).
        `salt` separates what this engine stores from all who have another one.
        Raises ModelError when the model cannot be used, SettingsError for a device that is not
        here, KernelError where CUDA's tools are missing.
        """
        return cls(
            load(path, torch_dtype(dtype), device, progress),
            store=store,
            hbm_bytes=hbm_bytes,
            hbm_fraction=hbm_fraction,
            kv_dtype=kv_dtype,
            block_tokens=block_tokens,
            max_batch=max_batch,
            prefill_chunk_tokens=prefill_chunk_tokens,
            salt=salt,
        )

    # ---- whole requests

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """Answer all `prompts`, together; one Output each, in their order.

        A prompt is text, token ids, or the messages of a chat. `params` are for
        all of them or one for each. Raises RequestError, and starts none, when one
        of them cannot be served.
        """
        if isinstance(prompts, str):
            raise RequestError("generate takes a list of prompts; put the text into one")
        if params is None or isinstance(params, SamplingParams):
            each: list[SamplingParams | None] = [params] * len(prompts)
        else:
            each = list(params)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts, but sampling values for {len(each)}")
        requests = [self._request(p, own) for p, own in zip(prompts, each, strict=True)]
        streams = [self._read(request) for request in requests]
        try:
            for request in requests:
                self._enqueue(request)
            return [assemble(list(stream)) for stream in streams]
        finally:
            for request in requests:
                self.abort(request.request_id)
            self._loop.settle()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        progress: Progress | None = None,
    ) -> Generator[Delta, None, None]:
        """The answer to one prompt, delta by delta as it is computed.

        `progress` is called with (tokens in HBM, all tokens) of the prompt after
        each step before the first delta. Raises RequestError at once when the
        prompt cannot be served. Closing the iterator before its end aborts the request.
        """
        request = self._request(prompt, params)

        def deltas() -> Generator[Delta, None, None]:
            self._enqueue(request)
            try:
                yield from self._read(request, progress)
            finally:
                self.abort(request.request_id)
                self._loop.settle()

        return deltas()

    # ---- the loop, for servers

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a prompt; `step` returns its deltas, under the id returned here."""
        request = self._request(prompt, params)
        self._loop.start(request)
        return request.request_id

    def step(self) -> list[Delta]:
        """Compute one batch: a token of each running sequence and a chunk of the prompts.

        Returns what has become final. Waits, for a moment, only when nothing can
        be computed because all is being loaded or copied.
        """
        self._check_open()
        self._advance()
        deltas, self._undelivered = self._undelivered, []
        return deltas

    def abort(self, request_id: int) -> None:
        """Drop a request and free its blocks; nothing happens when it is finished or unknown."""
        self._inboxes.pop(request_id, None)
        self._undelivered = [d for d in self._undelivered if d.request_id != request_id]
        self._loop.abort(request_id)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self._loop.busy

    def clear_hbm(self) -> int:
        """Forget every block that no running sequence uses; returns how many were known."""
        return self._loop.hbm.pool.clear()

    def stats(self) -> EngineStats:
        """Gauges, and counters since the engine was made."""
        return self._loop.stats()

    def close(self) -> None:
        """Abort all requests and let go of the weights and the KV. May be called twice."""
        if not self._closed:
            self._closed = True
            self._inboxes.clear()
            self._loop.close()
            del self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def check_invariants(self) -> None:
        """Raises InvariantError where scheduler, pool and requests contradict each other."""
        self._loop.check_invariants()

    # ---- requests

    def _request(self, prompt: Prompt, params: SamplingParams | None) -> Request:
        """Check and tokenise; nothing is queued yet."""
        self._check_open()
        arrived_s = time.monotonic()
        params = params or SamplingParams()
        tokens = prompt_tokens(self.model, prompt)
        limit = sequence_limit(
            len(tokens),
            params,
            context_tokens=self.model.config.context_tokens,
            hbm_tokens=self._hbm_tokens,
        )
        if params.n > self._max_batch:
            raise RequestError(f"n is {params.n}; the engine's max_batch is {self._max_batch}")
        self._arrivals += 1
        leader = TokenSequence(self.namespace, tokens, arrival=self._arrivals, width=params.n)
        return Request(
            leader, params, self.model.tokenizer, limit_tokens=limit, arrived_s=arrived_s
        )

    def _enqueue(self, request: Request) -> None:
        self._inboxes[request.request_id] = deque()
        self._loop.start(request)

    def _read(self, request: Request, progress: Progress | None = None) -> Iterator[Delta]:
        """The deltas of an enqueued request, computing until the last one is there."""
        inbox = self._inboxes[request.request_id]
        while True:
            while inbox:
                delta = inbox.popleft()
                yield delta
                if delta.usage is not None:
                    return
            self._check_open()
            if request.request_id not in self._loop.requests:
                return  # aborted meanwhile
            self._advance()
            if progress is not None and not request.completion_tokens:
                progress(request.leader.computed_tokens, request.leader.prompt_tokens)

    def _advance(self) -> None:
        """One step; its deltas go to whoever reads them."""
        for delta in self._loop.advance():
            inbox = self._inboxes.get(delta.request_id)
            (self._undelivered if inbox is None else inbox).append(delta)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed")


def _capacity(hbm_bytes: int | str) -> int:
    try:
        return parse_size(hbm_bytes)
    except ValueError as error:
        raise SettingsError(f"hbm_bytes = {hbm_bytes!r}: {error}") from None
