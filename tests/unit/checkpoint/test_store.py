"""One process saves, verifies, falls back and loads."""

import errno
import json
import os
import re
import signal
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lctrain.checkpoint import folders, manifest, store, tensors
from lctrain.checkpoint.rng import rng_state
from lctrain.checkpoint.store import CheckpointStore
from lctrain.errors import UserError


def make_state(fill=0.0):
    return {
        "model": {"layers.0.weight": torch.full((4, 3), fill), "bias": torch.full((3,), fill, dtype=torch.bfloat16)},
        "optimizer": {
            "step": torch.tensor(fill),
            "lr": fill,
            "groups": [{"betas": (0.9, fill), "names": ["a"], "fused": None}],
        },
        "rng": rng_state(0),
    }


def make_store(path, **settings):
    said = []
    return CheckpointStore(path, **{"keep_last": 2, "say": said.append, **settings}), said


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def largest_file(checkpoint):
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_round_trip_is_bitwise(tmp_path):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1000,), generator=generator, dtype=torch.int64).to(torch.int32)
    saved = {
        "all": {
            "floats": bits.view(torch.float32),  # NaNs with payload, infinities, denormals, negative zeros
            "halves": bits.to(torch.int16).view(torch.bfloat16),
            "integers": bits.to(torch.int64),
            "flags": bits > 0,
            "scalar": torch.tensor(1 / 3, dtype=torch.float64),
            "empty": torch.empty(0, 5),
            "transposed": bits.view(20, 50).T,
        }
    }
    checkpoints, _ = make_store(tmp_path)
    path = checkpoints.save(1, saved, {})
    loaded = {"all": {name: torch.zeros_like(tensor) for name, tensor in saved["all"].items()}}
    checkpoints.load(path, loaded)
    for name, tensor in saved["all"].items():
        assert as_bytes(loaded["all"][name]) == as_bytes(tensor), name


def test_values_and_meta_come_back(tmp_path):
    checkpoints, _ = make_store(tmp_path)
    path = checkpoints.save(12, make_state(1 / 3), {"samples": 12345678901234, "name": "ü", "digest": [1, None]})
    assert path.name == "step-00000012"
    loaded = make_state()
    assert checkpoints.load(path, loaded) == {"samples": 12345678901234, "name": "ü", "digest": [1, None]}
    assert loaded["optimizer"]["lr"] == 1 / 3
    assert loaded["optimizer"]["groups"] == [{"betas": (0.9, 1 / 3), "names": ["a"], "fused": None}]


def test_parts_can_be_loaded_alone(tmp_path):
    checkpoints, _ = make_store(tmp_path)
    path = checkpoints.save(1, make_state(2.0), {})
    model = make_state()["model"]
    checkpoints.load(path, {"model": model})
    assert model["bias"].tolist() == [2.0] * 3


def test_parameters_that_need_gradients_are_filled_in_place(tmp_path):
    checkpoints, _ = make_store(tmp_path)
    path = checkpoints.save(1, {"model": {"w": torch.ones(3)}}, {})
    parameter = torch.nn.Parameter(torch.zeros(3))
    checkpoints.load(path, {"model": {"w": parameter}})
    assert parameter.tolist() == [1.0] * 3
    assert parameter.requires_grad


def test_newest_and_multiples_are_kept(tmp_path):
    checkpoints, _ = make_store(tmp_path, keep_every=20)
    for step in (10, 20, 30, 40, 50, 60, 70):
        checkpoints.save(step, make_state(), {})
    assert names(tmp_path) == [f"step-000000{step}" for step in (20, 40, 60, 70)]
    assert checkpoints.newest_verified() == tmp_path / "step-00000070"


