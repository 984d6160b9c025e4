"""An engine's memory for tests, the prompt that is in it, and where."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from kvstore.connectors.convert import Pages
from kvstore.connectors.page_layout import PageLayout
from kvstore.identity import Namespace
from kvstore.layout import Shard
from tests.connectors.pages import random_tensors, slow_block

NAMESPACE = Namespace("tiny", "weights", "tokenizer", "bfloat16", 2, 4, 2, 16, "rope")
LAYOUT = PageLayout("KBNHD", 12, 32, 2, 4, 2, "bfloat16")
TOKENS = random.Random(0).choices(range(50_000), k=200)  # 12 full blocks of the store
TABLE = [7, 2, 9, 0, 11, 4, 3]


class Memory:
    """An engine's memory: its tensors, and the pages in them."""

    def __init__(self, layout: PageLayout = LAYOUT, seed: int = 0) -> None:
        self.layout = layout
        self.tensors = random_tensors(layout, seed)
        self.pages = Pages(layout, self.tensors)

    def kv(self, table: Sequence[int], tokens: range, shard: Shard | None = None) -> bytes:
        """What the tokens' KV is, read element by element."""
        return slow_block(self.layout, self.tensors, table, tokens, shard or self.layout.held)

    def bits(self) -> list[bytes]:
        return [tensor.view(torch.uint8).numpy().tobytes() for tensor in self.tensors]
