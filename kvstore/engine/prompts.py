"""From what a caller gives as a prompt to tokens that the engine can serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstore.engine.loading import ModelCard
from kvstore.engine.sampling import SamplingParams
from kvstore.errors import RequestError

# Text, token ids, or the messages of a chat: [{"role": "user", "content": "..."}].
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


def prompt_tokens(model: ModelCard, prompt: Prompt) -> list[int]:
    """Token ids, all within the vocabulary. Raises RequestError for what is no prompt."""
    if isinstance(prompt, str):
        tokens = model.tokenizer.encode(_unicode(prompt))
    elif not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray, memoryview)):
        raise RequestError("a prompt is text, a list of token ids, or a list of chat messages")
    else:
        messages = [part for part in prompt if isinstance(part, Mapping)]
        numbers = [part for part in prompt if isinstance(part, int)]
        if messages and len(messages) == len(prompt):
            text = model.tokenizer.render_chat(messages)
            tokens = model.tokenizer.encode(_unicode(text), add_special_tokens=False)
        elif len(numbers) == len(prompt):
            tokens = numbers
        else:
            raise RequestError("a prompt is text, a list of token ids, or a list of chat messages")
    if not tokens:
        raise RequestError("the prompt is empty")
    vocabulary = model.config.vocab_size
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        raise RequestError(f"the prompt has token ids outside of 0 to {vocabulary - 1}")
    return tokens


def _unicode(text: str) -> str:
    """The text, unless it holds half characters, as a command line that is not UTF-8 does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("the prompt is not a text in UTF-8") from None
    return text


def sequence_limit(
    tokens: int, params: SamplingParams, *, context_tokens: int, hbm_tokens: int
) -> int:
    """Tokens that a sequence may grow to: prompt and output.

    Raises RequestError when the prompt leaves no room for any output.
    """
    if tokens >= context_tokens:
        raise RequestError(
            f"the prompt has {tokens} tokens; with an answer it must fit into the model's "
            f"context of {context_tokens}"
        )
    if tokens >= hbm_tokens:
        raise RequestError(
            f"the prompt has {tokens} tokens; hbm_bytes is room for {hbm_tokens}, give more"
        )
    limit = min(context_tokens, hbm_tokens)
    return limit if params.max_tokens is None else min(limit, tokens + params.max_tokens)