def test_no_checkpoint(tmp_path):
    assert make_store(tmp_path / "nothing")[0].newest_verified() is None
    (tmp_path / "tmp-step-00000005-abcd").mkdir()
    (tmp_path / "notes").mkdir()
    assert make_store(tmp_path)[0].newest_verified() is None


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped bit": (lambda folder: flip_bit(largest_file(folder)), r"__0_0.distcp is damaged: its content does not match"),
    "flipped metadata": (lambda folder: flip_bit(folder / ".metadata"), r"\.metadata is damaged"),
    "truncated": (lambda folder: os.truncate(largest_file(folder), 100), r"__0_0.distcp is damaged: 100 bytes instead of \d+"),
    "lost file": (lambda folder: largest_file(folder).unlink(), r"__0_0.distcp is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), r"manifest.json is missing: the checkpoint was not"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_text(""), r"manifest.json is damaged"),
    "foreign manifest": (lambda folder: (folder / "manifest.json").write_text("[1]"), r"manifest.json is damaged"),
    "edited manifest": (
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"n": 20', '"n": 21')
        ),
        r"manifest.json is damaged: its content does not match its hash",
    ),
    "empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], r"manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_passed_over_and_named(tmp_path, damage):
    checkpoints, said = make_store(tmp_path)
    checkpoints.save(10, make_state(), {"n": 10})
    checkpoints.save(20, make_state(), {"n": 20})
    assert checkpoints.verify(tmp_path / "step-00000020") == []
    harm, message = DAMAGES[damage]
    harm(tmp_path / "step-00000020")
    again, said = make_store(tmp_path)
    assert again.newest_verified() == tmp_path / "step-00000010"
    (warning,) = said
    assert warning.startswith(f"warning: checkpoint {tmp_path / 'step-00000020'} is not used: ")
    assert re.search(message, warning)
    with pytest.raises(UserError, match=message):
        again.load(tmp_path / "step-00000020", make_state())


def test_only_damaged_checkpoints_need_a_person(tmp_path):
    checkpoints, _ = make_store(tmp_path)
    flip_bit(largest_file(checkpoints.save(10, make_state(), {})))
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        checkpoints.newest_verified()


def test_every_flipped_byte_is_found(tmp_path):
    checkpoints, _ = make_store(tmp_path)
    path = checkpoints.save(1, {"model": {"w": torch.ones(2)}}, {"n": 1})
    for file in path.iterdir():
        whole = file.read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 60)):
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x20]) + whole[position + 1 :])
            assert checkpoints.verify(path), f"{file.name} byte {position}"
        file.write_bytes(whole)
    assert checkpoints.verify(path) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"a": torch.zeros(4), "b": torch.zeros(2), "c": torch.zeros(1)}, "has no model/c"),
        ({"a": torch.zeros(4)}, "has model/b, which the config does not make"),
        ({"a": torch.zeros(5), "b": torch.zeros(2)}, r"has model/a as \[4\] float32, the config makes it \[5\] float32"),
        ({"a": torch.zeros(4).half(), "b": torch.zeros(2)}, r"model/a as \[4\] float32, the config makes it \[4\] float16"),
        ({"a": torch.zeros(4), "b": torch.zeros(2), "lr": 1.0}, "has no model/lr"),
    ],
)
def test_state_that_does_not_fit_is_named_and_left_alone(tmp_path, model, message):
    checkpoints, _ = make_store(tmp_path)
    path = checkpoints.save(1, {"model": {"a": torch.ones(4), "b": torch.ones(2)}}, {})
    with pytest.raises(UserError, match=message):
        checkpoints.load(path, {"model": model})
    assert not any(tensor.any() for tensor in model.values() if isinstance(tensor, torch.Tensor))


def test_missing_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        make_store(tmp_path)[0].load(tmp_path / "step-1", {})


def test_state_names_cannot_collide():
    with pytest.raises(TypeError, match="without '/'"):
        store.tensors_of({"a": {"b/c": torch.ones(1)}})
    with pytest.raises(TypeError, match="texts"):
        store.tensors_of({"a": {1: torch.ones(1)}})


def test_same_step_is_replaced(tmp_path):
    checkpoints, _ = make_store(tmp_path)
    flip_bit(largest_file(checkpoints.save(10, make_state(1.0), {"n": 1})))
    path = checkpoints.save(10, make_state(2.0), {"n": 2})
    loaded = make_state()
    assert checkpoints.load(path, loaded) == {"n": 2}
    assert loaded["model"]["bias"][0] == 2.0
    assert names(tmp_path) == ["step-00000010"]


