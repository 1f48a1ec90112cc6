"""Several ranks save one checkpoint, and any other number of them loads it."""

import errno
import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lctrain.checkpoint import folders, store
from lctrain.checkpoint.agree import agreed, from_rank_0
from lctrain.checkpoint.rng import rng_state, set_rng_state
from lctrain.checkpoint.store import CheckpointStore
from lctrain.errors import UserError
from lctrain.launch.ranks import RankError, run_ranks

pytestmark = pytest.mark.timeout(120)


def make_state(world_size, sharded, seed=0):
    """Weights and moments of odd sizes, as FSDP2 shards them or whole, the same numbers for any number of ranks."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    weights = dict(model.state_dict())
    return {
        "model": weights,
        "optimizer": {
            "moments": {name: weight.detach() * 2 for name, weight in weights.items()},
            "steps": torch.tensor(float(seed)),
            "lr": 0.1 + seed,
        },
    }


def whole(tensors):
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def save(rank, world_size, folder, sharded, seed, step=1):
    CheckpointStore(folder, keep_last=2).save(step, make_state(world_size, sharded, seed), {"seed": seed})


def load(rank, world_size, folder, sharded, seed):
    """Whether a state of other numbers, filled from the checkpoint, equals the saved one bit for bit."""
    state = make_state(world_size, sharded, seed=99)
    checkpoints = CheckpointStore(folder, keep_last=2)
    meta = checkpoints.load(checkpoints.newest_verified(), state)
    expected = make_state(1, False, seed)
    same = [
        torch.equal(a, b)
        for part, other in (
            (state["model"], expected["model"]),
            (state["optimizer"]["moments"], expected["optimizer"]["moments"]),
        )
        for a, b in zip(whole(part).values(), other.values(), strict=True)
    ]
    optimizer = state["optimizer"]
    return all(same) and (meta["seed"], optimizer["lr"], optimizer["steps"].item()) == (seed, 0.1 + seed, float(seed))


@pytest.mark.parametrize("saved", [(2, True), (4, True), (2, False)], ids=["fsdp 2", "fsdp 4", "ddp 2"])
def test_any_layout_loads_any_other(tmp_path, saved):
    world_size, sharded = saved
    run_ranks(save, world_size, str(tmp_path), sharded, 3)
    assert load(0, 1, tmp_path, False, 3)  # one process without a process group
    for other in ((2, True), (2, False), (4, True)):
        assert run_ranks(load, other[0], str(tmp_path), other[1], 3) == [True] * other[0]


def test_one_process_saves_for_several(tmp_path):
    save(0, 1, tmp_path, False, 5)
    assert run_ranks(load, 2, str(tmp_path), True, 5) == [True] * 2


def save_replicated(rank, world_size, folder):
    CheckpointStore(folder, keep_last=1).save(1, {"model": {"w": torch.ones(100_000)}}, {})


def test_replicated_tensors_are_written_once(tmp_path):
    run_ranks(save_replicated, 4, str(tmp_path))
    assert sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir()) < 1.1 * 400_000


def rng_round_trip(rank, world_size, folder):
    torch.manual_seed(rank)
    random.seed(rank)
    checkpoints = CheckpointStore(folder, keep_last=1)
    path = checkpoints.save(1, {"rng": rng_state(rank)}, {})
    expected = torch.rand(3).tolist(), random.random()
    torch.manual_seed(50)
    state = {"rng": rng_state(rank)}
    checkpoints.load(path, state)
    set_rng_state(state["rng"])
    return expected == (torch.rand(3).tolist(), random.random())


def rng_of_more_ranks(rank, world_size, folder):
    torch.manual_seed(60 + rank)
    seeded = torch.rand(1).item()
    torch.manual_seed(60 + rank)
    state = {"rng": rng_state(rank)}
    checkpoints = CheckpointStore(folder, keep_last=1)
    checkpoints.load(checkpoints.newest_verified(), state)
    set_rng_state(state["rng"])
    return torch.rand(1).item() == seeded


def test_each_rank_has_its_own_random_state(tmp_path):
    assert run_ranks(rng_round_trip, 2, str(tmp_path)) == [True, True]
    assert run_ranks(rng_of_more_ranks, 4, str(tmp_path)) == [False, False, True, True]


def outcome(action):
    try:
        return "done", action()
    except Exception as error:
        return type(error).__name__, str(error)


def save_on_full_disk(rank, world_size, folder, elements):
    """Rank 0's look at the free space says that all is well; then the file system refuses."""
    real, folders.free_bytes = folders.free_bytes, lambda path: 10**12
    try:
        state = {"model": {f"w{i}": torch.zeros(elements) for i in range(4)}}
        return outcome(lambda: CheckpointStore(folder, keep_last=1).save(2, state, {}))
    finally:
        folders.free_bytes = real


