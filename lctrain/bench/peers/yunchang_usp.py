"""yunchang: USP, Ulysses over two ranks and a zigzag ring over the pairs."""

from __future__ import annotations

from lctrain.bench.attention_problem import Problem
from lctrain.bench.peers import flash_stand_in
from lctrain.bench.peers.peer import Attend, Peer, uneven
from lctrain.parallel.layout import SequenceLayout

ULYSSES = 2


def _layout(world_size: int, length: int) -> SequenceLayout:
    """The two chunks of a ring rank lie one after the other over the two ranks of its pair."""
    pairs = world_size // ULYSSES
    owners = [0] * world_size
    for pair in range(pairs):
        owners[pair], owners[2 * pairs - 1 - pair] = ULYSSES * pair, ULYSSES * pair + 1
    return SequenceLayout("balanced", world_size, length, tuple(owners))


def _prepare(rank: int, world_size: int, problem: Problem) -> Attend:
    flash_stand_in.install()
    import yunchang
    from yunchang.kernels import AttnType

    yunchang.set_seq_parallel_pg(ULYSSES, world_size // ULYSSES, rank, world_size)
    attention = yunchang.LongContextAttention(ring_impl_type="zigzag", attn_type=AttnType.FA)
    return lambda q, k, v: attention(q, k, v, causal=True)


def _refuses(problem: Problem, world_size: int) -> str | None:
    if world_size % ULYSSES or world_size == ULYSSES:
        return "its ring of one rank sends to itself" if world_size == ULYSSES else "needs an even number of ranks"
    if problem.shape.n_kv_heads % ULYSSES:
        return f"{problem.shape.n_kv_heads} KV heads on {ULYSSES} ranks"
    return uneven(problem, world_size)


USP = Peer(
    name=f"yunchang USP, {ULYSSES} x ring",
    family="usp",
    packages=("yunchang",),
    install="pip install --no-deps yunchang==0.6.4",
    kernel="stand-in for flash_attn",
    layout=_layout,
    prepare=_prepare,
    refuses=_refuses,
)
