"""What each rank of a peer does."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import nullcontext

import torch.distributed as dist

from lctrain.bench.attention_problem import Pass, Problem, measure
from lctrain.bench.peers.peer import Attend
from lctrain.bench.peers.registry import PEERS
from lctrain.bench.peers.sent_bytes import SentBytes

_prepared: dict[tuple[str, Problem], Attend] = {}
"""What a library needs to be set up once, in a process that computes nothing else."""


def run_peer(rank: int, world_size: int, problem: Problem, name: str, count: bool) -> Pass:
    """One pass over this rank's shard; count: also count bytes and return results, which takes time."""
    peer = PEERS[name]
    if (name, problem) not in _prepared:
        warnings.simplefilter("ignore")  # of names that torch has deprecated since the libraries were written
        _prepared[name, problem] = peer.prepare(rank, world_size, problem)
    layout = peer.layout(world_size, problem.seq)
    q, k, v, dout = (layout.shard(x, rank, dim=1) for x in problem.inputs())
    sent = Counter[str]()
    with SentBytes(sent) if count else nullcontext():
        return measure(_prepared[name, problem], (q, k, v, dout), count, dist.barrier, sent, peer.backward)
