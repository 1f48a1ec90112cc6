"""Train a Hugging Face decoder with its sequence split over ranks.

    group = RankGroup(dist.group.WORLD)
    use_sequence_parallel_attention(model)
    batch = shard_batch(input_ids, labels, group=group, position_ids=position_ids)  # the same arguments on every rank
    model(**batch).loss.backward()
    all_reduce_gradients(model, group)
    optimizer.step()

What describes the sequence travels through the model's own keyword arguments from `shard_batch` to the attention of every
layer. Nothing is kept in a global, so two models in one process cannot get mixed up, and a layer that activation checkpointing
computes again in backward sees what it saw in forward.
"""

from lctrain.adapters.gradients import all_reduce_gradients
from lctrain.adapters.huggingface.batch import shard_batch
from lctrain.adapters.huggingface.model import use_sequence_parallel_attention
from lctrain.adapters.unsupported import UnsupportedError

__all__ = ["UnsupportedError", "all_reduce_gradients", "shard_batch", "use_sequence_parallel_attention"]
