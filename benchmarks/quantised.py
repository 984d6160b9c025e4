"""What KV of one byte an element costs in accuracy: the next token, all along texts of our own.

The model reads each text once for every way of keeping KV, in chunks, and every position's
logits are compared with those over KV in bfloat16, the dtype that it is computed in. Beside them
stands what the same model in float32 differs by: so much is bfloat16's own doing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks import model
from benchmarks.harness import Bench, Benchmark
from benchmarks.workers.lines import ROOT
from kvstore.bench.rows import NotHereError, Row

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore.engine.calibration import Quantised
    from kvstore.engine.loading import LoadedModel

TEXTS = ("README.md", "LICENSE", "kvstore/slots.py")
CHUNK_TOKENS = 256


def measure(bench: Bench) -> Iterator[Row]:
    try:
        import torch
    except ImportError as error:
        raise NotHereError(
            "torch is not installed: pip install -e '.[engine]' in its clone"
        ) from error
    from kvstore.engine.calibration import quantised
    from kvstore.engine.loading import load

    narrow, wide = load(model.gguf(), torch.bfloat16), load(model.gguf(), torch.float32)
    errors = {name: Error() for name in ("fp8", "int8", "float32")}
    kept = {name: quantised(narrow, name) for name in ("fp8", "int8")}
    for text in TEXTS:
        tokens = narrow.tokenizer.encode((ROOT / text).read_text())[: bench.effort.prompt_tokens]
        readers = {name: Reader(narrow, tokens, own) for name, own in kept.items()}
        compare(Reader(narrow, tokens), {**readers, "float32": Reader(wide, tokens)}, errors)
    own = errors.pop("float32")
    for name, wrong in errors.items():
        yield from _rows(name, wrong, own)


class Reader:
    """A model that reads one text, chunk by chunk, and keeps KV in its own way."""

    def __init__(
        self, model: LoadedModel, tokens: list[int], kept: Quantised | None = None
    ) -> None:
        import torch

        from kvstore.engine.attention import HostAttention
        from kvstore.tiers.hbm import TORCH_DTYPE

        c, self._decoder, self.tokens = model.config, model.decoder, tokens
        self._attention = HostAttention(c, model.decoder.device, kept.scales if kept else None)
        shape = (c.kv_heads, c.layers, 2, len(tokens), c.head_dim)
        dtype = TORCH_DTYPE[kept.dtype] if kept else model.decoder.dtype
        self._kv = torch.zeros(shape, dtype=dtype)

    def logits(self, start: int, stop: int) -> Tensor:
        """Of tokens `start` to `stop`, those before having been read: [tokens, vocabulary]."""
        from kvstore.engine.batch import Batch, SequenceSpan

        span = SequenceSpan(stop - start, start, [0])
        batch = Batch.build(
            [span],
            [self.tokens[start:stop]],
            block_tokens=len(self.tokens),
            logits_rows=range(stop - start),
        )
        return self._decoder.forward(batch, self._kv, attention=self._attention)


@dataclass
class Error:
    """How far logits are from what they should be, so far."""

    positions: int = 0
    agreed: int = 0  # positions with the same likeliest token
    distance: float = 0.0  # |logit - logit|, the mean of a position, summed
    largest: float = 0.0
    divergences: list[float] = field(default_factory=list)  # KL, by position
    losses: list[float] = field(default_factory=list)  # of the tokens that come next
    losses_of_right: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, right: Tensor, following: list[int]) -> None:
        """Some positions, and the tokens that follow all of them but perhaps the last."""
        distance, likely, expected = (logits - right).abs(), *map(_log_softmax, (logits, right))
        self.positions += len(right)
        self.agreed += int((logits.argmax(-1) == right.argmax(-1)).sum())
        self.distance += float(distance.mean(-1).sum())
        self.largest = max(self.largest, float(distance.max()))
        self.divergences += (expected.exp() * (expected - likely)).sum(-1).tolist()
        rows = range(len(following))
        self.losses += (-likely[rows, following]).tolist()
        self.losses_of_right += (-expected[rows, following]).tolist()

    @property
    def agreement(self) -> float:
        return self.agreed / self.positions

    @property
    def mean(self) -> float:
        return self.distance / self.positions

    @property
    def divergence(self) -> float:
        return fmean(self.divergences)

    @property
    def loss(self) -> float:
        return fmean(self.losses)

    @property
    def loss_of_right(self) -> float:
        return fmean(self.losses_of_right)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


def compare(right: Reader, readers: Mapping[str, Reader], errors: Mapping[str, Error]) -> None:
    """Read one text with all of them, and add what each is wrong by."""
    for start in range(0, len(right.tokens), CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, len(right.tokens))
        expected, following = right.logits(start, stop), right.tokens[start + 1 : stop + 1]
        for name, reader in readers.items():
            errors[name].add(reader.logits(start, stop), expected, following)


def _rows(name: str, wrong: Error, own: Error) -> Iterator[Row]:
    against = "the same model all in float32, beside bf16"
    count = f"{wrong.positions:,} positions of {', '.join(TEXTS)}"
    for what, value, beside, unit in (
        ("same next token as bf16", wrong.agreement * 100, own.agreement * 100, "%"),
        ("logits beside bf16, mean error", wrong.mean, own.mean, ""),
        ("logits beside bf16, largest error", wrong.largest, own.largest, ""),
        ("KL divergence from bf16, mean", wrong.divergence, own.divergence, "nats"),
        ("KL divergence, largest", max(wrong.divergences), max(own.divergences), "nats"),
    ):
        label = f"KV as {name}: {what}"
        yield Row(label, "quantised", value, unit, ceiling=beside, against=against, note=count)
    loss = f"KV as {name}: loss of the texts' own tokens"
    yield Row(loss, "quantised", wrong.loss, "nats", ceiling=wrong.loss_of_right, against="bf16")


BENCHMARKS = (Benchmark("quantised", "quantised", measure),)
