"""How a client of the data door makes sure whom it talks to."""

from __future__ import annotations

import ssl
from pathlib import Path

from kvstore.errors import SettingsError


def client_tls(
    ca: str | Path | None, certificate: str | Path | None, key: str | Path | None
) -> ssl.SSLContext | None:
    """None without `ca`: then nothing is encrypted. All are PEM files.

    Raises SettingsError where they are not, or do not fit together.
    """
    if ca is None:
        if certificate or key:
            raise SettingsError("a certificate of ours needs a `ca` as well, for the daemon's")
        return None
    try:
        context = ssl.create_default_context(cafile=str(ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if certificate:
            context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:  # of which OpenSSL's are
        raise SettingsError(f"{ca}, {certificate}, {key}: not certificates: {error}") from None
    return context
