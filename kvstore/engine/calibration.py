"""Scales for KV of one byte an element, from what a model computes of a text that never changes.

docs/adr/0054-quantised-kv.md has the reasons and the figures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.engine.loading import LoadedModel
from kvstore.errors import SettingsError
from kvstore.kernels.quantise import LARGEST
from kvstore.tiers.hbm import TORCH_DTYPE

# Of prose, code, tables and languages, some of each: heads have their largest numbers in
# different places. Who changes a letter changes everyone's scales, and finds no block again.
TEXT = """\
The old harbour lay quiet under a pale sky. A fisherman named Tom mended his nets and counted \
3 boats, 12 crates and 1,480 coins; "Nobody comes here any more," he said. In 1969, people \
walked on the Moon.

def area(radius: float) -> float:
    return 3.14159 * radius ** 2  # in square metres

| city | people |
|---|---|
| Paris | 2.1 million |

Q: What is 7 * 8? A: 56. https://example.org/a?b=1&c=2
Der Zug nach Berlin ist versp\u00e4tet. El perro duerme. O\u00f9 est la gare?
\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \
\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3002
"""
TEXT_TOKENS = 256  # of it, at most
OTHER_TOKENS = 128  # from all over the vocabulary
STRIDE = 2_654_435_761  # a prime, far from any size of a vocabulary
# Other texts have larger numbers, up to 1.8 times. fp8 has room for them at no cost. In int8 room
# is precision that all the others lose, which is worse than cutting one of 30,000.
MARGIN = {"float8_e4m3": 2.0, "int8": 1.0}
SMALLEST = 2.0**-30  # of a head that is zeros
# What engines are told, and what layouts call it.
KV_DTYPES = {"fp8": "float8_e4m3", "int8": "int8"}


@dataclass(frozen=True, slots=True)
class Quantised:
    """KV that a layout calls `dtype`, times `scales`: float32 [kv_heads, layers, 2]."""

    dtype: str
    scales: Tensor

    def identity(self, computed: torch.dtype) -> str:
        """What a `Namespace` says of it: KV was of dtype `computed`, and these are the scales."""
        digest = hashlib.sha256(self.scales.cpu().numpy().astype("<f4").tobytes()).hexdigest()
        return f"head scales {digest[:32]} of {str(computed).removeprefix('torch.')}"


def quantised(model: LoadedModel, kv_dtype: str) -> Quantised | None:
    """For a `kv_dtype` of "fp8" or "int8", None for "auto". Raises SettingsError for others."""
    if kv_dtype == "auto":
        return None
    if kv_dtype not in KV_DTYPES:
        raise SettingsError(f"kv_dtype {kv_dtype!r} is not one of auto, {', '.join(KV_DTYPES)}")
    return calibrate(model, KV_DTYPES[kv_dtype])


def calibrate(model: LoadedModel, dtype: str) -> Quantised:
    """As long as a prompt of 400 tokens takes; the same model has the same scales.

    Computed in float32, so that devices that add in another order differ by so little that
    rounding the scales up hides it nearly always. Where it does not, they share no blocks.
    """
    layers = model.decoder.pairs_in_float32(_tokens(model))
    ranges = torch.stack([ranges_of(pairs) for pairs in layers], 1)
    scales = rounded_up(ranges * (MARGIN[dtype] / LARGEST[TORCH_DTYPE[dtype]]))
    return Quantised(dtype, scales.clamp(min=SMALLEST))


def rounded_up(values: Tensor) -> Tensor:
    """Positive numbers to such with two bits behind the leading one, less than a quarter larger."""
    others = (1 << 21) - 1  # float32 has 23
    return ((values.view(torch.int32) + others) & ~others).view(torch.float32)


def ranges_of(pairs: Tensor) -> Tensor:
    """The largest magnitudes in [kv_heads, 2, tokens, head_dim]: [kv_heads, 2].

    Of K those of whole pairs of elements, which rotation does not change: a token far behind
    this text is turned otherwise.
    """
    keys, values = pairs.unbind(1)
    lengths = torch.hypot(*keys.chunk(2, -1))
    return torch.stack([lengths.amax((1, 2)), values.abs().amax((1, 2))], -1)


def _tokens(model: LoadedModel) -> list[int]:
    vocabulary = model.config.vocab_size
    text = [token for token in model.tokenizer.encode(TEXT) if token < vocabulary]
    others = [i * STRIDE % vocabulary for i in range(OTHER_TOKENS)]
    return (text[:TEXT_TOKENS] + others)[: model.config.context_tokens]
