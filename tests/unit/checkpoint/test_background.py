"""Saving in the background: what is saved is the state of that moment; errors come out; nothing is lost."""

import os
import threading
import time

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lctrain.checkpoint import folders, host_copy, store
from lctrain.checkpoint.background import Saver
from lctrain.checkpoint.store import CheckpointStore
from lctrain.errors import UserError
from lctrain.launch.ranks import run_ranks


def state_of(value: float) -> dict:
    return {
        "model": {"w": torch.full((3, 4), value), "scalar": torch.tensor(value), "none": torch.zeros(0)},
        "optimizer": {"lr": value, "betas": [value, 0.5]},
    }


def loaded(checkpoints: CheckpointStore) -> tuple[dict, dict]:
    path = checkpoints.newest_verified()
    assert path is not None
    state = state_of(-1.0)
    return checkpoints.load(path, state), state


def test_the_run_goes_on_while_it_is_written(tmp_path, monkeypatch):
    go, checkpoints = threading.Event(), CheckpointStore(tmp_path, keep_last=2)
    real = store.save_tensors
    monkeypatch.setattr(store, "save_tensors", lambda *arguments: go.wait(60) and real(*arguments))
    saver, state = Saver(checkpoints, asynchronous=True), state_of(1.0)
    meta = {"step": [1]}
    saver.save(1, state, meta)
    assert saver.finished() == []
    assert checkpoints.newest_verified() is None
    saver.before_change()
    state["model"]["w"].add_(5)  # the next step
    state["model"]["scalar"].add_(5)
    state["optimizer"]["betas"][0] = 7.0
    meta["step"][0] = 7
    go.set()
    saver.wait()
    (saved,) = saver.finished()
    assert (saved.step, saved.path) == (1, tmp_path / "step-00000001")
    assert saved.stall_s < saved.seconds
    assert saver.finished() == []
    meta, back = loaded(checkpoints)
    assert meta == {"step": [1]}
    assert torch.equal(back["model"]["w"], torch.full((3, 4), 1.0))
    assert back["model"]["scalar"] == 1.0
    assert back["optimizer"] == {"lr": 1.0, "betas": [1.0, 0.5]}


def test_the_save_does_not_wait_for_the_copy_but_the_next_change_does(tmp_path, monkeypatch):
    go, real, order = threading.Event(), host_copy.copy_all, []

    def held(pairs):
        go.wait(60)
        real(pairs)
        order.append("copied")

    monkeypatch.setattr(host_copy, "copy_all", held)
    checkpoints = CheckpointStore(tmp_path, keep_last=2)
    saver, state = Saver(checkpoints, asynchronous=True), state_of(1.0)
    saver.before_change()  # nothing was saved yet
    saver.save(1, state, {})  # or it would never return
    state["optimizer"]["lr"] = 7.0  # values need no waiting
    threading.Timer(0.2, go.set).start()
    saver.before_change()
    order.append("changed")
    state["model"]["w"].add_(5)
    saver.before_change()
    saver.wait()
    assert order == ["copied", "changed"]
    (saved,) = saver.finished()
    assert 0.15 < saved.stall_s <= saved.seconds
    _, back = loaded(checkpoints)
    assert torch.equal(back["model"]["w"], torch.full((3, 4), 1.0))
    assert back["optimizer"]["lr"] == 1.0


def test_a_copy_that_fails_keeps_nobody_waiting(tmp_path, monkeypatch):
    def fail(pairs):
        raise MemoryError("no host memory")

    checkpoints = CheckpointStore(tmp_path, keep_last=2)
    saver = Saver(checkpoints, asynchronous=True)
    with monkeypatch.context() as patched:
        patched.setattr(host_copy, "copy_all", fail)
        saver.save(1, state_of(1.0), {})
        saver.before_change()
        with pytest.raises(MemoryError, match="no host memory"):
            saver.wait()
    saver.save(2, state_of(2.0), {})
    saver.before_change()
    saver.wait()
    assert [saved.step for saved in saver.finished()] == [2]


@pytest.mark.parametrize("make", [lambda: torch.arange(12.0).view(3, 4).t(), lambda: torch.arange(6).bfloat16()[::2]])
def test_tensors_that_do_not_lie_in_one_piece(tmp_path, make):
    saver = Saver(CheckpointStore(tmp_path, keep_last=1), asynchronous=True)
    saver.save(1, {"model": {"w": make()}}, {})
    saver.wait()
    back = {"model": {"w": torch.zeros_like(make()).contiguous()}}
    saver.store.load(tmp_path / "step-00000001", back)
    assert torch.equal(back["model"]["w"], make())


