"""The published formulas against bytes that were counted while the published programs ran."""

from __future__ import annotations

import pytest
import torch

from lctrain.bench.published import published_bytes
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.strategy import Strategy

# 8,192 tokens, 8 heads of 64: strategy, ranks, KV heads, dtype, MiB per rank forward and backward.
COUNTED = [
    (Strategy("ring"), 2, 8, torch.bfloat16, 8, 40),
    (Strategy("ring"), 4, 8, torch.bfloat16, 12, 44),
    (Strategy("ring"), 4, 2, torch.bfloat16, 3, 11),
    (Strategy("ring"), 1, 8, torch.bfloat16, 0, 0),
    (Strategy("all_gather"), 2, 8, torch.float32, 16, 32),
    (Strategy("all_gather"), 4, 2, torch.bfloat16, 3, 6),
    (Strategy("ulysses"), 2, 8, torch.float32, 16, 16),
    (Strategy("ulysses"), 4, 8, torch.float32, 12, 12),
    (Strategy("usp", ulysses=2), 4, 8, torch.bfloat16, 8, 24),
    (Strategy("usp", ulysses=2), 4, 2, torch.bfloat16, 3.5, 7.5),
]


@pytest.mark.parametrize(("strategy", "ranks", "kv_heads", "dtype", "forward", "backward"), COUNTED)
def test_formula_is_what_was_counted(strategy, ranks, kv_heads, dtype, forward, backward):
    layout, shape = SequenceLayout("zigzag", ranks, 8192), AttentionShape(1, 8, kv_heads, 64, dtype)
    found = [published_bytes(strategy, way, layout, shape) for way in ("forward", "backward")]
    assert found == [forward * 2**20, backward * 2**20]


def test_nothing_is_made_up():
    layout, shape = SequenceLayout("zigzag", 2, 64), AttentionShape(1, 2, 2, 8, torch.float32)
    assert published_bytes(Strategy("token_ring"), "backward", layout, shape) is None
