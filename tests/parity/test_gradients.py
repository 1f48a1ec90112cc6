"""Any grid of processes computes what one process does: losses, every gradient, the gradient norm, the weights.

Sequences of 1000 tokens, which no tried number of ranks divides evenly into blocks, hold packed documents; every row of a batch
has others. In fp64 the same comparison is sharp enough to tell a small error from rounding.
"""

import pytest

GRIDS = {
    "cp2 ring": {"cp": 2},
    "cp3 ring": {"cp": 3},
    "cp4 ring": {"cp": 4},
    "cp2 all_gather": {"cp": 2, "attention": "all_gather"},
    "cp3 all_gather": {"cp": 3, "attention": "all_gather"},
    "cp4 all_gather": {"cp": 4, "attention": "all_gather"},
    "cp3 ring contiguous": {"cp": 3, "layout": "contiguous"},
    "cp3 ring striped": {"cp": 3, "layout": "striped"},
    "cp4 ring balanced": {"cp": 4, "layout": "balanced"},
    "cp3 all_gather contiguous": {"cp": 3, "attention": "all_gather", "layout": "contiguous"},
    "cp2 all_gather striped": {"cp": 2, "attention": "all_gather", "layout": "striped"},
    "cp3 all_gather balanced": {"cp": 3, "attention": "all_gather", "layout": "balanced"},
    "cp3 token_ring": {"cp": 3, "attention": "token_ring"},
    "cp4 bidirectional_ring": {"cp": 4, "attention": "bidirectional_ring"},
    "cp4 double_ring striped": {"cp": 4, "attention": "double_ring", "layout": "striped"},
    "cp2 ulysses": {"cp": 2, "attention": "ulysses"},
    "cp3 ulysses, fewer heads than ranks": {"cp": 3, "attention": "ulysses", "layout": "balanced"},
    "cp4 usp": {"cp": 4, "attention": "usp"},
    "cp4 usp, distant groups, token ring": {"cp": 4, "attention": "usp", "nesting": "outer", "ring": "token_ring"},
    "cp3 sinks": {"cp": 3, "sinks": True},
    "cp2 all_gather sinks": {"cp": 2, "sinks": True, "attention": "all_gather"},
    "fsdp dp2 cp2 usp sinks": {"dp": 2, "cp": 2, "data_parallel": "fsdp", "attention": "usp", "ulysses": 2, "sinks": True},
    "cp2 two rows at once": {"cp": 2, "micro_batch": 2},
    "cp3 three rows at once, striped": {"cp": 3, "micro_batch": 3, "layout": "striped", "attention": "all_gather"},
    "dp2": {"dp": 2, "micro_batch": 3},
    "dp3": {"dp": 3},
    "dp2 cp2": {"dp": 2, "cp": 2},
    "dp2 cp2 tied": {"dp": 2, "cp": 2, "tie": True},
    "cp4 tied, checkpointing": {"cp": 4, "tie": True, "checkpointing": "layer", "attention": "all_gather"},
    "fsdp cp2": {"cp": 2, "data_parallel": "fsdp"},
    "fsdp cp3 tied": {"cp": 3, "data_parallel": "fsdp", "tie": True, "attention": "all_gather"},
    "fsdp dp2": {"dp": 2, "data_parallel": "fsdp", "checkpointing": "layer"},
    "fsdp dp2 cp2": {"dp": 2, "cp": 2, "data_parallel": "fsdp", "checkpointing": "layer"},
    "one process, three rows at once, fsdp asked for": {"micro_batch": 3, "data_parallel": "fsdp", "layout": "striped"},
}


@pytest.mark.parametrize("double", [True, False], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", GRIDS)
def test_equal_to_one_process(train, make_setup, name: str, double: bool) -> None:
    setup = make_setup(**GRIDS[name], double=double)
    steps = 1 if double else 3
    one = train(make_setup(tie=setup.tie, sinks=setup.sinks, double=double), steps)
    many = train(setup, steps)
    loss, gradient, norm, weight = (1e-12, 1e-10, 1e-11, 1e-9) if double else (1e-6, 1e-5, 1e-6, 1e-5)
    assert many.steps[0].loss == pytest.approx(one.steps[0].loss, abs=loss)
    assert one.steps[0].grad_norm > setup.clip_norm, "clipping takes part in what is compared"
    for ours, theirs in zip(many.steps, one.steps, strict=True):
        assert ours.problem is None
        assert ours.loss == pytest.approx(theirs.loss, abs=10 * loss)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=10 * norm)
    assert many.steps[0].grad_norm == pytest.approx(one.steps[0].grad_norm, rel=norm)
    assert many.gradients.keys() == one.gradients.keys()
    for key, expected in one.gradients.items():
        assert expected.norm() > 0, key
        error = float((many.gradients[key] - expected).norm() / expected.norm())
        assert error < gradient, f"{key}: {error:.1e}"
    for key, expected in one.weights.items():
        assert float((many.weights[key] - expected).abs().max()) < weight, key


@pytest.mark.parametrize(
    "grid",
    [
        {"cp": 2},
        {"cp": 4, "attention": "all_gather"},
        {"cp": 3, "layout": "striped"},
        {"dp": 2, "cp": 2, "data_parallel": "fsdp", "layout": "contiguous"},
    ],
    ids=["cp2", "cp4 all_gather", "cp3 striped", "fsdp dp2 cp2"],
)
def test_twenty_steps_overlay(train, make_setup, grid: dict) -> None:
    """Loss curves in fp32 of a model that learns."""
    common = {"length": 250, "micro_batch": 3, "lr": 3e-3, "clip_norm": 1.0}
    one = [step.loss for step in train(make_setup(**common), 20).steps]
    many = [step.loss for step in train(make_setup(**common, **grid), 20).steps]
    assert one[-1] < 0.8 * one[0], "it learns"
    apart = max(abs(a - b) for a, b in zip(one, many, strict=True))
    print(f"largest difference {apart:.1e}")
    assert apart <= 1e-4