def test_the_next_save_waits_for_the_one_before_and_uses_its_buffers(tmp_path, monkeypatch):
    writing, most = [], 0
    real = store.save_tensors

    def slow(*arguments):
        nonlocal most
        writing.append(1)
        most = max(most, len(writing))
        time.sleep(0.2)
        real(*arguments)
        writing.pop()

    monkeypatch.setattr(store, "save_tensors", slow)
    checkpoints = CheckpointStore(tmp_path, keep_last=5)
    saver = Saver(checkpoints, asynchronous=True)
    for step in (1, 2, 3):
        saver.save(step, state_of(float(step)), {})
    saver.wait()
    assert most == 1
    assert [saved.step for saved in saver.finished()] == [1, 2, 3]
    for step in (1, 2, 3):
        state = state_of(0.0)
        checkpoints.load(tmp_path / folders.checkpoint_name(step), state)
        assert state["model"]["scalar"] == step


def test_a_lost_permission_comes_out_once_and_later_saves_work(tmp_path, monkeypatch):
    checkpoints = CheckpointStore(tmp_path / "c", keep_last=2)
    saver = Saver(checkpoints, asynchronous=True)
    saver.save(1, state_of(1.0), {})
    saver.wait()
    with monkeypatch.context() as patched:

        def refuse(*arguments):
            raise PermissionError(13, "Permission denied")

        patched.setattr(store, "save_tensors", refuse)
        saver.save(2, state_of(2.0), {})
        while not saver.failed:
            time.sleep(0.01)
    with pytest.raises(UserError, match="step-00000002 cannot be written: Permission denied"):
        saver.save(3, state_of(3.0), {})
    assert not saver.failed
    saver.save(4, state_of(4.0), {})
    saver.wait()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000001", "step-00000004"]


def test_full_disk(small_disk):
    checkpoints = CheckpointStore(small_disk(1000) / "checkpoints", keep_last=1)
    saver = Saver(checkpoints, asynchronous=True)
    saver.save(1, state_of(1.0), {})
    saver.save(2, {"model": {"w": torch.zeros(1_000_000)}}, {})
    with pytest.raises(UserError, match="step-00000002 cannot be written: No space left"):
        saver.wait()
    assert loaded(checkpoints)[1]["model"]["scalar"] == 1.0


def test_killed_while_writing(tmp_path):
    checkpoints = CheckpointStore(tmp_path, keep_last=2)
    checkpoints.save(1, state_of(1.0), {"n": 1})
    pid = os.fork()
    if pid == 0:
        store.write_manifest = lambda *arguments: time.sleep(60)
        Saver(checkpoints, asynchronous=True).save(2, state_of(2.0), {})
        while not list(tmp_path.glob("tmp-*/__0_0.distcp")):
            time.sleep(0.01)
        os._exit(9)
    os.waitpid(pid, 0)
    assert list(tmp_path.glob("tmp-step-00000002-*"))
    again = CheckpointStore(tmp_path, keep_last=2)
    assert loaded(again)[0] == {"n": 1}
    again.save(3, state_of(3.0), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def sharded(rank: int, world_size: int, folder: str) -> tuple[list[int], bool]:
    """Two saves of a sharded tensor while the ranks compute with collectives of their own; then a synchronous load."""
    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(10.0).reshape(5, 2)  # uneven shards
    state = {"model": {"w": distribute_tensor(whole.clone(), mesh, [Shard(0)])}, "rng": {str(rank): torch.tensor([rank])}}
    checkpoints = CheckpointStore(folder, keep_last=2)
    saver = Saver(checkpoints, asynchronous=True)
    for step in (1, 2):
        saver.save(step, state, {})
        for _ in range(50):
            torch.distributed.all_reduce(torch.ones(1000))
        saver.before_change()
        state["model"]["w"].to_local().add_(1)
    saver.wait()
    fresh = {"model": {"w": distribute_tensor(torch.zeros(5, 2), mesh, [Shard(0)])}, "rng": {str(rank): torch.tensor([9])}}
    checkpoints.load(f"{folder}/step-00000002", fresh)
    tensor = fresh["model"]["w"]
    assert isinstance(tensor, DTensor)
    return fresh["rng"][str(rank)].tolist(), torch.equal(tensor.full_tensor(), whole + 1)


def test_ranks_with_shards(tmp_path):
    assert run_ranks(sharded, 3, str(tmp_path)) == [([0], True), ([1], True), ([2], True)]


def one_refusal(rank: int, world_size: int, folder: str) -> str:
    real = store.hash_files
    saver = Saver(CheckpointStore(folder, keep_last=2), asynchronous=True)
    if rank == 1:

        def refuse(*arguments):
            raise PermissionError(13, "Permission denied")

        store.hash_files = refuse
    try:
        saver.save(1, {"model": {"w": torch.ones(3)}}, {})
        saver.wait()
    except UserError as error:
        return str(error)
    finally:
        store.hash_files = real
    return "nothing"


def test_all_ranks_tell_what_one_was_refused(tmp_path):
    messages = run_ranks(one_refusal, 2, str(tmp_path))
    assert len(set(messages)) == 1
    assert "step-00000001 cannot be written: Permission denied" in messages[0]
    assert list(tmp_path.iterdir()) == []
