"""Every error that kvstore raises on purpose.

Each message says what is wrong and what to do about it, in one line. Errors
that a person can mend by changing what they asked for are `InputError`s: the
command line prints them without a traceback and exits with status 2.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Base of every error raised on purpose by kvstore."""


class InputError(KVStoreError):
    """What the caller gave cannot be used: a flag, a file, a setting, a prompt."""


class SettingsError(InputError):
    """A setting is unknown, has no unit that we know, or is out of its bounds."""


class ModelError(InputError):
    """A model folder or file is missing, of the wrong type, or not supported."""


class RequestError(InputError):
    """A request cannot be served: prompt longer than the context, bad sampling values."""


class KernelError(InputError):
    """A CUDA kernel cannot be compiled or loaded, or not for these tensors."""


class DirectoryError(InputError):
    """An NVMe directory cannot be opened: no permission, in use, or of a newer format."""


class LayoutError(KVStoreError):
    """Shapes, sizes or head ranges that do not fit the canonical block layout."""


class IllegalMoveError(KVStoreError):
    """A block was asked to make a move that its state does not allow; nothing changed."""


class InvariantError(KVStoreError):
    """`check_invariants` found state that contradicts itself: a bug in kvstore."""


class ClosedError(KVStoreError):
    """A verb was called on a store, lease or reservation that is already closed."""


class FallenBehindError(KVStoreError):
    """Events that a reader asks for are no longer kept: it needs a snapshot to go on."""


class TierError(KVStoreError):
    """A tier failed as a whole; the store goes on without it and counts the reason."""


class TierFullError(TierError):
    """A tier has no room for what it was to remember; all else in it goes on."""


class CodecError(TierError):
    """Stored bytes are not an encoding of their block, or no codec has that name."""


class FrameError(TierError):
    """A record or a frame is truncated, damaged, or of a format that this version does not know."""


class WireError(KVStoreError):
    """What came over a connection is no message of the protocol, or breaks a bound of it."""


class RightsError(InputError):
    """The token given is unknown, or its tenant may not do this."""


class ConnectionLostError(KVStoreError):
    """The daemon cannot be reached, does not answer, or has gone."""
