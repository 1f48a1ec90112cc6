"""The rendered batch script: what stands in it, that any value survives the quoting, and that bash can read it."""

import shlex
import subprocess
from pathlib import Path

import pytest

from lctrain.config.launcher import ContainerConfig, LauncherConfig, SlurmConfig, limit_s
from lctrain.config.model import ModelConfig
from lctrain.config.schema import CorpusConfig, DataConfig, EngineConfig, TrainConfig, TrainerConfig
from lctrain.launch.slurm_script import Job, render_script, sbatch_value

ODD = "/data/my runs/100% 'a' \"b\" $HOME `id` #x \\ é"


def script(slurm=None, runs=(), folder="/home/me", device="auto", **launcher) -> str:
    settings = LauncherConfig(kind="slurm", slurm=SlurmConfig(**(slurm or {})), **launcher)
    config = TrainConfig(
        run_dir="run",
        model=ModelConfig(pattern="*-", d_model=16, vocab_size=256),
        data=DataConfig(corpora=(CorpusConfig(prefix="none"),)),
        trainer=TrainerConfig(global_batch=settings.processes),
        engine=EngineConfig(device=device),
        launcher=settings,
    )
    run = Path(folder, "run")
    job = Job(run / "slurm" / "001", run, run / "log", Path(folder), "lctrain train\nmodel=tiny", tuple(map(Path, runs)))
    text = render_script(config, job)
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert checked.stderr == ""
    return text


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def variable(text: str, name: str) -> str:
    """What bash makes of `name=...`, without running anything else."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name}=")]
    return subprocess.run(
        ["bash", "-c", f'{line}\nprintf %s "${{{name}[*]}}"'], capture_output=True, text=True, check=True
    ).stdout


def test_plain():
    text = script(nodes=2, processes_per_node=4)
    assert directives(text) == [
        "--job-name=run",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--output=/home/me/run/log/slurm-%j.out",
        "--open-mode=append",
        "--signal=B:USR1@120",
        "--requeue",
    ]
    assert "# Made by: lctrain train model=tiny\n" in text
    assert "export PYTHONPATH=$kept/code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1\n" in text
    assert 'step "${srun[@]}" --ntasks=8 --ntasks-per-node=4 --kill-on-bad-exit=1 \\\n' in text
    assert '"${python[@]}" -m lctrain.slurm.rank "$config" "$outcome"' in text
    assert "{{" not in text


def test_all_options():
    slurm = {
        "job_name": "long context",
        "partition": "gpu,gpu-big",
        "account": "a1",
        "qos": "high",
        "time": "1-12:00:00",
        "cpus_per_process": 6,
        "mem": "0",
        "constraint": "[a100&ib|h100]",
        "exclude": "node[1-3,7]",
        "sbatch": ("--mail-type=END", "--comment=for 'x'", "-J own", "--wckey='a b'"),
        "srun": ("--mpi=none",),
        "setup": ("module load cuda/12", "source ~/venv/bin/activate"),
        "python": "python3.12",
        "warn_s": 300,
        "restarts": 7,
    }
    text = script(slurm, device="cuda", nodes=4, processes_per_node=8)
    assert directives(text) == [
        '--job-name="long context"',
        "--nodes=4",
        "--ntasks-per-node=8",
        "--cpus-per-task=6",
        "--gpus-per-node=8",
        "--mem=0",
        "--time=1-12:00:00",
        "--partition=gpu,gpu-big",
        "--account=a1",
        "--qos=high",
        '--constraint="[a100&ib|h100]"',
        "--exclude=node[1-3,7]",
        "--output=/home/me/run/log/slurm-%j.out",
        "--open-mode=append",
        "--signal=B:USR1@300",
        "--requeue",
        "--mail-type=END",
        "--comment=\"for 'x'\"",
        "-J own",
        "--wckey='a b'",
    ]
    assert "\nmodule load cuda/12\nsource ~/venv/bin/activate\nexport PYTHONPATH=" in text
    assert "--ntasks=32 --ntasks-per-node=8 --cpus-per-task=6 --kill-on-bad-exit=1" in text
    assert variable(text, "srun") == "srun --nodes=4 --mpi=none"
    assert variable(text, "python") == "python3.12"
    assert variable(text, "restarts") == "7"
    assert variable(text, "exclude") == "node[1-3,7]"


def test_torchrun_gets_one_task_per_node():
    text = script({"cpus_per_process": 2}, nodes=2, processes_per_node=4, mode="torchrun")
    assert {"--ntasks-per-node=1", "--cpus-per-task=8"} <= set(directives(text))
    assert "--ntasks=2 --ntasks-per-node=1 --cpus-per-task=8 --kill-on-bad-exit=1" in text
    assert "-m lctrain.slurm.node" in text


def test_chains_are_not_requeued():
    text = script(chain=5)
    assert "--no-requeue" in directives(text)
    assert variable(text, "chain") == "5"


def test_array():
    text = script(runs=["/home/me/run/0", "/home/me/run/1", "/home/me/run/2"])
    assert {"--array=0-2", "--output=/home/me/run/log/slurm-%A_%a.out"} <= set(directives(text))
    assert 'run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$kept/runs")' in text
    assert "config=$kept/config-$SLURM_ARRAY_TASK_ID.yaml" in text


def test_odd_paths_reach_bash_as_they_are():
    text = script(folder=ODD)
    assert variable(text, "run") == f"{ODD}/run"
    assert variable(text, "kept") == f"{ODD}/run/slurm/001"
    (output,) = [line for line in directives(text) if line.startswith("--output=")]
    assert (
        output
        == '--output="' + f"{ODD}/run/log/slurm-%j.out".replace("100%", "100%%").replace("\\", "\\\\").replace('"', '\\"') + '"'
    )


@pytest.mark.parametrize(("text", "written"), [("a-b_1", "a-b_1"), ("a b", '"a b"'), ("", '""'), ('"', '"\\""'), ("#", '"#"')])
def test_sbatch_value(text, written):
    assert sbatch_value(text) == written


def test_pyxis():
    container = ContainerConfig(image="nvcr.io#nvidia/pytorch:25.01", mounts=("/data",), flags=("--container-writable",))
    text = script({"container": container})
    assert shlex.split(variable(text, "srun")) == [
        "srun",
        "--nodes=1",
        "--container-image=nvcr.io#nvidia/pytorch:25.01",
        "--container-mounts=/home/me:/home/me,/data:/data",
        "--container-workdir=/home/me",
        "--container-writable",
    ]
    assert variable(text, "python") == "python3"


def test_apptainer():
    container = ContainerConfig(runtime="apptainer", image="my image.sif", flags=("--nv",))
    text = script({"container": container, "python": "/opt/python"})
    assert variable(text, "srun") == "srun --nodes=1"
    assert variable(text, "python") == "apptainer exec --bind=/home/me:/home/me --pwd=/home/me --nv my image.sif /opt/python"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": "a\n#SBATCH --account=b"}, "must be one line of printable text"),
        ({"setup": ("ok", "a\nb")}, "must be one line of printable text"),
        ({"sbatch": ("mail-type=END",)}, "is no option: write --name=value"),
        ({"time": "1h"}, "time='1h' is no time limit: write minutes, hours:minutes:seconds or days-hours:minutes"),
        ({"time": "3"}, "time=3 leaves nothing to train in: SLURM may warn up to 60 s before warn_s=120; raise the limit"),
    ],
)
def test_values_that_would_break_the_script_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SlurmConfig(**settings)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:02:03", 3723),
        ("2-3", 183600),
        ("2-3:04", 183840),
        ("2-03:04:05", 183845),
        ("UNLIMITED", float("inf")),
    ],
)
def test_time_limits(text, seconds):
    assert limit_s(text) == seconds


def test_processes_are_counted():
    assert LauncherConfig(kind="slurm", nodes=3, processes_per_node=4).processes == 12
    assert LauncherConfig(kind="slurm", nodes=3, processes_per_node=4, processes=12).processes == 12
    with pytest.raises(
        ValueError, match=r"processes=5, but nodes=3 x processes_per_node=4 is 12: leave launcher\.processes out"
    ):
        LauncherConfig(kind="slurm", nodes=3, processes_per_node=4, processes=5)
    for name, value in (("nodes", 2), ("processes_per_node", 2), ("chain", 2), ("dry_run", True)):
        with pytest.raises(ValueError, match=f"{name}=(2|true) needs launcher=slurm"):
            LauncherConfig(**{name: value})
