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
    rounded_up,
)
from kvstore.engine.loading import LoadedModel, load
from kvstore.engine.naming import name_prompt, namespace_of
from kvstore.errors import SettingsError
from kvstore.kernels.quantise import LARGEST
from kvstore.tiers.hbm import TORCH_DTYPE
from tests.engine.tiny import tiny_model


@pytest.mark.parametrize("dtype", ["float8_e4m3", "int8"])
def test_what_a_model_computes_is_within_the_range(tiny: LoadedModel, dtype: str) -> None:
    """K and V of the beginning of the text, and K of the same tokens at other positions."""
    limit = LARGEST[TORCH_DTYPE[dtype]] / MARGIN[dtype]
    ranges = calibrate(tiny, dtype).scales * limit
    tokens = tiny.tokenizer.encode(TEXT)[:80]
    part = kv_of(tiny, tokens).abs().amax((-1, -2)) / ranges
    assert part.max() <= 1
    assert part.median() > 0.4
    # Only of the first layer: there K of a token does not depend on those before.
    turned = kv_of(tiny, tokens, first=700)[:, 0, 0].abs().amax((-1, -2)) / ranges[:, 0, 0]
    assert turned.max() <= 1


def kv_of(model: LoadedModel, tokens: list[int], first: int = 0) -> torch.Tensor:
    """K and V of `tokens` behind `first` others, which are zeros."""
    c, count = model.config, len(tokens)
    kv = torch.zeros(c.kv_heads, c.layers, 2, first + count, c.head_dim)
    span = SequenceSpan(count, first, range(first + count))
    model.decoder.forward(Batch.build([span], [tokens], block_tokens=1), kv)
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
