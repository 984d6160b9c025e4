"""Decoding with the engine: what a store costs it, and what CUDA graphs save."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvstore import compose
from kvstore.bench.asking import fresh_tokens, seconds_a_token
from kvstore.bench.benchmark import Bench
from kvstore.bench.pages import shuffled
from kvstore.bench.rows import Row, Unmeasured
from kvstore.bench.sizes import token_bytes
from kvstore.bench.turns import Turn, medians, timed
from kvstore.engine.attention_cuda import CudaAttention
from kvstore.engine.decode_steps import Capture, DecodeSteps, as_it_is, step_sizes
from kvstore.engine.engine import Engine
from kvstore.engine.naming import namespace_of
from kvstore.engine.sequence import TokenSequence

OFFLOAD_AT_LEAST = 0.98


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
    with (
        compose.open(ram_bytes=2 * turn_bytes) as store,
        make(store=store) as on,
        make() as off,
    ):

        def turn(engine: Engine) -> float:
            prompts = [
                fresh_tokens(sizes.model.vocab_size, sizes.decode_prompt_tokens)
                for _ in range(batch)
            ]
            return seconds_a_token(engine, prompts, tokens)

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
    most, context, block_tokens = (
        max(sizes.step_batches),
        sizes.step_context_tokens,
        sizes.block_tokens,
    )
    blocks = -(-context // block_tokens)
    slots = most * blocks * block_tokens
    bench.need_engine(hbm_bytes=slots * token_bytes(model, bench.dtype.itemsize))
    decoder = bench.model.decoder
    kv = torch.zeros(
        (model.kv_heads, model.layers, 2, slots, model.head_dim),
        dtype=bench.dtype,
        device=bench.card.device,
    )
    rows = step_sizes(most)[-1]
    attention = CudaAttention(model, bench.card.device, rows, runtime=bench.card.runtime)

    def steps(capture: Capture) -> DecodeSteps:
        return DecodeSteps(
            decoder, kv, attention, capture, max_batch=most, block_tokens=block_tokens
        )

    ways = {"graphs": steps(bench.card.capture()), "eager": steps(as_it_is)}
    sequences = _sequences(bench, most, blocks)
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


def _run(steps: DecodeSteps, sequences: list[TokenSequence], count: int) -> None:
    """The token is drawn in each step, so that the host waits as it does in the engine."""
    for _ in range(count):
        steps.run(sequences).argmax(-1).tolist()


def _sequences(bench: Bench, count: int, blocks: int) -> list[TokenSequence]:
    """Whose last token is to be computed; all have the same context."""
    sizes = bench.sizes
    namespace = namespace_of(bench.model, bench.dtype, block_tokens=sizes.block_tokens)
    order = shuffled(count * blocks)
    made = []
    for number in range(count):
        tokens = fresh_tokens(sizes.model.vocab_size, sizes.step_context_tokens)
        sequence = TokenSequence(namespace, tokens, arrival=number)
        sequence.block_table = order[number * blocks : (number + 1) * blocks]
        sequence.computed_tokens = len(tokens) - 1
        made.append(sequence)
    return made
