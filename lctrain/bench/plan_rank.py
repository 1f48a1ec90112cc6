"""One rank of a real engine in `lctrain bench plan`."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from lctrain.config.schema import TrainConfig
from lctrain.data.batch import DocumentSpan, PackedSample
from lctrain.data.loader import make_loader
from lctrain.engines.base import train_step
from lctrain.engines.make import make_engine


class Steps(NamedTuple):
    """Wall seconds of each step, all ranks together from start to end; bytes as Engine.memory() counts them, and the stage."""

    seconds: list[float]
    memory: dict[str, int]
    stage: int


class WholeRows:
    """Samples of random tokens, one document each: what a plan assumes."""

    pad_id = 0

    def __init__(self, length: int, vocab_size: int) -> None:
        self._length, self._vocab = length, vocab_size

    def sample(self, index: int) -> PackedSample:
        """See PackedSample."""
        tokens = np.random.default_rng(index).integers(0, self._vocab, self._length)
        return PackedSample(index, tokens, (0, self._length), None, (DocumentSpan(0, index, 0),))


def time_steps(rank: int, world_size: int, config: TrainConfig, steps: int) -> Steps:
    """Train for `steps` and one before."""
    mesh = config.mesh(rank, world_size)
    engine = make_engine(config, mesh, mesh.make_groups(), torch.device("cpu"))
    seconds = []
    samples = WholeRows(config.trainer.seq_len, config.model.vocab_size)
    targets = config.trainer.global_batch * (config.trainer.seq_len - 1)
    with make_loader(config, mesh, samples, 0, steps + 1) as loader:
        for batch in loader:
            dist.barrier()
            began = time.perf_counter()
            train_step(engine, batch, targets, config.optim.lr)
            dist.barrier()
            seconds.append(time.perf_counter() - began)
    return Steps(seconds[1:], engine.memory(), mesh.pp_rank)
