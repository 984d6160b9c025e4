"""Flags that say how the next token is drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from kvstore.engine.sampling_params import SamplingParams

_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}
_OPTIONS = (
    ("max_tokens", int, "N", "End after so many new tokens."),
    ("temperature", float, "T", "0: always the likeliest token."),
    ("top_k", int, "K", "Draw from the K likeliest tokens; 0: from all."),
    ("top_p", float, "P", "Draw from the likeliest P of all."),
    ("min_p", float, "P", "Leave out what is P times less likely."),
    ("repetition_penalty", float, "X", "Above 1: repeat less."),
    ("seed", int, "N", "The same seed draws the same tokens."),
)
_stop = click.option(
    "--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable."
)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command receives `sampling`, keywords of SamplingParams."""

    @functools.wraps(command)
    def with_sampling(*args: Any, **options: Any) -> Any:
        names = (*(name for name, *_ in _OPTIONS), "stop")
        sampling = {name: options.pop(name) for name in names}
        return command(*args, sampling=sampling, **options)

    decorated: Callable[..., Any] = _stop(with_sampling)
    for name, kind, metavar, text in reversed(_OPTIONS):
        decorated = click.option(
            "--" + name.replace("_", "-"),
            type=kind,
            default=_DEFAULTS[name],
            show_default=True,
            metavar=metavar,
            help=text,
        )(decorated)
    return decorated
