"""Train a Hugging Face Llama with its sequence split over two processes, beside the same model unsharded.

    python examples/hf_sequence_parallel.py
    torchrun --nproc-per-node 4 examples/hf_sequence_parallel.py

Rows of packed documents; the unsharded model gets each document by itself, so the two agree only if nothing leaks between
documents or is lost at the edges of shards.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from processes import compare
from transformers import LlamaConfig, LlamaForCausalLM

from lctrain.adapters.huggingface import all_reduce_gradients, shard_batch, use_sequence_parallel_attention
from lctrain.parallel.group import RankGroup

STEPS, LENGTH, VOCAB = 10, 500, 128
DOCUMENTS = [90, 1, 250, 159]  # tokens in each


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def make_row(step: int) -> torch.Tensor:
    return torch.randint(VOCAB // 2, (1, LENGTH), generator=torch.Generator().manual_seed(step))


def sharded(rank: int, world_size: int) -> list[float]:
    """The whole recipe: three calls of lctrain in an ordinary training loop."""
    group = RankGroup(dist.group.WORLD)
    model = use_sequence_parallel_attention(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    losses = []
    for step in range(STEPS):
        row = make_row(step)
        batch = shard_batch(row, labels=row, position_ids=positions, group=group)
        loss = model(**batch).loss  # this rank's part of the mean over all targets
        loss.backward()
        all_reduce_gradients(model, group)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def unsharded(rank: int, world_size: int) -> list[float]:
    """The same steps with transformers alone, one document at a time."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    targets = LENGTH - len(DOCUMENTS)
    losses = []
    for step in range(STEPS):
        documents = make_row(step).split(DOCUMENTS, dim=1)
        loss = sum(model(d, labels=d, num_items_in_batch=targets).loss for d in documents if d.shape[1] > 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    sys.exit(compare(sharded, unsharded))
