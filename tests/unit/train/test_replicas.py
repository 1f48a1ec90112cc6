"""One flipped bit in one copy of the weights: found, and its rank named."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lctrain.checkpoint.state import State
from lctrain.faults.replicas import different_replicas, fingerprint
from lctrain.launch.ranks import run_ranks
from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import read_events


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_every_bit_counts(dtype):
    tensor = torch.arange(7).to(dtype)
    prints = {fingerprint(tensor)}
    for byte in range(tensor.numel() * tensor.element_size()):
        for bit in (0, 7):
            changed = tensor.clone()
            changed.view(torch.uint8)[byte] ^= 1 << bit
            prints.add(fingerprint(changed))
    assert len(prints) == 1 + 2 * tensor.numel() * tensor.element_size()
    assert fingerprint(tensor.flip(0)) not in prints
    assert fingerprint(torch.tensor([])) == 0
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))


def compare(rank: int, world_size: int, bad: tuple[int, ...], sharded: bool) -> tuple[int, list[str]]:
    weights: State = {"a": torch.ones(5), "b": {"c": torch.zeros(3, 2)}}
    if sharded:
        mesh = init_device_mesh("cpu", (world_size // 2, 2))
        weights["b"]["c"] = distribute_tensor(torch.arange(8.0), mesh, [Replicate(), Shard(0)])
        own = weights["b"]["c"].to_local()
    else:
        own = weights["b"]["c"]
    if rank in bad:
        own.view(-1)[1] += 1 + rank
    dist.barrier()
    return different_replicas(weights)


def test_the_odd_one_is_named():
    assert run_ranks(compare, 3, (), False) == [(2, [])] * 3
    assert run_ranks(compare, 3, (1,), False) == [(2, ["rank 1 differs from the others in b/c"])] * 3
    assert run_ranks(compare, 2, (1,), False) == [(2, ["ranks 0, 1 differ from each other in b/c"])] * 2
    assert run_ranks(compare, 1, (), False) == [(0, [])]


def test_copies_of_shards():
    assert run_ranks(compare, 4, (), True) == [(3, [])] * 4
    assert run_ranks(compare, 4, (3,), True)[0] == (3, ["ranks 1, 3 differ from each other in b/c"])
    assert run_ranks(compare, 2, (1,), True)[0] == (1, [])  # its shard has no copy


def flipped(rank: int, world_size: int, config) -> str:
    import lctrain.train
    from lctrain.engines.make import make_engine
    from lctrain.engines.torch_engine import TorchEngine
    from lctrain.errors import UserError
    from lctrain.launch.process import Process

    class Engine(TorchEngine):
        def update(self, lr):
            super().update(lr)
            self.updates = getattr(self, "updates", 0) + 1
            if self.updates == 3 and rank == 1:
                self.model.embedding.data.view(torch.int32).view(-1)[17] ^= 1

    lctrain.train.make_engine = Engine
    try:
        lctrain.train.train(config, Process(rank, world_size, rank, world_size))
    except UserError as error:
        return str(error)
    finally:
        lctrain.train.make_engine = make_engine
    return "nothing was noticed"


def test_a_run_stops_before_it_saves_a_broken_copy(make_config):
    config = make_config(replica_check_every=2, processes=3)
    messages = run_ranks(flipped, 3, config)
    assert len(set(messages)) == 1
    assert messages[0].startswith("step 4: copies of the weights differ: rank 1 differs from the others in embedding")
    run = RunDir(config.run_dir)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000002"]
    assert [event["step"] for event in read_events(run.events) if event["kind"] == "replicas_differ"] == [4]
