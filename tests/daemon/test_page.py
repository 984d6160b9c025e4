"""The live page as a person sees it: in a real browser, over a real daemon."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest

from tests.daemon.asking import HOSTILE, port_of
from tests.daemon.browser import Page, chromium, find_chromium
from tests.daemon.conftest import MakeProcess
from tests.daemon.doors import DaemonProcess
from tests.store.rig import BLOCK, NAMESPACE, chain, get, put

CHROMIUM = find_chromium()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_in_a_browser(make_process: MakeProcess, tmp_path: Path) -> None:
    process = make_process("--http", "127.0.0.1:0")
    named = dataclasses.replace(NAMESPACE, model=HOSTILE)
    with process.connect() as client:
        put(client, chain(5, namespace=named))
        assert get(client, chain(5, namespace=named)) == 5
        assert get(client, chain(3, seed=1)) == 0
        with client.acquire(chain(4, namespace=named)):
            asyncio.run(_look(port_of(process), tmp_path / "browser", process))


async def _look(port: int, folder: Path, process: DaemonProcess) -> None:
    assert CHROMIUM is not None
    async with chromium(CHROMIUM, folder) as page:
        await page.open(f"http://127.0.0.1:{port}/", width=1280, height=900)
        await page.until("document.getElementById('state').textContent === 'ready'")
        await _shows(page)
        for width in (1280, 768, 360):
            await page.resize(width, 740)
            await page.until(f"innerWidth === {width}")
            assert await page.value("document.documentElement.scrollWidth") == width
        assert (await _asks_again(page, hidden=True), await _asks_again(page, hidden=False)) == (
            False,
            True,
        )
        assert page.complaints == []
        # Nobody answers any more: it says so, and keeps what it has shown.
        assert await asyncio.to_thread(process.end) == 0
        await page.until("document.getElementById('state').textContent.startsWith('no answer')")
        assert "62.5" in await page.value("document.getElementById('rate').textContent")


async def _asks_again(page: Page, *, hidden: bool) -> bool:
    """Whether the page, when it has asked, is going to ask again."""
    asks: bool = await page.value(
        f"""(async () => {{
            const value = {json.dumps(hidden)};
            Object.defineProperty(document, "hidden", {{ value, configurable: true }});
            document.dispatchEvent(new Event("visibilitychange"));
            const real = window.setTimeout;
            let again = false;
            window.setTimeout = (...given) => {{ again = true; return real(...given); }};
            await poll();
            window.setTimeout = real;
            return again;
        }})()"""
    )
    return asks


async def _shows(page: Page) -> None:
    async def text(name: str) -> str:
        said: str = await page.value(f"document.getElementById('{name}').textContent")
        return said

    assert (await text("rate")).startswith("62.5%from RAM62.5 %from NVMe0.0 %missed37.5 %")
    assert "absent · never stored3" in await text("misses")
    assert "1leases" in await text("clients")
    assert f"{4 * BLOCK // 1024}.0KiBleased and reserved" in await text("clients")
    assert "blocks5" in await text("tiers")
    assert "local862.5 %" in await text("tenants")
    # What a client named itself is text, and nothing but text.
    assert HOSTILE in await text("namespaces")
    assert HOSTILE in await text("prefixes")
    assert await page.value("document.title") == "kvstore"
    assert await page.value("document.querySelectorAll('img').length") == 0