def test_crash_between_the_renames_of_a_replacement_loses_nothing(tmp_path):
    checkpoints, _ = make_store(tmp_path)
    checkpoints.save(10, make_state(), {"n": 1}).rename(tmp_path / "old-step-00000010-abcdef01")
    (tmp_path / "tmp-step-00000010-12345678").mkdir()
    again, _ = make_store(tmp_path)
    assert again.load(again.newest_verified(), make_state()) == {"n": 1}
    again.save(20, make_state(), {})
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_checkpoints_of_an_abandoned_future_are_set_aside(tmp_path):
    """Resumed from step 10, the run must neither continue from the other history's step 30 nor lose its own for it."""
    checkpoints, said = make_store(tmp_path, keep_last=3)
    for step in (10, 20, 30):
        checkpoints.save(step, make_state(), {"history": 1})
    checkpoints.save(15, make_state(), {"history": 2})
    assert checkpoints.newest_verified() == tmp_path / "step-00000015"
    assert [path.name.rpartition("-")[0] for path in sorted(tmp_path.glob("abandoned-*"))] == [
        "abandoned-step-00000020",
        "abandoned-step-00000030",
    ]
    assert len(said) == 2
    assert names(tmp_path)[2:] == ["step-00000010", "step-00000015"]
    assert make_store(tmp_path)[0].verify(next(tmp_path.glob("abandoned-*"))) == []


def test_kill_9_at_any_time_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """The newest verified checkpoint is always the last one that `save` returned, or the one that was being written."""
    checkpoints, _ = make_store(tmp_path)
    checkpoints.save(10, make_state(10.0), {"n": 10})
    points = ["save_tensors", "hash_files", "write_manifest", "publish", "retain"]
    for number, point in enumerate(points):
        for late in (False, True):
            pid = os.fork()
            if pid == 0:
                torch.set_num_threads(1)
                home = folders if point in ("publish", "retain") else store
                original = getattr(home, point)

                def killed(*arguments, original=original, late=late):
                    if late:
                        original(*arguments)
                    os.kill(os.getpid(), signal.SIGKILL)

                setattr(home, point, killed)
                make_store(tmp_path)[0].save(20, make_state(20.0), {"n": 20})
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
            again, _ = make_store(tmp_path)
            loaded = make_state()
            meta = again.load(again.newest_verified(), loaded)
            assert meta["n"] == (20 if (number, late) >= (3, True) else 10), (point, late)
            assert loaded["model"]["bias"][0] == meta["n"]
    checkpoints, _ = make_store(tmp_path)
    checkpoints.save(30, make_state(), {})
    assert names(tmp_path) == ["step-00000020", "step-00000030"]


def test_too_small_disk_is_noticed_before_writing(small_disk):
    disk = small_disk(1000)
    checkpoints, _ = make_store(disk / "checkpoints")
    checkpoints.save(1, {"model": {"w": torch.zeros(10)}}, {})
    before = names(disk / "checkpoints")
    with pytest.raises(
        UserError, match=r"step-00000002 cannot be written: No space left.* needs 4\.0 MB and \d\.\d MB are free"
    ):
        checkpoints.save(2, {"model": {"w": torch.zeros(1_000_000)}}, {})
    assert names(disk / "checkpoints") == before
    assert checkpoints.newest_verified() == disk / "checkpoints" / "step-00000001"


def test_disk_that_fills_up_while_writing(small_disk, monkeypatch):
    disk = small_disk(1000)
    checkpoints, _ = make_store(disk / "checkpoints")
    checkpoints.save(1, {"model": {"w": torch.zeros(10)}}, {})
    real = folders.free_bytes
    answers = iter([10**9])
    monkeypatch.setattr(folders, "free_bytes", lambda folder: next(answers, None) or real(folder))
    with pytest.raises(UserError, match=r"step-00000002 cannot be written: No space left.* needs 4\.0 MB and"):
        checkpoints.save(2, {"model": {"w": torch.zeros(1_000_000)}}, {})
    assert names(disk / "checkpoints") == ["step-00000001"]
    checkpoints.save(3, {"model": {"w": torch.zeros(10)}}, {})


