"""What SGLang's KV is stored under: the model's namespace, and keys made of SGLang's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.connectors.options import Options
from kvstore.connectors.sglang_pages import kv_dtype
from kvstore.engine import naming
from kvstore.errors import ModelError
from kvstore.hashing import HASHES, Chain
from kvstore.identity import Namespace, salt_digest

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

# Of these the weights are the ones in the model's files; "dummy" ones for example are not.
_LOAD_FORMATS = ("auto", "safetensors", "gguf")
# Its arguments by which the same files give other KV.
_CHANGING = (
    *("quantization", "quantization_param_path", "kv_cache_dtype", "modelopt_quant"),
    *("quantize_and_serve", "rl_quant_profile", "decrypted_config_file", "model_config_parser"),
    *("model_impl", "model_loader_extra_config"),
)


def pool_namespace(
    config: HiCacheStorageConfig, pool: Any, options: Options, model: str
) -> Namespace:
    """That of the model whose KV is in `pool`, whole, in blocks of a page of SGLang's.

    `model` is a folder, a file, or a name that is in the hub's cache; where it is empty SGLang's
    own is taken. Blocks for a second, to read samples of the weights. Raises ModelError, one
    line, for what is not known to be one K and one V for every token, layer and KV head.
    """
    if config.is_mla_model:
        raise ModelError("its KV is that of MLA")
    if config.pp_size > 1:
        raise ModelError("pipeline-parallel ranks hold only some of the layers")
    if config.attn_cp_size > 1 or config.dcp_size > 1:
        raise ModelError("context-parallel ranks hold only some of the tokens")
    arguments = _server_arguments()
    if arguments is not None and arguments.enable_lora:
        raise ModelError("with LoRA, SGLang names pages by an adapter's path, not its content")
    if options.namespace is not None:
        namespace = options.namespace
        if options.salt:
            namespace = replace(namespace, salt=salt_digest(options.salt))
        return replace(namespace, block_tokens=pool.page_size)
    if model:
        files = _files(model)
    elif arguments is not None:
        files = _files(arguments.model_path, arguments.revision)
    else:
        files = _files(config.model_name)
    namespace = naming.model_namespace(
        files, dtype=kv_dtype(pool), block_tokens=pool.page_size, salt=options.salt
    )
    return replace(namespace, model=namespace.model + _changes(arguments))


def page_chain(namespace: Namespace, keys: Sequence[str], prefix_keys: Sequence[str]) -> Chain:
    """The blocks that SGLang's page hashes name.

    A page's hash stands for all tokens up to its end and, where the request has one, for its
    salt; the rest of the identity is the namespace's. `prefix_keys` are hashes of the pages
    before, if SGLang says them: without, the first block is taken to begin a prompt, which only
    eviction heeds.
    """
    digest = HASHES[namespace.hash_algorithm]
    root = namespace.fingerprint + b"SGLang page "
    parent = digest(root + prefix_keys[-1].encode()) if prefix_keys else namespace.fingerprint
    return Chain(namespace, parent, tuple(digest(root + key.encode()) for key in keys))


def _server_arguments() -> Any | None:
    """What SGLang was started with; None where host pools are used without a server."""
    from sglang.srt.runtime_context import get_server_args

    try:
        return get_server_args()
    except ValueError:
        return None


def _files(model: str | None, revision: str | None = None) -> Path:
    """Where the model's files are."""
    if not model:
        raise ModelError("nobody says where its files are: give `model` or `namespace`")
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception as error:
        raise ModelError(f"the files of {model} are not here: give `model` ({error})") from error


def _changes(arguments: Any | None) -> str:
    """What SGLang was told to do otherwise than the model's config says, on which KV depends."""
    if arguments is None:
        return ""
    if arguments.load_format not in _LOAD_FORMATS:
        raise ModelError(f"weights of load format {arguments.load_format!r} cannot be told apart")
    changes = {name: getattr(arguments, name, None) for name in _CHANGING}
    changes["overrides"] = json.loads(arguments.json_model_override_args or "{}")
    said = {name: value for name, value in changes.items() if value and value not in ("auto", "{}")}
    return " " + json.dumps(said, sort_keys=True, default=repr) if said else ""
