"""Scales of quantised KV: the same for the same model, and large enough."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvstore.engine.batch import Batch, SequenceSpan
from kvstore.engine.calibration import (
    MARGIN,
    SMALLEST,
    TEXT,
    Quantised,
    calibrate,
    quantised,
    ranges_of,
    rounded_up,
)
from kvstore.engine.loading import LoadedModel, load
from kvstore.engine.naming import name_prompt, namespace_of
from kvstore.engine.rope import Rope
from kvstore.engine.rotary import Rotary, rotate
from kvstore.errors import SettingsError
from kvstore.kernels.quantise import LARGEST
from kvstore.tiers.hbm import TORCH_DTYPE
from tests.engine.tiny import tiny_model


@pytest.mark.parametrize("dtype", ["float8_e4m3", "int8"])
def test_what_a_model_computes_is_within_the_range(tiny: LoadedModel, dtype: str) -> None:
    limit = LARGEST[TORCH_DTYPE[dtype]] / MARGIN[dtype]
    ranges = calibrate(tiny, dtype).scales * limit
    tokens = tiny.tokenizer.encode(TEXT)[:80]
    part = kv_of(tiny, tokens).abs().amax((-1, -2)) / ranges
    assert part.max() <= 1
    assert part.median() > 0.4


def test_ranges_are_those_of_every_position() -> None:
    """K turns with its position: one of 3 and 4 is one of 5 and 0 somewhere else."""
    pairs = torch.zeros(2, 2, 900, 64)
    pairs[1, 0, :, 7], pairs[1, 0, :, 39], pairs[0, 1, 5, 3] = 3.0, -4.0, -9.0
    rotary = Rotary(Rope(10_000.0, 64), torch.device("cpu"))
    cos, sin = rotary.at(torch.arange(900), 900)
    keys = rotate(pairs[:, 0].transpose(0, 1).clone(), cos, sin).transpose(0, 1)
    assert keys.abs().max() > 4.9
    for turned in (pairs[:, 0], keys[:, :1].expand(2, 900, 64)):
        pairs[:, 0] = turned
        assert ranges_of(pairs).tolist() == [[0.0, 9.0], [pytest.approx(5.0), 0.0]]


def kv_of(model: LoadedModel, tokens: list[int]) -> torch.Tensor:
    c, count = model.config, len(tokens)
    kv = torch.zeros(c.kv_heads, c.layers, 2, count, c.head_dim)
    batch = Batch.build([SequenceSpan(count, 0, [0])], [tokens], block_tokens=count)
    model.decoder.forward(batch, kv)
    return kv


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_scales_do_not_depend_on_the_dtype_of_the_arithmetic(tmp_path: Path, family: str) -> None:
    """The same weights, held in bfloat16 and in float32."""
    folder = tiny_model(tmp_path / family, model_type=family)
    weights = load_file(folder / "model.safetensors")
    save_file({name: w.bfloat16() for name, w in weights.items()}, folder / "model.safetensors")
    narrow = calibrate(load(folder, torch.bfloat16), "int8")
    wide = calibrate(load(folder, torch.float32), "int8")
    assert torch.equal(narrow.scales, wide.scales)
    assert narrow.identity(torch.bfloat16) != wide.identity(torch.float32)


def test_the_pass_in_float32_is_the_decoders_own(tiny: LoadedModel) -> None:
    tokens = [i * 7 % 256 for i in range(70)]
    layers = [pairs.clone() for pairs in tiny.decoder.pairs_in_float32(tokens)]
    assert torch.equal(torch.stack(layers, 1), kv_of(tiny, tokens))


def test_rounding_up() -> None:
    values = torch.rand(10_000) * 10 ** torch.linspace(-8, 4, 10_000) + 1e-9
    rounded = rounded_up(values)
    assert (rounded >= values).all()
    assert (rounded < values * 1.25).all()
    assert torch.equal(rounded_up(rounded), rounded)
    assert len(set(torch.frexp(rounded).mantissa.tolist())) == 4
    # What differs in its last bits, as between two machines, is nearly always rounded alike.
    assert (rounded_up(values * (1 + 2e-6)) != rounded).sum() < 5


def test_a_head_that_is_silent_has_a_scale(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "silent")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][:16] = 0
    save_file(weights, folder / "model.safetensors")
    scales = calibrate(load(folder, torch.float32), "int8").scales
    assert scales[0, 1, 1] == SMALLEST
    assert (scales > 2 * SMALLEST).sum() == scales.numel() - 1


def test_names_of_quantised_kv(tiny: LoadedModel, tiny_path: Path) -> None:
    plain = namespace_of(tiny, torch.float32, block_tokens=16)
    names = {
        kv_dtype: namespace_of(tiny, torch.float32, block_tokens=16, kept=quantised(tiny, kv_dtype))
        for kv_dtype in ("auto", "fp8", "int8")
    }
    assert names["auto"] == plain
    assert [name.kv_dtype for name in names.values()] == ["float32", "float8_e4m3", "int8"]
    assert [name.layout.block_bytes for name in names.values()] == [8192, 2048, 2048]
    assert len({name.kv_quantisation for name in names.values()}) == 3
    named = name_prompt(tiny_path, [1, 2], dtype="float32", block_tokens=16, kv_dtype="int8")
    assert named.chain.namespace == names["int8"]


def test_one_other_scale_is_another_name(tiny: LoadedModel) -> None:
    kept = calibrate(tiny, "int8")
    scales = kept.scales.clone()
    scales[1, 1, 0] *= 1.25
    assert Quantised("int8", scales).identity(torch.float32) != kept.identity(torch.float32)


def test_a_kv_dtype_that_is_none(tiny: LoadedModel) -> None:
    with pytest.raises(SettingsError, match="kv_dtype 'fp4' is not one of auto, fp8, int8"):
        quantised(tiny, "fp4")
