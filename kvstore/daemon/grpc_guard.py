"""What a gRPC client is told when a call fails: a status and one line, never a traceback."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from kvstore.errors import (
    ClosedError,
    FallenBehindError,
    InputError,
    KVStoreError,
    LayoutError,
    RightsError,
    TierError,
    WireError,
)

log = logging.getLogger(__name__)


class UnknownCallerError(RightsError):
    """A call without a token that is known here."""


class TooManyError(InputError):
    """More calls or clients than the daemon serves at once."""


# The first that fits.
_STATUS: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (UnknownCallerError, grpc.StatusCode.UNAUTHENTICATED),
    (TooManyError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (RightsError, grpc.StatusCode.PERMISSION_DENIED),
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (LayoutError, grpc.StatusCode.INVALID_ARGUMENT),
    (WireError, grpc.StatusCode.INVALID_ARGUMENT),
    (ClosedError, grpc.StatusCode.UNAVAILABLE),
    (TierError, grpc.StatusCode.UNAVAILABLE),
    (FallenBehindError, grpc.StatusCode.OUT_OF_RANGE),
)


def status_of(error: KVStoreError) -> grpc.StatusCode:
    found = (status for kind, status in _STATUS if isinstance(error, kind))
    return next(found, grpc.StatusCode.INTERNAL)


OPEN_STREAMS = 64  # at once, of health and reflection: who asks for those needs no token


class Guard(grpc.aio.ServerInterceptor):
    """Stands before every method of every service of a server.

    A request is decoded here, so that one that cannot be is the client's error. Without this
    grpc logs a traceback, and sends its last line. And strangers get only so many of the calls
    that a server answers at once, for theirs may last for ever.
    """

    def __init__(self) -> None:
        self._open_streams = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        is_ours = method.startswith("/kvstore.")
        counted = self._counted if handler.response_streaming and not is_ours else _uncounted
        return _guarded(handler, method, counted)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Raises TooManyError."""
        if self._open_streams >= OPEN_STREAMS:
            raise TooManyError(f"{OPEN_STREAMS} streams of health and reflection are open")
        self._open_streams += 1
        try:
            yield
        finally:
            self._open_streams -= 1


_uncounted = contextlib.nullcontext


def _guarded(handler: Any, method: str, counted: Callable[[], AbstractContextManager[None]]) -> Any:
    """The same handler, of whatever kind, whose every failure is a status."""
    streams_in, streams_out = handler.request_streaming, handler.response_streaming
    kind = f"{'stream' if streams_in else 'unary'}_{'stream' if streams_out else 'unary'}"
    answer = getattr(handler, kind)

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            if not streams_in:
                request = handler.request_deserializer(request)
            if inspect.isasyncgenfunction(answer):
                # To its end here: grpc leaves the generators of cancelled calls to the collector.
                with counted():
                    async with contextlib.aclosing(answer(request, context)) as replies:
                        async for reply in replies:
                            await context.write(reply)
                return None
            with counted():
                return await answer(request, context)
        except grpc.aio.AbortError:  # it has its status already
            raise
        except grpc.aio.InternalError:  # what was written did not go out
            raise asyncio.CancelledError from None
        except DecodeError:
            status, text = grpc.StatusCode.INVALID_ARGUMENT, "this is no message of that type"
        except KVStoreError as error:
            status, text = status_of(error), str(error)
        except Exception:
            log.exception("%s failed", method)
            status, text = grpc.StatusCode.INTERNAL, "an error of the daemon's; its log says more"
        # Out of the handlers: what the error held of blocks and buffers is let go of first.
        return await context.abort(status, text)

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        call,
        request_deserializer=handler.request_deserializer if streams_in else None,
        response_serializer=handler.response_serializer,
    )
