"""What the KV of one of vLLM's requests is stored under: the model's namespace, made its own."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvstore.connectors.accounts import Accounts
from kvstore.identity import Namespace, salt_digest

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

_CHUNK_BYTES = 1 << 20


class Adapter(NamedTuple):
    """What one of vLLM's numbers for adapters stands for."""

    path: str
    files: tuple[tuple[str, int, int, int], ...]  # name, bytes, mtime in ns, inode
    fingerprint: str | None  # of what is in them


class RequestNamespaces:
    """The namespace of each request: the model's, with its salt and its adapter."""

    def __init__(self, model: Namespace, accounts: Accounts) -> None:
        self._model = model
        self._accounts = accounts
        # Adapters can be large, and on a disk far away.
        self._thread = ThreadPoolExecutor(1, "kvstore-adapter")
        self._adapters: dict[int, Adapter] = {}  # the thread's

    def of(self, request: Request) -> Future[Namespace | None]:
        """None for what the tokens alone do not tell: images, embeddings, unknown adapters.

        Known at once, but where an adapter's files must be looked at.
        """
        namespace: Namespace | None = None
        if (reason := _left_out(request)) is not None:
            self._say_left_out(reason)
        else:
            namespace = self._model
            if request.cache_salt:
                # JSON: no two pairs of texts are the same one.
                salt = json.dumps([namespace.salt, request.cache_salt])
                namespace = replace(namespace, salt=salt_digest(salt))
            if request.lora_request is not None:
                return self._thread.submit(self._adapted, namespace, request.lora_request)
        known: Future[Namespace | None] = Future()
        known.set_result(namespace)
        return known

    def close(self) -> None:
        """Look at no more adapters. One that is being looked at is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # ---- in the thread

    def _adapted(self, namespace: Namespace, lora: LoRARequest) -> Namespace | None:
        """vLLM loads adapters by number, when it first meets one or is told to.

        It does not say when, so that of one whose files have changed nobody knows which it has.
        """
        number, folder = lora.lora_int_id, Path(lora.lora_path)
        files = _files(folder)
        adapter = self._adapters.get(number)
        if adapter is None:
            adapter = Adapter(lora.lora_path, files, adapter_fingerprint(folder))
            self._adapters[number] = adapter
        elif (adapter.path, adapter.files) != (lora.lora_path, files):
            self._say_left_out(f"adapter {number}, whose files have changed,")
            return None
        if adapter.fingerprint is None:
            self._say_left_out(f"adapter {number}, whose files are not in {lora.lora_path},")
            return None
        return replace(namespace, adapter=adapter.fingerprint)

    def _say_left_out(self, what: str) -> None:
        self._accounts.say(what, "requests with %s are computed without the store", what)


def _left_out(request: Request) -> str | None:
    if request.mm_features:
        return "images, sounds or films"
    if request.prompt_embeds is not None:
        return "prompt embeddings"
    return "pooling" if request.pooling_params else None


def _files(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What can be seen of an adapter's files without reading them; none where there are none."""
    try:
        found = [(file.name, file.stat()) for file in _parts(folder)]
    except OSError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found)


def _parts(folder: Path) -> list[Path]:
    return [folder / "adapter_config.json", *sorted(folder.glob("adapter_model.*"))]


def adapter_fingerprint(folder: Path) -> str | None:
    """Hex sha256 over a LoRA's config and weights; None where they are not in `folder`."""
    digest = hashlib.sha256()
    try:
        files = _parts(folder)
        if len(files) < 2:
            return None
        for file in files:
            digest.update(f"\0{file.name} {file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()
