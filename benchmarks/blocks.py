"""The blocks that all contenders move: their names, their bytes, and how they are copied."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Workload
from kvstore.hashing import Chain, TokenChain
from kvstore.identity import Namespace

Blocks = Sequence[memoryview]

_PAGE, _CACHE_LINE = 4096, 64
_PIECE_BYTES = 512 << 10
_HEADS, _HEAD_DIM, _BLOCK_TOKENS = 8, 128, 16  # as in Llama 3 8B: 64 KiB a layer in bf16


def namespace(block_bytes: int, model: str = "benchmark") -> Namespace:
    """A namespace whose blocks have `block_bytes`: a multiple of 64 KiB, or 4 KiB."""
    heads, head_dim = (_HEADS, _HEAD_DIM) if block_bytes >= 65_536 else (1, 64)
    layer_bytes = 2 * 2 * heads * head_dim * _BLOCK_TOKENS
    made = Namespace(
        model=model,
        weights="benchmark",
        tokenizer="benchmark",
        kv_dtype="bfloat16",
        layers=block_bytes // layer_bytes,
        kv_heads=heads,
        head_dim=head_dim,
        block_tokens=_BLOCK_TOKENS,
        rope="none",
    )
    assert made.layout.block_bytes == block_bytes
    return made


def chain(workload: Workload, seed: int = 0) -> Chain:
    """One prompt that is `workload.count` blocks long; another seed, another prompt."""
    tokens = np.random.default_rng(seed).integers(0, 50_000, workload.count * _BLOCK_TOKENS)
    return TokenChain(namespace(workload.block_bytes), tokens.tolist()).chain()


def random_bytes(workload: Workload, seed: int = 0) -> NDArray[np.uint8]:
    """`[count, block_bytes]` that nothing can compress or deduplicate."""
    made = buffers(workload)
    generator = np.random.default_rng(seed)
    for block in made:
        block[:] = np.frombuffer(generator.bytes(workload.block_bytes), np.uint8)
    return made


def buffers(workload: Workload) -> NDArray[np.uint8]:
    """`[count, block_bytes]` of zeros, on a cache line as every tensor is: memcpy minds."""
    memory = np.empty(workload.total_bytes + _PAGE, dtype=np.uint8)
    start = (_CACHE_LINE - memory.ctypes.data) % _PAGE
    flat = memory[start : start + workload.total_bytes]
    flat[:] = 0  # the pages are there before the first turn
    return flat.reshape(workload.count, workload.block_bytes)


def views(array: NDArray[np.uint8]) -> list[memoryview]:
    """One view a block."""
    return [memoryview(block) for block in array]


def copy(targets: Blocks, sources: Blocks) -> None:
    """Block by block: a memoryview's assignment is one memcpy without the interpreter between.

    In pieces below the size from which glibc's memcpy goes past the cache: 1.1 times as fast.
    """
    for target, source in zip(targets, sources, strict=True):
        if len(source) <= _PIECE_BYTES:
            target[:] = source
        else:
            for start in range(0, len(source), _PIECE_BYTES):
                target[start : start + _PIECE_BYTES] = source[start : start + _PIECE_BYTES]
