"""Tokens: who may come through a door that is open to more than this user.

A file in TOML, which only its owner and group may read. It holds no token, only each one's
digest, so that to have read it opens nothing:

    [[token]]
    sha256 = "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"
    tenant = "search"
    rights = ["read", "write"]
    quota_bytes = "100 GiB"
    priority_cap = 50
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvstore.daemon.listening import is_loopback
from kvstore.errors import RightsError, SettingsError
from kvstore.quantities import parse_size
from kvstore.retention import MAX_PRIORITY
from kvstore.tenant import RIGHTS, Right, Tenant

PREFIX = "kvs_"  # so that a token is known for one wherever it turns up
TOKEN_BYTES = 32  # of randomness: nobody guesses it, and a plain digest of it suffices
LONGEST = 1024  # characters of a token that is looked at
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FIELDS = ("sha256", "tenant", "rights", "quota_bytes", "priority_cap")

ANYONE = Tenant("loopback")
"""Who comes through a door where no tokens are asked for."""


class TokenRecord(NamedTuple):
    """One entry of the file. `quota_bytes` is the tenant's; its entries must agree on it."""

    sha256: str
    tenant: str
    rights: frozenset[Right]
    quota_bytes: int | None
    priority_cap: int


class Tenants:
    """Tokens and the tenants they stand for; without tokens, everyone is ANYONE."""

    def __init__(self, records: Sequence[TokenRecord] = (), secret: bytes = b"") -> None:
        """`secret` is the server's (`secret_of`); each tenant's own is made from it."""
        self._tenants = [(record.sha256, _tenant(record, secret)) for record in records]

    def __iter__(self) -> Iterator[Tenant]:
        """One for each token; several may be the same tenant's."""
        return (tenant for _, tenant in self._tenants)

    @property
    def are_known(self) -> bool:
        """Whether a token is asked for at all."""
        return bool(self._tenants)

    def of(self, token: str) -> Tenant:
        """Whose token it is. Raises RightsError where it is nobody's."""
        if not self._tenants:
            return ANYONE
        asked = digest_of(token[:LONGEST])
        # All are compared, and each in constant time: how long it takes says nothing.
        found = [tenant for digest, tenant in self._tenants if hmac.compare_digest(digest, asked)]
        if not found or len(token) > LONGEST:
            raise RightsError(
                "this token is not known here; ask whoever runs the daemon for one"
                if token
                else "a token is asked for here; give the one that `kvstore token new` printed"
            )
        return found[0]


def digest_of(token: str) -> str:
    """What the file holds of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def new_token() -> str:
    return PREFIX + secrets.token_urlsafe(TOKEN_BYTES)


def check_bind(host: str, tenants: Tenants, origin: str) -> None:
    """Raises SettingsError where a door would let in whoever can reach this machine.

    `origin` names the setting, such as "daemon.listen".
    """
    if not tenants.are_known and not is_loopback(host):
        raise SettingsError(
            f"{origin}: without tokens only this machine may be let in: listen on 127.0.0.1, or "
            f"name a file of tokens with daemon.tokens to listen on {host or 'all addresses'}"
        )


def read_tokens(path: Path | None) -> list[TokenRecord]:
    """The entries of the file; none without a file. Raises SettingsError, in one line."""
    if path is None:
        return []
    try:
        with path.open("rb") as file:
            _check_owner(path, os.fstat(file.fileno()))
            tables = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"{path}: tokens cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from None
    entries = tables.pop("token", None)
    if tables or not isinstance(entries, list) or not entries:
        raise SettingsError(f"{path}: must hold [[token]] tables, and nothing else")
    records = []
    for number, entry in enumerate(entries, 1):
        try:
            records.append(checked_record(entry))
        except ValueError as error:
            raise SettingsError(f"{path}: token {number}: {error}") from None
    _check_agree(path, records)
    return records


def secret_of(directory: Path | None) -> bytes:
    """The server's secret: made once, and kept in `directory` beside the blocks named with it.

    Without a directory no block outlives the process, so its secret need not either.
    Raises SettingsError where it cannot be read or written.
    """
    if directory is None:
        return secrets.token_bytes(32)
    path = directory / "tenants.secret"
    try:
        if not path.exists():
            _write_once(path, secrets.token_bytes(32))
        _check_owner(path, path.stat())
        secret = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: the secret cannot be kept: {error.strerror}") from None
    if len(secret) != 32:
        raise SettingsError(f"{path}: damaged; remove it, and tenants begin with an empty cache")
    return secret


def _tenant(record: TokenRecord, secret: bytes) -> Tenant:
    own = hmac.digest(secret, b"tenant " + record.tenant.encode(), "sha256")
    return Tenant(record.tenant, record.rights, own, record.quota_bytes, record.priority_cap)


def _write_once(path: Path, secret: bytes) -> None:
    """Whole or not at all: a daemon that dies here leaves no half of a secret."""
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(fd)
    draft.rename(path)


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in (0, os.geteuid()):
        raise SettingsError(f"{path}: belongs to user {found.st_uid}; make it this user's")
    if stat.S_IMODE(found.st_mode) & 0o027:
        raise SettingsError(f"{path}: open to others; close it: chmod 600 {path}")


def checked_record(entry: Any) -> TokenRecord:
    """An entry of the file. Raises ValueError that says what is wrong; never quotes a digest."""
    if not isinstance(entry, Mapping):
        raise ValueError("must be a table")
    unknown = sorted(set(entry) - set(_FIELDS))
    if unknown:
        raise ValueError(f"{unknown[0]}: no such field among {', '.join(_FIELDS)}")
    digest, tenant = entry.get("sha256"), entry.get("tenant")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError("sha256: must be the 64 hexadecimal digits of the token's digest")
    if not isinstance(tenant, str) or not _NAME.fullmatch(tenant):
        raise ValueError("tenant: must be 1 to 64 letters, digits, dots, dashes, underscores")
    rights = entry.get("rights", ["read", "write"])
    if not isinstance(rights, list) or not rights or not all(each in RIGHTS for each in rights):
        raise ValueError(f"rights: must be a list of {', '.join(RIGHTS)}")
    cap = entry.get("priority_cap", MAX_PRIORITY)
    if type(cap) is not int or not 0 <= cap <= MAX_PRIORITY:
        raise ValueError(f"priority_cap: must be a whole number from 0 to {MAX_PRIORITY}")
    quota = entry.get("quota_bytes")
    try:
        quota_bytes = None if quota is None else parse_size(quota)
    except ValueError as error:
        raise ValueError(f"quota_bytes: {error}") from None
    if quota_bytes == 0:
        raise ValueError("quota_bytes: must be above 0; for who may not write there is `rights`")
    return TokenRecord(digest, tenant, frozenset(rights), quota_bytes, cap)


def _check_agree(path: Path, records: list[TokenRecord]) -> None:
    quotas: dict[str, int | None] = {}
    for record in records:
        if quotas.setdefault(record.tenant, record.quota_bytes) != record.quota_bytes:
            raise SettingsError(f"{path}: tenant {record.tenant} has tokens of different quotas")
    if len({record.sha256 for record in records}) < len(records):
        raise SettingsError(f"{path}: one sha256 stands there twice")
