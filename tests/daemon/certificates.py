"""Certificates for a test, made by openssl: an authority of our own and what it has signed."""

from __future__ import annotations

import subprocess
from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc")


class Authority:
    """In a folder: `ca.pem`, and for each name that is signed `NAME.pem` and `NAME.key`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.ca = folder / "ca.pem"
        subject = ("-subj", f"/CN=authority of {folder.name}")
        _openssl("req", "-x509", *_KEY, "-keyout", folder / "ca.key", "-out", self.ca, *subject)

    def sign(self, name: str, host: str = "127.0.0.1") -> tuple[Path, Path]:
        """A certificate for an IP address, and its key."""
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        _openssl(
            *("req", "-x509", *_KEY, "-keyout", key, "-out", certificate, "-subj", f"/CN={name}"),
            *("-CA", self.ca, "-CAkey", self._folder / "ca.key"),
            *("-addext", f"subjectAltName=IP:{host}", "-addext", "basicConstraints=CA:FALSE"),
        )
        return certificate, key


def _openssl(*args: object) -> None:
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)
