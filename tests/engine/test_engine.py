"""The engine without a store: batches, chunks, siblings, preemption, streaming, bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.engine.engine import Engine
from kvstore.engine.loading import LoadedModel
from kvstore.engine.output import Delta
from kvstore.engine.sampling import SamplingParams
from kvstore.errors import ClosedError, RequestError, SettingsError
from tests.engine.reference import BLOCK_TOKENS, GREEDY, PROMPTS, block_bytes


@pytest.fixture
def make(tiny: LoadedModel) -> Iterator[Any]:
    """Engines on the tiny model; closed, and found free of leaks, at the end."""
    made: list[Engine] = []

    def engine(blocks: int = 256, **options: Any) -> Engine:
        options = {"block_tokens": BLOCK_TOKENS, "prefill_chunk_tokens": 16, **options}
        made.append(Engine(tiny, hbm_bytes=blocks * block_bytes(tiny), **options))
        return made[-1]

    yield engine
    for one in made:
        one.check_invariants()
        assert one.stats().hbm_used_blocks == 0
        one.close()


@pytest.mark.parametrize("max_batch", [1, 8])
@pytest.mark.parametrize("chunk", [5, 16, 512])
def test_greedy_answers_are_the_models_own(
    make: Any, expected: list[tuple[int, ...]], max_batch: int, chunk: int
) -> None:
    engine = make(max_batch=max_batch, prefill_chunk_tokens=chunk)
    outputs = engine.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in outputs] == expected
    assert all(output.finish_reason == "length" for output in outputs)


def test_a_prefix_in_hbm_is_used_and_accounted_for(
    make: Any, expected: list[tuple[int, ...]]
) -> None:
    engine = make()
    (cold,) = engine.generate(PROMPTS[:1], GREEDY)
    (warm,) = engine.generate(PROMPTS[:1], GREEDY)
    assert cold.token_ids == warm.token_ids == expected[0]
    assert (cold.usage.hbm_tokens, cold.usage.recomputed_tokens) == (0, 50)
    assert (warm.usage.hbm_tokens, warm.usage.recomputed_tokens) == (48, 2)
    assert engine.clear_hbm() > 0
    (again,) = engine.generate(PROMPTS[:1], GREEDY)
    assert again.token_ids == expected[0]
    assert again.usage.hbm_tokens == 0


def test_generated_tokens_are_found_again_too(make: Any) -> None:
    engine = make()
    (first,) = engine.generate(PROMPTS[:1], GREEDY)
    (second,) = engine.generate([[*PROMPTS[0], *first.token_ids, 1, 2, 3]], GREEDY)
    assert second.usage.hbm_tokens == (50 + 23) // BLOCK_TOKENS * BLOCK_TOKENS


def test_one_prompt_many_times_at_once_is_computed_once(
    make: Any, expected: list[tuple[int, ...]]
) -> None:
    engine = make()
    outputs = engine.generate([PROMPTS[0]] * 6, GREEDY)
    assert {output.token_ids for output in outputs} == {expected[0]}
    assert sum(output.usage.recomputed_tokens for output in outputs) == 50 + 5 * 2


@pytest.mark.parametrize("blocks", [24, 25, 40])
def test_a_small_hbm_preempts_and_changes_nothing(
    make: Any, expected: list[tuple[int, ...]], blocks: int
) -> None:
    engine = make(blocks=blocks)
    outputs = engine.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in outputs] == expected
    assert engine.stats().preemptions > 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.usage.prompt_tokens == len(prompt)
        assert output.usage.hbm_tokens + output.usage.recomputed_tokens == len(prompt)


@pytest.mark.parametrize("blocks", [16, 256])
def test_siblings_are_what_their_seeds_make_alone(make: Any, blocks: int) -> None:
    engine = make(blocks=blocks)
    params = SamplingParams(max_tokens=20, temperature=0.9, seed=5, n=4, ignore_eos=True)
    (together,) = engine.generate([PROMPTS[1]], params)
    assert [completion.index for completion in together.completions] == [0, 1, 2, 3]
    assert len({completion.token_ids for completion in together.completions}) == 4
    for index, completion in enumerate(together.completions):
        alone = SamplingParams(max_tokens=20, temperature=0.9, seed=5 + index, ignore_eos=True)
        (single,) = make().generate([PROMPTS[1]], alone)
        assert completion.token_ids == single.token_ids
    assert together.usage.recomputed_tokens == len(PROMPTS[1])
    assert together.usage.completion_tokens == 80


def test_seeded_answers_do_not_depend_on_the_company(make: Any) -> None:
    params = [
        SamplingParams(max_tokens=15, temperature=0.8, top_p=0.9, seed=i, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    together = make().generate(PROMPTS, params)
    for prompt, own, output in zip(PROMPTS, params, together, strict=True):
        assert make().generate([prompt], own)[0].token_ids == output.token_ids


def test_streaming_gives_what_generate_gives(make: Any) -> None:
    engine = make()
    params = SamplingParams(max_tokens=30, n=2, temperature=1.0, seed=1)
    (whole,) = engine.generate([PROMPTS[1]], params)
    deltas: list[Delta] = list(engine.stream(PROMPTS[1], params))
    for completion in whole.completions:
        own = [delta for delta in deltas if delta.index == completion.index]
        assert "".join(delta.text for delta in own) == completion.text
        assert tuple(t for delta in own for t in delta.token_ids) == completion.token_ids
        assert [d.finish_reason for d in own if d.finish_reason] == [completion.finish_reason]
    assert [delta.usage is not None for delta in deltas].count(True) == 1
    assert deltas[-1].usage is not None


def test_two_streams_are_read_in_turns(make: Any, expected: list[tuple[int, ...]]) -> None:
    engine = make()
    streams = [engine.stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
    tokens: list[tuple[int, ...]] = [(), ()]
    for _ in range(24):
        for i in (1, 0):
            tokens[i] += next(streams[i]).token_ids
    assert tokens == expected[:2]
    assert all(next(stream, None) is None for stream in streams)


def test_a_stream_that_is_left_frees_its_blocks(make: Any) -> None:
    engine = make()
    stream = engine.stream(PROMPTS[0], GREEDY)
    next(stream)
    assert engine.stats().hbm_used_blocks > 0
    stream.close()
    assert engine.stats().hbm_used_blocks == 0
    assert not engine.busy
    never_begun = engine.stream(PROMPTS[0], GREEDY)
    never_begun.close()
    assert not engine.busy


def test_requests_by_hand(make: Any, expected: list[tuple[int, ...]]) -> None:
    engine = make()
    ids = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS[:4]]
    engine.step()
    engine.abort(ids[1])
    engine.abort(ids[1])
    stream = engine.stream(PROMPTS[4], GREEDY)
    # Computes steps whose deltas belong to the others.
    streamed = [token for _ in range(12) for token in next(stream).token_ids]
    engine.abort(ids[2])
    seen: dict[int, tuple[int, ...]] = dict.fromkeys(ids, ())
    while engine.busy:
        for delta in engine.step():
            seen[delta.request_id] += delta.token_ids
        engine.check_invariants()
    assert seen[ids[0]]
    assert not seen[ids[2]]
    for i in (0, 3):
        assert seen[ids[i]][-20:] == expected[i][-20:]
    assert (*streamed, *(token for d in stream for token in d.token_ids)) == expected[4]


def test_an_end_token_stops_and_is_not_text(make: Any, tiny: LoadedModel) -> None:
    (free,) = make().generate([PROMPTS[0]], GREEDY)
    end = free.token_ids[7]
    first = free.token_ids.index(end)
    params = SamplingParams(max_tokens=24, ignore_eos=True, stop_token_ids=[end])
    (stopped,) = make().generate([PROMPTS[0]], params)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.text == tiny.tokenizer.decode(free.token_ids[:first])


def test_a_stop_string_over_a_token_border_ends_the_text_before_itself(make: Any) -> None:
    engine = make()
    # A token is a byte here, so two letters are two tokens. Take any that the model writes.
    answers = {prompt: engine.generate([[prompt, 65]], GREEDY)[0] for prompt in range(200, 230)}
    prompt, stop = next(
        (prompt, letters[0])
        for prompt, answer in answers.items()
        if (letters := re.search(r"(?<=.)[A-Za-z0-9]{2}", answer.text))
    )
    text = answers[prompt].text
    params = SamplingParams(max_tokens=24, ignore_eos=True, stop=["never there", stop])
    (stopped,) = engine.generate([[prompt, 65]], params)
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]
    assert len(stopped.token_ids) < 24
    assert "".join(d.text for d in engine.stream([prompt, 65], params)) == stopped.text


def test_the_context_ends_the_answer(make: Any, tiny: LoadedModel) -> None:
    context = tiny.config.context_tokens
    engine = make(blocks=2 * context // BLOCK_TOKENS, prefill_chunk_tokens=512)
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    (output,) = engine.generate([[1] * (context - 3)], params)
    assert len(output.token_ids) == 3
    assert output.finish_reason == "length"
    unbounded = SamplingParams(max_tokens=None, ignore_eos=True)
    (output,) = engine.generate([[1] * (context - 30)], unbounded)
    assert len(output.token_ids) == 30


def test_hbm_ends_the_answer_when_it_is_smaller_than_the_context(make: Any) -> None:
    (output,) = make(blocks=5).generate([[1, 2, 3]], SamplingParams(max_tokens=None))
    assert 3 + len(output.token_ids) <= 20


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([1] * 1024, {}, "1024 tokens"),
        ([1] * 401, {}, "hbm_bytes"),
        ([], {}, "empty"),
        ("", {}, "empty"),
        ([1, 260], {}, "outside of 0 to 259"),
        ([1, "a"], {}, "list of token ids"),
        (7, {}, "list of token ids"),
        ([1], {"n": 9}, "max_batch is 8"),
    ],
)
def test_bad_requests_are_refused_in_one_line(
    make: Any, prompt: Any, params: dict[str, Any], said: str
) -> None:
    engine = make(blocks=100)
    for ask in (engine.add_request, engine.stream, lambda *a: engine.generate([[1], a[0]], a[1])):
        with pytest.raises(RequestError, match=said) as caught:
            ask(prompt, SamplingParams(**params))
        assert "\n" not in str(caught.value)
    assert not engine.busy


def test_generate_wants_lists(make: Any) -> None:
    engine = make()
    with pytest.raises(RequestError, match="list of prompts"):
        engine.generate("Hello")
    with pytest.raises(RequestError, match="2 prompts, but sampling values for 1"):
        engine.generate([[1], [2]], [GREEDY])
    assert engine.generate([]) == []


def test_text_and_chats_are_tokenised(make: Any, tiny: LoadedModel) -> None:
    engine = make()
    (text,) = engine.generate(["Hello"], GREEDY)
    (ids,) = engine.generate([tiny.tokenizer.encode("Hello")], GREEDY)
    assert text.token_ids == ids.token_ids
    chat = [{"role": "user", "content": "Hello"}]
    (answer,) = engine.generate([chat], GREEDY)
    rendered = tiny.tokenizer.encode("<|user|>Hello<|end|><|assistant|>", add_special_tokens=False)
    assert answer.usage.prompt_tokens == len(rendered)


def test_a_closed_engine_says_so(make: Any, tiny: LoadedModel) -> None:
    engine = Engine(tiny, hbm_bytes="1 MiB")
    stream = engine.stream([1], GREEDY)
    next(stream)
    engine.close()
    engine.close()
    with pytest.raises(ClosedError):
        next(stream)
    with pytest.raises(ClosedError):
        engine.generate([[1]])
    with pytest.raises(ClosedError):
        engine.step()


@pytest.mark.parametrize("prompt", [b"Hello", bytearray(b"Hello"), memoryview(b"Hello")])
def test_bytes_are_not_taken_for_token_ids(make: Any, prompt: Any) -> None:
    with pytest.raises(RequestError, match="a prompt is text"):
        make().add_request(prompt)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"hbm_bytes": 100}, "less than one block"),
        ({"hbm_bytes": "12 potatoes"}, "hbm_bytes = '12 potatoes': not a size"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"prefill_chunk_tokens": 0}, "prefill_chunk_tokens is 0"),
    ],
)
def test_engines_that_cannot_be(tiny: LoadedModel, options: Any, expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        Engine(tiny, **options)
