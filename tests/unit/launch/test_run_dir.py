"""The run directory: what is noted at a start, and that only one run may use it."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from lctrain import environment
from lctrain.config.optim import OptimConfig
from lctrain.environment import describe_environment, git_diff
from lctrain.errors import UserError
from lctrain.run_dir import RunDir, command_line, config_changes
from lctrain.tracking.jsonl import read_events


def test_start_is_noted(make_config):
    config = make_config()
    with RunDir(config.run_dir).prepare() as run:
        assert not run.config.exists()  # it may not fit the run's checkpoints
        noted = json.loads(run.environment.read_text())
        assert noted["packages"]["torch"].startswith("2.")
        assert noted["pid"] == os.getpid()
        (event,) = read_events(run.events)
        assert event["kind"] == "launch"
        run.note_config(config)
        assert yaml.safe_load(run.config.read_text())["launcher"]["processes"] == 2
        assert len(read_events(run.events)) == 1


def test_changed_config_is_kept_and_named(make_config):
    first, second = make_config(), make_config(optim=OptimConfig(lr=0.5))
    run = RunDir(first.run_dir)
    changes = [["optim.lr: 0.001 -> 0.5"], ["optim.lr: 0.5 -> 0.001"]]
    assert [run.note_config(config) for config in (first, first, second, first)] == [[], [], *changes]
    assert yaml.safe_load((run.path / "config.1.yaml").read_text())["optim"]["lr"] == 0.001
    assert yaml.safe_load((run.path / "config.2.yaml").read_text())["optim"]["lr"] == 0.5
    assert not (run.path / "config.3.yaml").exists()
    events = read_events(run.events)
    assert [event["kind"] for event in events] == ["config", "config"]
    assert [event["changes"] for event in events] == changes


def test_config_changes():
    assert config_changes({"a": {"b": 1}, "c": [1]}, {"a": {"b": 1}, "c": [1]}) == []
    assert config_changes({"a": {"b": 1}}, {"a": {"b": 2, "n": 3}}) == ["a.b: 1 -> 2", "a.n: None -> 3"]


def test_second_run_is_refused_with_the_pid(make_config):
    config = make_config()
    with RunDir(config.run_dir).prepare():
        with pytest.raises(UserError, match=f"in use by pid {os.getpid()}"):
            RunDir(config.run_dir).prepare()
        assert len(read_events(RunDir(config.run_dir).events)) == 1
    RunDir(config.run_dir).prepare().release()


def test_ranks_of_a_killed_launcher_are_waited_for(make_config, tmp_path, capfd):
    config = make_config()
    launcher = os.fork()
    if launcher == 0:
        RunDir(config.run_dir).prepare()
        if os.fork() == 0:  # a rank that still saves
            (tmp_path / "ready").touch()
            time.sleep(1)
            os._exit(0)
        time.sleep(60)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(launcher, 9)
    os.waitpid(launcher, 0)
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"in use by pid {launcher}"):
        RunDir(config.run_dir).prepare(patience_s=0.1)
    RunDir(config.run_dir).prepare(patience_s=10).release()
    assert 0.3 < time.monotonic() - begin < 8
    assert "waiting for its ranks to end" in capfd.readouterr().err


def test_unusable_folder_is_one_line(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    config = make_config().model_copy(update={"run_dir": str(tmp_path / "file" / "run")})
    with pytest.raises(UserError, match=r"run_dir=.*cannot be used: Not a directory"):
        RunDir(config.run_dir).prepare()


def test_lock_is_given_up_when_preparing_fails(make_config, monkeypatch):
    config = make_config()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lctrain.run_dir.write_json", full)
        with pytest.raises(UserError, match="No space left"):
            RunDir(config.run_dir).prepare()
    RunDir(config.run_dir).prepare().release()


def test_environment_of_a_dirty_clone(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    monkeypatch.setattr(environment, "_SOURCE", tmp_path)
    assert describe_environment()["git_commit"] is None
    (tmp_path / "a.py").write_text("one\n")
    git("init")
    git("add", "a.py")
    git("commit", "-m", "first")
    noted = describe_environment()
    assert len(noted["git_commit"]) == 40
    assert (noted["git_dirty"], git_diff()) == (False, "")
    (tmp_path / "a.py").write_text("two\n")
    assert describe_environment()["git_dirty"] is True
    assert "-one\n+two\n" in git_diff()


def test_environment_does_not_need_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    noted = describe_environment()
    assert noted["git_commit"] is None
    assert noted["gpus"] == []


def test_command_line_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lctrain", "train", "model=tiny", "run_dir=my runs/1", "resume=never"])
    assert command_line() == "lctrain train model=tiny 'run_dir=my runs/1' resume=never"
    assert command_line(without="resume") == "lctrain train model=tiny 'run_dir=my runs/1'"
    monkeypatch.setattr(sys, "argv", ["/x/thing.py", "train"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "thing", "train"])
    assert command_line() == "python3 -m thing train"
