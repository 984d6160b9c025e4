"""The decoder: Llama-family forward pass over paged KV, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, rms_norm

from kvstore.engine.attention import Attention, HostAttention, Write
from kvstore.engine.batch import Batch, DecodeRows, SequenceSpan
from kvstore.engine.checkpoint import Checkpoint, Progress
from kvstore.engine.config import ModelConfig
from kvstore.engine.linear import MIN_ROWS, Linear
from kvstore.engine.rotary import Rotary, rotate
from kvstore.tiers.hbm_copies import Gates


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear
    head_norm: Tensor | None  # [heads + kv_heads, head_dim]: Qwen3 normalises each head
    output: Linear
    post_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear

    def in_float32(self) -> _Layer:
        parts = (getattr(self, field.name) for field in fields(self))
        return _Layer(*(_in_float32(part) for part in parts))


def _in_float32(part: Tensor | Linear | None) -> Any:
    if isinstance(part, Linear):
        return part.in_float32()
    return None if part is None else part.float()


class Decoder:
    """A Llama-family decoder with its weights. Not thread-safe: one forward at a time.

    The logits and KV of a token are the same, bit for bit, whatever else is in its batch
    and however its sequence was cut into batches, as far as the matrix products keep
    that promise: docs/adr/0020-determinism.md says where they were measured to.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: list[_Layer],
        embedding: Tensor,
        norm: Tensor,
        head: Linear,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._layers = layers
        self._embedding = embedding
        self._norm = norm
        self._head = head
        self._rotary = Rotary(config.rope, self.device)
        self.attention: Attention = HostAttention(config, self.device)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> Decoder:
        """Read every weight; calls `progress` after each. Raises ModelError."""
        take = _taker(checkpoint, dtype, device, progress)
        config = checkpoint.config
        layers = [_load_layer(config, f"model.layers.{i}.", take) for i in range(config.layers)]
        embedding = take("model.embed_tokens.weight")
        norm = take("model.norm.weight")
        head = embedding if config.tied_embeddings else take("lm_head.weight")
        return cls(config, layers, embedding, norm, Linear(head))

    @torch.inference_mode()
    def forward(
        self,
        batch: Batch,
        kv: Tensor,
        gates: Sequence[Gates] = (),
        attention: Attention | None = None,
    ) -> Tensor:
        """Compute the batch's rows, write their K and V to `kv`, return the wanted logits.

        `kv` is [kv_heads, layers, 2, slots, head_dim] of the decoder's dtype and device;
        the caller owns it, and everything in it is finite. Blocks that are still being copied
        to it are read layer by layer, each after its event in each of `gates`. Logits are
        float32 [len(batch.logits_rows), vocab_size]. `attention` is the decoder's own if not
        given.
        """
        attention = attention or self.attention
        write = attention.writer(batch.slots, kv)
        attend = attention.of_spans(batch.spans, kv, batch.block_tokens)
        hidden = self._embedding[_padded(batch.tokens)]
        cos, sin = self._rotary.at(
            _padded(batch.positions), max(span.total_tokens for span in batch.spans)
        )
        for number, layer in enumerate(self._layers):
            query = self._store_kv(layer, hidden, cos, sin, write, number)
            for gate in gates:
                gate[number].precede_compute()
            if layer is self._layers[-1] and len(batch.logits_rows) < len(batch.tokens):
                # All K and V are stored; of what remains only the wanted rows are read.
                if not batch.logits_spans:
                    break
                rows = _padded(batch.logits_rows)
                query, hidden = query[rows], hidden[rows]
                attend = attention.of_spans(batch.logits_spans, kv, batch.block_tokens)
            hidden = self._mix(layer, attend(query, number), hidden)
        return self._logits(hidden, len(batch.logits_rows))

    @torch.inference_mode()
    def decode(self, rows: DecodeRows, kv: Tensor, attention: Attention | None = None) -> Tensor:
        """As `forward` for one token of each sequence; the logits of every row, in their order.

        Reads no tensor on the host and allocates by shapes alone, as far as `attention` does:
        a CUDA graph of it holds for whatever is in `rows` later.
        """
        attention = attention or self.attention
        write = attention.writer(rows.slots, kv)
        attend = attention.of_tables(rows.block_tables, rows.context_lens, kv, rows.block_tokens)
        hidden = self._embedding[rows.tokens]
        cos, sin = self._rotary.at(rows.positions, self.config.context_tokens)
        for number, layer in enumerate(self._layers):
            query = self._store_kv(layer, hidden, cos, sin, write, number)
            hidden = self._mix(layer, attend(query, number), hidden)
        return self._logits(hidden, len(hidden))

    @torch.inference_mode()
    def pairs_in_float32(self, tokens: Sequence[int]) -> Iterator[Tensor]:
        """K and V of a prompt, layer by layer, whatever the decoder's own dtype: float32
        [kv_heads, 2, tokens, head_dim], which the next layer overwrites.

        Takes memory for one layer of weights in float32 at a time.
        """
        c, count = self.config, len(tokens)
        span = SequenceSpan(count, 0, [0])
        batch = Batch.build([span], [tokens], block_tokens=count, device=self.device)
        kv = torch.zeros((c.kv_heads, 1, 2, count, c.head_dim), device=self.device)
        attention = HostAttention(c, self.device)
        write = attention.writer(batch.slots, kv)
        attend = attention.of_spans(batch.spans, kv, count)
        hidden = self._embedding[_padded(batch.tokens)].float()
        cos, sin = self._rotary.at(_padded(batch.positions), count)
        for own in self._layers:
            layer = own.in_float32()
            query = self._store_kv(layer, hidden, cos, sin, write, 0)
            yield kv[:, 0]
            hidden = self._mix(layer, attend(query, 0), hidden)

    def _store_kv(
        self, layer: _Layer, hidden: Tensor, cos: Tensor, sin: Tensor, write: Write, number: int
    ) -> Tensor:
        """Write K and V of the rows of hidden; return Q, float32 [rows, -1]."""
        c = self.config
        qkv = layer.qkv(self._norm_rows(hidden, layer.input_norm))
        rotated = qkv[:, : c.query_size + c.kv_size].float().view(len(hidden), -1, c.head_dim)
        if layer.head_norm is not None:
            rotated = rms_norm(rotated, (c.head_dim,), None, c.norm_eps) * layer.head_norm
        rotated = rotate(rotated, cos, sin).flatten(1)
        # K goes back to its place beside V, so that one call stores both.
        qkv[:, c.query_size : -c.kv_size] = rotated[:, c.query_size :]
        write(qkv[:, c.query_size :].view(len(hidden), 2, c.kv_heads, c.head_dim), number)
        return rotated[:, : c.query_size]

    def _mix(self, layer: _Layer, attended: Tensor, hidden: Tensor) -> Tensor:
        """What follows attention in a layer."""
        hidden = layer.output.plus(attended.to(hidden.dtype), hidden)
        x = self._norm_rows(hidden, layer.post_norm)
        return layer.down.plus(layer.up.times(x, layer.gate.silu(x)), hidden)

    def _logits(self, hidden: Tensor, count: int) -> Tensor:
        """Of the first `count` rows."""
        if not count:
            return hidden.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        return self._head(self._norm_rows(hidden, self._norm))[:count].float()

    def _norm_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, (x.shape[-1],), weight, self.config.norm_eps)


