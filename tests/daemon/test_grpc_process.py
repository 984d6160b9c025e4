"""`kvstore daemon --grpc`, as an operator runs it."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest

from kvstore.daemon.tokens import digest_of
from kvstore.proto import store_pb2
from tests.cli.commands import kvstore
from tests.daemon.certificates import Authority
from tests.daemon.conftest import MakeProcess
from tests.daemon.doors import DaemonProcess
from tests.daemon.grpc_client import GrpcClient
from tests.store.rig import chain, put

pytestmark = pytest.mark.usefixtures("_grpc_runtime")

TOKENS = """
[[token]]
sha256 = "{digest}"
tenant = "red"
"""


def address_of(process: DaemonProcess) -> str:
    found = re.findall(r"ready: gRPC on (\S+:\d+)$", process.log, re.MULTILINE)
    return str(found[-1])


def test_it_serves_what_the_socket_serves(make_process: MakeProcess) -> None:
    process = make_process("--grpc", "127.0.0.1:0")
    with process.connect() as local, GrpcClient(address_of(process)) as remote:
        put(local, chain(3))
        assert remote.get(chain(3)).blocks == 3
        with remote.start_put(chain(5, seed=1)):  # what is held stops nobody from ending
            assert process.end() == 0
    assert "Traceback" not in process.log
    assert "E0000" not in process.log


def test_after_a_kill_it_has_what_was_on_nvme(make_process: MakeProcess) -> None:
    first = make_process("--grpc", "127.0.0.1:0")
    with first.connect() as local, GrpcClient(address_of(first)) as remote:
        remote.put(chain(3))
        assert local.flush(30)
        with remote.start_put(chain(2, seed=1)) as writing:
            first.kill()
            with pytest.raises(grpc.RpcError) as lost:
                writing.end()
    assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
    second = make_process("--grpc", "127.0.0.1:0")
    with GrpcClient(address_of(second)) as remote:
        assert remote.get(chain(3)).sources == ["TIER_NVME"] * 3
        assert remote.get(chain(2, seed=1)).blocks == 0


def shown(certificate: Path, key: Path) -> dict[str, bytes]:
    return {"private_key": key.read_bytes(), "certificate_chain": certificate.read_bytes()}


def test_tls_and_tokens_as_the_settings_say(make_process: MakeProcess, tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    certificate, key = ours.sign("server")
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(TOKENS.format(digest=digest_of("sesame")))
    tokens.chmod(0o600)
    tls = {"certificate": certificate, "key": key, "client_ca": ours.ca}
    flags = [f"--set=daemon.tls_{name}={path}" for name, path in tls.items()]
    process = make_process("--grpc", "127.0.0.1:0", "--tokens", str(tokens), *flags)
    root = {"root_certificates": ours.ca.read_bytes()}
    own, others = shown(*ours.sign("client")), shown(*theirs.sign("client"))

    def code(token: str, **credentials: bytes) -> grpc.StatusCode:
        with GrpcClient(address_of(process), token, **credentials) as remote:
            try:
                remote.ask(remote.store.Stats, store_pb2.StatsRequest())
            except grpc.RpcError as error:
                found: grpc.StatusCode = error.code()
                return found
            return grpc.StatusCode.OK

    assert code("sesame", **root, **own) is grpc.StatusCode.OK
    assert code("other", **root, **own) is grpc.StatusCode.UNAUTHENTICATED
    assert code("sesame") is grpc.StatusCode.UNAVAILABLE  # not encrypted
    assert code("sesame", **root) is grpc.StatusCode.UNAVAILABLE  # no certificate
    assert code("sesame", **root, **others) is grpc.StatusCode.UNAVAILABLE  # one of another's
    assert code("sesame", root_certificates=theirs.ca.read_bytes(), **own) is (
        grpc.StatusCode.UNAVAILABLE  # the client does not trust the daemon
    )
    assert "sesame" not in process.log


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    cases = {
        "nonsense": "must be HOST:PORT",
        "0.0.0.0:0": "without tokens only this machine",
    }
    for value, says in cases.items():
        done = kvstore(tmp_path, "daemon", "--socket", str(tmp_path / "s"), "--grpc", value)
        assert done.status == 2
        assert says in done.stderr
        assert done.stderr.count("\n") <= 2


def test_only_this_door_needs_grpcio(make_process: MakeProcess, tmp_path: Path) -> None:
    for name in ("grpc", "google"):  # found first, for a process runs in its working directory
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    process = make_process()
    with process.connect() as local:
        assert put(local, chain(2)) == 2
    assert process.end() == 0
    done = kvstore(tmp_path, "daemon", "--socket", str(process.path), "--grpc", "127.0.0.1:0")
    assert done.status == 2
    assert "pip install -e '.[daemon]' in its clone" in done.stderr
    assert "Traceback" not in done.stderr
