from kvstore.proto import store_pb2 as _store_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Position(_message.Message):
    __slots__ = ("epoch", "id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    id: int
    def __init__(self, epoch: _Optional[int] = ..., id: _Optional[int] = ...) -> None: ...

class SubscribeRequest(_message.Message):
    __slots__ = ("namespaces", "after")
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[_store_pb2.Namespace]
    after: Position
    def __init__(self, namespaces: _Optional[_Iterable[_Union[_store_pb2.Namespace, _Mapping]]] = ..., after: _Optional[_Union[Position, _Mapping]] = ...) -> None: ...

class SubscribeReply(_message.Message):
    __slots__ = ("position", "held", "complete", "stored", "removed", "cleared")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    position: Position
    held: Blocks
    complete: Complete
    stored: Blocks
    removed: Blocks
    cleared: Cleared
    def __init__(self, position: _Optional[_Union[Position, _Mapping]] = ..., held: _Optional[_Union[Blocks, _Mapping]] = ..., complete: _Optional[_Union[Complete, _Mapping]] = ..., stored: _Optional[_Union[Blocks, _Mapping]] = ..., removed: _Optional[_Union[Blocks, _Mapping]] = ..., cleared: _Optional[_Union[Cleared, _Mapping]] = ...) -> None: ...

class Blocks(_message.Message):
    __slots__ = ("tier", "fingerprint", "keys", "parents")
    TIER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    tier: _store_pb2.Tier
    fingerprint: bytes
    keys: bytes
    parents: bytes
    def __init__(self, tier: _Optional[_Union[_store_pb2.Tier, str]] = ..., fingerprint: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., parents: _Optional[bytes] = ...) -> None: ...

class Complete(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Cleared(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NameRequest(_message.Message):
    __slots__ = ("chain",)
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    chain: _store_pb2.Chain
    def __init__(self, chain: _Optional[_Union[_store_pb2.Chain, _Mapping]] = ...) -> None: ...

class NameReply(_message.Message):
    __slots__ = ("fingerprint", "parent", "keys")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    parent: bytes
    keys: bytes
    def __init__(self, fingerprint: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., keys: _Optional[bytes] = ...) -> None: ...
