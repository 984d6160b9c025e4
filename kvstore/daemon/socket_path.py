"""A Unix socket's place in the file system: one daemon at a time, and none in the way after it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path

from kvstore.errors import DirectoryError
from kvstore.settings import Settings

_LONGEST = 107  # bytes of a path that fit into a socket address


def socket_of(settings: Settings) -> Path:
    """Where the local door is, as clients name it: absolute. Raises DirectoryError for no place."""
    if settings.daemon.socket is not None:
        return settings.daemon.socket.absolute()
    runtime = os.environ.get("RUNTIME_DIRECTORY") or os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        raise DirectoryError(
            "there is no XDG_RUNTIME_DIR to put a socket in: name one with --socket, such as "
            "--socket /run/kvstore/kvstore.sock"
        )
    name = "kvstore.sock" if os.environ.get("RUNTIME_DIRECTORY") else "kvstore/kvstore.sock"
    return Path(runtime.partition(":")[0], name).absolute()


class SocketPath:
    """A listening Unix socket that only this user can open. Gone from the path after `close`.

    A lock on a file beside it says that it is in use, so that what a killed daemon left
    is told from a living one's.
    """

    def __init__(self, path: Path) -> None:
        """Raises DirectoryError where the path cannot be used, or is in use."""
        if len(os.fsencode(path)) > _LONGEST:
            raise DirectoryError(
                f"{path}: longer than the {_LONGEST} bytes that a socket's path may have; "
                "choose a shorter one"
            )
        self.path = path
        lock = path.with_name(path.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DirectoryError(f"{path}: no socket can be made there: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.socket = _listen(path)
        except OSError as error:
            os.close(self._lock)
            if error.errno in (errno.EWOULDBLOCK, errno.EADDRINUSE):
                text = "another process is listening there; end it, or choose another path"
            else:
                text = f"no socket can be made there: {error.strerror}"
            raise DirectoryError(f"{path}: {text}") from None

    def stop_listening(self) -> None:
        """Whoever comes now hears at once that nobody is there; the place stays ours."""
        if self.socket.fileno() >= 0:
            self.socket.close()
            with contextlib.suppress(OSError):
                self.path.unlink()

    def close(self) -> None:
        """The lock's file stays: removing it would let two others each lock one of that name."""
        self.stop_listening()
        os.close(self._lock)


def _listen(path: Path) -> socket.socket:
    """What is at the path is removed if it is a socket on which nobody listens."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)  # who listens, but does not accept, is there as well
                if probe.connect_ex(os.fspath(path)) != errno.ECONNREFUSED:
                    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            path.unlink()
        elif os.path.lexists(path):
            raise OSError(errno.EEXIST, "something else is there, which is left alone")
        mask = os.umask(0o177)  # from the first moment, and not after a chmod
        try:
            listening.bind(os.fspath(path))
        finally:
            os.umask(mask)
        listening.listen(128)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening
