"""Run directories as the loop leaves them, without a loop."""

import math

import pytest

from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import MetricsLog, append_event
from lctrain.whole_file import write_json


@pytest.fixture
def make_run(tmp_path):
    """A run of so many steps, interrupted and resumed half-way, with everything that a record can hold."""

    def make(steps: int, name: str = "some-run", total: int = 40) -> RunDir:
        folder = tmp_path / name
        folder.mkdir()
        run = RunDir(folder)
        run.config.write_text(
            f"model: {{name: tiny, pattern: '*E*E'}}\ntrainer: {{steps: {total}, seq_len: 256, global_batch: 4}}\n"
            "parallel: {cp: 2}\nlauncher: {processes: 2}\nengine: {name: torch, dtype: fp32}\n"
        )
        write_json(run.environment, {"host": "here", "packages": {"torch": "2.13"}, "command": ["lctrain", "train"]})
        append_event(run.events, "launch", host="here")
        append_event(run.events, "start", world_size=2)
        log = MetricsLog(run.metrics, 0)
        for step in range(1, steps + 1):
            log.step(record(step))
            if step % 10 == 0:
                append_event(run.events, "checkpoint", step=step, seconds=0.1 * step)
            if step == steps // 2:
                append_event(run.events, "resume", step=step, world_size=2)
        log.close()
        return run

    return make


def record(step: int) -> dict:
    loss = math.nan if step == 7 else 5 / math.sqrt(step)
    return {
        "step": step,
        "loss": loss,
        "skipped": step == 7 or None,
        "grad_norm": 1 + 1 / step,
        "lr": 1e-3 / step,
        "tokens_per_s": 9000.0 + step,
        "mfu": 0.3,
        "step_s": 0.1,
        "data_wait_s": 0.001,
        "memory_mb": 300.0 + step,
        "tokens": 1024,
        "cp_imbalance": 1.0,
        "eval_loss": loss if step % 10 == 0 else None,
        **({"recall": 0.1, "recall_256": [0.1, None, 0.9], "recall_128": [-0.05, 0.2, 1.0]} if step % 10 == 0 else {}),
        "loss_by_position": [5.0, 4.0, None, 3.0 / step, 2.0],
        "slowest_rank": 1,
        "slowest_rank_excess": 0.2,
        "rank_forward_s": [0.01, 0.02],
        "exposed_comm": 0.1,
        "memory_weights_mb": 4.0,
        "moe_load": [[0.25, 0.75], [0.5, 0.5]],
        "moe_max_violation": [0.5, 0.0],
        "moe_entropy": [0.6, 0.7],
        "moe_bias": [0.01 * step, 0.0],
    }
