"""The mixer `+` over ranks: outputs and all gradients of one process, whatever travels."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lctrain.config.latent_attention import LatentAttentionConfig
from lctrain.config.model import ModelConfig
from lctrain.config.rope import RopeConfig
from lctrain.launch.ranks import run_ranks
from lctrain.models.latent_attention import LatentAttention, travel_bytes
from lctrain.models.parallel import ModelParallel
from lctrain.parallel.deal import make_layout
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout, document_positions
from lctrain.parallel.sequence import SequenceMeta
from lctrain.parallel.strategy import Strategy

DOCUMENTS = ((0, 3, 4, 61), (0, 47))
LENGTH = 61
YARN = RopeConfig(scaling="yarn", factor=4.0, original_max_position=16, mscale_all_dim=1.0)


def make(travel: str) -> LatentAttention:
    latent = LatentAttentionConfig(
        n_heads=3,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=7,
        rope=YARN,
        travel=travel,
    )
    mixer = LatentAttention(ModelConfig(pattern="+", d_model=16, vocab_size=8, latent_attention=latent), ModelParallel())
    torch.manual_seed(0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return mixer.double()


def compare(rank: int, world_size: int, layout_kind: str, travel: str, strategy: str) -> dict[str, int]:
    group = RankGroup(dist.group.WORLD if world_size > 1 else None)
    mixer, whole = make(travel), make("heads")
    torch.manual_seed(1)
    x, dy = (torch.randn(2, LENGTH, 16, dtype=torch.float64) for _ in range(2))
    ends = torch.tensor([[borders[-1]] for borders in DOCUMENTS])
    dy[torch.arange(LENGTH) >= ends] = 0.0
    positions = document_positions(DOCUMENTS, LENGTH)

    alone = SequenceLayout("contiguous", 1, LENGTH)
    leaf = x.clone().requires_grad_()
    y = whole(leaf, SequenceMeta(alone, RankGroup(), positions, DOCUMENTS))
    y.backward(dy)

    layout = make_layout(layout_kind, world_size, LENGTH, DOCUMENTS)
    seq = SequenceMeta(layout, group, layout.shard(positions, rank, 1), DOCUMENTS, Strategy(strategy))
    shard = layout.shard(x, rank, 1).requires_grad_()
    part = mixer(shard, seq)
    sent = dict(group.sent)
    part.backward(layout.shard(dy, rank, 1))
    real = layout.shard((torch.arange(LENGTH) < ends).to(torch.int64), rank, 1).bool().unsqueeze(-1)
    torch.testing.assert_close(part * real, layout.shard(y.detach(), rank, 1) * real, atol=1e-11, rtol=0)
    torch.testing.assert_close(shard.grad, layout.shard(leaf.grad, rank, 1), atol=1e-11, rtol=0)
    for (name, mine), wanted in zip(mixer.named_parameters(), whole.parameters(), strict=True):
        if world_size > 1:
            dist.all_reduce(mine.grad)
        torch.testing.assert_close(mine.grad, wanted.grad, atol=1e-10, rtol=0, msg=name)
    return sent


@pytest.mark.parametrize("travel", ["latent", "heads", "auto"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_exact(world_size: int, travel: str) -> None:
    for layout in ("zigzag", "contiguous", "balanced"):
        for strategy in ("ring", "all_gather", "ulysses"):
            run_ranks(compare, world_size, layout, travel, strategy)


def test_latents_are_what_travels_where_they_are_fewer_bytes() -> None:
    latent, heads, auto = (run_ranks(compare, 2, "zigzag", travel, "ring") for travel in ("latent", "heads", "auto"))
    width = {"latent": 10 + 4, "heads": 2 * 3 * 10}
    for few, many in zip(latent, heads, strict=True):
        assert few["kv"] * width["heads"] == many["kv"] * width["latent"]
    assert auto == latent


def test_queries_that_travel_leave_nothing_to_choose() -> None:
    settings = make("auto").settings
    sent = travel_bytes(settings, 3, Strategy("token_ring"), 4, 64, torch.bfloat16)
    assert sent.latent == sent.heads > 0


def test_few_wide_heads_travel_themselves() -> None:
    """One head of 8 entries is less than a latent of 40."""
    sizes = {"n_heads": 1, "kv_lora_rank": 36, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
    sent = travel_bytes(LatentAttentionConfig(**sizes), 1, Strategy("ring"), 4, 64, torch.bfloat16)
    assert sent.heads * 40 == sent.latent * 16
