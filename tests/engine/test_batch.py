"""What a batch is made of, and that asking for fewer logits changes none of them."""

from __future__ import annotations

import pytest
import torch

from kvstore.engine.batch import Batch, SequenceSpan
from kvstore.engine.loading import LoadedModel, load

SPANS = [
    SequenceSpan(3, 2, [4, 1]),
    SequenceSpan(1, 9, [0, 3, 7]),
    SequenceSpan(6, 0, [2, 5]),
]
TOKENS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]


def test_rows_lie_where_the_block_tables_say() -> None:
    batch = Batch.build(SPANS, TOKENS, block_tokens=4)
    assert batch.tokens.tolist() == list(range(1, 11))
    assert batch.positions.tolist() == [2, 3, 4, 9, 0, 1, 2, 3, 4, 5]
    assert batch.slots.tolist() == [18, 19, 4, 29, 8, 9, 10, 11, 20, 21]
    assert batch.logits_rows.tolist() == [2, 3, 9]
    assert [span.total_tokens for span in batch.logits_spans] == [5, 10, 6]


def test_a_wanted_row_is_a_span_of_one_token() -> None:
    batch = Batch.build(SPANS, TOKENS, block_tokens=4, logits_rows=[0, 3, 5])
    assert batch.logits_spans == (
        SequenceSpan(1, 2, [4, 1]),
        SequenceSpan(1, 9, [0, 3, 7]),
        SequenceSpan(1, 1, [2, 5]),
    )


@pytest.mark.parametrize("rows", [[10], [-1], [3, 3], [5, 2]])
def test_rows_that_are_not_there(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="not ascending, or not there"):
        Batch.build(SPANS, TOKENS, block_tokens=4, logits_rows=rows)


def test_spans_tokens_and_tables_must_fit() -> None:
    with pytest.raises(ValueError, match="tokens for 2"):
        Batch.build(SPANS, TOKENS[:2], block_tokens=4)
    with pytest.raises(ValueError, match="span 0 has 2 tokens, not 3"):
        Batch.build(SPANS[:1], [[1, 2]], block_tokens=4)
    with pytest.raises(ValueError, match="block table of span 2"):
        Batch.build([*SPANS[:2], SequenceSpan(6, 3, [2, 5])], TOKENS, block_tokens=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [[], [9], [2, 3, 9], [0, 1, 3, 4, 8], list(range(10))], ids=str)
def test_wanting_fewer_logits_changes_neither_them_nor_the_kv(
    tiny_path: object, dtype: torch.dtype, rows: list[int]
) -> None:
    model = load(str(tiny_path), dtype)
    wanted, kv = forward(model, rows)
    everything, all_kv = forward(model, list(range(10)))
    assert torch.equal(wanted, everything[rows])
    assert torch.equal(kv, all_kv)


def forward(model: LoadedModel, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    config = model.config
    generator = torch.Generator().manual_seed(1)
    shape = (config.kv_heads, config.layers, 2, 32, config.head_dim)
    kv = torch.randn(shape, generator=generator).to(model.decoder.dtype)
    batch = Batch.build(SPANS, TOKENS, block_tokens=4, logits_rows=rows)
    return model.decoder.forward(batch, kv), kv
