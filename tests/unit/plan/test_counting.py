"""The counter on functions whose kernels and tensors can be counted by hand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lctrain.plan.cost import Operation, Sent
from lctrain.plan.counting import CostCounter
from lctrain.plan.fake_world import fake_world

DEVICES = ["cpu", "meta"]
KB = 1024


@pytest.mark.parametrize("device", DEVICES)
def test_peak_and_live(device):
    with CostCounter() as counter:
        x = torch.empty(KB, dtype=torch.uint8, device=device)
        counter.begin()
        y = x + x  # 1 kB more
        z = y * 3  # and another
        del y
        z = z.add_(1)
        view = z[: KB // 2]
        assert (counter.live, counter.peak) == (2 * KB, 3 * KB)
        del z
        assert counter.live == 2 * KB, "a view keeps the whole storage"
        del view
        assert counter.live == KB
    assert counter.cost(held=KB).peak == 2 * KB


@pytest.mark.parametrize("device", DEVICES)
def test_kernels(device):
    a, b = torch.zeros(8, 16, device=device), torch.zeros(16, 4, device=device)
    row = torch.zeros(1, 4, device=device)
    with CostCounter() as counter:
        c = a @ b
        c.view(4, 8)
        c.add_(row.expand(8, 4))
        torch.mm(a, b, out=c)
        c.zero_()
        torch.empty_like(a)
        b.index_select(0, torch.zeros(2, dtype=torch.int64, device=device))
    assert set(counter.cost(0).operations) == {
        Operation("aten.mm", 2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4), 2),  # views and empty tensors run no kernel
        Operation("aten.add_", 0, 4 * (32 + 4 + 32), 1),
        Operation("aten.zero_", 0, 4 * 32, 1),
        Operation("aten.zeros", 0, 16, 1),
        Operation("aten.index_select", 0, 2 * 2 * 4 * 4 + 16, 1),  # two rows of four, not all sixteen
    }


def test_named_attention():
    with CostCounter() as counter, counter.inside_attention():
        x = torch.ones(4, device="meta")
        x.view(2, 2) @ x.view(2, 2)
    assert [operation.name for operation in counter.cost(0).operations] == ["attention.aten.ones", "aten.mm"]


def test_what_is_sent_without_a_rank_group():
    with fake_world(4):
        group = dist.new_group([0, 1, 2, 3])
        x, y = torch.empty(1000, device="meta"), torch.empty(4000, device="meta")
        with CostCounter({group: "tp"}) as counter:
            dist.all_reduce(x, group=group)
            dist.all_reduce(x, group=group)
            dist.all_gather_into_tensor(y, x, group=group)
            dist.reduce_scatter_tensor(x, y, group=group)
    assert set(counter.cost(0).sent) == {
        Sent("tp", "all_reduce", 2 * 2 * 3000, 2),
        Sent("tp", "all_gather", 12000, 1),
        Sent("tp", "reduce_scatter", 12000, 1),
    }


def test_fake_world():
    """Nothing is left behind, also after an error; a process group that is there already is not touched."""

    def fail() -> None:
        with fake_world(1024, rank=7):
            assert (dist.get_rank(), dist.get_world_size()) == (7, 1024)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not dist.is_initialized()
    with fake_world(2), pytest.raises(AssertionError, match="disturb"), fake_world(2):
        pass
    assert "meta" not in dist.Backend.backend_capability["fake"]
