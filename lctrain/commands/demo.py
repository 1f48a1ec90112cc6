"""Show the whole road in a few minutes: corpus, training on 4 processes, a crash, the resume, a sample.

usage: lctrain demo [name=value ...]

Settings are those of `lctrain train recipe=demo`, for example trainer.steps=40.
"""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.console import say
from lctrain.errors import UserError

PROMPT = "def main("
PROCESSES = 4
"""Two pairs, each of which shares its sequences."""


def main(args: list[str]) -> int:
    """Run the command."""
    settings = ["recipe=demo", f"launcher.processes={PROCESSES}", *args]
    config = load(TrainConfig, "train", settings)
    if Path(config.run_dir).exists():
        names = (f"{config.run_dir}-{number}" for number in itertools.count(2))
        settings.append(f"run_dir={next(name for name in names if not Path(name).exists())}")
        config = load(TrainConfig, "train", settings)
    crash_at = config.trainer.steps // 2 + 3
    if not 0 < config.checkpoint.every < crash_at or config.processes < 2:
        raise UserError(
            "the demo kills a process half-way and resumes: it needs launcher.processes of at least 2, and checkpoint.every"
            f" between 1 and {crash_at - 1}, half of trainer.steps={config.trainer.steps}"
        )
    train = [sys.executable, "-m", "lctrain", "train", *settings]

    _title(1, f"train {config.trainer.steps} steps; at step {crash_at} one process is killed, as by a failing machine")
    before = _train_and_kill(train, Path(config.run_dir), crash_at)

    _title(2, "the same command again: it continues from the newest whole checkpoint")
    if _run(train) != 0:
        return 1
    after = _losses(Path(config.run_dir))
    repeated = sorted(step for step in before if step > _resumed_at(config))
    equal = sum(before[step] == after[step] for step in repeated)
    say(f"steps computed twice, before the crash and after: {len(repeated)}; equal to the last bit: {equal}")
    say(f"loss {after[1]:.3f} at step 1, {after[max(after)]:.3f} at step {max(after)}")

    _title(3, "what it has learned")
    if _run([sys.executable, "-m", "lctrain", "sample", f"run={config.run_dir}", f"prompt={PROMPT}", "tokens=400"]) != 0:
        return 1

    _title(4, "what to look at and try next")
    for line in (
        f"{config.run_dir}/report.html   one page with everything, for a browser",
        f"{config.run_dir}/loss.png, metrics.jsonl, events.jsonl, config.yaml, checkpoints/",
        f"lctrain train recipe=demo launcher.processes={config.processes} run_dir={config.run_dir}"
        f" trainer.steps={2 * config.trainer.steps}   train on",
        f"lctrain train recipe=demo run_dir={config.run_dir} parallel.cp=4 trainer.steps={2 * config.trainer.steps}"
        "   the same run, its sequences over 4 processes",
        "lctrain train model=tiny trainer.seq_len=32768 parallel.cp=4   longer sequences",
        "lctrain data prepare input=YOUR_FILES output=corpora/mine   then: lctrain train data=custom"
        " data.corpora.0.prefix=corpora/mine",
        "lctrain config train   every setting, with its meaning",
    ):
        say(f"  {line}")
    return 0 if equal == len(repeated) else 1


def _train_and_kill(command: list[str], run_dir: Path, step: int) -> dict[int, float]:
    """Run until `step` is recorded, kill one rank with SIGKILL, return the losses so far by step."""
    say(f"$ {shlex.join(['lctrain', *command[3:]])}")
    training = subprocess.Popen(command)
    try:
        while training.poll() is None and max(_losses(run_dir), default=0) < step:
            time.sleep(0.05)
        if training.poll() is not None:
            raise UserError(f"the demo's training ended by itself with status {training.returncode}; see {run_dir}/log")
        os.kill(_ranks(training.pid)[-1], signal.SIGKILL)
        training.wait(timeout=120)
    finally:
        if training.poll() is None:
            training.terminate()
            training.wait()
    return _losses(run_dir)


def _run(command: list[str]) -> int:
    say(f"$ {shlex.join(['lctrain', *command[3:]])}")
    return subprocess.run(command, check=False).returncode


def _ranks(launcher: int) -> list[int]:
    import psutil

    return sorted(child.pid for child in psutil.Process(launcher).children())


def _losses(run_dir: Path) -> dict[int, float]:
    from lctrain.run_dir import RunDir
    from lctrain.tracking.jsonl import read_metrics

    path = RunDir(run_dir).metrics
    return {record["step"]: record["loss"] for record in read_metrics(path)} if path.exists() else {}


def _resumed_at(config: TrainConfig) -> int:
    """The step after which the second start continued, as the run's own events tell."""
    import json

    from lctrain.run_dir import RunDir

    events = [json.loads(line) for line in RunDir(config.run_dir).events.read_text().splitlines()]
    return max((event["step"] for event in events if event["kind"] == "resume"), default=0)


def _title(number: int, text: str) -> None:
    say(f"\n{number}. {text}", style="bold")
