"""Certificates for tests: an authority, and what it has signed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple


class Signed(NamedTuple):
    """A certificate and its key, in PEM."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates for 127.0.0.1."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder, self._name = folder, name
        self._own = self._signed(name, "-x509", "-addext", "basicConstraints=critical,CA:true")

    @property
    def certificate(self) -> Path:
        return self._own.certificate

    def sign(self, name: str) -> Signed:
        by = ("-CA", str(self._own.certificate), "-CAkey", str(self._own.key))
        return self._signed(name, "-x509", *by, "-addext", "subjectAltName=IP:127.0.0.1")

    def _signed(self, name: str, *options: str) -> Signed:
        certificate, key = (self._folder / f"{self._name}-{name}.{end}" for end in ("pem", "key"))
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        files = ("-out", str(certificate), "-keyout", str(key), "-subj", f"/CN={name}")
        command = ["openssl", "req", *curve, *files, "-days", "2", *options]
        subprocess.run(command, check=True, capture_output=True)
        return Signed(certificate, key)
