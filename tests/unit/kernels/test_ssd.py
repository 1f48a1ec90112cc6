"""The chunked state-space scan against the token-by-token recurrence: values, gradients, dtypes, documents, odd shapes."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lctrain.kernels.ssd import best, chunked, panels, reference
from lctrain.kernels.ssd.merge import Summary, exclusive, merge

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def problem(rows, tokens, heads, size, groups, state, *, resets=0.0, dt=True, D=True, initial=True, seed=0, decay=1.0):
    """Arguments of `ssd` in fp64; `resets`: probability that a document starts at a token."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "x": random(rows, tokens, heads, size),
        "dt": random(rows, tokens, heads).exp() if dt else None,
        "A": -decay * random(heads).exp(),
        "B": random(rows, tokens, groups, state),
        "C": random(rows, tokens, groups, state),
        "D": random(heads) if D else None,
        "initial_state": random(rows, heads, size, state) if initial else None,
        "resets": torch.rand(rows, tokens, generator=generator) < resets if resets else None,
    }


def run(scan, inputs, dtype, **options):
    """y, final state and all gradients, for upstream gradients of both outputs."""
    cast = {name: t.to(dtype) if name in ("x", "B", "C") else t.to(torch.promote_types(dtype, torch.float32))
            for name in NAMES if (t := inputs[name]) is not None}  # fmt: skip
    leaves = {name: t.detach().clone().requires_grad_() for name, t in cast.items()}
    arguments = [leaves.get(name) for name in NAMES]
    y, state = scan(*arguments, inputs["resets"], **options)
    generator = torch.Generator().manual_seed(9)
    dy, dstate = (torch.randn(t.shape, generator=generator, dtype=torch.float64).bfloat16().to(t.dtype) for t in (y, state))
    outputs, slopes = zip(*[(out, slope) for out, slope in ((y, dy), (state, dstate)) if out.requires_grad], strict=True)
    grads = torch.autograd.grad(outputs, list(leaves.values()), slopes, materialize_grads=True)
    return {"y": y.detach(), "state": state.detach(), **dict(zip(leaves, grads, strict=True))}


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference over largest entry."""
    assert found.keys() == wanted.keys()
    return {
        name: float((found[name].double() - t.double()).abs().max() / t.double().abs().max().clamp(min=1e-30))
        for name, t in wanted.items()
        if t.numel()
    }


SHAPES = {
    "odd length": (1, 37, 4, 5, 1, 3),
    "two rows, two groups": (2, 40, 4, 5, 2, 3),
    "a group per head": (3, 19, 4, 3, 4, 6),
    "one token": (1, 1, 2, 3, 1, 4),
    "shorter than a chunk": (2, 7, 2, 3, 2, 4),
    "empty": (2, 0, 2, 3, 2, 4),
}


@pytest.mark.parametrize("options", [{}, {"resets": 0.2}, {"resets": 0.2, "dt": False, "D": False, "initial": False}])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("panel", [1, 600, panels.PANEL], ids=["a chunk of a row", "some chunks", "everything"])
def test_equals_the_recurrence(shape, options, panel, monkeypatch):
    """However rows and chunks are divided into panels."""
    monkeypatch.setattr(panels, "PANEL", panel)
    inputs = problem(*SHAPES[shape], **options)
    wanted = run(reference.ssd, inputs, torch.float64)
    for chunk in (8, 128):
        assert max(errors(run(chunked.ssd, inputs, torch.float64, chunk=chunk), wanted).values(), default=0) < 1e-13


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 30), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]), st.integers(1, 9), st.booleans(), st.integers(0, 99)
)
def test_equals_the_recurrence_at_any_size(tokens, heads, chunk, resets, seed):
    inputs = problem(2, tokens, heads[0], 2, heads[1], 3, resets=0.3 if resets else 0.0, seed=seed)
    found, wanted = (
        run(scan, inputs, torch.float64, **kw) for scan, kw in ((chunked.ssd, {"chunk": chunk}), (reference.ssd, {}))
    )
    assert max(errors(found, wanted).values(), default=0) < 1e-12


@pytest.mark.parametrize("resets", [0.0, 0.1])
def test_fp32(resets):
    inputs = problem(2, 150, 4, 16, 2, 16, resets=resets)
    found, wanted = run(chunked.ssd, inputs, torch.float32, chunk=32), run(reference.ssd, inputs, torch.float64)
    assert max(errors(found, wanted).values()) < 2e-6


def test_bf16_accumulates_in_fp32():
    """Results differ from fp64 on the same rounded inputs by no more than the rounding of the results themselves."""
    inputs = problem(1, 300, 4, 16, 1, 16)
    rounded = {name: t.bfloat16().double() if name in ("x", "B", "C") else t for name, t in inputs.items()}
    found, wanted = run(chunked.ssd, inputs, torch.bfloat16), run(reference.ssd, rounded, torch.float64)
    assert (found["y"].dtype, found["x"].dtype, found["state"].dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert {found[name].dtype for name in ("dt", "A", "D", "initial_state")} == {torch.float32}
    assert max(errors(found, wanted).values()) < 2.0**-8


def test_decays_of_every_strength_keep_their_digits():
    """A token that forgets everything, then tokens that forget little: a plain fp32 running sum would be off by 1e-3."""
    inputs = problem(1, 64, 2, 4, 1, 4, D=False)
    inputs["dt"] = torch.full_like(inputs["dt"], 0.01)
    inputs["dt"][:, 3] = 2e4
    found, wanted = run(chunked.ssd, inputs, torch.float32), run(reference.ssd, inputs, torch.float64)
    assert max(errors(found, wanted).values()) < 2e-6


def test_gradient_of_decay_rates_does_not_cancel():
    """Heads that forget nearly everything: what a token does to itself must not drown what it does to the next."""
    inputs = problem(1, 256, 2, 16, 1, 16, D=False, initial=False)
    inputs["A"], inputs["dt"] = torch.tensor([-6.0, -8.0], dtype=torch.float64), torch.ones_like(inputs["dt"])
    found, wanted = run(chunked.ssd, inputs, torch.float32), run(reference.ssd, inputs, torch.float64)
    assert errors(found, wanted)["A"] < 1e-6


def test_no_bit_leaks_between_documents():
    """Outputs, and gradients for a loss on one document alone, do not see another document's values."""
    inputs = problem(1, 90, 2, 4, 1, 4, initial=False)
    resets = torch.zeros(1, 90, dtype=torch.bool)
    resets[0, [0, 13, 50]] = True
    other = slice(13, 50)
    results = []
    for factor in (1.0, 3.0):
        leaves = {name: t.float() for name, t in inputs.items() if t is not None}
        for name in ("x", "dt", "B", "C"):
            leaves[name][:, other] *= factor
            leaves[name].requires_grad_()
        y, _ = chunked.ssd(
            leaves["x"], leaves["dt"], leaves["A"], leaves["B"], leaves["C"], leaves["D"], None, resets, chunk=16
        )
        keep = torch.ones(90, dtype=torch.bool)
        keep[other] = False
        grads = torch.autograd.grad(y[:, keep].square().sum(), [leaves[name] for name in ("x", "dt", "B", "C")])
        assert all(not grad[:, other].any() for grad in grads)
        results.append([y[:, keep], *(grad[:, keep] for grad in grads)])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_what_is_kept_is_linear_in_length():
    kept = []
    for tokens in (256, 512):
        inputs = {name: None if t is None else t.float() for name, t in problem(1, tokens, 2, 8, 1, 16).items()}
        inputs["x"].requires_grad_()
        storages = {}

        def keep(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            chunked.ssd(*(inputs[name] for name in NAMES), chunk=32)
        kept.append(sum(storages.values()))
    assert kept[1] < 2.05 * kept[0]


def test_frozen_inputs_and_unused_outputs():
    inputs = problem(1, 20, 2, 3, 1, 4)
    x = inputs["x"].requires_grad_()
    _, state = chunked.ssd(x, inputs["dt"], inputs["A"], inputs["B"], inputs["C"], chunk=8)
    assert torch.autograd.grad(state.sum(), x)[0].any()


numbers = st.floats(-4, 4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), numbers), min_size=1, max_size=6))
def test_merging_stretches_is_associative(parts):
    summaries = [
        Summary(torch.tensor([decay], dtype=torch.float64), torch.tensor([[[added]]], dtype=torch.float64))
        for decay, added in parts
    ]
    left = summaries[0]
    for summary in summaries[1:]:
        left = merge(left, summary)
    right = summaries[-1]
    for summary in summaries[-2::-1]:
        right = merge(summary, right)
    torch.testing.assert_close(left.added, right.added, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(left.decay, right.decay, atol=1e-12, rtol=1e-12)
    state, reached = torch.zeros(1, 1, 1, dtype=torch.float64), []
    for summary in summaries:
        reached.append(state)
        state = summary.decay[:, None, None] * state + summary.added
    torch.testing.assert_close(torch.stack(list(exclusive(summaries))), torch.stack(reached), atol=1e-12, rtol=1e-12)


def test_call_of_mamba_ssm(monkeypatch):
    """Its kernel needs a GPU: a stand-in with its signature shows that our arguments mean to it what they mean to us."""

    def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
        cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
    ):  # fmt: skip
        assert (z, dt_bias, cu_seqlens, dt_softplus, return_final_states) == (None, None, None, False, True)
        assert seq_idx.dtype == torch.int32
        before = torch.cat([torch.zeros_like(seq_idx[:, :1]), seq_idx[:, :-1]], dim=1)  # the entering state belongs to 0
        return reference.ssd(x, dt.to(x.dtype), A, B, C, D, initial_states, seq_idx != before)

    module = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    module.mamba_chunk_scan_combined = mamba_chunk_scan_combined
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for dt in (True, False):
        inputs = problem(2, 30, 4, 3, 2, 5, resets=0.2, dt=dt)
        arguments = [inputs[name] for name in NAMES]
        found = best.mamba_ssm(*arguments, inputs["resets"], chunk=8)
        for one, two in zip(found, chunked.ssd(*arguments, inputs["resets"], chunk=8), strict=True):
            torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)


def test_torch_form_runs_on_cpu():
    assert not best.mamba_ssm_fits(torch.zeros(1, 4, 1, 1), None, 128)
