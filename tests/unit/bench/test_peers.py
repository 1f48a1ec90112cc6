"""Other libraries beside ours: the stand-in kernel, counted bytes, and every peer that is installed against fp64."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import closing
from typing import get_args

import pytest
import torch
import torch.distributed as dist

from lctrain import cli
from lctrain.bench.attention_problem import Problem
from lctrain.bench.attention_results import errors, unsharded
from lctrain.bench.attention_sdpa import WholeSequence
from lctrain.bench.peers import flash_stand_in as flash
from lctrain.bench.peers.rank import run_peer
from lctrain.bench.peers.registry import PEERS
from lctrain.bench.peers.sent_bytes import SentBytes
from lctrain.config.bench import PeerName
from lctrain.kernels.attention.reference import attention
from lctrain.launch.ranks import RankPool, run_ranks
from lctrain.parallel.payload import AttentionShape

PROBLEM = Problem(AttentionShape(1, 8, 4, 16, torch.bfloat16), 64, (0, 64), None, "zigzag", 0)


def plain(q, k, v, scale, causal=True):
    """Causal is aligned bottom-right."""
    live = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    return attention(q, k, v, live.tril(k.shape[1] - q.shape[1]) if causal else live, scale)


class TestStandIn:
    @pytest.mark.parametrize(
        ("rows", "columns", "causal"), [(6, 6, True), (6, 6, False), (4, 10, True), (3, 9, False), (1, 1, True)]
    )
    def test_is_plain_attention(self, rows, columns, causal):
        torch.manual_seed(0)
        q, dout = torch.randn(2, 2, rows, 4, 8, dtype=torch.float64).unbind()
        k, v = torch.randn(2, 2, columns, 2, 8, dtype=torch.float64).unbind()
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        wanted, wanted_lse = plain(*leaves, 0.3, causal)
        wanted.backward(dout)
        out, lse, *_ = flash._flash_attn_forward(q, k, v, 0.0, 0.3, causal)
        grads = [torch.full_like(x, 7.0) for x in (q, k, v)]
        flash._flash_attn_backward(dout, q, k, v, out, lse, *grads, 0.0, 0.3, causal)
        torch.testing.assert_close(out, wanted.detach())
        torch.testing.assert_close(lse, wanted_lse.detach())
        for grad, leaf in zip(grads, leaves, strict=True):
            torch.testing.assert_close(grad, leaf.grad)

    def test_packed_is_each_document_by_itself(self):
        torch.manual_seed(0)
        cu_q, cu_k = torch.tensor([0, 2, 6]), torch.tensor([0, 5, 9])
        q, dout = torch.randn(2, 6, 2, 8).unbind()
        k, v = torch.randn(2, 9, 1, 8).unbind()
        out, lse, *_ = flash._flash_attn_varlen_forward(q, k, v, cu_q, cu_k, 4, 5, 0.0, 0.5, True)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        flash._flash_attn_varlen_backward(dout, q, k, v, out, lse, *grads, cu_q, cu_k, 4, 5, 0.0, 0.5, True)
        for (q0, q1), (k0, k1) in (((0, 2), (0, 5)), ((2, 6), (5, 9))):
            leaves = [x[None, a:b].clone().requires_grad_() for x, a, b in ((q, q0, q1), (k, k0, k1), (v, k0, k1))]
            wanted, _ = plain(*leaves, 0.5)
            wanted.backward(dout[None, q0:q1])
            torch.testing.assert_close(out[q0:q1], wanted[0].detach())
            for grad, leaf, (a, b) in zip(grads, leaves, ((q0, q1), (k0, k1), (k0, k1)), strict=True):
                torch.testing.assert_close(grad[a:b], leaf.grad[0])

    def test_refuses_what_it_does_not_know(self):
        x = torch.randn(1, 2, 1, 8)
        with pytest.raises(NotImplementedError, match="no dropout, window"):
            flash._flash_attn_forward(x, x, x, 0.1, 1.0, True)

    def test_is_found_as_flash_attn(self, monkeypatch):
        for name in ("flash_attn", "flash_attn.flash_attn_interface"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        flash.install()
        from flash_attn.flash_attn_interface import _flash_attn_forward

        assert _flash_attn_forward is flash._flash_attn_forward
        for name in ("flash_attn", "flash_attn.flash_attn_interface"):
            monkeypatch.delitem(sys.modules, name)


def send_in_every_way(rank, world_size):
    sent = Counter()
    shard, whole = torch.ones(4), torch.ones(4 * world_size)
    with SentBytes(sent):
        dist.all_gather_into_tensor(whole, shard)
        dist.reduce_scatter_tensor(shard, whole)
        dist.all_to_all_single(torch.empty_like(whole), whole)
        dist.all_to_all_single(torch.empty_like(whole), whole, [4] * world_size, [4] * world_size)
        dist.all_reduce(shard)
        dist.all_gather([torch.empty(4) for _ in range(world_size)], shard)
        ring = [
            dist.P2POp(dist.isend, shard, (rank + 1) % world_size),
            dist.P2POp(dist.irecv, whole[:4], (rank - 1) % world_size),
        ]
        for work in dist.batch_isend_irecv(ring):
            work.wait()
        dist.barrier()
    return sent


def test_counts_what_leaves_a_rank():
    for sent in run_ranks(send_in_every_way, 3):
        assert sent == {
            "allgather_base": 2 * 16,
            "reduce_scatter_base": 2 * 16,
            "alltoall_base": 2 * (2 * 16),
            "allreduce": 2 * 16 * 2 // 3,
            "allgather": 2 * 16,
            "send": 16,
        }


def test_every_peer_has_a_name_in_the_settings():
    assert tuple(PEERS) == get_args(PeerName)


def test_says_why_a_peer_cannot():
    few = Problem(AttentionShape(1, 8, 2, 16, torch.bfloat16), 64, (0, 64), None, "zigzag", 0)
    odd = Problem(AttentionShape(2, 8, 8, 16, torch.bfloat16), 63, (0, 63), None, "zigzag", 0)
    assert PEERS["deepspeed"].refuses(few, 4) == "asserts that there are at least 4 KV heads"
    assert PEERS["alst"].refuses(few, 4) is None
    assert PEERS["yunchang"].refuses(PROBLEM, 2) == "its ring of one rank sends to itself"
    assert PEERS["zigzag_ring"].refuses(odd, 2) == "length is not a multiple of 4"
    assert PEERS["llama3"].refuses(odd, 2) == "one row only"


@pytest.fixture(scope="module")
def pool():
    """Four ranks that have inherited what takes long to import."""
    if PEERS["llama3"].missing != "transformers":
        import transformers.integrations.sdpa_attention
        import transformers.modeling_flash_attention_utils  # noqa: F401
    with closing(RankPool(4)) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def exact():
    return WholeSequence(PROBLEM).exact()


# Bytes a rank sends per token and KV head of 16 in bf16, forward and backward, where a formula is published.
T, KV = 16, 4 * 16 * 2
SENT = {
    "deepspeed": ((2 * 2 + 2) * KV * T * 3 // 4,) * 2,
    "zigzag_ring": (2 * KV * 3 * T, 2 * KV * 3 * T + 2 * 2 * KV * 4 * T),
    "llama3": (2 * KV * 3 * T, 4 * KV * 3 * T),
}


@pytest.mark.parametrize("name", PEERS)
def test_peer_computes_attention(name, pool, exact):
    peer = PEERS[name]
    if peer.missing:
        pytest.skip(f"{peer.missing} is not installed: {peer.install}")
    passes = pool.run(run_peer, PROBLEM, name, True)
    found = errors(unsharded(peer.layout(4, PROBLEM.seq), passes), exact)
    assert found["out"] < 2e-2
    for gradient in ("dq", "dk", "dv"):
        assert found[gradient] < 2e-2 if peer.backward else found[gradient] is None
    if name in SENT:
        for rank in passes:
            assert tuple(sum(rank.sent[way].values()) for way in ("forward", "backward")) == SENT[name]


class TestCommand:
    SIZES = ("cp=2", "seq=64", "heads=2", "kv_heads=2", "head_dim=8", "dtypes=fp32", "repeats=1")

    def test_side_by_side(self, capfd, tmp_path):
        where = tmp_path / "peers.json"
        chosen = ("peers=torch_ring,yunchang", "strategies=ring", f"output={where}")
        assert cli.main(["bench", "attention", "--peers", *self.SIZES, *chosen]) == 0
        out = capfd.readouterr().out
        for word in ("torch context parallel, all-to-all", "lctrain ring", "Ours beside the best exact peer", "yunchang USP"):
            assert word in out
        rows = {row["contender"]: row for row in json.loads(where.read_text())["results"]}
        theirs, ours = (rows[name] for name in ("torch context parallel, all-to-all", "lctrain ring"))
        assert theirs["exact"]
        assert ours["exact"]
        assert sum(map(sum, ours["sent"].values())) < sum(map(sum, theirs["sent"].values()))
        assert "yunchang" in rows["yunchang USP, 2 x ring"]["why_not"] or "itself" in rows["yunchang USP, 2 x ring"]["why_not"]

    @pytest.mark.parametrize(
        ("args", "message"),
        [(["peers=flash"], "peers"), (["heads=8", "kv_heads=3"], "heads=8 is not a multiple of kv_heads=3")],
    )
    def test_bad_requests_end_in_one_line(self, capfd, args, message):
        assert cli.main(["bench", "attention", "--peers", *args]) == 2
        err = capfd.readouterr().err
        assert message in err
        assert err.count("\n") == 1
