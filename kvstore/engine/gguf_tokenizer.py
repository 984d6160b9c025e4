"""A tokenizer rebuilt from GGUF metadata, for the `tokenizers` library.

GGUF names a tokenizer's kind ("gpt2": BPE over bytes, "llama": SentencePiece BPE) and,
for BPE over bytes, how text is split before merging; the splits themselves are known by
name only. They are those of the models' own tokenizer.json, and llama.cpp's "default".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from kvstore.engine.tokenizer import Tokenizer
from kvstore.errors import ModelError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # of tokenizer.ggml.token_type
_SPACE = "\u2581"  # how SentencePiece writes a space

_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Any of these ends a turn.
_EOS = ("eos_token_id", "eot_token_id", "eom_token_id")


class _Split(NamedTuple):
    """How text is cut before merging: each pattern cuts the pieces that the last one left."""

    patterns: tuple[str, ...]
    adds_bos: bool = False
    whole_words: bool = False  # a piece that is a token is never merged from parts
    normalizer: normalizers.Normalizer | None = None


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASED_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_DIGITS_FIRST = _Split((r"\p{N}", _GPT2))
_PLAIN_GPT2 = _Split((_GPT2,))
_LLAMA3 = _Split(
    (rf"{_CASED_ENDINGS}|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACE}",),
    adds_bos=True,
    whole_words=True,
)
_QWEN2_PATTERN = rf"{_CASED_ENDINGS}|\p{{N}}|{_PUNCTUATION_AND_SPACE}"
_DEFAULT = _Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_TEKKEN = _Split(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    whole_words=True,
)

# By the name in tokenizer.ggml.pre.
_SPLITS = {
    "default": _DEFAULT,
    "gpt-2": _PLAIN_GPT2,
    "gpt2": _PLAIN_GPT2,
    "smollm": _DIGITS_FIRST,
    "starcoder": _DIGITS_FIRST,
    "refact": _DIGITS_FIRST,
    "command-r": _DIGITS_FIRST,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3._replace(adds_bos=False, whole_words=False),
    "qwen2": _Split((_QWEN2_PATTERN,), normalizer=normalizers.NFC()),
    "deepseek-r1-qwen": _Split((_QWEN2_PATTERN,)),
    "tekken": _TEKKEN,
}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises ModelError for a kind or a split that we do not know, or broken lists."""
    vocabulary = _Vocabulary(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, adds_bos = _byte_bpe(metadata, vocabulary)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece_bpe(metadata, vocabulary), True
    else:
        raise ModelError(f"tokenizer {kind!r} is not supported in a GGUF; gpt2 and llama are")
    backend.add_special_tokens(vocabulary.added(_UNKNOWN, _CONTROL, special=True))
    backend.add_tokens(vocabulary.added(_USER_DEFINED, special=False))
    _add_template(backend, metadata, vocabulary, adds_bos)
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        chat_template=template if isinstance(template, str) else None,
        special={name: vocabulary.tokens[i] for name, i in vocabulary.ids(_SPECIAL).items()},
        eos_token_ids=sorted(vocabulary.ids({name: name for name in _EOS}).values()),
    )


class _Vocabulary:
    """The lists of tokens and of their types, and the ids with a role."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.tokens: list[str] = _strings(metadata, "tokenizer.ggml.tokens")
        plain = [_NORMAL] * len(self.tokens)
        self.types: Sequence[int] = metadata.get("tokenizer.ggml.token_type", plain)
        if not isinstance(self.types, list) or len(self.types) != len(self.tokens):
            raise ModelError("tokenizer.ggml.token_type is not as long as tokenizer.ggml.tokens")

    def by_text(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def added(self, *wanted: int, special: bool) -> list[AddedToken]:
        """Tokens found as a whole in text, before any splitting. An empty one would be all over."""
        return [
            AddedToken(token, normalized=False, special=special)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in wanted and token
        ]

    def ids(self, names: Mapping[str, str]) -> dict[str, int]:
        """The token of each role that the file gives one; as in llama.cpp, wrong ids give none."""
        found = {}
        for role, name in names.items():
            token = self._metadata.get(f"tokenizer.ggml.{name}")
            if isinstance(token, int) and 0 <= token < len(self.tokens):
                found[role] = token
        return found


def _byte_bpe(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> tuple[Backend, bool]:
    """The tokenizer, and whether files of its kind ask for a BOS when they say nothing."""
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    split = _SPLITS.get(name)
    if split is None:
        raise ModelError(
            f"pre-tokenizer {name!r} is not supported; these are: {', '.join(sorted(_SPLITS))}"
        )
    merges = [pair.split(" ") for pair in _strings(metadata, "tokenizer.ggml.merges")]
    if any(len(pair) != 2 for pair in merges):
        raise ModelError("tokenizer.ggml.merges has an entry that is not two tokens")
    pairs = [(left, right) for left, right in merges]
    backend = _backend(vocabulary, pairs, ignore_merges=split.whole_words)
    if split.normalizer is not None:
        backend.normalizer = split.normalizer
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, split.adds_bos


def _sentencepiece_bpe(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Backend:
    """BPE over characters, where what has no token becomes byte tokens such as <0x0A>."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise ModelError("tokenizer.ggml.scores is not as long as tokenizer.ggml.tokens")
    if not all(isinstance(score, float) for score in scores):
        raise ModelError("tokenizer.ggml.scores has entries that are not numbers")
    unknown = vocabulary.added(_UNKNOWN, special=True)
    backend = _backend(
        vocabulary,
        _merges_by_score(vocabulary, scores),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=unknown[0].content if unknown else None,
    )
    prefixed = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    )
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefixed else parts)
    return backend


def _merges_by_score(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose union scores best; as a list, best first."""
    by_text = {
        token: i
        for i, token in enumerate(vocabulary.tokens)
        if vocabulary.types[i] in (_NORMAL, _USER_DEFINED)
    }
    ranked = []
    for token, number in by_text.items():
        for cut in range(1, len(token)):
            left, right = by_text.get(token[:cut]), by_text.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[number], number, left, right))
    ranked.sort()
    tokens = vocabulary.tokens
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _backend(vocabulary: _Vocabulary, merges: Sequence[tuple[str, str]], **options: Any) -> Backend:
    try:
        return Backend(models.BPE(vocabulary.by_text(), list(merges), **options))
    except Exception as error:  # the Rust side raises plain Exception
        raise ModelError(f"the tokenizer cannot be built: {error}") from error


def _add_template(
    backend: Backend, metadata: Mapping[str, Any], vocabulary: _Vocabulary, adds_bos: bool
) -> None:
    """Have `encode` put a BOS in front, or an EOS behind, where the file asks for it."""
    ids = vocabulary.ids({"bos": "bos_token_id", "eos": "eos_token_id"})
    wanted = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    bos, eos = ([(role, ids[role])] if wanted[role] and role in ids else [] for role in wanted)
    if bos or eos:
        backend.post_processor = processors.TemplateProcessing(
            single=[*(role for role, _ in bos), "$A", *(role for role, _ in eos)],
            special_tokens=[*bos, *eos],
        )


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ModelError(f"the file has no {key}, so no tokenizer")
    return values
