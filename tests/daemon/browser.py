"""Headless Chromium, driven over its DevTools protocol: enough to look at one page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

PATIENCE_S = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking"),
    *("--disable-component-update", "--hide-scrollbars", "--remote-debugging-port=0"),
)


def find_chromium() -> str | None:
    """On the PATH, or where Playwright keeps its own."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache/ms-playwright"))
    kept = sorted(cache.glob("chromium*/chrome-linux*/*"))
    return next((str(path) for path in kept if path.name in ("chrome", "headless_shell")), None)


class Page:
    """One tab. `complaints` are the errors that a person would see in the console."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._loaded = asyncio.Event()
        self.complaints: list[str] = []
        self._hearing = asyncio.create_task(self._hear())

    async def close(self) -> None:
        """And the browser, which tidies up after itself."""
        await self._call("Browser.close")
        self._hearing.cancel()
        await asyncio.gather(self._hearing, return_exceptions=True)

    async def open(self, url: str, *, width: int, height: int, dark: bool = False) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self._call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self._call("Emulation.setEmulatedMedia", features=[scheme])
        await self.resize(width, height)
        self._loaded.clear()
        await self._call("Page.navigate", url=url)
        async with asyncio.timeout(PATIENCE_S):
            await self._loaded.wait()

    async def resize(self, width: int, height: int) -> None:
        await self._call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    async def value(self, script: str) -> Any:
        """Of a JavaScript expression; a promise is waited for."""
        answer = await self._call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true, looking whenever a frame is drawn."""
        await self.value(
            "new Promise((done) => { const look = () => "
            f"({condition}) ? done(true) : requestAnimationFrame(look); look(); }})"
        )

    async def picture(self) -> bytes:
        """All of the page, as PNG."""
        shot = await self._call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    async def _call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": params}))
        async with asyncio.timeout(PATIENCE_S):
            return await answer

    async def _hear(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                answer = self._answers.pop(said["id"])
                if "error" in said:
                    answer.set_exception(RuntimeError(said["error"]["message"]))
                else:
                    answer.set_result(said["result"])
            elif said["method"] == "Page.loadEventFired":
                self._loaded.set()
            elif said["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(said["params"]["exceptionDetails"]))
            elif said["method"] == "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(said["params"]["args"]))
            elif said["method"] == "Log.entryAdded":
                self.complaints.append(said["params"]["entry"]["text"])


@contextlib.asynccontextmanager
async def chromium(program: str, folder: Path) -> AsyncIterator[Page]:
    """A tab of a browser that lives, with all its processes, as long as the block."""
    process = await asyncio.create_subprocess_exec(
        *(program, *FLAGS, f"--user-data-dir={folder}", "about:blank"),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "HOME": str(folder)},
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            port = await _port(process)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            tabs = await (await session.get("/json/list")).json()
            (tab,) = [each for each in tabs if each["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                try:
                    yield page
                finally:
                    await page.close()
        async with asyncio.timeout(PATIENCE_S):
            await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


async def _port(process: asyncio.subprocess.Process) -> int:
    """Where it listens: "DevTools listening on ws://127.0.0.1:PORT/..."."""
    assert process.stderr is not None
    said = b""
    while line := await process.stderr.readline():
        said += line
        if b"DevTools listening on ws://" in line:
            return int(line.split(b"127.0.0.1:")[1].split(b"/")[0])
    raise RuntimeError(f"chromium has ended: {said.decode(errors='replace')}")
