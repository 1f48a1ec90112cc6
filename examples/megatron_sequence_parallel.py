"""Train a megatron-core GPTModel over two context-parallel processes without Transformer Engine, beside one process.

    python examples/megatron_sequence_parallel.py
    torchrun --nproc-per-node 4 examples/megatron_sequence_parallel.py

The process alone uses megatron-core's own attention. Grouped-query attention, rotary embedding, SwiGLU.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from processes import compare

from lctrain.adapters.gradients import all_reduce_gradients
from lctrain.adapters.megatron import use_sequence_parallel_attention
from lctrain.adapters.megatron_cpu import megatron_on_cpu
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout

STEPS, BATCH, LENGTH, VOCAB = 10, 2, 480, 128


def make_model(world_size: int) -> GPTModel:
    parallel_state.destroy_model_parallel()  # of an earlier run in this process
    parallel_state.initialize_model_parallel(context_parallel_size=world_size)
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=128,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        context_parallel_size=world_size,
        use_cpu_initialization=True,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if world_size > 1:
        spec = use_sequence_parallel_attention(spec, strategy="ring")  # all that changes in the model
    return GPTModel(config, spec, VOCAB, LENGTH, position_embedding_type="rope")


def train(rank: int, world_size: int) -> list[float]:
    """One loop for any number of processes; with one, megatron-core's own attention runs."""
    with megatron_on_cpu():
        model = make_model(world_size)
        group = RankGroup(parallel_state.get_context_parallel_group())
        layout = SequenceLayout("zigzag", world_size, LENGTH)  # the way megatron-core cuts sequences
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        positions = layout.shard(torch.arange(LENGTH).expand(BATCH, -1), rank, dim=1)
        losses = []
        for step in range(STEPS):
            text = torch.randint(VOCAB // 2, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
            tokens, labels = layout.shard(text[:, :-1], rank, dim=1), layout.shard(text[:, 1:], rank, dim=1)
            loss = model(tokens, positions, None, labels=labels).sum() / (BATCH * LENGTH)  # a part of the whole mean
            loss.backward()
            all_reduce_gradients(model, group)
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach()
            dist.all_reduce(total)
            losses.append(total.item())
    return losses


if __name__ == "__main__":
    sys.exit(compare(train, train))
