"""The file of tokens, the secret, and where a daemon may listen."""

from __future__ import annotations

import hmac
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.cli.main import run
from kvstore.compose import connect
from kvstore.daemon.listening import Endpoint, is_loopback, listen, parse_endpoint
from kvstore.daemon.tokens import (
    ANYONE,
    Tenants,
    TokenRecord,
    check_bind,
    digest_of,
    new_token,
    read_tokens,
    secret_of,
)
from kvstore.errors import RightsError, SettingsError
from tests.cli.commands import kvstore
from tests.daemon.doors import DaemonProcess
from tests.store.rig import chain, get, put

DIGEST = digest_of("kvs_one")


def written(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "tokens.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def entry(extra: str = "", digest: str = DIGEST, tenant: str = "search") -> str:
    return f'[[token]]\nsha256 = "{digest}"\ntenant = "{tenant}"\n{extra}\n'


def test_what_a_file_says(tmp_path: Path) -> None:
    limits = 'quota_bytes = "2 GiB"\npriority_cap = 60\nrights = ["admin"]'
    first = entry()
    second = entry(limits, digest_of("kvs_two"), "ops")
    assert read_tokens(written(tmp_path, first + second)) == [
        TokenRecord(DIGEST, "search", frozenset(["read", "write"]), None, 100),
        TokenRecord(digest_of("kvs_two"), "ops", frozenset(["admin"]), 2 << 30, 60),
    ]
    assert read_tokens(None) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "[[token]]"),
        ("token = 1", "[[token]]"),
        ("token = []", "[[token]]"),
        ("token = [1]", "token 1: must be a table"),
        ("[[token]\n", "not valid TOML"),
        (entry() + "[other]\na = 1", "nothing else"),
        (entry("right = []"), "token 1: right: no such field"),
        (entry(digest="kvs_one"), "token 1: sha256"),
        (entry(digest=DIGEST.upper()), "token 1: sha256"),
        (entry(tenant="a b"), "token 1: tenant"),
        (entry(tenant=""), "token 1: tenant"),
        (entry("rights = []"), "token 1: rights"),
        (entry('rights = ["all"]'), "token 1: rights"),
        (entry('rights = [["read"]]'), "token 1: rights"),
        (entry("priority_cap = 101"), "token 1: priority_cap"),
        (entry("priority_cap = true"), "token 1: priority_cap"),
        (entry('quota_bytes = "many"'), "token 1: quota_bytes"),
        (entry("quota_bytes = -1"), "token 1: quota_bytes"),
        (entry("quota_bytes = 0"), "token 1: quota_bytes"),
        (entry() + entry(), "twice"),
        (entry() + entry("quota_bytes = 1", "0" * 64), "different quotas"),
    ],
)
def test_what_is_wrong_is_one_clear_line(tmp_path: Path, text: str, told: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SettingsError) as refused:
        read_tokens(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "kvs_one" not in str(refused.value)  # someone may have put a token there


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o606, 0o660, 0o620, 0o601])
def test_a_file_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SettingsError, match="chmod 600"):
        read_tokens(written(tmp_path, entry(), mode))


def test_a_file_of_this_users_group_is_read(tmp_path: Path) -> None:
    assert len(read_tokens(written(tmp_path, entry(), 0o640))) == 1


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        read_tokens(tmp_path / "none.toml")


def test_each_token_leads_to_its_tenant() -> None:
    records = [
        TokenRecord(digest_of(token), tenant, frozenset(["read"]), None, 50)
        for token, tenant in (("kvs_a", "a"), ("kvs_b", "b"), ("kvs_a2", "a"))
    ]
    tenants = Tenants(records, b"s" * 32)
    assert [tenants.of(token).name for token in ("kvs_a", "kvs_b", "kvs_a2")] == ["a", "b", "a"]
    assert tenants.of("kvs_a").secret == tenants.of("kvs_a2").secret != tenants.of("kvs_b").secret
    assert len(tenants.of("kvs_a").secret) == 32
    assert Tenants(records, b"t" * 32).of("kvs_a").secret != tenants.of("kvs_a").secret
    assert "secret" not in repr(tenants.of("kvs_a"))
    for wrong in ("", "kvs_", "kvs_c", "kvs_a ", "\u00ff", digest_of("kvs_a")):
        with pytest.raises(RightsError):
            tenants.of(wrong)


def test_every_digest_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = hmac.compare_digest

    def counting(ours: str, theirs: str) -> bool:
        compared.append((ours, theirs))
        return compare(ours, theirs)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    records = [
        TokenRecord(digest_of(name), name, frozenset(["read"]), None, 50) for name in ("a", "b")
    ]
    assert Tenants(records, b"s").of("a").name == "a"
    assert compared == [(digest_of(name), digest_of("a")) for name in ("a", "b")]


def test_without_tokens_everyone_is_the_same() -> None:
    assert Tenants().of("") is Tenants().of("anything") is ANYONE
    assert not ANYONE.secret


