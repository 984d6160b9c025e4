"""How many clients may be connected: all together, and of one tenant."""

from __future__ import annotations

from functools import partial

import pytest

from kvstore import wire
from kvstore.daemon.service import Limits
from kvstore.errors import RequestError
from kvstore.tenant import LOCAL, Tenant
from tests.daemon.doors import Daemon
from tests.daemon.raw_client import RawClient
from tests.daemon.subjects import others_are_served
from tests.store.rig import chain, put


@pytest.mark.parametrize("limits", [Limits(connections=2)])
def test_no_more_clients_than_allowed(daemon: Daemon) -> None:
    with daemon.connect() as one, RawClient(daemon) as other:
        with RawClient(daemon) as third:
            assert isinstance(third.welcome, wire.Failed)
        with pytest.raises(RequestError, match="2 clients are connected"):
            daemon.connect()
        assert put(one, chain(2)) == 2
        other.close()
        daemon.until(lambda: len(daemon.service.sessions) == 1)
        others_are_served(daemon)


@pytest.mark.parametrize("limits", [Limits(connections=5)])
def test_one_tenant_cannot_take_all_connections(daemon: Daemon) -> None:
    """Half of them, and those of this machine's user all."""
    service = daemon.service
    one, two = (Tenant(name, secret=name.encode()) for name in ("one", "two"))
    opened = [daemon.call(partial(service.open, one, "a peer")) for _ in range(2)]
    with pytest.raises(RequestError, match="one has 2 clients"):
        daemon.call(partial(service.open, one, "a peer"))
    daemon.call(partial(service.end, opened[0]))
    for tenant in (one, two, two, LOCAL):
        daemon.call(partial(service.open, tenant, "a peer"))
    with pytest.raises(RequestError, match="5 clients are connected"):
        daemon.call(partial(service.open, LOCAL, "a peer"))
