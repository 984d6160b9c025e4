"""Flags that say how the next token is drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option("--max-tokens", type=int, metavar="N", help="End after so many new tokens."),
    click.option("--temperature", type=float, metavar="T", help="0: always the likeliest token."),
    click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest tokens."),
    click.option("--top-p", type=float, metavar="P", help="Draw from the likeliest P of all."),
    click.option("--min-p", type=float, metavar="P", help="Leave out what is P times less likely."),
    click.option("--repetition-penalty", type=float, metavar="X", help="Above 1: repeat less."),
    click.option("--seed", type=int, metavar="N", help="The same seed draws the same tokens."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable."),
)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command receives `sampling`: what was asked for, as keywords of SamplingParams."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")

    @functools.wraps(command)
    def with_sampling(*args: Any, stop: tuple[str, ...], **options: Any) -> Any:
        given = {name: options.pop(name) for name in names}
        sampling = {name: value for name, value in given.items() if value is not None}
        return command(*args, sampling={**sampling, "stop": stop}, **options)

    decorated: Callable[..., Any] = with_sampling
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
