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
            raise SettingsError("a certificate of ours needs client.ca as well, for the daemon's")
        return None
    _check_readable("client.ca", ca)
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except (OSError, ValueError) as error:  # of which OpenSSL's are
        raise SettingsError(f"client.ca = {ca}: no certificates in PEM: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate:
        _load_ours(context, certificate, key)
    elif key:
        raise SettingsError("client.key needs client.certificate as well")
    return context


def _load_ours(context: ssl.SSLContext, certificate: str | Path, key: str | Path | None) -> None:
    _check_readable("client.certificate", certificate)
    if key:
        _check_readable("client.key", key)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:
        beside = f"with client.key = {key}" if key else "and client.key is not set"
        raise SettingsError(
            f"client.certificate = {certificate}, {beside}: no certificate and key in PEM that "
            f"fit together: {error}"
        ) from None


def _check_readable(setting: str, path: str | Path) -> None:
    """OpenSSL does not say which of its files is missing."""
    try:
        with open(path, "rb"):
            pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise SettingsError(f"{setting} = {path}: cannot be read: {why}") from None
