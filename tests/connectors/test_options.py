"""What an engine's settings for its connector may say: names that are none are said to be so."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.connectors.options import WHERE, read_options
from kvstore.errors import SettingsError

URL = "unix:///run/kvstore.sock"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"url": URL, "deadline": 1}, "deadline: no such setting; did you mean deadline_s?"),
        ({"url": URL, "tokn": "x"}, "tokn: no such setting; did you mean token?"),
        ({"ulr": URL}, "ulr: no such setting; did you mean url?"),
        ({"ram_byte": "1 GiB"}, "ram_byte: no such setting; did you mean ram_bytes?"),
        ({"zzz": 1}, "zzz: no such setting"),
        ({"url": URL, "ram_bytes": "1 GiB"}, "ram_bytes is for a store of this process's own"),
        ({}, "names no store"),
        ({"token": "x", "ram_bytes": "1 GiB"}, "credentials, but no url"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read_options(given)
    assert str(refused.value).startswith(WHERE)
    assert expected in str(refused.value)


def test_what_is_said_is_taken() -> None:
    options = read_options({"url": URL, "token": "t", "salt": "s", "deadline_s": 2})
    assert (options.url, options.credentials) == (URL, {"token": "t"})
    assert (options.salt, options.deadline_s, options.store) == ("s", 2.0, {})
    assert read_options({"nvme_path": "/x", "ram_bytes": 1}).store == {
        "nvme_path": "/x",
        "ram_bytes": 1,
    }
