from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_RAM: _ClassVar[Tier]
    TIER_NVME: _ClassVar[Tier]
    TIER_REMOTE: _ClassVar[Tier]

class Miss(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISS_UNSPECIFIED: _ClassVar[Miss]
    MISS_ABSENT: _ClassVar[Miss]
    MISS_EVICTED: _ClassVar[Miss]
    MISS_IDENTITY: _ClassVar[Miss]
    MISS_CHECKSUM: _ClassVar[Miss]
    MISS_DEADLINE: _ClassVar[Miss]
    MISS_BREAKER: _ClassVar[Miss]
    MISS_TOO_SLOW: _ClassVar[Miss]
TIER_UNSPECIFIED: Tier
TIER_RAM: Tier
TIER_NVME: Tier
TIER_REMOTE: Tier
MISS_UNSPECIFIED: Miss
MISS_ABSENT: Miss
MISS_EVICTED: Miss
MISS_IDENTITY: Miss
MISS_CHECKSUM: Miss
MISS_DEADLINE: Miss
MISS_BREAKER: Miss
MISS_TOO_SLOW: Miss

class Namespace(_message.Message):
    __slots__ = ("model", "weights", "tokenizer", "kv_dtype", "layers", "kv_heads", "head_dim", "block_tokens", "rope", "kv_quantisation", "adapter", "salt", "layout_version", "hash_algorithm")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    KV_QUANTISATION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    HASH_ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    model: str
    weights: str
    tokenizer: str
    kv_dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    rope: str
    kv_quantisation: str
    adapter: str
    salt: str
    layout_version: int
    hash_algorithm: str
    def __init__(self, model: _Optional[str] = ..., weights: _Optional[str] = ..., tokenizer: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_tokens: _Optional[int] = ..., rope: _Optional[str] = ..., kv_quantisation: _Optional[str] = ..., adapter: _Optional[str] = ..., salt: _Optional[str] = ..., layout_version: _Optional[int] = ..., hash_algorithm: _Optional[str] = ...) -> None: ...

class Chain(_message.Message):
    __slots__ = ("namespace", "parent", "keys")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    parent: bytes
    keys: bytes
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., parent: _Optional[bytes] = ..., keys: _Optional[bytes] = ...) -> None: ...

