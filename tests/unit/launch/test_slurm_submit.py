"""`lctrain train launcher=slurm`: what is kept, what sbatch is given, what is refused. SLURM's commands are stand-ins here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lctrain.checkpoint.manifest import write_manifest
from lctrain.commands import train
from lctrain.config.load import load
from lctrain.config.render import from_yaml
from lctrain.config.schema import TrainConfig
from lctrain.data.identity import data_identity
from lctrain.errors import UserError
from lctrain.launch import slurm_queue
from lctrain.launch.slurm import submissions
from lctrain.launch.slurm_queue import job_state, parse_job
from lctrain.launch.slurm_snapshot import copy_code
from lctrain.run_dir import RunDir

SETTINGS = ["model=tiny", "launcher=slurm", "launcher.nodes=2", "launcher.processes_per_node=2"]
SBATCH = """#!/bin/bash
printf '%s\\n' "$*" >>"$CALLS"
[ -e "$CALLS.refuse" ] && { echo "sbatch: error: invalid partition specified: x" >&2; exit 1; }
echo "$((100 + $(wc -l <"$CALLS")));cluster"
"""
SCONTROL = """#!/bin/bash
[ -e "$CALLS.queue" ] && echo "JobId=$4 JobName=x JobState=$(cat "$CALLS.queue") Reason=None" || exit 1
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder to submit from, with an sbatch that takes everything and notes it in `calls`."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK", "WORLD_SIZE"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(cluster: Path) -> list[str]:
    return (cluster / "calls").read_text().splitlines() if (cluster / "calls").exists() else []


def test_submitted_run_keeps_script_settings_and_code(cluster, capsys):
    assert train.main([*SETTINGS, "run_dir=runs/a", "launcher.slurm.time=1:00:00"]) == 0
    kept = cluster / "runs/a/slurm/001"
    assert calls(cluster) == [f"--parsable {kept}/job.sbatch"]
    assert capsys.readouterr().out.splitlines() == [
        "submitted job 101: 2 nodes x 2 processes, srun, time limit 1:00:00",
        "  script    runs/a/slurm/001/job.sbatch",
        "  follow    lctrain logs runs/a follow=true",
        "  state     lctrain status runs/a",
        "  end       lctrain stop runs/a",
    ]
    config = from_yaml(TrainConfig, (kept / "config.yaml").read_text())
    assert (config.launcher.processes, config.model.name, config.run_dir) == (4, "tiny", "runs/a")
    assert (cluster / "runs/a/log").is_dir()  # where the job writes; SLURM does not make it
    run = RunDir("runs/a")
    assert submissions(run)[0].log(run, "101") == Path("runs/a/log/slurm-101.out")


def test_the_kept_code_runs_without_the_original(tmp_path):
    copy_code(tmp_path / "code")
    script = "import lctrain.slurm.rank, lctrain.kernels.attention.reference as r; print(r.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "code"), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / "code/lctrain/kernels/attention/reference.py")
    assert (tmp_path / "code/lctrain/slurm/job.sbatch").exists()
    assert (tmp_path / "code/lctrain/configs/train.yaml").exists()
    assert set(json.loads((tmp_path / "code/source.json").read_text())) == {"git_commit", "git_dirty", "git_diff"}


@pytest.mark.parametrize("how", ["--dry-run", "launcher.dry_run=true"])
def test_dry_run_prints_the_script_and_leaves_nothing(cluster, capsys, monkeypatch, how):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(slurm_queue.shutil, "which", lambda name: None)
    assert train.main([*SETTINGS, "run_dir=runs/a", how]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert not (cluster / "runs").exists()


def test_without_slurm_it_is_refused(cluster, monkeypatch):
    monkeypatch.setattr(slurm_queue.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="launcher=slurm needs sbatch, which this machine does not have: give the command on a"):
        train.main([*SETTINGS, "run_dir=runs/a"])
    assert not (cluster / "runs").exists()


def test_what_sbatch_says_is_passed_on(cluster):
    (cluster / "calls.refuse").touch()
    with pytest.raises(UserError, match="sbatch refuses the job: invalid partition specified: x; the script is"):
        train.main([*SETTINGS, "run_dir=runs/a"])


def test_a_run_that_is_in_the_queue_is_not_submitted_again(cluster):
    train.main([*SETTINGS, "run_dir=runs/a"])
    (cluster / "calls.queue").write_text("PENDING")
    with pytest.raises(UserError, match=r"run_dir=.*runs/a has job 101 in the queue \(PENDING\): end it with lctrain stop"):
        train.main([*SETTINGS, "run_dir=runs/a"])
    (cluster / "calls.queue").write_text("TIMEOUT")
    assert train.main([*SETTINGS, "run_dir=runs/a"]) == 0
    assert [submission.jobs for submission in submissions(RunDir("runs/a"))] == [("101",), ("102",)]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "model=small",
            "runs/a has checkpoints of a model with d_model=128, the settings say model.d_model=512: choose",
        ),
        ("model.pattern=(*-){3}", r"of a model with pattern=\(\*-\)\{4\}, the settings say model.pattern=\(\*-\)\{3\}: choose"),
        (
            "trainer.seed=7",
            "trainer.seed is 7, but checkpoint .*step-00000004 was made with 0: continuing would repeat",
        ),
    ],
)
def test_the_directory_of_another_run_is_refused_before_the_queue(cluster, setting, message):
    config = load(TrainConfig, "train", ["model=tiny", "parallel.cp=4", "launcher.processes=4", "run_dir=runs/a"])
    step = RunDir("runs/a").checkpoints / "step-00000004"
    step.mkdir(parents=True)
    RunDir("runs/a").note_config(config)
    write_manifest(step, {"meta": {"data": data_identity(config)}})
    with pytest.raises(UserError, match=message):
        train.main([*SETTINGS, "parallel.cp=4", "run_dir=runs/a", setting])
    assert calls(cluster) == []
    assert train.main([*SETTINGS, "parallel.cp=4", "run_dir=runs/a", "model.pattern=*-*-(*-){2}"]) == 0


