"""The reader of TensorBoard's server finds in the event files what metrics.jsonl has."""

import importlib.util

import pytest

from lctrain.errors import UserError
from lctrain.tracking import tensorboard as tensorboard_log
from lctrain.tracking.jsonl import read_metrics
from lctrain.tracking.tensorboard import TensorBoardLog, check_tensorboard
from lctrain.tracking.tracker import open_tracker

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")


def curves(run) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = EventAccumulator(str(run.tensorboard), tensor_size_guidance={"scalars": 0})
    found.Reload()
    return {
        tag: [(event.step, float(make_ndarray(event.tensor_proto))) for event in found.Tensors(tag)]
        for tag in found.Tags()["tensors"]
    }


@needs_tensorboard
def test_curves_equal_the_metrics_to_the_last_bit_across_a_resume(run, make_config):
    for start, steps in ((0, range(1, 6)), (3, range(4, 9))):  # steps 4 and 5 were lost in a crash and are done again
        tracker = open_tracker(make_config(tensorboard=True), 0, start)
        for step in steps:
            tracker.step(
                {
                    "step": step,
                    "loss": 1 / 3 + start + step,
                    "digest": "00ff",
                    "bad": float("nan"),
                    "tokens": 2**40 + step,
                    "rank_forward_s": [0.1 * step, 0.2],
                    "loss_by_position": [None, 1.5],
                    "moe_load": [[0.5, 0.5]],
                }
            )
        tracker.close()
    records, found = read_metrics(run.metrics), curves(run)
    assert len(records) == 8
    for name in ("loss", "tokens"):
        assert found[name] == [(record["step"], record[name]) for record in records]
    for rank in (0, 1):
        assert found[f"rank_forward_s/{rank}"] == [(record["step"], record["rank_forward_s"][rank]) for record in records]
    assert set(found) == {"loss", "tokens", "rank_forward_s/0", "rank_forward_s/1", "loss_by_position/1"}


@needs_tensorboard
def test_a_folder_that_cannot_be_written_is_said_once(run):
    run.tensorboard.write_text("a file where the folder should be")
    said = []
    log = TensorBoardLog(run, 0, said.append)
    log.step({"step": 1, "loss": 1.0})
    log.close()
    (line,) = said
    assert line.startswith("tensorboard is off for the rest of the run")


def test_missing_package_is_said_before_anything_starts(monkeypatch, make_config):
    monkeypatch.setattr(tensorboard_log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lctrain\[tensorboard\]'"):
        check_tensorboard(make_config(tensorboard=True))
    check_tensorboard(make_config())
