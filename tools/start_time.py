"""How long it takes from the command to the end of the first step: lctrain on every engine, and the bare library beside it.

python tools/start_time.py [--repeats 3] [--engines torch,deepspeed,megatron]

lctrain trains the demo's model on the demo's corpus for one step of 256 tokens on one process; the bare library takes one AdamW
step of its own smallest example on random numbers. Medians, after one round that is not counted. CPU only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lctrain.console import say, table

TORCH = """
import torch
layers = torch.nn.Embedding(320, 128), torch.nn.TransformerEncoderLayer(128, 4, 384), torch.nn.Linear(128, 320)
model = torch.nn.Sequential(*layers)
optimizer = torch.optim.AdamW(model.parameters())
tokens = torch.randint(320, (1, 256))
torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
optimizer.step()
"""
DEEPSPEED = """
import torch, deepspeed
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # else it is compiled, for 40 s
deepspeed.init_distributed(dist_backend="gloo")
model = torch.nn.Linear(128, 320)
settings = {"train_batch_size": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=settings)
engine.backward(torch.nn.functional.cross_entropy(engine(torch.randn(256, 128)), torch.randint(320, (256,))))
engine.step()
"""
MEGATRON = """
import torch
from functools import partial
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from lctrain.adapters.megatron_cpu import megatron_on_cpu  # megatron-core alone needs CUDA

with megatron_on_cpu():
    torch.distributed.init_process_group("gloo", world_size=1, rank=0)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(num_layers=2, hidden_size=128, num_attention_heads=4, use_cpu_initialization=True)
    config.finalize_model_grads_func = finalize_model_grads
    model = GPTModel(config, get_gpt_layer_local_spec(), 320, 256)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens, at = torch.randint(320, (1, 256)), torch.arange(256)[None]
    mask = torch.ones(1, 1, 256, 256, dtype=torch.bool).triu(1)
    mean = lambda losses: (losses.mean(), {})
    step = lambda data, model: (model(tokens, at, mask, labels=tokens), mean)
    get_forward_backward_func()(forward_step_func=step, data_iterator=None, model=model, num_microbatches=1, seq_length=256,
                                micro_batch_size=1)
    for parameter in model.parameters():
        parameter.grad = parameter.main_grad
    optimizer.step()
"""
BARE = {"torch": TORCH, "deepspeed": DEEPSPEED, "megatron": MEGATRON}
DONE = "step 1/"
ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29517",
    "DS_ACCELERATOR": "cpu",
}
"""What torchrun would set for one process."""


def seconds_until(line: str, command: list[str], folder: Path, variables: dict[str, str]) -> float:
    """Seconds until the command writes a line that begins so; it is then waited for."""
    began = time.monotonic()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        found = [time.monotonic() - began for text in run.stdout if text.startswith(line)]
        _, errors = run.communicate()
    if run.returncode or not found:
        raise SystemExit(f"{' '.join(command[:4])} ... ended with status {run.returncode}:\n{errors[-2000:]}")
    return found[0]


def ours(engine: str, folder: Path, number: int) -> float:
    """lctrain on an engine."""
    settings = [
        "recipe=demo",
        f"engine={engine}",
        "parallel.cp=1",
        "trainer.steps=1",
        "trainer.seq_len=256",
        "trainer.eval_every=0",
    ]
    run = [f"run_dir={engine}-{number}", "tracking.plot=false", "engine.device=cpu"]
    return seconds_until(DONE, [sys.executable, "-m", "lctrain", "train", *settings, *run], folder, {})


def bare(engine: str, folder: Path) -> float:
    """The library's own smallest example."""
    script = folder / f"bare_{engine}.py"
    script.write_text(f"{BARE[engine]}\nprint('{DONE}1', flush=True)\n")
    return seconds_until(DONE, [sys.executable, str(script)], folder, ALONE)


def main() -> int:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", default=",".join(BARE))
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for engine in arguments.engines.split(","):
            rounds = [(ours(engine, folder, number), bare(engine, folder)) for number in range(arguments.repeats + 1)][1:]
            mine, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
            lines.append((engine, f"{mine:.1f}", f"{theirs:.1f}", f"{mine - theirs:+.1f}"))
    say(f"seconds from the command to the end of the first step, median of {arguments.repeats}, {os.cpu_count()} cores")
    table(("engine", "lctrain", "bare library", "difference"), lines, align="lrrr")
    return 0


if __name__ == "__main__":
    sys.exit(main())