def test_new_tokens_are_long_and_never_the_same() -> None:
    made = {new_token() for _ in range(100)}
    assert len(made) == 100
    assert all(token.startswith("kvs_") and len(token) > 40 for token in made)


def test_the_secret_is_made_once_and_kept_from_others(tmp_path: Path) -> None:
    secret = secret_of(tmp_path)
    assert len(secret) == 32
    assert secret_of(tmp_path) == secret
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret_of(None) != secret_of(None)  # nothing outlives it
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="open to others"):
        secret_of(tmp_path)
    path.chmod(0o600)
    path.write_bytes(b"half")
    with pytest.raises(SettingsError, match="damaged"):
        secret_of(tmp_path)


def test_a_draft_that_a_killed_daemon_left_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "tenants.draft").write_bytes(b"half")
    assert len(secret_of(tmp_path)) == 32


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_only_this_machine_where_there_are_no_tokens(host: str) -> None:
    assert is_loopback(host)
    check_bind(host, Tenants(), "daemon.listen")


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "10.0.0.1", "no such host", "x" * 300])
def test_all_else_is_refused(host: str) -> None:
    with pytest.raises(SettingsError, match=r"^daemon\.listen: without tokens"):
        check_bind(host, Tenants(), "daemon.listen")
    record = TokenRecord(DIGEST, "a", frozenset(["read"]), None, 100)
    check_bind(host, Tenants([record]), "daemon.listen")


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("127.0.0.1:7420", ("127.0.0.1", 7420)),
        (":0", ("", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("a.b:1", ("a.b", 1)),
    ],
)
def test_endpoints(text: str, endpoint: tuple[str, int]) -> None:
    assert parse_endpoint(text, "x") == endpoint
    assert str(parse_endpoint(text, "x")) == text


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:65536", "::1:5", "h:-1"])
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^daemon\.x = "):
        parse_endpoint(text, "daemon.x")


def test_a_port_that_is_taken_is_one_clear_line() -> None:
    (first,) = listen(Endpoint("127.0.0.1", 0), "daemon.x")
    with first, pytest.raises(SettingsError, match=r"^daemon\.x = 127.*: cannot be listened on"):
        listen(Endpoint("127.0.0.1", first.getsockname()[1]), "daemon.x")


# ---- as an operator does it


def refused(folder: Path, *flags: str) -> str:
    done = kvstore(
        folder, "daemon", "--socket", str(folder / "s.sock"), "--ram-bytes", "1MiB", *flags
    )
    assert done.status == 2
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_daemon_that_anyone_could_enter_does_not_start(tmp_path: Path) -> None:
    assert "without tokens" in refused(tmp_path, "--listen", "0.0.0.0:0")


def test_nor_does_one_whose_tokens_anyone_can_read(tmp_path: Path) -> None:
    path = written(tmp_path, entry(), 0o644)
    assert "chmod 600" in refused(tmp_path, "--listen", "127.0.0.1:0", "--tokens", str(path))


def new(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What `kvstore token new` prints."""
    assert run(["token", "new", "--tenant", "search", *flags]) == 0
    return capsys.readouterr().out


def data_url(process: DaemonProcess) -> str:
    urls: list[str] = re.findall(r"kvstore://[0-9.:]+", process.log)
    return urls[-1]


def test_a_token_from_its_making_to_its_use(
    tmp_path: Path,
    make_process: Callable[..., DaemonProcess],
    capsys: pytest.CaptureFixture[str],
) -> None:
    token, _, lines = new(capsys, "--quota-bytes", "1 MiB").partition("\n")
    assert token not in lines
    path = written(tmp_path, lines)
    flags = ("--listen", "127.0.0.1:0", "--tokens", str(path))
    for restarted in (False, True):
        process = make_process(*flags)
        with connect(data_url(process), token=token) as client:
            if not restarted:
                assert put(client, chain(5)) == 5
            assert get(client, chain(5)) == 5
        with pytest.raises(RightsError):
            connect(data_url(process), token="kvs_other")
        assert process.end() == 0
        assert token not in process.log
    secret = tmp_path / "nvme" / "tenants.secret"
    assert stat.S_IMODE(os.stat(secret).st_mode) == 0o600


def test_a_token_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(new(capsys, "--rights", "read, admin", "--priority-cap", "7", "--json"))
    assert data["entry"] == {
        "sha256": digest_of(data["token"]),
        "tenant": "search",
        "rights": ["read", "admin"],
        "priority_cap": 7,
    }


@pytest.mark.parametrize(
    "flags",
    [
        ("--tenant", "a b"),
        ("--rights", "all"),
        ("--priority-cap", "101"),
        ("--quota-bytes", "many"),
    ],
)
def test_a_token_that_makes_no_sense(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, str]
) -> None:
    assert run(["token", "new", "--tenant", "a", *flags]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"kvstore: {flags[0]}: ")
