"""What the help says: all of it where a person looks, and the defaults from where they are set."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvstore.engine.sampling_params import SamplingParams
from kvstore.specs import specs
from tests.cli.commands import Done


def test_without_arguments_it_is_the_help(here: Callable[..., Done]) -> None:
    assert here() == here("--help")


@pytest.mark.parametrize("group", ["token", "bench"])
def test_a_group_without_a_command_shows_its_own(here: Callable[..., Done], group: str) -> None:
    assert here(group) == Done(2, here(group, "--help").stdout, "")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_defaults(here: Callable[..., Done], command: str) -> None:
    options = " ".join(here(command, "--help").stdout.split()).partition("Options:")[2]
    defaults = {spec.key: spec.default for spec in specs()}
    for flag, default in (
        ("--max-tokens", SamplingParams().max_tokens),
        ("--temperature", SamplingParams().temperature),
        ("--ram-bytes", defaults["ram.capacity_bytes"]),
        ("--device", defaults["engine.device"]),
    ):
        about = options.partition(f" {flag} ")[2].partition(" --")[0]
        assert about.endswith(f"[default: {default}]")
