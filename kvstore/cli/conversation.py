"""A conversation that outlives the process: messages in one JSON file, written whole."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.errors import InputError
from kvstore.machine import home_folder

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def state_home() -> Path:
    home = home_folder("XDG_STATE_HOME", "~/.local/state")
    if home is None:
        raise InputError("there is no home directory to keep conversations in: set XDG_STATE_HOME")
    return home / "kvstore"


@dataclass
class Conversation:
    """What was said, and with which model. Not safe for two writers: the last one wins."""

    path: Path
    model: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def open(cls, name: str, folder: Path | None = None) -> Conversation:
        """The saved conversation of that name, or an empty one. Raises InputError."""
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{name!r} cannot name a conversation: use letters, digits, '.', '_' and '-'"
            )
        path = (folder or state_home() / "chats") / f"{name}.json"
        try:
            saved = json.loads(path.read_text())
        except FileNotFoundError:
            return cls(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError:
            saved = None
        if not _is_conversation(saved):
            raise InputError(f"{path}: not a conversation; delete it, or choose another name")
        return cls(path, saved.get("model"), saved["messages"])

    def instruct(self, system: str) -> None:
        """Begin with what the model is told. Raises InputError where that was something else."""
        told = {"role": "system", "content": system}
        if not self.messages:
            self.messages.append(told)
        elif self.messages[0] != told:
            raise InputError(
                f"the conversation {self.path.stem!r} exists, and its --system cannot be changed: "
                "leave that out, or choose another name"
            )

    def save(self) -> None:
        """Replace the file in one step: a crash leaves the old one or the new one."""
        text = json.dumps(
            {"format": FORMAT, "model": self.model, "messages": self.messages}, indent=1
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, prefix=".saving-", delete=False
            ) as file:
                file.write(text)
            os.replace(file.name, self.path)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be saved: {error.strerror}") from error


def _is_conversation(saved: object) -> bool:
    return (
        isinstance(saved, Mapping)
        and saved.get("format") == FORMAT
        and isinstance(saved.get("model"), (str, type(None)))
        and isinstance(saved.get("messages"), list)
        and all(
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(text, str) for text in message.values())
            for message in saved["messages"]
        )
    )
