"""Asking a daemon over HTTP."""

from __future__ import annotations

import http.client
import json
import re
from typing import Any, NamedTuple

from tests.daemon.doors import DaemonProcess
from tests.store.rig import PATIENCE_S

# What a client may name its model, for all we know.
HOSTILE = "<img src=x onerror=alert(1)><script>document.title='stolen'</script> & \"co\""


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def data(self) -> Any:
        return json.loads(self.body)


def ask(port: int, path: str, method: str = "GET", **headers: str) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request(method, path, headers=headers)
        reply = connection.getresponse()
        return Reply(reply.status, reply.headers, reply.read())
    finally:
        connection.close()


def port_of(process: DaemonProcess) -> int:
    """Where a daemon that was started with `--http 127.0.0.1:0` listens."""
    (found,) = re.findall(r"http://127\.0\.0\.1:(\d+)/", process.log)
    return int(found)