def test_a_missing_corpus_is_noticed_before_the_queue(cluster):
    with pytest.raises(UserError, match="corpus nowhere does not exist: run lctrain data prepare"):
        train.main([*SETTINGS, "data=custom", "data.corpora.0.prefix=nowhere"])
    assert calls(cluster) == []


def test_processes_that_do_not_fit_the_layout(cluster):
    with pytest.raises(
        UserError, match=r"parallel.cp=3.*\(launcher.processes is launcher.nodes=2 x launcher.processes_per_nod"
    ):
        train.main([*SETTINGS, "parallel.cp=3"])


def test_a_chain_depends_on_its_predecessor(cluster, capsys):
    train.main([*SETTINGS, "run_dir=runs/a", "launcher.chain=3"])
    assert [line.split()[:-1] for line in calls(cluster)] == [
        ["--parsable"],
        ["--parsable", "--dependency=afterany:101"],
        ["--parsable", "--dependency=afterany:102"],
    ]
    assert capsys.readouterr().out.startswith("submitted jobs 101, 102, 103, one after the other: ")
    assert submissions(RunDir("runs/a"))[0].jobs == ("101", "102", "103")


def test_a_sweep_is_one_array(cluster, capsys):
    settings = [*SETTINGS[:1], "launcher=slurm_array", *SETTINGS[2:], "run_dir=runs/s"]
    train.main([*settings, "optim.lr=1e-3,3e-4", "parallel.attention=ring,token_ring"])
    kept = cluster / "runs/s/slurm/001"
    assert calls(cluster) == [f"--parsable {kept}/job.sbatch"]
    names = ["0-lr-0.001-attention-ring", "1-lr-0.001-attention-token_ring"]
    names += ["2-lr-0.0003-attention-ring", "3-lr-0.0003-attention-token_ring"]
    assert (kept / "runs").read_text().splitlines() == [f"{cluster}/runs/s/{name}" for name in names]
    configs = [from_yaml(TrainConfig, (kept / f"config-{number}.yaml").read_text()) for number in range(4)]
    assert [config.optim.lr for config in configs] == [1e-3, 1e-3, 3e-4, 3e-4]
    assert [config.parallel.attention for config in configs] == ["ring", "token_ring"] * 2
    assert {config.tracking.wandb.group for config in configs} == {"s"}
    assert configs[3].run_dir == f"runs/s/{names[3]}"
    assert "#SBATCH --array=0-3\n" in (kept / "job.sbatch").read_text()
    assert submissions(RunDir(f"runs/s/{names[2]}"))[0].jobs == ("101_2",)
    assert "an array of 4 runs in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launcher=slurm_array"], "launcher=slurm_array needs a setting with several values, such as optim.lr=1e-3,3e-4"),
        (["launcher=slurm_array", "launcher.nodes=1,2", "run_dir=r"], "share one job array: give settings of the launcher one"),
        (["launcher=slurm_array", "model=tiny,small"], "the runs of a sweep share one folder: set run_dir"),
        (["launcher=slurm_array", "optim.lr=1e-3,x", "run_dir=r"], "optim.lr=x"),
        (["optim.lr=1e-3,3e-4"], "optim.lr takes one value, not several"),
        (["launcher=slurm", "optim.lr=1e-3,3e-4"], "optim.lr takes one value, not several"),
    ],
)
def test_sweeps_that_make_no_sense(cluster, arguments, message):
    with pytest.raises(UserError, match=message):
        train.main(arguments)
    assert calls(cluster) == []


def test_an_unusable_run_directory(cluster):
    (cluster / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir=.*/file/a cannot be (used|written): Not a directory"):
        train.main([*SETTINGS, "run_dir=file/a"])
    assert calls(cluster) == []


def test_the_layout_of_a_cluster_is_proved_on_this_machine():
    from lctrain.config.load import load
    from lctrain.config.verify import LayoutVerifyConfig
    from lctrain.verify.layout.shrink import shrink

    small, _ = shrink(load(TrainConfig, "train", [*SETTINGS, "parallel.cp=4"]), LayoutVerifyConfig(processes=2))
    assert (small.launcher.kind, small.launcher.processes, small.parallel.cp) == ("local", 2, 2)


class TestJobState:
    def test_fields(self):
        text = (
            "JobId=7 JobName=a JobState=FAKE Restarts=9 b UserId=root(0) GroupId=root(0) JobState=PENDING Reason=Resources"
            " Dependency=(null) Restarts=2 RunTime=00:01:02 TimeLimit=1-00:00:00 StartTime=Unknown NodeList=(null)"
        )
        state = parse_job("7", text)
        assert (state.state, state.reason, state.restarts, state.nodes, state.start) == ("PENDING", "Resources", 2, "", "")
        assert state.waits
        assert not state.ended

    def test_a_forgotten_job_has_ended(self, cluster):
        assert job_state("5").ended

    def test_no_answer_says_nothing_about_a_job(self, cluster):
        words = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
        (cluster / "bin" / "scontrol").write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 1\n")
        state = job_state("5")
        assert (state.state, state.reason) == ("UNREACHABLE", "Unable to contact slurm controller (connect failure)")
        assert not state.ended
