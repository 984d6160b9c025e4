"""The data door under TLS: who is let in, by which certificate, and that the bytes are right."""

from __future__ import annotations

import dataclasses
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.client.client import StoreClient
from kvstore.compose import connect
from kvstore.daemon.network import server_tls
from kvstore.errors import ConnectionLostError, SettingsError
from kvstore.settings import DaemonSettings
from tests.daemon.certificates import Authority
from tests.daemon.data_doors import DataDaemon
from tests.store.rig import BLOCK, NAMESPACE, Rig, RunningClock, chain, get, put


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def certified(authority: Authority) -> DaemonSettings:
    certificate, key = authority.sign("daemon")
    return DaemonSettings(tls_certificate=certificate, tls_key=key)


def tls_of(settings: DaemonSettings) -> ssl.SSLContext:
    tls = server_tls(settings)
    assert tls is not None
    return tls


def is_let_in(client: StoreClient) -> bool:
    """Which also uses the connection: that a certificate is refused may be heard late."""
    with client:
        return client.is_connected and put(client, chain(1)) == 1


def test_blocks_go_there_and_back(
    rig: Rig, authority: Authority, certified: DaemonSettings
) -> None:
    with DataDaemon(rig.store, tls=tls_of(certified)) as daemon:
        with daemon.connect(ca=authority.ca) as client:
            assert put(client, chain(20)) == 20
            assert get(client, chain(20)) == 20
        assert get(rig.store, chain(20)) == 20


def test_both_ways_at_once(authority: Authority, certified: DaemonSettings) -> None:
    """OpenSSL's connection is in two threads at each end, with megabytes in both directions."""
    large = dataclasses.replace(NAMESPACE, layers=128)
    rig = Rig(None, ram_blocks=64 * large.layout.block_bytes // BLOCK, clock=RunningClock())
    faults: list[BaseException] = []
    with (
        DataDaemon(rig.store, tls=tls_of(certified)) as daemon,
        daemon.connect(ca=authority.ca) as client,
    ):
        put(client, chain(12, namespace=large))

        def work(verb: Callable[[int], int]) -> None:
            try:
                assert [verb(step) for step in range(3)] == [12] * 3
            except BaseException as error:
                faults.append(error)

        threads = [
            threading.Thread(target=work, args=(verb,))
            for verb in (
                lambda _: get(client, chain(12, namespace=large)),
                lambda step: put(client, chain(12, step + 1, large)),
            )
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert faults == []
    rig.finish()


def test_a_daemon_that_another_has_certified_is_not_trusted(
    rig: Rig, certified: DaemonSettings, tmp_path: Path
) -> None:
    with DataDaemon(rig.store, tls=tls_of(certified)) as daemon:
        stranger = Authority(tmp_path / "theirs")
        assert not is_let_in(daemon.connect(ca=stranger.ca))
        assert not is_let_in(daemon.connect())  # and one that does not speak TLS is not heard


def test_a_certificate_for_another_host_is_not_trusted(rig: Rig, authority: Authority) -> None:
    certificate, key = authority.sign("elsewhere", "10.1.2.3")
    tls = tls_of(DaemonSettings(tls_certificate=certificate, tls_key=key))
    with DataDaemon(rig.store, tls=tls) as daemon:
        assert not is_let_in(daemon.connect(ca=authority.ca))


def test_a_daemon_without_tls_is_not_talked_to(rig: Rig, authority: Authority) -> None:
    with DataDaemon(rig.store) as daemon:
        assert not is_let_in(daemon.connect(ca=authority.ca, timeout_s=0.2))


def test_clients_need_a_certificate_where_one_is_asked_for(
    rig: Rig, authority: Authority, certified: DaemonSettings, tmp_path: Path
) -> None:
    asking = certified.model_copy(update={"tls_client_ca": authority.ca})
    certificate, key = authority.sign("engine")
    strange, strange_key = Authority(tmp_path / "theirs").sign("engine")
    with DataDaemon(rig.store, tls=tls_of(asking)) as daemon:
        assert not is_let_in(daemon.connect(ca=authority.ca))
        assert not is_let_in(daemon.connect(ca=authority.ca, certificate=strange, key=strange_key))
        assert is_let_in(daemon.connect(ca=authority.ca, certificate=certificate, key=key))


def test_what_is_no_certificate_is_one_clear_line(
    authority: Authority, certified: DaemonSettings, tmp_path: Path
) -> None:
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    for wrong in (
        {"tls_certificate": None},
        {"tls_certificate": nothing},
        {"tls_certificate": tmp_path / "missing.pem"},
        {"tls_key": authority.sign("other")[1]},
        {"tls_client_ca": nothing},
    ):
        with pytest.raises(SettingsError, match=r"^daemon\.tls_[^\n]*$"):
            server_tls(certified.model_copy(update=wrong))


def test_who_does_not_speak_tls_hears_what_may_be_wrong(
    rig: Rig, certified: DaemonSettings
) -> None:
    with (
        DataDaemon(rig.store, tls=tls_of(certified)) as daemon,
        daemon.connect() as client,
        pytest.raises(ConnectionLostError, match=r"does it speak TLS\? then set client\.ca"),
    ):
        client.check_connected()


def test_a_client_is_told_which_file_is_wrong(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.sign("engine")
    missing = tmp_path / "missing"
    for given, told in (
        ({"ca": missing}, f"client.ca = {missing}: cannot be read: No such file"),
        ({"ca": key}, f"client.ca = {key}: no certificates in PEM"),
        ({"ca": authority.ca, "certificate": missing}, f"client.certificate = {missing}: cannot"),
        ({"ca": authority.ca, "certificate": certificate}, "and client.key is not set"),
        ({"ca": authority.ca, "key": key}, "client.key needs client.certificate"),
        (
            {"ca": authority.ca, "certificate": certificate, "key": missing},
            f"client.key = {missing}: cannot be read",
        ),
    ):
        with pytest.raises(SettingsError) as refused:
            connect("kvstore://127.0.0.1:1", **given)  # type: ignore[arg-type]
        assert told in str(refused.value)
        assert "None" not in str(refused.value)


@pytest.mark.parametrize(
    "wrong", [{"ca": "/missing.pem"}, {"certificate": "/some.pem"}, {"ca": __file__}]
)
def test_so_it_is_for_a_client(wrong: dict[str, str]) -> None:
    with pytest.raises(SettingsError):
        connect("kvstore://127.0.0.1:1", **wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="needs no token"):
        connect("unix:///tmp/none.sock", token="kvs_")
