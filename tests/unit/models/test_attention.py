"""The attention mixers on one process, against the plain reference and against themselves document by document."""

import itertools

import pytest
import torch
from torch import Tensor

from lctrain.kernels.attention import reference
from lctrain.models.attention import Attention, KeyValueCache
from lctrain.models.rope import rotation
from lctrain.parallel.mask import AttentionMask

DOCUMENTS = ((0, 5, 6, 20), (0, 13))
LENGTH = 20


def make(model_config, windowed: bool = False, **attention: object) -> Attention:
    torch.manual_seed(0)
    mixer = Attention(model_config("W" if windowed else "*", attention=attention), windowed).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return mixer


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def by_hand(mixer: Attention, x: Tensor, positions: Tensor, mask: AttentionMask) -> Tensor:
    """What forward should give, from the textbook."""
    q, k, v = (
        torch.nn.functional.linear(x, module.weight, module.bias).unflatten(-1, (-1, mixer.head_dim))
        for module in (mixer.q, mixer.k, mixer.v)
    )
    if mixer.q_norm is not None:
        q, k = (
            t / torch.sqrt(t.square().mean(-1, keepdim=True) + 1e-5) * norm.weight
            for t, norm in ((q, mixer.q_norm), (k, mixer.k_norm))
        )
    cos, sin = (t.double() for t in rotation(mixer.rope, mixer.head_dim, positions))
    out, lse = reference.attention(turn(q, cos, sin), turn(k, cos, sin), v, mask.live(x.shape[1]))
    if mixer.sinks is not None:  # one more key with this score and the value 0
        out = out * torch.sigmoid(lse - mixer.sinks[:, None]).transpose(1, 2).unsqueeze(-1)
    return torch.nn.functional.linear(out.flatten(2), mixer.out.weight, mixer.out.bias)


SETTINGS = {
    "grouped": {},
    "one key head": {"n_kv_heads": 1},
    "as many key heads": {"n_kv_heads": 4},
    "qk_norm": {"qk_norm": True},
    "bias": {"bias": True, "out_bias": True},
    "wide heads": {"head_dim": 12},
    "sinks": {"sinks": True},
}


@pytest.mark.parametrize("windowed", [False, True], ids=["full", "window"])
@pytest.mark.parametrize("name", SETTINGS)
def test_forward_and_gradients(model_config, make_seq, name: str, windowed: bool) -> None:
    mixer = make(model_config, windowed, **SETTINGS[name])
    seq = make_seq(DOCUMENTS, LENGTH)
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64, requires_grad=True)
    y = mixer(x, seq)
    dy = torch.randn_like(y)
    y.backward(dy)
    grads = [x.grad.clone(), *(p.grad.clone() for p in mixer.parameters())]
    x.grad = None
    mixer.zero_grad()
    want = by_hand(mixer, x, seq.positions, AttentionMask(DOCUMENTS, window=6 if windowed else None))
    want.backward(dy)
    torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-12)
    for got, leaf in zip(grads, (x, *mixer.parameters()), strict=True):
        torch.testing.assert_close(got, leaf.grad, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("windowed", [False, True], ids=["full", "window"])
def test_packed_documents_are_documents_run_alone(model_config, make_seq, windowed: bool) -> None:
    mixer = make(model_config, windowed, qk_norm=True)
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64)
    packed = mixer(x, make_seq(DOCUMENTS, LENGTH))
    for row, borders in enumerate(DOCUMENTS):
        for start, end in itertools.pairwise(borders):
            alone = mixer(x[row : row + 1, start:end], make_seq([(0, end - start)]))
            torch.testing.assert_close(packed[row : row + 1, start:end], alone, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("windowed", [False, True], ids=["full", "window"])
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("pieces", [(17,), (1,) * 17, (5, 1, 1, 7, 3)], ids=["at once", "one by one", "in pieces"])
def test_decoding_equals_forward(model_config, make_seq, windowed: bool, pieces: tuple[int, ...], sinks: bool) -> None:
    mixer = make(model_config, windowed, qk_norm=True, bias=True, sinks=sinks)
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    whole = mixer(x, make_seq([(0, 17), (0, 17)]))
    state, at = mixer.new_state(), 0
    for size in pieces:
        y = mixer.decode(x[:, at : at + size], state)
        torch.testing.assert_close(y, whole[:, at : at + size], atol=1e-12, rtol=1e-12)
        at += size
    assert state.tokens == 17


def test_cache_grows_without_losing_anything() -> None:
    cache, seen = KeyValueCache(), torch.empty(1, 0, 2, 4)
    for size in (3, 1, 1, 20, 1):
        k = torch.randn(1, size, 2, 4)
        seen = torch.cat([seen, k], dim=1)
        keys, values = cache.append(k, -k)
        assert torch.equal(keys, seen)
        assert torch.equal(values, -seen)


def test_a_window_of_one_sees_only_itself(model_config, make_seq) -> None:
    mixer = make(model_config, windowed=True, window=1)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    alone = mixer.out(mixer.v(x).unflatten(-1, (2, 8)).repeat_interleave(2, dim=2).flatten(2))
    torch.testing.assert_close(mixer(x, make_seq([(0, 9)])), alone, atol=1e-13, rtol=1e-12)
