"""Check and time everything that needs a GPU, on this machine's: `make gpu-check`.

Runs the tests of tests/gpu, times the attention kernels over sequence lengths, times training steps beside what `lctrain plan`
says of them, and prints what belongs into docs/benchmarks. Exit status 1 if a test fails, 2 if there is no CUDA device.

usage: python tools/gpu_check.py [--output results.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.console import say, table
from lctrain.devices import gemm_flops, peak_flops
from lctrain.kernels.attention import fused
from lctrain.kernels.attention.band import Band
from lctrain.models.init import initialise
from lctrain.models.model import LanguageModel
from lctrain.optim import make_adamw
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout, document_positions
from lctrain.parallel.sequence import SequenceMeta
from lctrain.plan.plan import make_plan

LENGTHS = (4096, 16384, 65536)


def main() -> int:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        say("no CUDA device: nothing was checked")
        return 2
    device = torch.device("cuda")
    peak, source = peak_flops(device, torch.bfloat16)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "peak_tflops": peak / 1e12,
        "gemm_bf16_tflops": gemm_flops(device, torch.bfloat16) / 1e12,
    }
    say(f"{results['device']}, torch {torch.__version__}; peak {peak / 1e12:.0f} TFLOP/s ({source})")
    status = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/gpu"], check=False).returncode
    results["tests"] = "passed" if status == 0 else "failed"
    results["attention"] = [attention_rate(length, kv_heads) for length in LENGTHS for kv_heads in (32, 8)]
    table(
        list(results["attention"][0]), [list(row.values()) for row in results["attention"]], "causal attention, bf16", "rrrrr"
    )
    results["step"] = [
        *(step_rate("small", length) for length in LENGTHS),
        step_rate("llama3_1b", 16384),
        step_rate("hybrid_small", 16384),
    ]
    table(list(results["step"][0]), [list(row.values()) for row in results["step"]], "training step, bf16, one GPU", "lrrrrrr")
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    return int(status != 0)


def attention_rate(length: int, kv_heads: int) -> dict[str, Any]:
    """TFLOP/s on live entries of one causal square, 32 heads of 128, forward and backward."""
    heads, size = 32, 128
    q, k, v, dout = (
        torch.randn(1, length, h, size, device="cuda", dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads, heads)
    )
    band, scale = Band(0, length, 0, length, None, 0), size**-0.5
    out, lse, _ = fused.forward(q, k, v, band, scale)
    flops = 4 * band.entries * heads * size
    forward = seconds(lambda: fused.forward(q, k, v, band, scale))
    backward = seconds(lambda: fused.backward_whole(dout, q, k, v, out, lse, band, scale))
    return {
        "tokens": length,
        "heads": f"{heads}:{kv_heads}",
        "forward TFLOP/s": round(flops / forward / 1e12, 1),
        "backward TFLOP/s": round(2.5 * flops / backward / 1e12, 1),
        "fwd+bwd ms": round(1e3 * (forward + backward), 3),
    }


def step_rate(model_name: str, length: int) -> dict[str, Any]:
    """Tokens/s, MFU and peak memory of forward, backward and AdamW on one sequence, recomputing sublayers in backward.

    Beside them, those that `lctrain plan` foresees on the preset of this GPU.
    """
    settings = (
        f"trainer.seq_len={length}",
        "trainer.global_batch=1",
        "engine.dtype=bf16",
        "engine.activation_checkpointing=layer",
    )
    config = load(TrainConfig, "train", [f"model={model_name}", *settings])
    plan = make_plan(config)
    device = torch.device("cuda")
    model = LanguageModel(config.model, torch.bfloat16, checkpointing=True)
    initialise(model, seed=0)
    model.to(device)
    optimizer = make_adamw(model, config.optim)
    documents = ((0, length),)
    tokens = torch.randint(0, 256, (1, length), device=device)
    positions = document_positions(documents, length).to(device)

    def step() -> None:
        seq = SequenceMeta(SequenceLayout("zigzag", 1, length), RankGroup(), positions, documents)
        (model(tokens, tokens, seq).objective / length).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    torch.cuda.reset_peak_memory_stats()
    took = seconds(step)
    mfu = 3 * model.flops(documents) / took / peak_flops(device, torch.bfloat16)[0]
    return {
        "model": model_name,
        "tokens": length,
        "tokens/s": round(length / took),
        "planned tokens/s": round(plan.tokens_per_s),
        "MFU": f"{mfu:.1%}",
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "planned GiB": round(plan.most / 2**30, 2),
    }


def seconds(action: Callable[[], object], tries: int = 5) -> float:
    """Median seconds of an action on the GPU, after two to warm up."""
    times = []
    for attempt in range(tries + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        if attempt >= 2:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    sys.exit(main())
