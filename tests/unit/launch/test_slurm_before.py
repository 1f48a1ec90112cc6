"""A start of a job waits until the processes of an earlier one, which may live on a node that SLURM has given up, are gone."""

import threading

from lctrain.run_dir import RunDir
from lctrain.slurm import before


def test_nobody_holds_a_new_run_directory(tmp_path):
    assert before._last_holder(str(tmp_path / "run")) is None


def test_the_end_of_an_earlier_start_is_waited_for(tmp_path, capsys):
    run = RunDir(tmp_path).prepare()
    holder = run.lock.read_text().strip()
    threading.Timer(0.2, run.release).start()
    assert before._last_holder(str(tmp_path)) is None
    assert capsys.readouterr().err == f"{tmp_path} is still in use by pid {holder}: waiting for its end\n"


def test_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(before, "LOCK_S", 0.1)
    with RunDir(tmp_path).prepare() as run:
        assert before._last_holder(str(tmp_path)) == run.lock.read_text().strip()