class Retention(_message.Message):
    __slots__ = ("priority", "ttl_s")
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    priority: int
    ttl_s: float
    def __init__(self, priority: _Optional[int] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("chain",)
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    chain: Chain
    def __init__(self, chain: _Optional[_Union[Chain, _Mapping]] = ...) -> None: ...

class ProbeReply(_message.Message):
    __slots__ = ("tiers", "prefix_blocks")
    TIERS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedScalarFieldContainer[Tier]
    prefix_blocks: int
    def __init__(self, tiers: _Optional[_Iterable[_Union[Tier, str]]] = ..., prefix_blocks: _Optional[int] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("chain", "deadline_s")
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    chain: Chain
    deadline_s: float
    def __init__(self, chain: _Optional[_Union[Chain, _Mapping]] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class GetReply(_message.Message):
    __slots__ = ("begun", "piece", "ended")
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    begun: GetBegun
    piece: Piece
    ended: GetEnded
    def __init__(self, begun: _Optional[_Union[GetBegun, _Mapping]] = ..., piece: _Optional[_Union[Piece, _Mapping]] = ..., ended: _Optional[_Union[GetEnded, _Mapping]] = ...) -> None: ...

class GetBegun(_message.Message):
    __slots__ = ("blocks", "block_bytes")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    block_bytes: int
    def __init__(self, blocks: _Optional[int] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("block", "offset", "source", "data")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    block: int
    offset: int
    source: Tier
    data: bytes
    def __init__(self, block: _Optional[int] = ..., offset: _Optional[int] = ..., source: _Optional[_Union[Tier, str]] = ..., data: _Optional[bytes] = ...) -> None: ...

class GetEnded(_message.Message):
    __slots__ = ("blocks", "miss")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    miss: Miss
    def __init__(self, blocks: _Optional[int] = ..., miss: _Optional[_Union[Miss, str]] = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("begin", "data")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    begin: PutBegin
    data: bytes
    def __init__(self, begin: _Optional[_Union[PutBegin, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutBegin(_message.Message):
    __slots__ = ("chain", "retention")
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    chain: Chain
    retention: Retention
    def __init__(self, chain: _Optional[_Union[Chain, _Mapping]] = ..., retention: _Optional[_Union[Retention, _Mapping]] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ("wanted", "committed")
    WANTED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    wanted: PutWanted
    committed: PutCommitted
    def __init__(self, wanted: _Optional[_Union[PutWanted, _Mapping]] = ..., committed: _Optional[_Union[PutCommitted, _Mapping]] = ...) -> None: ...

class PutWanted(_message.Message):
    __slots__ = ("blocks", "block_bytes")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedScalarFieldContainer[int]
    block_bytes: int
    def __init__(self, blocks: _Optional[_Iterable[int]] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class PutCommitted(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("chain",)
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    chain: Chain
    def __init__(self, chain: _Optional[_Union[Chain, _Mapping]] = ...) -> None: ...

class PrefetchReply(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class RetainRequest(_message.Message):
    __slots__ = ("chain", "retention")
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    chain: Chain
    retention: Retention
    def __init__(self, chain: _Optional[_Union[Chain, _Mapping]] = ..., retention: _Optional[_Union[Retention, _Mapping]] = ...) -> None: ...

class RetainReply(_message.Message):
    __slots__ = ("accepted", "clipped", "refused", "absent", "priority", "ttl_s")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    CLIPPED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    accepted: int
    clipped: int
    refused: int
    absent: int
    priority: int
    ttl_s: float
    def __init__(self, accepted: _Optional[int] = ..., clipped: _Optional[int] = ..., refused: _Optional[int] = ..., absent: _Optional[int] = ..., priority: _Optional[int] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("chain",)
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    chain: Chain
    def __init__(self, chain: _Optional[_Union[Chain, _Mapping]] = ...) -> None: ...

class EvictReply(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("chain",)
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    chain: Chain
    def __init__(self, chain: _Optional[_Union[Chain, _Mapping]] = ...) -> None: ...

class ExplainReply(_message.Message):
    __slots__ = ("blocks", "present", "breaks_at", "miss", "namespace_known", "nearest", "differences")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    BREAKS_AT_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_KNOWN_FIELD_NUMBER: _ClassVar[int]
    NEAREST_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    present: int
    breaks_at: int
    miss: Miss
    namespace_known: bool
    nearest: str
    differences: _containers.RepeatedCompositeFieldContainer[Difference]
    def __init__(self, blocks: _Optional[int] = ..., present: _Optional[int] = ..., breaks_at: _Optional[int] = ..., miss: _Optional[_Union[Miss, str]] = ..., namespace_known: _Optional[bool] = ..., nearest: _Optional[str] = ..., differences: _Optional[_Iterable[_Union[Difference, _Mapping]]] = ...) -> None: ...

class Difference(_message.Message):
    __slots__ = ("field", "asked", "stored")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    field: str
    asked: str
    stored: str
    def __init__(self, field: _Optional[str] = ..., asked: _Optional[str] = ..., stored: _Optional[str] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("ram", "nvme", "hits", "misses", "counters", "queues")
    class RamEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class NvmeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class HitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class MissesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class QueuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    RAM_FIELD_NUMBER: _ClassVar[int]
    NVME_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    QUEUES_FIELD_NUMBER: _ClassVar[int]
    ram: _containers.ScalarMap[str, int]
    nvme: _containers.ScalarMap[str, int]
    hits: _containers.ScalarMap[str, int]
    misses: _containers.ScalarMap[str, int]
    counters: _containers.ScalarMap[str, int]
    queues: _containers.ScalarMap[str, int]
    def __init__(self, ram: _Optional[_Mapping[str, int]] = ..., nvme: _Optional[_Mapping[str, int]] = ..., hits: _Optional[_Mapping[str, int]] = ..., misses: _Optional[_Mapping[str, int]] = ..., counters: _Optional[_Mapping[str, int]] = ..., queues: _Optional[_Mapping[str, int]] = ...) -> None: ...
