"""Who makes a gRPC call, and which session it is part of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc

from kvstore.daemon.grpc_guard import TooManyError, UnknownCallerError
from kvstore.daemon.service import Service
from kvstore.daemon.session import Session
from kvstore.daemon.tokens import Tenants
from kvstore.errors import RequestError, RightsError
from kvstore.tenant import Tenant

Context = grpc.aio.ServicerContext[Any, Any]

SCHEME = "bearer "


@dataclass(slots=True)
class _Shared:
    session: Session
    calls: int = 0


class Calls:
    """Callers of one door. Belongs to the event loop.

    The calls of one connection that hold something share a session, and so one bound on what
    they hold; it ends with the last of them.
    """

    def __init__(self, service: Service, tenants: Tenants) -> None:
        self._service = service
        self._tenants = tenants
        self._shared: dict[tuple[str, Tenant], _Shared] = {}

    def passing(self, context: Context) -> Session:
        """The session of a call that holds nothing. Raises UnknownCallerError."""
        return Session(self._service, self._tenant(context), _peer(context))

    @contextlib.contextmanager
    def holding(self, context: Context) -> Iterator[Session]:
        """The session of a call that holds leases or reservations, and gives them back itself.

        Raises UnknownCallerError, TooManyError.
        """
        key = _peer(context), self._tenant(context)
        shared = self._shared.get(key) or self._open(key)
        shared.calls += 1
        try:
            yield shared.session
        finally:
            shared.calls -= 1
            if not shared.calls:
                del self._shared[key]
                self._service.dismiss(shared.session)

    def _open(self, key: tuple[str, Tenant]) -> _Shared:
        peer, tenant = key
        session = Session(self._service, tenant, peer)
        try:
            self._service.admit(session)
        except RequestError as error:
            raise TooManyError(str(error)) from None
        return self._shared.setdefault(key, _Shared(session))

    def _tenant(self, context: Context) -> Tenant:
        try:
            return self._tenants.of(_token(context))
        except RightsError as error:
            raise UnknownCallerError(str(error)) from None


def _peer(context: Context) -> str:
    return unquote(context.peer())


def _token(context: Context) -> str:
    """Of the metadata `authorization: Bearer TOKEN`; "" where there is none, or another kind."""
    for name, value in context.invocation_metadata() or ():
        if name == "authorization" and isinstance(value, str):
            found = value.strip()
            return found[len(SCHEME) :].strip() if found.lower().startswith(SCHEME) else ""
    return ""
