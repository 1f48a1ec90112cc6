"""Histories that are sound, and ones with a planted fault each: the audit must find it and name it."""

import json

import pytest

from lctrain.audit.check import audit
from lctrain.audit.history import note_discarded, read_history
from lctrain.commands.audit import main
from lctrain.config.schema import DataConfig, StageConfig, TrainConfig, TrainerConfig
from lctrain.data.digest import step_digest, step_documents
from lctrain.data.samples import SampleSource
from lctrain.errors import UserError
from lctrain.faults.passed_over import PassedOver, write_passed_over
from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import append_event
from tests.unit.conftest import TINY

STEPS, BATCH = 8, 4


class Past:
    """A run directory as a run leaves it, without the run."""

    def __init__(self, config: TrainConfig) -> None:
        self.run, self.config = RunDir(config.run_dir), config
        self.run.path.mkdir()
        self.run.note_config(config)
        self.source = SampleSource(config.data, config.trainer, config.model.vocab_size, "train")
        self.records = [
            {"step": step, "consumed": step * BATCH, "digest": self.digest(step), "loss": 1.0} for step in range(1, STEPS + 1)
        ]
        append_event(self.run.events, "start", world_size=2)

    def digest(self, step: int) -> str:
        return step_digest(self.source, step, BATCH)

    def write(self) -> None:
        self.run.metrics.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def wrong(self, steps: int | None = None) -> dict[str, tuple[str, ...]]:
        self.write()
        return {check.name: check.wrong for check in audit(read_history(self.run.path), steps) if check.wrong}


@pytest.fixture
def past(tmp_path, corpus) -> Past:
    return Past(
        TrainConfig(
            run_dir=str(tmp_path / "run"),
            model=TINY,
            data=DataConfig(corpora=(corpus,), valid_fraction=0.0),
            trainer=TrainerConfig(steps=STEPS, seq_len=50, global_batch=BATCH, stages=(StageConfig(steps=3, seq_len=21),)),
        )
    )


def test_clean_run(past, capsys):
    past.write()
    assert main([str(past.run.path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{past.run.path}: no sample was lost or used twice"


def test_resumed_run_with_steps_computed_again(past):
    past.write()
    note_discarded(past.run, 5)
    append_event(past.run.events, "resume", step=5, world_size=3)
    note_discarded(past.run, 7)
    append_event(past.run.events, "resume", step=7, world_size=1)
    assert past.wrong() == {}
    assert past.wrong(steps=3) == {}
    restarts = next(check for check in audit(read_history(past.run.path)) if check.name == "restarts")
    assert restarts.text == "2 resumes (after step 5, 7; 1, 2, 3 processes), 3 steps computed again"


def test_step_computed_again_with_other_samples(past):
    past.records[5]["digest"] = past.digest(3)
    past.write()
    note_discarded(past.run, 5)
    past.records[5]["digest"] = past.digest(6)
    (line,) = past.wrong()["restarts"]
    assert line.startswith("step 6 was computed again after the restart from step 5 with other samples than 20 to 23")


def test_duplicated_batch(past, capsys):
    past.records[5]["digest"] = past.digest(5)
    past.write()
    assert main([str(past.run.path)]) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("step 6: samples 20 to 23 (document")
    assert "are lost; it used samples 16 to 19 of step 5 (document" in line
    assert line.endswith("), which step 5 used too")
    for corpus, document in step_documents(past.source, 6, BATCH)[:6]:
        assert f"{document} of corpus {corpus}" in line


def test_skipped_batch(past):
    for step in range(6, STEPS + 1):
        past.records[step - 1]["digest"] = past.digest(step + 1)
    lines = past.wrong()["digests"]
    assert len(lines) == 3
    assert lines[0].startswith("step 6: samples 20 to 23 (")
    assert "are lost; it used samples 24 to 27 of step 7" in lines[0]
    assert "were used in step 6 instead" in lines[1]


def test_edited_digest(past):
    past.records[2]["digest"] = f"{int(past.digest(3), 16) ^ 1:016x}"
    (line,) = past.wrong()["digests"]
    assert line.startswith("step 3: digest ")
    assert line.endswith("the corpus has changed since, or the record has")


def test_missing_and_repeated_lines(past):
    del past.records[3]
    past.records.append(past.records[0])
    wrong = past.wrong()
    assert wrong == {
        "steps": ("step 1 has 2 lines in metrics.jsonl", "step 4 missing in metrics.jsonl (samples 12 to 15)"),
    }


def test_samples_that_do_not_follow(past):
    past.records[4]["consumed"] += BATCH
    assert past.wrong() == {"samples": ("step 5: 24 samples used after it instead of 20",)}


def test_batches_left_out_must_be_listed(past):
    past.records[4]["passed_over"] = True
    assert past.wrong() == {"left out": ("step 5 was left out, but passed_over.json does not list it",)}
    entry = PassedOver(5, past.digest(5), (16, 19), ((0, 1),), "a spike", 4, 5)
    write_passed_over(past.run.passed_over, [entry])
    assert past.wrong() == {}
    del past.records[4]["passed_over"]
    assert past.wrong() == {"left out": ("step 5 was trained on, but passed_over.json lists it (a spike)",)}


def test_a_sample_of_the_steps_has_those_around_restarts(past):
    append_event(past.run.events, "resume", step=4, world_size=1)
    past.records[4]["digest"] = past.digest(4)
    assert "step 5" in past.wrong(steps=3)["digests"][0]


def test_no_run(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        main([str(tmp_path)])


def test_a_run_that_has_not_begun(past):
    past.records.clear()
    assert past.wrong() == {}
