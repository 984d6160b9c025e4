"""The decoder: Llama-family forward pass over paged KV, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from kvstore.engine.batch import Batch
from kvstore.engine.checkpoint import Checkpoint, Progress
from kvstore.engine.config import ModelConfig
from kvstore.kernels.paged_attention import PagedAttention, Workspace


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Decoder:
    """A Llama-family decoder with its weights. Not thread-safe: one forward at a time."""

    def __init__(
        self,
        config: ModelConfig,
        layers: list[_Layer],
        embedding: Tensor,
        norm: Tensor,
        head: Tensor,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._layers = layers
        self._embedding = embedding
        self._norm = norm
        self._head = head
        cos, sin = config.rope.tables(config.context_tokens)
        self._cos, self._sin = cos.to(self.device), sin.to(self.device)
        self._workspace = Workspace(self.device)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> Decoder:
        """Read every weight; calls `progress` after each."""
        config, done = checkpoint.config, 0

        def take(*names: str) -> Tensor:
            nonlocal done
            parts = [checkpoint.weight(n).to(device=device, dtype=dtype) for n in names]
            done += sum(checkpoint.weight_bytes(n) for n in names)
            if progress is not None:
                progress(done, checkpoint.weights_bytes)
            return torch.cat(parts) if len(parts) > 1 else parts[0].clone()

        def optional(wanted: bool, *names: str) -> Tensor | None:
            return take(*names) if wanted else None

        layers = []
        for i in range(config.layers):
            p = f"model.layers.{i}."
            a, m = p + "self_attn.", p + "mlp."
            qkv = [a + f"{x}_proj" for x in "qkv"]
            gate_up = [m + "gate_proj", m + "up_proj"]
            layers.append(
                _Layer(
                    input_norm=take(p + "input_layernorm.weight"),
                    qkv=take(*(n + ".weight" for n in qkv)),
                    qkv_bias=optional(config.qkv_bias, *(n + ".bias" for n in qkv)),
                    query_norm=optional(config.qk_norm, a + "q_norm.weight"),
                    key_norm=optional(config.qk_norm, a + "k_norm.weight"),
                    output=take(a + "o_proj.weight"),
                    output_bias=optional(config.output_bias, a + "o_proj.bias"),
                    post_norm=take(p + "post_attention_layernorm.weight"),
                    gate_up=take(*(n + ".weight" for n in gate_up)),
                    gate_up_bias=optional(config.mlp_bias, *(n + ".bias" for n in gate_up)),
                    down=take(m + "down_proj.weight"),
                    down_bias=optional(config.mlp_bias, m + "down_proj.bias"),
                )
            )
        embedding = take("model.embed_tokens.weight")
        norm = take("model.norm.weight")
        head = embedding if config.tied_embeddings else take("lm_head.weight")
        return cls(config, layers, embedding, norm, head)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: Tensor) -> Tensor:
        """Compute the batch's rows, write their K and V to `kv`, return the wanted logits.

        `kv` is [kv_heads, layers, 2, slots, head_dim] of the decoder's dtype and device;
        the caller owns it. Logits are float32 [len(batch.logits_rows), vocab_size].
        """
        c = self.config
        hidden = self._embedding[batch.tokens]
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        cos, sin = cos.to(self.dtype)[:, None], sin.to(self.dtype)[:, None]
        rows = hidden.shape[0]
        attend = PagedAttention(batch.spans, kv, heads=c.heads, block_tokens=batch.block_tokens, workspace=self._workspace)
        for number, layer in enumerate(self._layers):
            x = self._rms(hidden, layer.input_norm)
            q, k, v = linear(x, layer.qkv, layer.qkv_bias).split(
                [c.query_size, c.kv_size, c.kv_size], -1
            )
            q, k = q.view(rows, c.heads, c.head_dim), k.view(rows, c.kv_heads, c.head_dim)
            if layer.query_norm is not None and layer.key_norm is not None:
                q, k = self._rms(q, layer.query_norm), self._rms(k, layer.key_norm)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            kv[:, number, 0].index_copy_(1, batch.slots, k.transpose(0, 1))
            kv[:, number, 1].index_copy_(
                1, batch.slots, v.view(rows, c.kv_heads, c.head_dim).transpose(0, 1)
            )
            attended = attend(q.flatten(1).float(), number).to(self.dtype)
            hidden = hidden + linear(attended, layer.output, layer.output_bias)
            x = self._rms(hidden, layer.post_norm)
            gate, up = linear(x, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            hidden = hidden + linear(silu(gate) * up, layer.down, layer.down_bias)
        last = self._rms(hidden[batch.logits_rows], self._norm)
        return linear(last, self._head).float()

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, (x.shape[-1],), weight, self.config.norm_eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [T, heads, head_dim] by tables [T, 1, head_dim / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
