"""Attention through torch's fused operators, against the plain reference."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lctrain.kernels.attention import blocks, fused, reference
from lctrain.kernels.attention.band import Band

SCALE = 0.3
QUERIES, KEYS = 70, 80

BANDS = {
    "full": Band(0, 70, 0, 80),
    "part": Band(10, 60, 20, 30),
    "causal": Band(0, 70, 0, 70, None, 0),
    "causal with earlier keys": Band(0, 70, 0, 80, None, 10),
    "causal, later rows see all": Band(0, 70, 5, 40, None, 5),
    "causal, first rows see nothing": Band(0, 70, 0, 80, None, -20),
    "window": Band(0, 70, 0, 70, -7, 0),
    "window wider than a block": Band(0, 70, 0, 80, -40, 3),
    "window of one": Band(0, 70, 0, 80, 4, 4),
    "far end of a window": Band(0, 70, 0, 80, 30, None),
    "both sides": Band(0, 70, 0, 80, -5, 5),
    "one token": Band(7, 8, 7, 8),
    "one query": Band(69, 70, 0, 80, None, 0),
    "one key": Band(0, 70, 3, 4, None, 0),
}


def inputs(heads: tuple[int, int], dtype: torch.dtype, batch: int = 2, queries: int = QUERIES, keys: int = KEYS):
    torch.manual_seed(0)
    q, dout = (torch.randn(batch, queries, heads[0], 16, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(batch, keys, heads[1], 16, dtype=dtype) for _ in range(2))
    return q, k, v, dout


def live(band: Band, queries: int, keys: int) -> Tensor:
    whole = torch.zeros(queries, keys, dtype=torch.bool)
    whole[band.q0 : band.q1, band.k0 : band.k1] = band.live()
    return whole


def oracle(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor) -> list[Tensor]:
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention(*leaves, mask, SCALE)
    out.backward(dout.double())
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def ours(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, band: Band) -> list[Tensor]:
    """out, lse, dq, dk, dv over all rows; rows outside of the band as the executor would have them."""
    part, part_lse, rows = fused.forward(q, k, v, band, SCALE)
    wide = fused.accumulation_dtype(q.dtype)
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=wide)
    out[:, rows], lse[:, :, rows] = part.to(q.dtype), part_lse
    into = [torch.zeros_like(x, dtype=wide) for x in (q, k, v)]
    fused.backward_(dout, q, k, v, out, lse, band, SCALE, into)
    whole = fused.backward_whole(dout, q, k, v, out, lse, band, SCALE)
    if whole is not None and q.dtype != torch.bfloat16:  # parts of bf16 gradients are computed in fp32, a whole one is not
        for one, added in zip(whole, into, strict=True):
            torch.testing.assert_close(one, added.to(one.dtype))
    return [out, lse, *into]


def compare(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("name", BANDS)
def test_exact_in_fp64(name: str, heads: tuple[int, int]) -> None:
    band = BANDS[name].trim()
    tensors = inputs(heads, torch.float64)
    with patch.object(blocks, "MASKED_ROWS", (16, 32)):
        compare(ours(*tensors, band), oracle(*tensors, live(band, QUERIES, KEYS)), 2e-13)


bounds = st.none() | st.integers(-60, 60)


@given(st.integers(0, 8), st.integers(1, 40), st.integers(0, 8), st.integers(1, 40), bounds, bounds)
@settings(max_examples=60)
def test_any_band(q0: int, rows: int, k0: int, columns: int, lo: int | None, hi: int | None) -> None:
    band = Band(q0, q0 + rows, k0, k0 + columns, lo, hi).trim()
    if band is None:
        return
    tensors = inputs((2, 1), torch.float64, batch=1, queries=48, keys=48)
    with patch.object(blocks, "MASKED_ROWS", (4, 8)):
        compare(ours(*tensors, band), oracle(*tensors, live(band, 48, 48)), 2e-13)


@pytest.mark.parametrize("name", BANDS)
def test_fp32(name: str) -> None:
    band = BANDS[name].trim()
    tensors = inputs((4, 2), torch.float32)
    compare(ours(*tensors, band), oracle(*tensors, live(band, QUERIES, KEYS)), 5e-6)


@pytest.mark.parametrize("name", ["full", "causal", "causal with earlier keys", "window", "window wider than a block"])
def test_bf16_is_as_exact_as_torch(name: str) -> None:
    """Error against fp64 no larger than that of torch's own bf16 attention, however many blocks make a row."""
    band = BANDS[name].trim()
    tensors = inputs((4, 2), torch.bfloat16)
    mask = live(band, QUERIES, KEYS)
    assert mask.any(dim=1).all(), "torch returns no zero for empty rows, so this comparison needs none"
    exact = oracle(*tensors, mask)
    *leaves, dout = (x.clone() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    heads_first = (x.transpose(1, 2) for x in leaves)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        additive = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill_(~mask, float("-inf"))
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, attn_mask=additive, scale=SCALE, enable_gqa=True
        ).transpose(1, 2)
    theirs.backward(dout)
    out, _, *gradients = ours(*tensors, band)
    assert out.dtype == torch.bfloat16
    pairs = zip((out, *gradients), (theirs, *(x.grad for x in leaves)), (exact[0], *exact[2:]), strict=True)
    for name_, (a, b, want) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
        mine, torchs = (float((x.detach().double() - want).norm() / want.norm()) for x in (a, b))
        assert mine <= 1.1 * torchs, f"{name_}: error {mine:.2e}, torch's own {torchs:.2e}"


