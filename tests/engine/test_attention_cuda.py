"""The decoder on CUDA's attention, whose kernels run in the emulator where there is no device."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kvstore.engine.attention import HostAttention
from kvstore.engine.attention_cuda import CudaAttention
from kvstore.engine.batch import Batch, SequenceSpan
from kvstore.engine.calibration import quantised
from kvstore.engine.decode_steps import Capture, DecodeSteps, GraphCapture, as_it_is
from kvstore.engine.device_cuda import CudaDevice
from kvstore.engine.engine import Engine
from kvstore.engine.forward import Forward
from kvstore.engine.loading import LoadedModel, load
from kvstore.engine.naming import namespace_of
from kvstore.engine.sampling import SamplingParams
from kvstore.kernels import reference
from kvstore.kernels.cuda_module import CudaRuntime, Runtime
from kvstore.kernels.pinned_memory import PinnedMemory
from kvstore.kernels.quantise import LARGEST, quantise
from kvstore.store import BlockStore
from kvstore.tiers.hbm import TORCH_DTYPE
from kvstore.tiers.hbm_cuda import CudaStream
from kvstore.tiers.ram import RamTier
from tests.engine.tiny import tiny_model
from tests.kernels.emulator import EmulatedRuntime
from tests.tiers.emulated_copies import Later, at_once, emulated_copies

BLOCK_TOKENS = 16
PROMPTS = [[i * 7 % 256 for i in range(50)], [200, 3, 17], [i * 31 % 256 for i in range(71)]]
ANSWER = SamplingParams(max_tokens=20, ignore_eos=True)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def runtime(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Runtime:
    if request.param == "cuda":
        return CudaRuntime()
    if shutil.which("g++") is None:
        pytest.skip("kernels are emulated with g++, which is not there")
    assert pytestconfig.cache is not None
    return EmulatedRuntime(Path(pytestconfig.cache.mkdir("emulator")))


# Weights with which no token of these answers is a close call, by KV dtype: products of other
# sizes, as there are when blocks are loaded, may be rounded otherwise on a device.
CLEAR = {"auto": 1159, "fp8": 1287, "int8": 663}


@pytest.fixture
def model(tmp_path: Path, runtime: Runtime) -> LoadedModel:
    """Two layers of heads that the kernels know, in bfloat16."""
    return model_of(0, tmp_path, runtime)


def model_of(seed: int, folder: Path, runtime: Runtime) -> LoadedModel:
    path = tiny_model(folder / f"wide-{seed}", seed, head_dim=64, num_attention_heads=4)
    return load(path, torch.bfloat16, torch.device(runtime.device_type))


@contextmanager
def engine_of(
    model: LoadedModel,
    runtime: Runtime,
    store: BlockStore | None = None,
    *,
    steps: bool = True,
    blocks: int = 64,
    kv_dtype: str = "auto",
) -> Iterator[Engine]:
    """An engine whose decoder attends with the kernels, in steps of fixed sizes or not."""
    nbytes = blocks * 2 * 2 * 2 * BLOCK_TOKENS * 64 * (2 if kv_dtype == "auto" else 1)
    with Engine(
        model,
        store=store,
        hbm_bytes=nbytes,
        block_tokens=BLOCK_TOKENS,
        max_batch=4,
        prefill_chunk_tokens=32,
        kv_dtype=kv_dtype,
    ) as engine:
        hbm, decoder = engine._loop.hbm, model.decoder
        kept = quantised(model, kv_dtype)
        attention = CudaAttention(
            model.config, decoder.device, 4, runtime, None if kept is None else kept.scales
        )
        capture: Capture = as_it_is
        if decoder.device.type == "cuda":
            capture = GraphCapture(decoder.device)
        else:
            hbm.copies = emulated_copies(hbm.kv, hbm.layout, runtime)
        made = DecodeSteps(
            decoder, hbm.kv, attention, capture, max_batch=4, block_tokens=BLOCK_TOKENS
        )
        engine._loop._forward = Forward(decoder, hbm, attention, made if steps else None)
        yield engine
        engine.check_invariants()


def answers(engine: Engine) -> list[Sequence[int]]:
    return [output.token_ids for output in engine.generate(PROMPTS, ANSWER)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_rows_of_every_kind_attend_to_what_they_should(
    model: LoadedModel, runtime: Runtime, dtype: torch.dtype
) -> None:
    """Decoded tokens and chunks, from blocks in a run and from blocks all over the place."""
    device, generator = model.decoder.device, torch.Generator().manual_seed(1)
    values = torch.randn((2, 2, 2, 20 * BLOCK_TOKENS, 64), generator=generator)
    scales = None
    if dtype == torch.bfloat16:
        kv = values.bfloat16()
        wide = kv.double()
    else:
        scales = (torch.rand((2, 2, 2), generator=generator) + 1) * 2 / LARGEST[dtype]
        kv = quantise(values, scales[..., None, None], dtype)
        wide = kv.double() * scales[..., None, None]
        scales = scales.to(device)
    kv = kv.to(device)
    spans = [
        SequenceSpan(1, 40, [3, 9, 1]),
        SequenceSpan(20, 30, [5, 2, 12, 8]),
        SequenceSpan(1, 0, [15]),
        SequenceSpan(17, 15, [16, 17]),
        SequenceSpan(9, 0, [0]),
    ]
    rows = sum(span.query_tokens for span in spans)
    query = torch.randn((rows + 3, 4 * 64), generator=generator).to(device)
    attention = CudaAttention(model.config, device, 4, runtime, scales)
    attend = attention.of_spans(spans, kv, BLOCK_TOKENS)
    for layer in range(2):
        out = attend(query, layer)
        right = reference.paged_attention(
            query[:rows].view(rows, 4, 64).cpu(), wide, layer, spans, BLOCK_TOKENS
        )
        error = (out[:rows].view(rows, 4, 64).cpu() - right).norm() / right.norm()
        assert error < 4e-3  # chunks come back in bfloat16 or float16
        assert not out[rows:].any()


_may_choose_cudnn: Callable[[], bool] = torch.backends.cuda.cudnn_sdp_enabled  # which has no types


class Backends(TorchFunctionMode):
    """Notes whether torch may choose cuDNN where it computes attention."""

    def __init__(self) -> None:
        super().__init__()
        self.cudnn: list[bool] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            self.cudnn.append(_may_choose_cudnn())
        return func(*args, **(kwargs or {}))


def test_no_length_of_a_prompt_is_planned_for(model: LoadedModel, runtime: Runtime) -> None:
    kv = torch.zeros((2, 2, 2, 4 * BLOCK_TOKENS, 64)).to(model.decoder.device, torch.bfloat16)
    attention = CudaAttention(model.config, kv.device, 4, runtime)
    query = torch.randn((17, 4 * 64)).to(kv.device)
    with Backends() as seen:
        for before in (0, 16):
            span = SequenceSpan(17, before, [0, 1, 2])
            attention.of_spans([span], kv, BLOCK_TOKENS)(query, 0)
    assert seen.cudnn
    assert not any(seen.cudnn)
    assert _may_choose_cudnn()


def test_where_the_kernels_have_no_room_all_is_gathered(
    model: LoadedModel, runtime: Runtime
) -> None:
    vars(runtime)["block_shared_bytes"] = 10_000
    kv = torch.randn((2, 2, 2, 20 * BLOCK_TOKENS, 64)).to(model.decoder.device, torch.bfloat16)
    attention = CudaAttention(model.config, kv.device, 4, runtime)
    assert not attention.can_read_pages(kv.dtype, BLOCK_TOKENS)
    spans = [SequenceSpan(1, 40, [3, 9, 1]), SequenceSpan(1, 0, [15])]
    query = torch.randn((2, 4 * 64)).to(kv.device)
    out = attention.of_spans(spans, kv, BLOCK_TOKENS)(query, 1).view(2, 4, 64).cpu()
    right = reference.paged_attention(
        query.view(2, 4, 64).cpu(), kv.cpu().double(), 1, spans, BLOCK_TOKENS
    )
    assert (out - right).norm() < 4e-3 * right.norm()


@pytest.mark.parametrize("max_batch", [1, 4, 5, 8])
@pytest.mark.parametrize("chunk_tokens", [1, 40])
def test_the_largest_step_fits_into_the_workspace(
    model: LoadedModel, runtime: Runtime, max_batch: int, chunk_tokens: int
) -> None:
    """The step by which an engine measures how much memory it needs beside its KV."""
    device = CudaDevice(model.decoder, max_batch, runtime=runtime)
    layout = namespace_of(model, torch.bfloat16, block_tokens=BLOCK_TOKENS).layout
    kv = device.compute_largest_step(layout, chunk_tokens)
    written = kv.float().abs().sum((0, 1, 2, 4)).nonzero()[:, 0].tolist()
    decoded = range(kv.shape[3] - (max_batch - 1) * BLOCK_TOKENS, kv.shape[3], BLOCK_TOKENS)
    assert written == [*range(chunk_tokens), *decoded]


def test_steps_and_batches_give_the_same_tokens(model: LoadedModel, runtime: Runtime) -> None:
    with engine_of(model, runtime, steps=False) as engine:
        right = answers(engine)
    with engine_of(model, runtime) as engine:
        assert answers(engine) == right


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8", "int8"])
def test_the_kernels_give_the_logits_of_plain_attention(
    model: LoadedModel, runtime: Runtime, kv_dtype: str
) -> None:
    """A prompt in two chunks, then tokens one by one; the KV is written by both, too."""
    decoder, c, kept = model.decoder, model.config, quantised(model, kv_dtype)
    scales, dtype, error = None, torch.bfloat16, 0.02
    if kept is not None:  # what differs by a bit may be rounded to another number of one byte
        scales, dtype, error = kept.scales, TORCH_DTYPE[kept.dtype], 0.06
    host = HostAttention(c, decoder.device, scales)
    attention = CudaAttention(c, decoder.device, 4, runtime, scales)
    shape = (c.kv_heads, c.layers, 2, 8 * BLOCK_TOKENS, c.head_dim)
    plain = torch.zeros(shape, dtype=dtype, device=decoder.device)
    paged = torch.zeros_like(plain)
    tokens, table, done = [i * 7 % 256 for i in range(60)], [4, 1, 2, 6], 0
    for count in (30, 25, 1, 1, 1):
        span = SequenceSpan(count, done, table)
        batch = Batch.build(
            [span],
            [tokens[done : done + count]],
            block_tokens=BLOCK_TOKENS,
            device=decoder.device,
        )
        right = decoder.forward(batch, plain, attention=host)
        got = decoder.forward(batch, paged, attention=attention)
        assert (got - right).norm() < error * right.norm()
        done += count
    assert (paged.float() - plain.float()).norm() < error * plain.float().norm()
    assert not paged.float()[:, :, :, :BLOCK_TOKENS].any()


@pytest.mark.parametrize(
    ("blocks", "kv_dtype"), [(8, "auto"), (64, "auto"), (8, "fp8"), (8, "int8")]
)
def test_offload_changes_no_token(
    tmp_path: Path, runtime: Runtime, blocks: int, kv_dtype: str
) -> None:
    model = model_of(CLEAR[kv_dtype], tmp_path, runtime)
    with engine_of(model, runtime, kv_dtype=kv_dtype) as engine:
        right = answers(engine)
    with (
        BlockStore(RamTier(4 << 20)) as store,
        engine_of(model, runtime, store, blocks=blocks, kv_dtype=kv_dtype) as engine,
    ):
        for _ in range(2):
            assert answers(engine) == right
            engine.clear_hbm()
        counters = engine.stats().counters
        assert counters["loaded_blocks"] > 0
        assert "store_errors" not in counters


@pytest.mark.parametrize("blocks", [8, 64])
def test_memory_that_cannot_be_pinned_changes_no_token(
    tmp_path: Path, runtime: Runtime, blocks: int
) -> None:
    """Copies are over when someone waits for them, or on a device when it is through."""
    model = model_of(CLEAR["auto"], tmp_path, runtime)
    refusing = PinnedMemory(lambda start, nbytes, device: 2, aside=at_once)
    with engine_of(model, runtime) as engine:
        right = answers(engine)
    with (
        BlockStore(RamTier(4 << 20)) as store,
        engine_of(model, runtime, store, blocks=blocks) as engine,
    ):
        hbm = engine._loop.hbm
        is_cuda = hbm.kv.device.type == "cuda"
        stream = partial(CudaStream, hbm.kv.device) if is_cuda else Later
        hbm.copies = emulated_copies(hbm.kv, hbm.layout, runtime, refusing, stream)
        for _ in range(2):
            assert answers(engine) == right
            engine.clear_hbm()
        counters = engine.stats().counters
        assert counters["loaded_blocks"] > 0
        assert "store_errors" not in counters