@pytest.fixture
def four_files(monkeypatch):
    """Even the smallest checkpoint is written as four files at a time."""
    monkeypatch.setattr(tensors, "SMALLEST_FILE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)


def test_several_files(tmp_path, four_files):
    checkpoints, _ = make_store(tmp_path)
    sizes = (300, 70, 100, 1, 0, 200, 99, 1000)
    state = {"model": {str(number): torch.rand(size) for number, size in enumerate(sizes)}}
    path = checkpoints.save(1, state, {})
    assert names(path) == [".metadata", "__0_0.distcp", "__0_1_0.distcp", "__0_2_0.distcp", "__0_3_0.distcp", "manifest.json"]
    assert manifest.problems(path) == []
    back = {"model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()}}
    checkpoints.load(path, back)
    assert all(torch.equal(back["model"][name], tensor) for name, tensor in state["model"].items())


def test_no_more_files_than_tensors(tmp_path, four_files):
    checkpoints, _ = make_store(tmp_path)
    path = checkpoints.save(1, {"model": {"a": torch.rand(3), "b": torch.rand(2)}}, {})
    assert sorted(path.glob("*.distcp")) == [path / "__0_0.distcp", path / "__0_1_0.distcp"]
    checkpoints.save(2, {"model": {}, "optimizer": {"lr": 1.0}}, {})


def test_one_of_several_files_does_not_fit(small_disk, monkeypatch, four_files):
    disk = small_disk(1000)
    checkpoints, _ = make_store(disk / "checkpoints")
    checkpoints.save(1, {"model": {"w": torch.zeros(10)}}, {})
    real = folders.free_bytes
    answers = iter([10**9])
    monkeypatch.setattr(folders, "free_bytes", lambda folder: next(answers, None) or real(folder))
    with pytest.raises(UserError, match=r"step-00000002 cannot be written: No space left"):
        checkpoints.save(2, {"model": {"large": torch.zeros(400_000), **{f"{n}": torch.zeros(10) for n in range(5)}}}, {})
    assert names(disk / "checkpoints") == ["step-00000001"]


@pytest.mark.parametrize("place", ["write_manifest", "hash_files"])
def test_refusing_file_system_without_a_mount(tmp_path, monkeypatch, place):
    checkpoints, _ = make_store(tmp_path)
    checkpoints.save(1, make_state(), {})

    def refuse(*arguments):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(store, place, refuse)
    with pytest.raises(UserError, match="Disk quota exceeded"):
        checkpoints.save(2, make_state(), {})
    assert names(tmp_path) == ["step-00000001"]


def test_a_bug_is_not_called_a_full_disk(tmp_path, monkeypatch):
    def bug(*arguments):
        raise ValueError("a bug")

    monkeypatch.setattr(store, "write_manifest", bug)
    with pytest.raises(ValueError, match="a bug"):
        make_store(tmp_path)[0].save(2, make_state(), {})
    assert names(tmp_path) == []


def test_failure_to_delete_old_ones_does_not_fail_the_save(tmp_path, monkeypatch):
    checkpoints, said = make_store(tmp_path, keep_last=1)
    checkpoints.save(1, make_state(), {})

    def refuse(*arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(folders.shutil, "rmtree", refuse)
    checkpoints.save(2, make_state(), {})
    assert "could not be deleted: Permission denied" in said[0]
    assert checkpoints.newest_verified() == tmp_path / "step-00000002"


def test_nothing_is_unpickled_from_a_damaged_checkpoint(tmp_path, monkeypatch):
    checkpoints, _ = make_store(tmp_path)
    path = checkpoints.save(1, make_state(), {})
    flip_bit(path / ".metadata")
    monkeypatch.setattr(tensors, "_metadata", lambda folder: pytest.fail("the metadata was read"))
    with pytest.raises(UserError, match=r"\.metadata is damaged"):
        make_store(tmp_path)[0].load(path, make_state())


def test_all_files_are_in_the_manifest(tmp_path):
    path = make_store(tmp_path)[0].save(7, make_state(), {"a": 1})
    written = json.loads((path / "manifest.json").read_text())
    assert {*written["files"], "manifest.json"} == {entry.name for entry in path.iterdir()}
    assert (written["step"], written["world_size"], written["torch"]) == (7, 1, torch.__version__)
    assert abs(written["time"] - time.time()) < 60


@given(st.dictionaries(st.text(st.characters(blacklist_categories=["Cs"]), max_size=5), st.integers() | st.text(max_size=5)))
def test_manifest_round_trip(tmp_path_factory, meta):
    folder = tmp_path_factory.mktemp("manifest")
    manifest.write_manifest(folder, {"meta": meta, "files": {}})
    assert manifest.read_manifest(folder)["meta"] == meta
    assert manifest.problems(folder) == []


def test_size_text():
    assert [store._size(count) for count in (0, 999, 1500, 3.2e6, 7.3e9, 5e12, 4e15)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "3.2 MB",
        "7.3 GB",
        "5.0 TB",
        "4000.0 TB",
    ]
