"""The door for people and for Prometheus: metrics, health, and a page that shows the store live.

It asks nobody who they are, so it opens to this machine only, and it only tells: there is
nothing here that changes anything.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from importlib import resources
from ipaddress import ip_address
from urllib.parse import urlsplit

from aiohttp import web

from kvstore.daemon.history import STEP_S, History
from kvstore.daemon.listening import Endpoint, is_loopback
from kvstore.daemon.metrics import render
from kvstore.daemon.page import Page, describe
from kvstore.daemon.service import Service
from kvstore.daemon.status import read_status, why_not_ready
from kvstore.errors import ClosedError, SettingsError

log = logging.getLogger(__name__)

CONNECTIONS = 64  # at once; more are closed unheard
IDLE_S = 30.0  # between two requests of one connection
ENDING_S = 1.0  # for answers under way when the daemon ends
HOTTEST = 10  # prefixes that are shown
HALF_LIFE_S = 600.0  # of what a prefix has been served
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpDoor:
    """Answers GET and HEAD on one address. Belongs to the event loop that opened it."""

    def __init__(self, service: Service) -> None:
        """The service is borrowed."""
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._started_s = self._loop.time()
        self._history = History(service.store.stats())
        self._page = Page((resources.files("kvstore.daemon") / "static/index.html").read_text())
        self._runner = web.AppRunner(
            self._application(),
            access_log=None,
            handle_signals=False,
            shutdown_timeout=ENDING_S,
            keepalive_timeout=IDLE_S,
        )
        self._timer: asyncio.TimerHandle | None = None
        self._server: asyncio.Server | None = None
        self.port = 0

    @classmethod
    async def open(cls, service: Service, endpoint: Endpoint) -> HttpDoor:
        """Raises SettingsError where the address cannot be listened on."""
        check_loopback(endpoint)
        door = cls(service)
        await door._listen(endpoint)
        return door

    async def close(self) -> None:
        """May be called twice."""
        if self._timer is not None:
            self._timer.cancel()
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()

    # ---- what is answered

    async def _show_page(self, request: web.Request) -> web.Response:
        return web.Response(
            text=self._page.text,
            content_type="text/html",
            headers={"Content-Security-Policy": self._page.policy},
        )

    async def _tell_status(self, request: web.Request) -> web.Response:
        service = self._service
        status = read_status(service)
        return web.json_response(
            {
                "uptime_s": self._loop.time() - self._started_s,
                "not_ready": why_not_ready(service),
                **describe(status, service.hot.top(HOTTEST)),
                "step_s": STEP_S,
                "history": self._history.columns(status.stats),
            }
        )

    async def _tell_metrics(self, request: web.Request) -> web.Response:
        status, not_ready = read_status(self._service), why_not_ready(self._service)
        body = await asyncio.to_thread(render, status, not_ready)
        return web.Response(body=body, headers={"Content-Type": METRICS_TYPE})

    async def _tell_health(self, request: web.Request) -> web.Response:
        """That the event loop turns is all there is to tell."""
        return web.Response(text="ok\n")

    async def _tell_readiness(self, request: web.Request) -> web.Response:
        reason = why_not_ready(self._service)
        return web.Response(text=f"{reason or 'ready'}\n", status=503 if reason else 200)

    # ---- inside

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[_guard], client_max_size=1024)
        application.add_routes(
            [
                web.get("/", self._show_page),
                web.get("/api/status", self._tell_status),
                web.get("/metrics", self._tell_metrics),
                web.get("/healthz", self._tell_health),
                web.get("/readyz", self._tell_readiness),
            ]
        )
        return application

    async def _listen(self, endpoint: Endpoint) -> None:
        await self._runner.setup()
        try:
            self._server = await self._loop.create_server(
                self._protocol, endpoint.host, endpoint.port
            )
        except OSError as error:
            await self._runner.cleanup()
            raise SettingsError(_no_listening(endpoint, error)) from None
        self.port = self._server.sockets[0].getsockname()[1]
        log.info("metrics and page: http://%s/", Endpoint(endpoint.host, self.port))
        self._timer = self._loop.call_later(STEP_S, self._step)

    def _protocol(self) -> asyncio.Protocol:
        server = self._runner.server
        if server is None or len(server.connections) >= CONNECTIONS:
            return _Unheard()
        return server()

    def _step(self) -> None:
        self._timer = self._loop.call_later(STEP_S, self._step)
        try:
            self._history.step(self._service.store.stats())
        except ClosedError:  # only while the daemon ends
            return
        self._service.hot.fade(0.5 ** (STEP_S / HALF_LIFE_S))


class _Unheard(asyncio.Protocol):
    """One connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def check_loopback(endpoint: Endpoint) -> None:
    """Raises SettingsError where the door would be open to others than this machine."""
    if not is_loopback(endpoint.host):
        raise SettingsError(
            f"daemon.http = {str(endpoint)!r}: metrics and page ask nobody who they are, so they "
            f"open to this machine only: listen on 127.0.0.1:{endpoint.port}, and let others in "
            "through a proxy that asks"
        )


def _no_listening(endpoint: Endpoint, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        why = "another process listens there; end it, or choose another port"
    else:
        why = error.strerror or str(error)
    return f"daemon.http = {str(endpoint)!r}: {why}"


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Only for those who asked for this machine by name, and nothing to be kept or guessed.

    A page from elsewhere whose name was made to resolve to this machine must not read what
    is here, and a browser says which name it went to.
    """
    if not _is_this_machine(request.headers.get("Host")):
        return web.Response(status=421, text="ask for this machine by a loopback address\n")
    try:
        response = await handler(request)
    except web.HTTPException as refused:
        response = web.Response(status=refused.status, text=f"{refused.reason}\n")
        if "Allow" in refused.headers:
            response.headers["Allow"] = refused.headers["Allow"]
    except ClosedError:
        response = web.Response(status=503, text="stopping\n")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["Server"] = "kvstore"
    return response


def _is_this_machine(host: str | None) -> bool:
    if host is None:  # HTTP/1.0, which some probes speak, and no browser
        return True
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False
