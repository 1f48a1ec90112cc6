"""The fused CUDA kernels over bands, against the plain reference in fp64."""

import pytest
import torch

from lctrain.kernels.attention import fused, reference
from lctrain.kernels.attention.band import Band

BANDS = {
    "full": Band(0, 300, 0, 300),
    "causal": Band(0, 300, 0, 300, None, 0),
    "causal, keys before": Band(0, 300, 0, 300, None, 120),
    "rows below the diagonal": Band(40, 300, 0, 180, None, 0),
    "window": Band(0, 300, 0, 300, -31, 0),
    "corner of a window": Band(100, 300, 0, 200, -150, 0),
}


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bands_match_the_reference(band, heads, dtype):
    torch.manual_seed(0)
    band = band.trim()
    n, kv = heads
    exact = [torch.randn(2, 300, h, 64, dtype=torch.float64, device="cuda") for h in (n, kv, kv, n)]
    q, k, v, dout = (x.to(dtype) for x in exact)
    live = torch.zeros(300, 300, dtype=torch.bool, device="cuda")
    live[band.q0 : band.q1, band.k0 : band.k1] = band.live("cuda")
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = reference.attention(*leaves, live)
    want.backward(dout.double())

    part, part_lse, rows = fused.forward(q, k, v, band, 0.125)
    out, lse = torch.zeros_like(want), torch.full_like(want_lse, float("-inf"))
    out[:, rows], lse[:, :, rows] = part.double(), part_lse.double()
    into = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    fused.backward_(dout, q, k, v, out.to(dtype), lse.float(), band, 0.125, into)

    bar = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out[:, rows], want[:, rows], rtol=bar, atol=bar)
    torch.testing.assert_close(lse[:, :, rows], want_lse[:, :, rows], rtol=bar, atol=bar)
    for got, leaf in zip(into, leaves, strict=True):
        assert (got.double() - leaf.grad).norm() <= bar * leaf.grad.norm()