def test_disk_that_fills_up_is_told_by_every_rank(tmp_path, small_disk):
    folder = small_disk(2000) / "checkpoints"
    save(0, 1, folder, False, 1)
    begin = time.monotonic()
    outcomes = run_ranks(save_on_full_disk, 2, str(folder), 200_000)
    assert time.monotonic() - begin < 30
    assert {kind for kind, _ in outcomes} == {"UserError"}
    assert len({text for _, text in outcomes}) == 1
    assert "step-00000002 cannot be written: No space left on device; it needs 3.2 MB" in outcomes[0][1]
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert run_ranks(load, 2, str(folder), False, 1) == [True, True]


def save_with_one_refusal(rank, world_size, folder, refuser, place):
    real = getattr(store, place)

    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    if rank == refuser:
        setattr(store, place, refuse)
    try:
        return outcome(lambda: save(rank, world_size, folder, False, 1))
    finally:
        setattr(store, place, real)


@pytest.mark.parametrize(("refuser", "place"), [(1, "hash_files"), (0, "hash_files"), (0, "write_manifest")])
def test_refusal_on_one_rank_is_told_by_every_rank(tmp_path, refuser, place):
    outcomes = run_ranks(save_with_one_refusal, 2, str(tmp_path), refuser, place)
    assert {kind for kind, _ in outcomes} == {"UserError"}
    assert "Permission denied" in outcomes[0][1]
    assert list(tmp_path.iterdir()) == []


def load_misfit(rank, world_size, folder):
    checkpoints = CheckpointStore(folder, keep_last=1)
    return outcome(lambda: checkpoints.load(checkpoints.newest_verified(), {"model": {"0.weight": torch.zeros(5 + rank, 5)}}))


def test_misfit_is_told_by_every_rank(tmp_path):
    save(0, 1, tmp_path, False, 1)
    outcomes = run_ranks(load_misfit, 2, str(tmp_path))
    assert {kind for kind, _ in outcomes} == {"UserError"}
    assert "has model/0.weight as [7, 5] float32, the config makes it [5, 5] float32" in outcomes[0][1]


def fall_back(rank, world_size, folder):
    said = []
    checkpoints = CheckpointStore(folder, keep_last=2, say=said.append)
    return str(checkpoints.newest_verified()), len(said)


def test_all_ranks_fall_back_to_the_same_checkpoint(tmp_path):
    run_ranks(save, 2, str(tmp_path), True, 1, 10)
    run_ranks(save, 2, str(tmp_path), True, 2, 20)
    os.truncate(tmp_path / "step-00000020" / "__1_0.distcp", 10)
    older = str(tmp_path / "step-00000010")
    assert run_ranks(fall_back, 2, str(tmp_path)) == [(older, 1), (older, 0)]


def all_damaged(rank, world_size, folder):
    return outcome(lambda: CheckpointStore(folder, keep_last=2).newest_verified())[0]


def test_every_rank_hears_that_nothing_is_whole(tmp_path):
    (tmp_path / "step-00000010").mkdir()
    assert run_ranks(all_damaged, 2, str(tmp_path)) == ["UserError"] * 2


def save_and_die(rank, world_size, folder):
    real = store.save_tensors

    def die(*arguments):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)

    store.save_tensors = die
    save(rank, world_size, folder, False, 2, 20)


def test_kill_9_of_a_rank_in_a_save_ends_the_others_and_loses_nothing(tmp_path):
    run_ranks(save, 2, str(tmp_path), False, 1, 10)
    begin = time.monotonic()
    with pytest.raises(RankError):
        run_ranks(save_and_die, 2, str(tmp_path))
    assert time.monotonic() - begin < 20
    assert run_ranks(load, 2, str(tmp_path), True, 1) == [True, True]


def agree(rank, world_size):
    def fails(who, error):
        return outcome(lambda: agreed(lambda: (_ for _ in ()).throw(error) if rank in who else rank))

    def fails_on_0():
        raise UserError("said by 0")

    return (
        agreed(lambda: rank * 10),
        fails([1], ValueError("bug")),
        fails([1], UserError("yours")),
        from_rank_0(lambda: rank + 5),
        outcome(lambda: from_rank_0(fails_on_0)),
        dist.get_world_size(),
    )


def test_agreement():
    first, second = run_ranks(agree, 2)
    user = ("UserError", "yours")
    assert first == (0, ("RuntimeError", "rank 1 failed: ValueError: bug"), user, 5, ("UserError", "said by 0"), 2)
    assert second == (10, ("ValueError", "bug"), user, 5, ("UserError", "said by 0"), 2)
