"""Scales for KV of one byte an element, from what a model computes of a text that never changes.

docs/adr/0054-quantised-kv.md has the reasons and the figures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.engine.loading import LoadedModel
from kvstore.kernels.quantise import LARGEST
from kvstore.tiers.hbm import DTYPE_NAME

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
\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3002
"""
TEXT_TOKENS = 256  # of it, at most
OTHER_TOKENS = 128  # from all over the vocabulary
STRIDE = 2_654_435_761  # a prime, far from any size of a vocabulary
# Other texts have larger numbers: the largest were 1.2 to 1.8 times those of this one.
MARGIN = 1.5
SMALLEST = 2.0**-30  # of a head that is zeros


@dataclass(frozen=True, slots=True)
class Quantised:
    """KV as numbers of `dtype`, times `scales`: float32 [kv_heads, layers, 2], on the device."""

    dtype: torch.dtype
    scales: Tensor

    def identity(self, computed: torch.dtype) -> str:
        """What a `Namespace` says of it: KV was of dtype `computed`, and these are the scales."""
        digest = hashlib.sha256(self.scales.cpu().numpy().astype("<f4").tobytes())
        return f"head scales {digest.hexdigest()[:32]} of {DTYPE_NAME[computed]}"


def calibrate(model: LoadedModel, dtype: torch.dtype) -> Quantised:
    """As long as a prompt of 400 tokens takes; the same model has the same scales.

    Computed in float32, so that devices that add in another order differ by so little that
    rounding the scales up hides it nearly always. Where it does not, they share no blocks.
    """
    ranges = torch.stack([_ranges(pairs) for pairs in model.decoder.pairs_in_float32(_tokens(model))])
    scales = rounded_up(ranges * (MARGIN / LARGEST[dtype])).clamp(min=SMALLEST)
    return Quantised(dtype, scales.transpose(0, 1).contiguous())


def rounded_up(values: Tensor) -> Tensor:
    """To numbers with two bits behind the leading one: at most a fifth larger."""
    mantissas, exponents = torch.frexp(values)
    return torch.ldexp((mantissas * 8).ceil() / 8, exponents)


def _ranges(pairs: Tensor) -> Tensor:
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
