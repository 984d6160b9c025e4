"""How much is measured: all of it for figures, next to nothing to see that everything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvstore.engine.config import ModelConfig
from kvstore.engine.rope import Rope

GiB, MiB = 1 << 30, 1 << 20


class DecodeShape(NamedTuple):
    """What is attended to when `batch` sequences decode, each with so much before it."""

    batch: int
    context_tokens: int

    @property
    def label(self) -> str:
        context = self.context_tokens
        shown = f"{context // 1024} Ki" if context % 1024 == 0 else f"{context}"
        return f"batch {self.batch}, context {shown}"


class Answers(NamedTuple):
    """How long they are, and how many sessions are answered at the same time: one after another."""

    tokens: int
    at_once: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """`FULL` for figures, `TINY` to see that all of it works."""

    model: ModelConfig
    dtype: str  # of weights and KV
    block_tokens: int
    rounds: int  # of kernels, that count; one more runs before them
    engine_rounds: int
    time_limit_s: float  # nothing is begun any more after this

    # Kernels
    copy_bytes: int  # in one copy between pages and RAM
    copy_block_tokens: tuple[int, ...]
    decode_shapes: tuple[DecodeShape, ...]
    device_copy_bytes: int
    written_tokens: tuple[int, ...]

    # The engine
    chunk_tokens: int
    beside: DecodeShape  # what decodes while pages are copied
    decode_batch: int
    decode_prompt_tokens: int
    decode_tokens: int
    step_batches: tuple[int, ...]
    step_context_tokens: int
    steps: int

    # Prompts
    prompt_tokens: int
    prompt_rounds: int
    drive_bytes: int  # read at once to see how fast the drive is

    # Sessions
    session_tokens: int
    session_hbm_bytes: int
    sessions: int  # that take turns: more than HBM has room for
    question_tokens: int
    answers: tuple[Answers, ...]  # the first is the one that is judged
    session_run_s: float  # of each pace, at least
    session_turns: int  # and at least so many of them
    think_s: float


# Llama 3.1 8B, from its config.json; the weights are random.
LLAMA_8B = ModelConfig(
    name="Llama-3.1-8B's shape",
    architecture="llama",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    context_tokens=131_072,
    norm_eps=1e-5,
    rope=Rope(
        theta=500_000.0,
        dim=128,
        scaling="llama3",
        factor=8.0,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
        original_context_tokens=8192,
    ),
    tied_embeddings=False,
)
TINY_MODEL = ModelConfig(
    name="tiny",
    architecture="llama",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=64,
    context_tokens=1024,
    norm_eps=1e-5,
    rope=Rope(theta=10_000.0, dim=64),
    tied_embeddings=True,
)

FULL = Sizes(
    model=LLAMA_8B,
    dtype="bfloat16",
    block_tokens=16,
    rounds=7,
    engine_rounds=5,
    time_limit_s=325,
    copy_bytes=GiB,
    copy_block_tokens=(16, 64, 256),
    decode_shapes=(DecodeShape(64, 4096), DecodeShape(8, 32_768)),
    device_copy_bytes=2 * GiB,
    written_tokens=(64, 2048),
    chunk_tokens=2048,
    beside=DecodeShape(64, 4096),
    decode_batch=64,
    decode_prompt_tokens=256,
    decode_tokens=128,
    step_batches=(1, 8, 64),
    step_context_tokens=1024,
    steps=16,
    prompt_tokens=32_768,
    prompt_rounds=3,
    drive_bytes=2 * GiB,
    session_tokens=8192,
    session_hbm_bytes=20 * GiB,
    sessions=32,
    question_tokens=32,
    answers=(Answers(32, (4, 8, 16)), Answers(128, (8,))),
    session_run_s=6.0,
    session_turns=24,
    think_s=60.0,
)
TINY = Sizes(
    model=TINY_MODEL,
    dtype="bfloat16",
    block_tokens=16,
    rounds=1,
    engine_rounds=1,
    time_limit_s=420,
    copy_bytes=256 << 10,
    copy_block_tokens=(16, 32),
    decode_shapes=(DecodeShape(3, 48), DecodeShape(1, 144)),
    device_copy_bytes=1 << 20,
    written_tokens=(2, 8),
    chunk_tokens=64,
    beside=DecodeShape(2, 32),
    decode_batch=3,
    decode_prompt_tokens=60,
    decode_tokens=24,
    step_batches=(1, 3),
    step_context_tokens=40,
    steps=2,
    prompt_tokens=512,
    prompt_rounds=1,
    drive_bytes=4 * MiB,
    session_tokens=128,
    session_hbm_bytes=1 * MiB,
    sessions=12,
    question_tokens=8,
    answers=(Answers(8, (1, 2)), Answers(16, (2,))),
    session_run_s=0.1,
    session_turns=4,
    think_s=60.0,
)


def most_at_once(sizes: Sizes) -> int:
    """Sessions that are ever answered at the same time."""
    return max(max(answers.at_once) for answers in sizes.answers)


def pair_bytes(model: ModelConfig, element_bytes: int) -> int:
    """K and V of one token in one layer."""
    return 2 * model.kv_heads * model.head_dim * element_bytes


def token_bytes(model: ModelConfig, element_bytes: int) -> int:
    """K and V of one token in all layers."""
    return model.layers * pair_bytes(model, element_bytes)


def weight_count(model: ModelConfig) -> int:
    """Numbers in the weights."""
    norms = (2 * model.layers + 1) * model.hidden_size
    embeddings = (1 if model.tied_embeddings else 2) * model.vocab_size * model.hidden_size
    return _matrices(model) + norms + embeddings


def prompt_flops(model: ModelConfig, tokens: int) -> int:
    """Of computing a prompt: 2 for each weight and token, and for each pair that attends.

    Embeddings are looked up, and logits computed for one token: neither counts.
    """
    pairs = tokens * (tokens + 1) // 2
    return 2 * _matrices(model) * tokens + 4 * pairs * model.query_size * model.layers


def _matrices(model: ModelConfig) -> int:
    """Numbers in the matrices of the layers."""
    attention = model.hidden_size * (2 * model.query_size + 2 * model.kv_size)
    return model.layers * (attention + 3 * model.hidden_size * model.intermediate_size)
