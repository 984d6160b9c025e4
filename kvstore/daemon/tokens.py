"""Tokens: who may come through a door that is open to more than this user.

A file in TOML, to be read by nobody but its owner and group. It holds no token, only each
one's digest, so that whoever reads it cannot come in:

    [[token]]
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    tenant = "search"
    rights = ["read", "write"]
    quota_bytes = "100 GiB"
    priority_cap = 50
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import stat
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Meta, Struct
from typing_extensions import Annotated

from kvstore.errors import RightsError, SettingsError
from kvstore.quantities import parse_size
from kvstore.retention import MAX_PRIORITY
from kvstore.tenant import LOCAL, Right, Tenant
