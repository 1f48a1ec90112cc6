"""wandb records a run that its own code can read, and never stands in the way of the training."""

import json
import struct
import sys
import threading
import time
import types

import pytest

from lctrain.errors import UserError
from lctrain.tracking import wandb as wandb_log
from lctrain.tracking.jsonl import read_metrics
from lctrain.tracking.tracker import open_tracker
from lctrain.tracking.wandb import WandbLog, check_wandb

pytestmark = pytest.mark.timeout(60)

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc0000003010100c9fe92ef"
    "0000000049454e44ae426082"
)
"""A PNG picture."""


def read_datastore(path):
    """Records of a .wandb file: after a 7-byte header, LevelDB's log format in blocks of 32 KiB, each record a protobuf."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def history(records):
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item})
    return rows


def test_offline_run_can_be_read_back_and_continues_under_its_id(run, make_config):
    config = make_config("offline")
    for start in (0, 3):
        tracker = open_tracker(config, 0, start)
        for step in range(start + 1, start + 4):
            tracker.step({"step": step, "loss": 1 / step, "something/new": step * 2})
        tracker.close()
    files = sorted(run.wandb.glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2
    rows = [row for path in files for row in history(read_datastore(path))]
    assert [(row["step"], row["loss"], row["something/new"]) for row in rows] == [(n, 1 / n, n * 2) for n in range(1, 7)]
    ids = {record.run.run_id for path in files for record in read_datastore(path) if record.WhichOneof("record_type") == "run"}
    assert ids == {run.wandb_id.read_text().strip()}


def fake_wandb(monkeypatch, init):
    module = types.ModuleType("wandb")
    module.init, module.Settings, module.teardown = init, dict, lambda: None
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(wandb_log.importlib.util, "find_spec", lambda name: module)


class FakeRun:
    def __init__(self, log=lambda record: None, finish=lambda: None):
        self.rows, self.status, self._log, self._finish = [], None, log, finish

    def define_metric(self, *arguments, **keywords):
        pass

    def log(self, record):
        self._log(record)
        self.rows.append(record)

    def finish(self, exit_code):
        self._finish()
        self.status = exit_code


def test_missing_package_is_said_before_anything_starts(monkeypatch, make_config):
    monkeypatch.setattr(wandb_log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lctrain\[wandb\]'"):
        check_wandb(make_config("online"))
    check_wandb(make_config("disabled"))


def test_unreachable_service_makes_the_run_offline(monkeypatch, run, make_config):
    said, modes, fake = [], [], FakeRun()

    def init(**settings):
        modes.append(settings["mode"])
        if settings["mode"] == "online":
            raise ConnectionError("no route to host\nmore")
        return fake

    fake_wandb(monkeypatch, init)
    log = WandbLog(run, make_config("online"), said.append)
    log.step({"step": 1})
    log.close(1)
    assert modes == ["online", "offline"]
    assert (fake.rows, fake.status) == ([{"step": 1}], 1)
    (line,) = said
    assert "no route to host" in line
    assert f"wandb sync {run.wandb}" in line


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(1)])
@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_failure_is_said_once_and_training_goes_on(monkeypatch, run, make_config, error, place):
    def fail(*arguments, **keywords):
        raise error

    fake = FakeRun(log=fail if place == "log" else lambda record: None, finish=fail if place == "finish" else lambda: None)
    fake_wandb(monkeypatch, fail if place == "init" else lambda **settings: fake)
    said = []
    log = WandbLog(run, make_config("offline"), said.append)
    for step in range(5):
        log.step({"step": step})
    log.close(0)
    (line,) = said
    assert line.startswith("wandb is off for the rest of the run")


@pytest.mark.parametrize("wanted", ["none", "last", "all"])
def test_files_pictures_and_checkpoints_go_along(run, make_config, capfd, wanted):
    config = make_config("offline", artifacts=wanted)
    run.config.write_text("a: 1\n")
    (run.path / "verify_layout.json").write_text("{}")
    run.plot.write_bytes(PIXEL)
    tracker = open_tracker(config, 0, 0)
    for step in (1, 2):
        tracker.step({"step": step, "loss": 1.0})
        folder = run.checkpoints / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text("w" * step)
        tracker.event("checkpoint", step=step, checkpoint=str(folder))
    tracker.event("checkpoint", step=3, checkpoint=str(run.checkpoints / "gone")) if wanted == "all" else None
    tracker.close()
    (file,) = run.wandb.glob("offline-run-*/*.wandb")
    records = read_datastore(file)
    named = {entry.path for record in records if record.WhichOneof("record_type") == "files" for entry in record.files.files}
    assert {"run/config.yaml", "run/verify_layout.json"} <= named
    copy = file.parent / "files" / "run" / "config.yaml"
    assert copy.read_text() == "a: 1\n"
    assert not any(path.is_symlink() for path in copy.parents[1].rglob("*"))
    said = capfd.readouterr()
    assert not [line for line in (said.out + said.err).splitlines() if line.startswith("wandb: ")]
    assert any(("loss" in row and "image-file" in str(row["loss"])) or "loss/_type" in row for row in history(records))
    versions = [
        record.request.log_artifact.artifact if record.WhichOneof("record_type") == "request" else record.artifact
        for record in records
        if record.WhichOneof("record_type") == "artifact"
        or (record.WhichOneof("record_type") == "request" and record.request.WhichOneof("request_type") == "log_artifact")
    ]
    steps = [json.loads(version.metadata)["step"] for version in versions if version.type == "model"]
    assert steps == {"none": [], "last": [2], "all": [1, 2]}[wanted]


def test_an_address_where_nobody_listens_makes_the_run_offline_with_one_warning(run, make_config, monkeypatch):
    """The real library, online, against a port that refuses: nothing waits for it, and the run is there, offline."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_log, "START_S", 2)
    said = []
    began = time.monotonic()
    log = WandbLog(run, make_config("online"), said.append)
    for step in range(1, 51):
        log.step({"step": step, "loss": 1 / step})
    assert time.monotonic() - began < 1
    log.close(0)
    assert time.monotonic() - began < 25
    (line,) = said
    assert "cannot be reached" in line
    assert "wandb sync" in line
    (file,) = run.wandb.glob("offline-run-*/*.wandb")
    assert [row["step"] for row in history(read_datastore(file))] == list(range(1, 51))


def test_service_that_never_answers_costs_no_step_and_a_bounded_end(monkeypatch, run, make_config):
    forever = threading.Event()
    fake_wandb(monkeypatch, lambda **settings: forever.wait(30) and FakeRun())
    monkeypatch.setattr(wandb_log, "CLOSE_S", 0.2)
    monkeypatch.setattr(wandb_log, "WAITING_RECORDS", 3)
    begin = time.monotonic()
    tracker = open_tracker(make_config("online"), 0, 0)
    for step in range(1, 7):
        tracker.step({"step": step})
    tracker.close()
    assert time.monotonic() - begin < 2
    assert len(read_metrics(run.metrics)) == 6
    forever.set()
