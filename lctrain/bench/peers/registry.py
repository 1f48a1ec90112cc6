"""All peers that run on CPU."""

from __future__ import annotations

from lctrain.bench.peers.deepspeed_ulysses import ALST, DISTRIBUTED_ATTENTION
from lctrain.bench.peers.peer import Peer
from lctrain.bench.peers.published_token_ring import TOKEN_RING
from lctrain.bench.peers.ring_flash_attention import LLAMA3, ZIGZAG_RING
from lctrain.bench.peers.torch_context_parallel import ALL_GATHER, RING
from lctrain.bench.peers.yunchang_usp import USP

PEERS: dict[str, Peer] = {
    "deepspeed": DISTRIBUTED_ATTENTION,
    "alst": ALST,
    "torch_ring": RING,
    "torch_all_gather": ALL_GATHER,
    "zigzag_ring": ZIGZAG_RING,
    "llama3": LLAMA3,
    "yunchang": USP,
    "token_ring": TOKEN_RING,
}
"""By the name that `peers=` takes."""
