"""Tokenizers rebuilt from metadata: each word-splitting rule, special tokens, SentencePiece."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.engine.gguf_tokenizer import tokenizer_from_gguf
from kvstore.engine.tokenizer import Tokenizer
from kvstore.errors import ModelError
from tests.engine.tiny import byte_tokens

# Each merge joins what some rule keeps apart.
MERGES = [
    "1 2",
    "12 3",
    "123 4",
    "Ġ Ġ",
    "Ġ 1",
    "Ġ a",
    "' s",
    "' S",
    "! Ċ",
    "! !",
    "( a",
    "a A",
    "Ì ģ",
]
MERGES += ["Ã ©"]
WORDS = [merge.replace(" ", "") for merge in MERGES]
SPECIAL = ["<s>", "</s>", "<|turn|>", "<tool>"]
TOKENS = [*byte_tokens(), *WORDS, "Ġaa", *SPECIAL]
BOS, EOS, TURN, TOOL = range(len(TOKENS) - 4, len(TOKENS))
TYPES = [1] * (len(TOKENS) - 4) + [3, 3, 3, 4]


def byte_level(rule: str | None, **fields: Any) -> dict[str, Any]:
    named = {} if rule is None else {"pre": rule}
    values = {
        "model": "gpt2",
        "tokens": TOKENS,
        "token_type": TYPES,
        "merges": MERGES,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **named,
        **fields,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def pieces(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> list[str]:
    tokens = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return [tokenizer.token_text(token) or "?" for token in tokens]


# Text, and its tokens by rule, as the models' own tokenizer.json files have them.
SPLITS = {
    "1234": {
        "gpt-2": ["1234"],
        "smollm": ["1", "2", "3", "4"],
        "llama-bpe": ["123", "4"],
        "smaug-bpe": ["123", "4"],
        "qwen2": ["1", "2", "3", "4"],
        "tekken": ["1", "2", "3", "4"],
        "default": ["123", "4"],
    },
    "a  12": {
        "gpt-2": ["a", "Ġ", "Ġ", "12"],
        "smollm": ["a", "ĠĠ", "1", "2"],
        "llama-bpe": ["a", "Ġ", "Ġ", "12"],
        "qwen2": ["a", "Ġ", "Ġ", "1", "2"],
        "tekken": ["a", "Ġ", "Ġ", "1", "2"],
        "default": ["a", "Ġ", "Ġ", "12"],
    },
    "a's a'S": {
        "gpt-2": ["a", "'s", "Ġa", "'", "S"],
        "smollm": ["a", "'s", "Ġa", "'", "S"],
        "llama-bpe": ["a", "'s", "Ġa", "'S"],
        "qwen2": ["a", "'s", "Ġa", "'S"],
        "tekken": ["a", "'s", "Ġa", "'S"],
        "default": ["a", "'", "s", "Ġa", "'", "S"],
    },
    "!!\n(aA": {
        "gpt-2": ["!!", "Ċ", "(", "aA"],
        "smollm": ["!!", "Ċ", "(", "aA"],
        "llama-bpe": ["!", "!Ċ", "(a", "A"],
        "qwen2": ["!", "!Ċ", "(a", "A"],
        "tekken": ["!", "!Ċ", "(a", "A"],
        "default": ["!!", "Ċ", "(", "aA"],
    },
    "aA": {"llama-bpe": ["aA"], "tekken": ["a", "A"]},  # Mistral Nemo cuts where case changes
    "Ġaa": {"gpt-2": ["Ä", "ł", "a", "a"]},
    " aa": {"gpt-2": ["Ġa", "a"], "llama-bpe": ["Ġaa"], "smaug-bpe": ["Ġa", "a"]},
    "e\u0301": {"gpt-2": ["e", "Ìģ"], "qwen2": ["Ã©"], "deepseek-r1-qwen": ["e", "Ìģ"]},
}
CASES = [(text, rule, tokens) for text, rules in SPLITS.items() for rule, tokens in rules.items()]


@pytest.mark.parametrize(("text", "rule", "expected"), CASES)
def test_splits_by_rule(text: str, rule: str, expected: list[str]) -> None:
    assert pieces(tokenizer_from_gguf(byte_level(rule)), text) == expected


def test_a_rule_left_out_is_the_default() -> None:
    assert pieces(tokenizer_from_gguf(byte_level(None)), "a's 1234") == [
        "a", "'", "s", "Ġ", "123", "4",
    ]  # fmt: skip


def test_any_text_comes_back_from_its_tokens() -> None:
    text = "naïve\t\u00a0日本語 🙂\x00 e\u0301 <tool>\r\n  "
    for rule in ("gpt-2", "smollm", "llama-bpe", "tekken", "default"):
        tokenizer = tokenizer_from_gguf(byte_level(rule))
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_control_tokens_are_found_whole_and_left_out_of_text() -> None:
    tokenizer = tokenizer_from_gguf(byte_level("smollm"))
    tokens = tokenizer.encode("a<|turn|><tool> a", add_special_tokens=False)
    assert tokens[1:3] == [TURN, TOOL]
    assert tokenizer.decode(tokens) == "a<tool> a"
    assert tokenizer.decode(tokens, skip_special_tokens=False) == "a<|turn|><tool> a"
    assert tokenizer.vocab_size == len(TOKENS)


@pytest.mark.parametrize(
    ("rule", "fields", "expected"),
    [
        ("smollm", {}, ["a"]),
        ("smollm", {"add_bos_token": True}, ["<s>", "a"]),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, ["<s>", "a", "</s>"]),
        ("smollm", {"add_bos_token": True, "bos_token_id": None}, ["a"]),
        ("smollm", {"add_bos_token": True, "bos_token_id": 10**6}, ["a"]),
        ("llama-bpe", {}, ["<s>", "a"]),
        ("llama-bpe", {"add_bos_token": False}, ["a"]),
    ],
)
def test_what_goes_around_a_prompt(rule: str, fields: dict[str, Any], expected: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(byte_level(rule, **fields))
    assert pieces(tokenizer, "a", add_special_tokens=True) == expected
    assert pieces(tokenizer, "a", add_special_tokens=False) == ["a"]


def test_every_token_that_ends_a_turn_is_an_eos() -> None:
    assert tokenizer_from_gguf(byte_level("smollm")).eos_token_ids == {EOS}
    two = tokenizer_from_gguf(byte_level("llama-bpe", eot_token_id=TURN))
    assert two.eos_token_ids == {EOS, TURN}
    assert tokenizer_from_gguf(byte_level("smollm", eos_token_id=None)).eos_token_ids == set()


def test_the_chat_template_sees_the_special_tokens() -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"
    tokenizer = tokenizer_from_gguf({**byte_level("smollm"), "tokenizer.chat_template": template})
    assert tokenizer.render_chat([{"role": "user", "content": "a"}]) == "<s>a</s>"


# SentencePiece: bytes for what has no piece, the rest by score.
PIECES = {
    "<unk>": 0.0,
    "<s>": 0.0,
    "</s>": 0.0,
    **{f"<0x{byte:02X}>": 0.0 for byte in range(256)},
    "▁a": -1.0,
    "ab": -2.0,
    "bc": -0.5,
    "▁▁": -3.0,
    "▁": -10.0,
    "a": -11.0,
    "b": -12.0,
    "c": -13.0,
}


def sentencepiece(**fields: Any) -> dict[str, Any]:
    values = {
        "model": "llama",
        "tokens": list(PIECES),
        "scores": list(PIECES.values()),
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **fields,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc", ["▁a", "bc"]),  # the best score first, not the longest piece
        ("ab", ["▁a", "b"]),
        ("b ab", ["▁", "b", "▁a", "b"]),
        (" a", ["▁", "▁a"]),
        ("  a", ["▁▁", "▁a"]),
        ("cé", ["▁", "c", "<0xC3>", "<0xA9>"]),
        ("a</s>b", ["▁a", "</s>", "▁", "b"]),
    ],
)
def test_sentencepiece_merges_by_score(text: str, expected: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece())
    assert pieces(tokenizer, text) == expected
    assert pieces(tokenizer, text, add_special_tokens=True) == ["<s>", *expected]


def test_sentencepiece_text_comes_back() -> None:
    for text in ("abc", "  a b", "cé 日本 🙂\n", "a  c"):
        for prefix in (True, False):
            tokenizer = tokenizer_from_gguf(sentencepiece(add_space_prefix=prefix))
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert pieces(tokenizer_from_gguf(sentencepiece(add_space_prefix=False)), "ab") == ["ab"]


def test_a_byte_split_over_tokens_streams_as_one_character() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece())
    stream = tokenizer.stream()
    pushed = [stream.push(t) for t in tokenizer.encode("cé a", add_special_tokens=False)]
    assert "".join(pushed) + stream.finish() == "cé a"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pushed)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": (byte_level("gpt-2", model="t5"), "'t5' is not supported"),
    "no kind": (byte_level("gpt-2", model=None), "None is not supported"),
    "another rule": (byte_level("viking"), "'viking' is not supported; these are: command-r"),
    "no tokens": (byte_level("gpt-2", tokens=None), "no tokenizer.ggml.tokens"),
    "tokens that are numbers": (byte_level("gpt-2", tokens=[1, 2]), "no tokenizer.ggml.tokens"),
    "no merges": (byte_level("gpt-2", merges=None), "no tokenizer.ggml.merges"),
    "too few types": (byte_level("gpt-2", token_type=[1]), "not as long"),
    "one type": (byte_level("gpt-2", token_type=1), "not as long"),
    "a merge of one": (byte_level("gpt-2", merges=["ab"]), "not two tokens"),
    "a merge of unknown tokens": (byte_level("gpt-2", merges=["qq qq"]), "cannot be built"),
    "too few scores": (sentencepiece(scores=[0.0]), "not as long"),
    "scores that are text": (sentencepiece(scores=["x"] * len(PIECES)), "not numbers"),
    "a rule that is a list": (byte_level("gpt-2", pre=["gpt-2"]), "is not supported"),
}


@pytest.mark.parametrize(("metadata", "message"), BROKEN.values(), ids=list(BROKEN))
def test_broken_lists(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        tokenizer_from_gguf(metadata)
    assert "\n" not in str(error.value)