def _padded(values: Tensor) -> Tensor:
    """At least MIN_ROWS values: rows of zeros are cheaper than another kernel for few rows."""
    return pad(values, (0, MIN_ROWS - len(values))) if len(values) < MIN_ROWS else values


_Take = Callable[..., Tensor]


def _taker(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: Progress | None
) -> _Take:
    """A function that reads the named weights, lays them end to end, and reports progress."""
    done = 0

    def take(*names: str) -> Tensor:
        nonlocal done
        parts = [checkpoint.weight(name).to(device=device, dtype=dtype) for name in names]
        done += sum(checkpoint.weight_bytes(name) for name in names)
        if progress is not None:
            progress(done, checkpoint.weights_bytes)
        return torch.cat(parts)  # even of one: what is mapped from a file is copied here

    return take


def _load_layer(config: ModelConfig, prefix: str, take: _Take) -> _Layer:
    attention, mlp = prefix + "self_attn.", prefix + "mlp."

    def linear(has_bias: bool, *names: str) -> Linear:
        weight = take(*(f"{name}.weight" for name in names))
        return Linear(weight, take(*(f"{name}.bias" for name in names)) if has_bias else None)

    head_norm = None
    if config.qk_norm:
        query, key = take(attention + "q_norm.weight"), take(attention + "k_norm.weight")
        head_norm = torch.stack([query] * config.heads + [key] * config.kv_heads).float()
    return _Layer(
        input_norm=take(prefix + "input_layernorm.weight"),
        qkv=linear(config.qkv_bias, *(f"{attention}{name}_proj" for name in "qkv")),
        head_norm=head_norm,
        output=linear(config.output_bias, attention + "o_proj"),
        post_norm=take(prefix + "post_attention_layernorm.weight"),
        gate=linear(config.mlp_bias, mlp + "gate_proj"),
        up=linear(config.mlp_bias, mlp + "up_proj"),
        down=linear(config.mlp_bias, mlp + "down_proj"),
    )
