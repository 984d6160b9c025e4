"""A `tokenizers` model from the vocabulary in GGUF metadata.

Two kinds: "gpt2" is byte-level BPE, whose splitting rule GGUF gives only a name; "llama"
is SentencePiece BPE, whose merges are implied by the scores of its pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from kvstore.engine.tokenizer import Tokenizer
from kvstore.errors import ModelError

# Token types of GGUF. Byte pieces (6) stay in the vocabulary, for the fallback.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"

# The words of these models' published tokenizer.json files, by GGUF's name for the rule.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "llama-bpe": _CONTRACTIONS + _WORDS % r"\p{N}{1,3}",
    "qwen2": _CONTRACTIONS + _WORDS % r"\p{N}",
}
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises ModelError for kinds of tokenizer that cannot be rebuilt faithfully."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"GGUF tokenizer {kind!r} is not supported; gpt2 and llama are")
    try:
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        backend = _byte_level(metadata, tokens) if kind == "gpt2" else _pieces(metadata, tokens)
        _add_special_tokens(backend, tokens, metadata.get("tokenizer.ggml.token_type") or ())
        _add_bos_and_eos(backend, metadata, tokens, kind)
        return Tokenizer(
            backend,
            chat_template=metadata.get("tokenizer.chat_template"),
            special={
                f"{name}_token": tokens[number]
                for name in ("bos", "eos", "unknown", "padding")
                if (number := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None
            },
            eos_token_ids=_eos_token_ids(metadata),
        )
    except (KeyError, IndexError, ValueError) as error:
        raise ModelError(f"the GGUF tokenizer cannot be used: {error!r}") from error


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Backend:
    rule = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Backend(
        BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            # Llama 3 takes a word that is in the vocabulary whole, however merges would build it.
            ignore_merges=rule in _LLAMA3_NAMES,
        )
    )
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _splitter(rule)
    backend.decoder = decoders.ByteLevel()
    return backend


def _splitter(rule: str) -> pre_tokenizers.PreTokenizer:
    if rule in _LLAMA3_NAMES:
        rule = "llama-bpe"
    if rule in _PATTERNS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERNS[rule]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's rule
    if rule in ("smollm", "starcoder", "refact", "command-r"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if rule in ("gpt-2", "default"):
        return words
    known = ", ".join(("gpt-2", "smollm", *_PATTERNS))
    raise ModelError(f"GGUF word-splitting rule {rule!r} is not supported; these are: {known}")


def _pieces(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Backend:
    vocab = {token: number for number, token in enumerate(tokens)}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Backend(
        BPE(
            vocab=vocab,
            merges=_merges(tokens, vocab, metadata["tokenizer.ggml.scores"]),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    to_pieces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), to_pieces]) if prefix else to_pieces
    )
    from_pieces = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*from_pieces, decoders.Strip(" ", 1, 0)] if prefix else from_pieces
    )
    return backend


def _merges(
    tokens: Sequence[str], vocab: Mapping[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to build a piece from two, best score of the result first.

    SentencePiece merges whichever neighbours give the best-scored piece; a list in
    that order makes `tokenizers` do the same.
    """
    ranked = []
    for number, token in enumerate(tokens):
        ways = [
            (vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
            for cut in range(1, len(token))
            if token[:cut] in vocab and token[cut:] in vocab
        ]
        ranked.extend((-scores[number], number, *way) for way in ways)
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_special_tokens(backend: Backend, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Control tokens are matched in the text as they stand, and left out when decoding."""
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (_CONTROL, _UNKNOWN):
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])


def _add_bos_and_eos(
    backend: Backend, metadata: Mapping[str, Any], tokens: Sequence[str], kind: str
) -> None:
    llama3 = metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    parts, named = ["$A"], []
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or llama3):
        number = metadata["tokenizer.ggml.bos_token_id"]
        parts.insert(0, tokens[number])
        named.append((tokens[number], number))
    if metadata.get("tokenizer.ggml.add_eos_token", False):
        number = metadata["tokenizer.ggml.eos_token_id"]
        parts.append(tokens[number])
        named.append((tokens[number], number))
    if named:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(parts), special_tokens=named
        )


def _eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End of text, and end of turn where a model has its own token for it."""
    names = ("eos", "eot", "eom")
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names)
    return tuple(int(number) for number in ids if number is not None)
