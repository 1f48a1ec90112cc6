"""Networks on routed rows, block by block, against a formula: outputs and all gradients."""

import pytest
import torch

from lctrain.kernels.routed_mlp import blocked, reference

COUNTS = {
    "even": [6, 6, 6],
    "empty networks": [0, 9, 0, 0, 4],
    "one row": [0, 1],
    "first and last empty": [0, 7, 0],
    "no rows": [0, 0],
    "several blocks": [3, 37, 8, 9, 16],
}
EXACT = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 4e-2}
TOKENS, D_MODEL, D_FF = 40, 6, 5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK", 8)


def leaves(counts: list[int], gated: bool, routed: bool, dtype: torch.dtype) -> tuple:
    """x, gate, up, down, weights, which are leaves or None; ends, tokens."""
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(TOKENS if routed else sum(counts) + 2, D_MODEL, dtype=dtype)
    gate, up = (torch.randn(len(counts), D_FF, D_MODEL, dtype=wide) for _ in range(2))
    down = torch.randn(len(counts), D_MODEL, D_FF, dtype=wide)
    weights = torch.rand(sum(counts), dtype=wide) if routed else None
    tokens = torch.cat([torch.randperm(TOKENS)[:count].sort().values for count in counts]) if routed else None
    tensors = [x, gate if gated else None, up, down, weights]
    return *(None if t is None else t.requires_grad_() for t in tensors), torch.tensor(counts).cumsum(0).int(), tokens


def run(form, activation: str, x, gate, up, down, weights, ends, tokens):
    return form.routed_mlp(x, ends, gate, up, down, activation, tokens, weights)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_against_the_formula(counts: list[int], activation: str, routed: bool, dtype: torch.dtype) -> None:
    *ours, ends, tokens = leaves(counts, activation == "swiglu", routed, dtype)
    exact = [None if t is None else t.detach().to(dtype if t.ndim > 1 else t.dtype).double().requires_grad_() for t in ours]
    y, plain = run(blocked, activation, *ours, ends, tokens), run(reference, activation, *exact, ends, tokens)
    assert y.dtype == dtype
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [t for t in ours if t is not None], dy)
    wanted = torch.autograd.grad(plain, [t for t in exact if t is not None], dy.double(), materialize_grads=True)
    for mine, theirs in zip([y, *found], [plain.detach(), *wanted], strict=True):
        assert mine.shape == theirs.shape
        assert float((mine.detach().double() - theirs).norm()) <= EXACT[dtype] * float(theirs.norm())


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
def test_gradcheck(activation: str, routed: bool) -> None:
    *tensors, ends, tokens = leaves([3, 0, 10], activation == "swiglu", routed, torch.float64)
    wanted = [t for t in tensors if t is not None]

    def form(*args):
        given = iter(args)
        return run(blocked, activation, *(None if t is None else next(given) for t in tensors), ends, tokens)

    torch.autograd.gradcheck(form, wanted)


def test_frozen_inputs_and_a_gradient_without_strides() -> None:
    x, gate, up, down, weights, ends, tokens = leaves([4, 4], True, True, torch.float64)
    exact = [t.detach().requires_grad_() for t in (x, gate, up, down, weights)]
    run(reference, "swiglu", *exact, ends, tokens).sum().backward()
    x.requires_grad_(False)
    run(blocked, "swiglu", x, gate, up, down, weights, ends, tokens).sum().backward()
    assert torch.allclose(up.grad, exact[2].grad)
    assert torch.allclose(weights.grad, exact[4].grad)


def test_incoming_gradients_and_inputs_stay_as_they_are() -> None:
    """Blocks are views where rows are not gathered, and backward works in place."""
    x, gate, up, down, _, ends, _ = leaves([20, 4], True, False, torch.float64)
    dy, before = torch.randn(len(x), D_MODEL, dtype=torch.float64), x.detach().clone()
    given = dy.clone()
    run(blocked, "swiglu", x, gate, up, down, None, ends, None).backward(dy)
    assert torch.equal(dy, given)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [8, 64])
def test_a_row_does_not_depend_on_how_many_others_there_are(block: int, dtype: torch.dtype, monkeypatch) -> None:
    """To the last bit, on one thread, forward and backward: a token must not tell how many others go to its expert."""
    monkeypatch.setattr(blocked, "BLOCK", block)
    torch.manual_seed(0)
    x, dy = (torch.randn(70, 48).to(dtype) for _ in range(2))
    gate, up, down = (torch.randn(1, *shape) for shape in [(33, 48), (33, 48), (48, 33)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = []
        for rows in range(1, 71):
            leaf = x[:rows].clone().requires_grad_()
            y = blocked.routed_mlp(leaf, torch.tensor([rows], dtype=torch.int32), gate, up, down, "swiglu")
            runs.append((y.detach(), torch.autograd.grad(y, leaf, dy[:rows])[0]))
        for rows, (y, dx) in enumerate(runs, 1):
            assert torch.equal(y, runs[-1][0][:rows]), rows
            assert torch.equal(dx, runs[-1][1][:rows]), rows
    finally:
        torch.set_num_threads(threads)


def test_bf16_sums_in_fp32() -> None:
    """1 + 2^-9 + 2^-9 is 1 + 2^-8 in fp32; bf16 partial sums would lose both small terms."""
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    down = torch.tensor([1.0, 2**-8, 2**-8]).view(3, 1, 1)
    ends, tokens, ones = torch.tensor([1, 2, 3], dtype=torch.int32), torch.zeros(3, dtype=torch.int64), torch.ones(3)
    y = blocked.routed_mlp(x, ends, None, torch.ones(3, 1, 1), down, "relu2", tokens, ones)
    assert float(y) == 1 + 2**-7


def test_the_same_bits_every_time() -> None:
    for _ in range(2):
        results = []
        for _ in range(2):
            *tensors, ends, tokens = leaves([30, 25, 40], True, True, torch.float32)
            y = run(blocked, "swiglu", *tensors, ends, tokens)
            results.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_of_the_size_of_the_gathered_rows_is_kept() -> None:
    *tensors, ends, tokens = leaves([30, 25, 40], True, True, torch.float32)
    kept: dict[int, int] = {}
    known = {t.data_ptr() for t in (*tensors, ends, tokens)}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in known:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(blocked, "swiglu", *tensors, ends, tokens)
    assert sum(kept.values()) == 2 * 95 * D_FF
