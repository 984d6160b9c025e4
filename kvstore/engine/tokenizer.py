"""Text to tokens and back, streaming, and chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend

from kvstore.errors import ModelError, RequestError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """Wraps a `tokenizers` model with the special tokens and the chat template of one LLM.

    Thread-safe: nothing changes after it is made.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        chat_template: str | None = None,
        special: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        """`special` maps names such as "bos_token" to their text, for the chat template."""
        self._backend = backend
        self.chat_template = chat_template
        self.special = dict(special or {})
        self.eos_token_ids = frozenset(eos_token_ids)

    @classmethod
    def from_json(cls, text: str, **options: Any) -> Tokenizer:
        """`text` is the content of a tokenizer.json."""
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the Rust side raises plain Exception
            raise ModelError(f"the tokenizer cannot be read: {error}") from error
        return cls(backend, **options)

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return self._backend.to_str()

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """`add_special_tokens`: what the model wants in front of a plain prompt (often a BOS)."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def token_text(self, token: int) -> str | None:
        return self._backend.id_to_token(token)

    def stream(self) -> TokenStream:
        """A detokeniser for one sequence of generated tokens."""
        return TokenStream(self)

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt text of a conversation. Raises RequestError when the template fails on it.

        Encode the result with `add_special_tokens=False`: the template writes its own.
        """
        if self.chat_template is None:
            raise RequestError("this model has no chat template; give it a plain prompt")
        template = self._template
        try:
            text: str = template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
            return text
        except Exception as error:  # a stranger's program: it may raise anything
            raise RequestError(f"the chat template refused the messages: {error}") from error

    @cached_property
    def _template(self) -> Any:
        # Templates come with the model file, from strangers: hence the sandbox.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        try:
            return environment.from_string(self.chat_template or "")
        except TemplateError as error:
            raise ModelError(f"the chat template cannot be used: {error}") from error


class TokenStream:
    """Text of a growing sequence of tokens, in pieces that are final.

    A token may end in the middle of a UTF-8 character; its text waits for the
    token that completes it. Decoding starts a few tokens back, because a token's
    text can depend on what precedes it (a leading space, for one).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # decoded from here
        self._sent = 0  # tokens whose text has been given out

    def push(self, token: int) -> str:
        """The text that `token` completes, "" while a character is incomplete."""
        self._tokens.append(token)
        before, after = self._decode(self._sent), self._decode(len(self._tokens))
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return ""
        self._start, self._sent = self._sent, len(self._tokens)
        return after[len(before) :]

    def finish(self) -> str:
        """What is left at the end of the sequence, however broken."""
        before, after = self._decode(self._sent), self._decode(len(self._tokens))
        self._sent = len(self._tokens)
        return after[len(before) :]

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._tokens[self._start : end])


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
