"""Scan and convolution over gloo ranks equal one process: layouts, packed documents across ranks, odd lengths, tiny runs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lctrain.config.mamba import LinearAttentionConfig, MambaConfig
from lctrain.config.model import ModelConfig
from lctrain.kernels.causal_conv.fused import causal_conv
from lctrain.kernels.ssd import chunked
from lctrain.launch.ranks import run_ranks
from lctrain.models.init import initialise
from lctrain.models.model import LanguageModel
from lctrain.parallel.deal import balanced_layout
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import IGNORE, SequenceLayout, document_positions, shift_labels
from lctrain.parallel.scan import halo_bytes, sequence_parallel_convs, sequence_parallel_scan, state_bytes
from lctrain.parallel.sequence import SequenceMeta

LAYOUTS = ("zigzag", "contiguous", "balanced")


def make_layout(kind, world_size, length, documents):
    if kind == "balanced":
        return balanced_layout(world_size, length, documents, smallest_block=1)
    return SequenceLayout(kind, world_size, length)


def rows_of(length):
    """Two rows: documents that cross ranks, one of a single token; one document and padding."""
    return ((0, 5, 6, length), (0, length // 2)) if length > 8 else ((0, length), (0, 1))


def group_of(world_size):
    return RankGroup(dist.group.WORLD) if world_size > 1 else RankGroup()


def shared_error(found, wanted, world_size):
    """Of a gradient whose parts add up over ranks."""
    total = found.clone()
    if world_size > 1:
        dist.all_reduce(total)
    return float((total - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def compare_scan_and_convolution(rank, world_size, kind, length, dtype):
    """Largest error of all outputs and gradients on this rank; asserts the counted bytes."""
    documents, rows, heads, size, groups, state = rows_of(length), 2, 4, 3, 2, 5
    layout, group = make_layout(kind, world_size, length, documents), group_of(world_size)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    positions = document_positions(documents, length)
    tokens = {
        "x": random(rows, length, heads, size),
        "dt": random(rows, length, heads).exp(),
        "B": random(rows, length, groups, state),
        "C": random(rows, length, groups, state),
        "u": random(rows, length, 2),
        "v": random(rows, length, 3),
    }
    shared = {"A": -random(heads).exp(), "D": random(heads), "w_u": random(2, 4), "w_v": random(3, 4), "b_v": random(3)}
    slopes = [random(rows, length, heads, size), random(rows, length, 2), random(rows, length, 3)]

    def leaves(shard):
        own = {name: layout.shard(t, rank, 1) if shard else t for name, t in tokens.items()} | shared
        return {name: t.clone().requires_grad_() for name, t in own.items()}

    one = leaves(shard=False)
    y, _ = chunked.ssd(one["x"], one["dt"], one["A"], one["B"], one["C"], one["D"], resets=positions == 0, chunk=8)
    u = causal_conv(one["u"], one["w_u"], None, positions)
    v = causal_conv(one["v"], one["w_v"], one["b_v"], positions)
    wanted = dict(zip(one, torch.autograd.grad([y, u, v], list(one.values()), slopes), strict=True))

    own, local = leaves(shard=True), layout.shard(positions, rank, 1)
    own_y = sequence_parallel_scan(
        own["x"], own["dt"], own["A"], own["B"], own["C"], own["D"], resets=local == 0, layout=layout, group=group, chunk=4
    )
    inputs = [(own["u"], own["w_u"], None), (own["v"], own["w_v"], own["b_v"])]
    own_u, own_v = sequence_parallel_convs(inputs, positions=local, layout=layout, group=group)
    own_slopes = [layout.shard(slope, rank, 1) for slope in slopes]
    grads = torch.autograd.grad([own_y, own_u, own_v], list(own.values()), own_slopes)
    found = dict(zip(own, grads, strict=True))

    real = layout.indices(rank) < length
    pairs = [(own_y, y), (own_u, u), (own_v, v), *((found[name], wanted[name]) for name in tokens)]
    errors = [shared_error(found[name], wanted[name], world_size) for name in shared]
    for mine, whole in pairs:
        difference = (mine.detach() - layout.shard(whole.detach(), rank, 1))[:, real]
        errors.append(float(difference.abs().max() / whole.detach().abs().max()) if difference.numel() else 0.0)

    itemsize = tokens["x"].element_size()
    states = state_bytes(layout, rows, heads, size, state, itemsize)
    assert group.sent["state"] == group.sent["state gradient"] == states
    assert group.sent["halo"] == halo_bytes(layout, rank, rows, 5, 3, itemsize)
    assert sum(group.sent.values()) == 2 * states + group.sent["halo"] + group.sent["halo gradient"]
    return max(errors)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_scan_and_convolution_equal_one_process(kind, world_size):
    for length in (41, 7, 1):  # runs of several chunks; shorter than the halo; empty but for padding
        assert max(run_ranks(compare_scan_and_convolution, world_size, kind, length, torch.float64)) < 1e-12
    assert max(run_ranks(compare_scan_and_convolution, world_size, kind, 41, torch.float32)) < 1e-5


def bytes_sent(rank, world_size, length):
    layout, group = SequenceLayout("zigzag", world_size, length), group_of(world_size)
    x, small = torch.zeros(1, layout.local_length, 2, 4, requires_grad=True), torch.zeros(1, layout.local_length, 1, 8)
    resets = torch.zeros(1, layout.local_length, dtype=torch.bool)
    y = sequence_parallel_scan(x, None, -torch.ones(2), small, small, None, resets=resets, layout=layout, group=group)
    positions = torch.arange(layout.local_length)[None]
    conv = sequence_parallel_convs([(x.flatten(2), torch.zeros(8, 4), None)], positions=positions, layout=layout, group=group)
    (y.sum() + conv[0].sum()).backward()
    return dict(group.sent)


def test_bytes_do_not_depend_on_the_length():
    assert run_ranks(bytes_sent, 4, 64) == run_ranks(bytes_sent, 4, 1024)


def model_on_ranks(rank, world_size, kind, length, double):
    """Loss and gradients of a hybrid model through the real SequenceMeta, summed over ranks."""
    config = ModelConfig(
        pattern="M-L*M",
        d_model=16,
        vocab_size=29,
        mamba=MambaConfig(head_dim=4, d_state=3, n_groups=2, chunk=8),
        linear_attention=LinearAttentionConfig(chunk=8),
    )
    model = LanguageModel(config, torch.float64 if double else torch.float32, checkpointing=True)
    initialise(model, 0)
    if double:
        model.double()
    documents = rows_of(length)
    layout, group = make_layout(kind, world_size, length, documents), group_of(world_size)
    tokens = torch.randint(29, (2, length), generator=torch.Generator().manual_seed(1))
    labels = shift_labels(tokens, documents, [3, None])
    tokens, labels, positions = (
        layout.shard(t, rank, 1, pad) for t, pad in ((tokens, 0), (labels, IGNORE), (document_positions(documents, length), 0))
    )
    sums = model(tokens, labels, SequenceMeta(layout, group, positions, documents))
    sums.objective.backward()
    total = sums.objective.detach().clone()
    if world_size > 1:
        dist.all_reduce(total)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
    return float(total), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_hybrid_model_equals_one_process(kind):
    for double, allowed in ((True, 1e-12), (False, 1e-5)):
        (loss, wanted), = run_ranks(model_on_ranks, 1, kind, 45, double)  # fmt: skip
        for world_size in (2, 3, 4):
            found_loss, found = run_ranks(model_on_ranks, world_size, kind, 45, double)[0]
            assert found_loss == pytest.approx(loss, rel=allowed)
            for name, gradient in wanted.items():
                error = float((found[name] - gradient).abs().max() / gradient.abs().max())
                assert error < allowed, f"{name}, {world_size} ranks: {error:.1e}"


def test_striped_layout_is_refused():
    layout = SequenceLayout("striped", 2, 8)
    x = torch.zeros(1, 4, 1, 2)
    with pytest.raises(ValueError, match="choose zigzag, contiguous or balanced"):
        sequence_parallel_scan(x, None, torch.zeros(1), x, x, None, resets=x[..., 0, 0] > 0, layout=layout, group=RankGroup())
