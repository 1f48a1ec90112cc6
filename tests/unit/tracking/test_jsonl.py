"""metrics.jsonl has one line per step whatever happened; events.jsonl only grows."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lctrain.tracking.jsonl import MetricsLog, append_event, read_events, read_metrics


def write(path, start_step, steps, **fields):
    log = MetricsLog(path, start_step)
    for step in steps:
        log.step({"step": step, **fields})
    log.close()


def test_each_step_is_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path / "m", 0)
    log.step({"step": 1, "loss": 0.1 + 0.2})
    assert read_metrics(tmp_path / "m") == [{"step": 1, "loss": 0.1 + 0.2}]
    log.close()


def test_resume_drops_later_steps_and_keeps_the_bytes_of_earlier_ones(tmp_path):
    path = tmp_path / "m"
    write(path, 0, range(1, 8), loss=1 / 3)
    before = path.read_bytes().splitlines()
    write(path, 4, [5, 6], loss=2 / 3)
    after = path.read_bytes().splitlines()
    assert after[:4] == before[:4]
    assert [(record["step"], record["loss"]) for record in read_metrics(path)[4:]] == [(5, 2 / 3), (6, 2 / 3)]
    write(path, 0, [1])
    assert read_metrics(path) == [{"step": 1}]
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4}', "", "\x00\x00\x00", "[4]", "4"])
def test_torn_last_line_is_forgotten(tmp_path, torn):
    path = tmp_path / "m"
    write(path, 0, [1, 2, 3])
    with open(path, "a") as file:
        file.write(torn)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    write(path, 3, [4])
    assert path.read_text() == "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4))


def test_crash_while_dropping_lines_keeps_the_file(tmp_path, monkeypatch):
    path = tmp_path / "m"
    write(path, 0, [1, 2, 3])

    def crash(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            MetricsLog(path, 1)
    assert len(read_metrics(path)) == 3
    write(path, 1, [2])
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_what_is_not_json_becomes_it(tmp_path):
    values = {
        "step": np.int64(1),
        "nan": float("nan"),
        "inf": -float("inf"),
        "tensor": torch.tensor(0.5),
        "tensor_nan": torch.tensor(float("nan")),
        "numpy": np.float32(0.25),
        "flag": True,
        "nothing": None,
        "list": [1, float("nan"), (2, "x")],
        "dict": {1: torch.tensor(3)},
    }
    write_path = tmp_path / "m"
    log = MetricsLog(write_path, 0)
    log.step(values)
    log.close()
    assert read_metrics(write_path) == [
        {
            "step": 1,
            "nan": None,
            "inf": None,
            "tensor": 0.5,
            "tensor_nan": None,
            "numpy": 0.25,
            "flag": True,
            "nothing": None,
            "list": [1, None, [2, "x"]],
            "dict": {"1": 3},
        }
    ]


def test_missing_files_are_empty(tmp_path):
    assert read_metrics(tmp_path / "m") == []
    assert read_events(tmp_path / "e") == []


def test_events_survive_a_torn_line(tmp_path):
    path = tmp_path / "e"
    append_event(path, "start", step=0)
    with open(path, "a") as file:
        file.write('{"time": "2')
    append_event(path, "resume", step=3)
    events = read_events(path)
    assert [(event["kind"], event["step"]) for event in events] == [("start", 0), ("resume", 3)]
    assert events[0]["time"].endswith("+00:00")


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=20))
def test_numbers_come_back_exactly(tmp_path_factory, numbers):
    path = tmp_path_factory.mktemp("exact") / "m"
    log = MetricsLog(path, 0)
    for step, number in enumerate(numbers):
        log.step({"step": step, "x": number})
    log.close()
    assert [record["x"] for record in read_metrics(path)] == numbers
