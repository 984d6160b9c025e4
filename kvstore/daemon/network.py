"""What the doors to other machines have in common: where they listen, to whom, and how secretly."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass

from kvstore.daemon.listening import Endpoint, is_loopback, parse_endpoint
from kvstore.daemon.tokens import Tenants, TokenRecord, check_bind, read_tokens, secret_of
from kvstore.errors import SettingsError
from kvstore.settings import DaemonSettings, Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Network:
    """All that can be refused is refused before a store is opened."""

    settings: Settings
    records: list[TokenRecord]
    tls: ssl.SSLContext | None
    data: Endpoint | None  # of the data door
    grpc: Endpoint | None

    @classmethod
    def of(cls, settings: Settings) -> Network:
        """Reads the tokens and the certificates. Raises SettingsError."""
        asked = settings.daemon
        records = read_tokens(asked.tokens)
        tls = server_tls(asked)
        data = _endpoint(asked.listen, "daemon.listen", records)
        grpc = _endpoint(asked.grpc, "daemon.grpc", records)
        if tls is None and any(door and not is_loopback(door.host) for door in (data, grpc)):
            log.warning("without daemon.tls_certificate, tokens and blocks cross the network open")
        return cls(settings, records, tls, data, grpc)

    def tenants(self) -> Tenants:
        """When the store is open: what tells tenants apart is kept beside their blocks."""
        return Tenants(self.records, secret_of(self.settings.nvme.path) if self.records else b"")


def _endpoint(text: str | None, origin: str, records: list[TokenRecord]) -> Endpoint | None:
    """Where a door is to listen, if anywhere. Raises SettingsError, also where it may not."""
    if text is None:
        return None
    endpoint = parse_endpoint(text, origin)
    check_bind(endpoint.host, Tenants(records), origin)
    return endpoint


def server_tls(asked: DaemonSettings) -> ssl.SSLContext | None:
    """None where no certificate is named. Raises SettingsError, in one line."""
    if asked.tls_certificate is None:
        if asked.tls_key is not None or asked.tls_client_ca is not None:
            raise SettingsError("daemon.tls_certificate: must be set for the other tls_ settings")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(asked.tls_certificate, asked.tls_key)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"daemon.tls_certificate = {asked.tls_certificate}: no certificate and key in PEM that "
            f"fit together: {error}"
        ) from None
    if asked.tls_client_ca is not None:
        try:
            context.load_verify_locations(asked.tls_client_ca)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"daemon.tls_client_ca = {asked.tls_client_ca}: no certificates in PEM: {error}"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context
