"""Decoding with the engine: what a store and its copies cost it, and what CUDA graphs save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from kvstore import compose
from kvstore.bench.asking import fresh_tokens, seconds_a_token
from kvstore.bench.benchmark import Bench, attempted
from kvstore.bench.card import Work
from kvstore.bench.copies import Pages, tier_way
from kvstore.bench.pages import random_kv, shuffled
from kvstore.bench.rows import Row, Unmeasured
from kvstore.bench.sizes import token_bytes
from kvstore.bench.turns import Turn, medians, timed
from kvstore.engine.attention_cuda import CudaAttention
from kvstore.engine.decode_steps import Capture, DecodeSteps, as_it_is, step_sizes
from kvstore.engine.engine import Engine
from kvstore.engine.naming import namespace_of
from kvstore.engine.sequence import TokenSequence

OFFLOAD_AT_LEAST, BESIDE_AT_LEAST = 0.98, 0.98


def measure_offload(bench: Bench) -> Iterator[Row | Unmeasured]:
    """The same work by two engines, one with a store; every block that fills is offloaded."""
    sizes, batch = bench.sizes, bench.sizes.decode_batch
    # While the last prompt is read, the first answers go on: a token a step.
    steps = -(-batch * sizes.decode_prompt_tokens // sizes.chunk_tokens) + batch
    tokens = sizes.decode_tokens + steps
    turn_bytes = (
        batch
        * (sizes.decode_prompt_tokens + tokens + sizes.block_tokens)
        * token_bytes(sizes.model, bench.dtype.itemsize)
    )
    bench.need_engine(hbm_bytes=2 * turn_bytes, ram_bytes=4 * turn_bytes)
    make = partial(
        Engine,
        bench.model,
        hbm_bytes=turn_bytes,
        block_tokens=sizes.block_tokens,
        max_batch=batch,
        prefill_chunk_tokens=sizes.chunk_tokens,
    )

    def turn(engine: Engine) -> float:
        prompts = [
            fresh_tokens(sizes.model.vocab_size, sizes.decode_prompt_tokens) for _ in range(batch)
        ]
        return seconds_a_token(engine, prompts, tokens)

    with compose.open(ram_bytes=2 * turn_bytes) as store:
        yield from bench.pin(store, "decode with offload")
        with make(store=store) as on, make() as off:
            turns: dict[str, Turn] = {"on": partial(turn, on), "off": partial(turn, off)}
            seconds = medians(turns, sizes.engine_rounds)
            offloaded = on.stats().counters.get("offloaded_blocks", 0)
    # The last token of an answer is never computed, and so has no KV.
    full = (sizes.decode_prompt_tokens + tokens - 1) // sizes.block_tokens
    if offloaded < (due := (sizes.engine_rounds + 1) * batch * full):
        raise RuntimeError(f"{offloaded} blocks were offloaded, and {due} had become full")
    yield Row(
        name=f"decode with offload, batch {batch}",
        group="decode",
        value=1 / seconds["on"],
        unit="tokens/s",
        ceiling=1 / seconds["off"],
        against="the same engine without a store",
        at_least=OFFLOAD_AT_LEAST,
        note=f"all {offloaded} blocks that became full were offloaded meanwhile",
    )


def measure_graphs(bench: Bench) -> Iterator[Row | Unmeasured]:
    """Decode steps as the engine makes them, replayed from CUDA graphs and computed eagerly."""
    sizes, model = bench.sizes, bench.sizes.model
    most, context = max(sizes.step_batches), sizes.step_context_tokens
    blocks = -(-context // sizes.block_tokens)
    slots = most * blocks * sizes.block_tokens
    bench.need_engine(hbm_bytes=slots * token_bytes(model, bench.dtype.itemsize))
    kv = random_kv(model, slots, model.layers, bench.dtype, bench.card.device)
    steps = partial(_steps, bench, kv, _attention(bench, most), most)
    ways = {"graphs": steps(bench.card.capture()), "eager": steps(as_it_is)}
    sequences = _sequences(bench, most, context)
    for batch in sizes.step_batches:
        turns = {
            name: timed(partial(_run, way, sequences[:batch], sizes.steps))
            for name, way in ways.items()
        }
        seconds = medians(turns, sizes.engine_rounds)
        tokens = batch * sizes.steps
        yield Row(
            name=f"decode steps with CUDA graphs, batch {batch}",
            group="decode",
            value=tokens / seconds["graphs"],
            unit="tokens/s",
            ceiling=tokens / seconds["eager"],
            against=f"the same steps launched kernel by kernel; context {context}",
        )


def measure_beside(bench: Bench) -> Iterator[Row | Unmeasured]:
    """A decode step from its CUDA graph, alone and while pages are copied without a pause."""
    sizes, card = bench.sizes, bench.card
    batch, context = sizes.beside
    slots = batch * -(-context // sizes.block_tokens) * sizes.block_tokens
    kv_bytes = slots * token_bytes(sizes.model, bench.dtype.itemsize)
    bench.need_engine(hbm_bytes=kv_bytes + 2 * sizes.copy_bytes, ram_bytes=2 * sizes.copy_bytes)
    pages, other = Pages(bench, sizes.block_tokens), Pages(bench, sizes.block_tokens)
    way = tier_way(bench, pages)
    kv = random_kv(sizes.model, slots, sizes.model.layers, bench.dtype, card.device)
    steps = _steps(bench, kv, _attention(bench, batch), batch, card.capture())
    step = partial(steps.run, _sequences(bench, batch, context))
    out, into = partial(pages.out, way), partial(other.into, way)
    company: dict[str, list[Work]] = {
        "pages to RAM": [out],
        "pages from RAM": [into],
        "pages both ways": [out, into],
    }
    for name, works in company.items():
        name = f"decode steps beside {name}"
        yield from attempted(name, _beside(bench, name, step, works, way))


def _beside(
    bench: Bench, name: str, step: Work, company: Sequence[Work], way: str
) -> Iterator[Row | Unmeasured]:
    sizes, card = bench.sizes, bench.card
    turns: dict[str, Turn] = {
        "alone": partial(card.seconds, step),
        "beside": partial(card.seconds_beside, step, company),
    }
    seconds = medians(turns, sizes.rounds)
    yield Row(
        name=name,
        group="decode",
        value=sizes.beside.batch / seconds["beside"],
        unit="tokens/s",
        ceiling=sizes.beside.batch / seconds["alone"],
        against=f"the same CUDA graph alone; {sizes.beside.label}; copies by {way} without a pause",
        at_least=BESIDE_AT_LEAST,
    )


def _attention(bench: Bench, batch: int) -> CudaAttention:
    card = bench.card
    rows = step_sizes(batch)[-1]
    return CudaAttention(bench.sizes.model, card.device, rows, runtime=card.runtime)


def _steps(
    bench: Bench, kv: Tensor, attention: CudaAttention, batch: int, capture: Capture
) -> DecodeSteps:
    return DecodeSteps(
        bench.model.decoder,
        kv,
        attention,
        capture,
        max_batch=batch,
        block_tokens=bench.sizes.block_tokens,
    )


def _run(steps: DecodeSteps, sequences: list[TokenSequence], count: int) -> None:
    """The token is drawn in each step, so that the host waits as it does in the engine."""
    for _ in range(count):
        steps.run(sequences).argmax(-1).tolist()


def _sequences(bench: Bench, count: int, context: int) -> list[TokenSequence]:
    """Whose last token is to be computed; all have the same context."""
    block_tokens = bench.sizes.block_tokens
    namespace = namespace_of(bench.model, bench.dtype, block_tokens=block_tokens)
    blocks = -(-context // block_tokens)
    order = shuffled(count * blocks)
    made = []
    for number in range(count):
        tokens = fresh_tokens(bench.sizes.model.vocab_size, context)
        sequence = TokenSequence(namespace, tokens, arrival=number)
        sequence.block_table = order[number * blocks : (number + 1) * blocks]
        sequence.computed_tokens = len(tokens) - 1
        made.append(sequence)
    return made
