"""What a block's KV depends on besides its tokens, and the fingerprint of that."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from kvstore.errors import LayoutError
from kvstore.layout import LAYOUT_VERSION, BlockLayout

HashAlgorithm = Literal["xxh3_128", "sha256"]


def salt_digest(secret: str) -> str:
    """What stands for a tenant's salt in a `Namespace`: the secret itself is never stored."""
    return hashlib.sha256(b"kvstore salt\0" + secret.encode()).hexdigest()[:32] if secret else ""


@dataclass(frozen=True)
class Namespace:
    """Everything that blocks must have in common to be served to one another's readers.

    The 16-byte `fingerprint` is the parent of every chain's first block, so two
    namespaces that differ in any field share no key. Build it once per model.

    `weights` and `tokenizer` are content hashes, `rope` a canonical text of all
    RoPE parameters, `adapter` the content hash of a LoRA ("" for none), `salt`
    the `salt_digest` of a tenant's secret ("" for none).
    """

    model: str
    weights: str
    tokenizer: str
    kv_dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    rope: str
    kv_quantisation: str = "none"
    adapter: str = ""
    salt: str = ""
    layout_version: int = LAYOUT_VERSION
    hash_algorithm: HashAlgorithm = "xxh3_128"

    def __post_init__(self) -> None:
        if self.hash_algorithm not in ("xxh3_128", "sha256"):
            raise LayoutError(f"hash algorithm {self.hash_algorithm!r} is not known")
        self.layout  # noqa: B018  a namespace with an impossible shape must not exist

    @cached_property
    def layout(self) -> BlockLayout:
        return BlockLayout(
            self.layers, self.kv_heads, self.head_dim, self.block_tokens, self.kv_dtype
        )

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes: sha256 over the canonical JSON of all fields, cut."""
        return hashlib.sha256(self.to_json().encode()).digest()[:16]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Namespace:
        """Raises ValueError on anything that `to_json` did not write."""
        fields: Any = json.loads(text)
        try:
            namespace = cls(**fields)
        except (TypeError, LayoutError) as error:
            raise ValueError(f"not a namespace record: {error}") from error
        for field in dataclasses.fields(cls):
            kind = int if field.type == "int" else str
            if type(value := getattr(namespace, field.name)) is not kind:
                raise ValueError(f"not a namespace record: {field.name} is {value!r}")
        return namespace

    def differences(self, other: Namespace) -> Mapping[str, tuple[Any, Any]]:
        """Fields in which the two differ: name -> (ours, theirs)."""
        # Asked of every namespace that a store knows: `asdict` would take ten times as long.
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in _FIELDS}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


_FIELDS = tuple(field.name for field in dataclasses.fields(Namespace))
