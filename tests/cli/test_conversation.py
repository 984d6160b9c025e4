"""A conversation's file: written whole, read back, refused when it is something else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvstore.cli.conversation import Conversation, state_home
from kvstore.errors import InputError


def test_what_was_said_is_there_again(tmp_path: Path) -> None:
    first = Conversation.open("holiday", tmp_path)
    assert (first.model, first.messages) == (None, [])
    first.model = "smollm2"
    first.messages.append({"role": "user", "content": "Grüße, 世界\n"})
    first.save()
    again = Conversation.open("holiday", tmp_path)
    assert (again.model, again.messages) == ("smollm2", first.messages)
    assert Conversation.open("work", tmp_path).messages == []
    assert os.listdir(tmp_path) == ["holiday.json"]  # nothing half-written beside it


def test_conversations_live_in_the_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert state_home() == Path("/state/kvstore")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/ada")
    assert state_home() == Path("/home/ada/.local/state/kvstore")


@pytest.mark.parametrize("name", ["", "../escape", "a/b", ".hidden", "x" * 65, "a\n"])
def test_a_name_is_not_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot name a conversation"):
        Conversation.open(name, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json",
        "[]",
        '{"format": 2, "model": null, "messages": []}',
        '{"format": 1, "model": null, "messages": [{"role": "user"}]}',
        '{"format": 1, "model": null, "messages": [{"role": "user", "content": 3}]}',
    ],
)
def test_a_file_that_is_no_conversation_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "talk.json").write_text(content)
    with pytest.raises(InputError, match="not a conversation"):
        Conversation.open("talk", tmp_path)
    assert (tmp_path / "talk.json").read_text() == content


def test_a_conversation_without_a_model_is_one_that_names_none(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text('{"format": 1, "messages": []}')
    assert Conversation.open("talk", tmp_path).model is None


def test_a_place_where_nothing_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    conversation = Conversation.open("talk", tmp_path / "absent")
    conversation.path = tmp_path / "file" / "talk.json"
    with pytest.raises(InputError, match="cannot be saved: File exists"):
        conversation.save()