def test_parts_of_the_keys_add_up() -> None:
    """Backward with the rows' global out and log-sum-exp: gradients of two halves of the keys add up to the whole."""
    q, k, v, dout = inputs((4, 2), torch.float64)
    exact = oracle(q, k, v, dout, torch.ones(QUERIES, KEYS, dtype=torch.bool))
    into = [torch.zeros_like(x) for x in (q, k, v)]
    for part in (Band(0, QUERIES, 0, 33), Band(0, QUERIES, 33, KEYS)):
        fused.backward_(dout, q, k, v, exact[0], exact[1], part, SCALE, into)
    compare([*exact[:2], *into], exact, 1e-13)


def test_backward_whole_only_where_one_call_covers_everything() -> None:
    q, k, v, dout = inputs((2, 2), torch.float64, queries=20, keys=20)
    out, lse = reference.attention(q, k, v, torch.ones(20, 20, dtype=torch.bool).tril(), SCALE)
    assert fused.backward_whole(dout, q, k, v, out, lse, Band(0, 20, 0, 20, None, 0), SCALE) is not None
    assert fused.backward_whole(dout, q, k, v, out, lse, Band(0, 20, 0, 19), SCALE) is None
    assert fused.backward_whole(dout, q, k, v, out, lse, Band(1, 20, 0, 20), SCALE) is None
    assert fused.backward_whole(dout, q, k, v, out, lse, Band(0, 20, 0, 20, None, 3), SCALE) is None  # two blocks


def test_accumulation_dtype() -> None:
    assert fused.accumulation_dtype(torch.bfloat16) == torch.float32
    assert fused.accumulation_dtype(torch.float32) == torch.float32
    assert fused.accumulation_dtype(torch.float64) == torch.float64


@pytest.mark.parametrize(
    ("threads", "batch", "sizes"), [(1, 1, [1] * 8), (2, 1, [4, 4]), (3, 1, [6, 2]), (3, 2, [4, 4]), (9, 1, [8])]
)
def test_large_bands_go_in_portions_that_keep_all_threads_busy(threads: int, batch: int, sizes: list[int]) -> None:
    q, k, *_ = inputs((8, 4), torch.bfloat16, batch)
    band = BANDS["full"]
    assert fused.portions(q, k, band) == [(slice(0, 8), slice(0, 4))], "calls on small bands cost more than their work"
    with patch.object(fused, "LARGE", band.entries), patch.object(torch, "get_num_threads", lambda: threads):
        portions = fused.portions(q, k, band)
    assert [q[0, 0, own].shape[0] for own, _ in portions] == sizes
    found = [(head, range(4)[their][i // 2]) for own, their in portions for i, head in enumerate(range(8)[own])]
    assert found == [(head, head // 2) for head in range(8)]
