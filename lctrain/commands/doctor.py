"""Check this machine: versions, processors, memory, disk, and whether processes can talk to each other.

usage: lctrain doctor

Ends with status 1 if something that training needs is missing or broken.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from lctrain.config.arguments import no_arguments

REQUIRED = ("torch", "numpy", "hydra-core", "pydantic", "rich", "tokenizers", "matplotlib", "psutil")
OPTIONAL = ("transformers", "wandb", "triton", "megatron-core", "deepspeed")
GLOO_TIMEOUT_S = 60

GLOO_TEST = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
rank, where = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2, timeout=timedelta(seconds=30))
x = torch.ones(4) * (rank + 1)
dist.all_reduce(x)
assert x.tolist() == [3.0] * 4, x
dist.barrier()
dist.destroy_process_group()
"""


class Finding(NamedTuple):
    """One line of the report; ok is None where nothing depends on it."""

    what: str
    value: str
    ok: bool | None = None


def main(args: list[str]) -> int:
    """Run the command."""
    no_arguments(args)
    from lctrain.console import say, table

    findings = [*_versions(), *_devices(), *_machine(), _gloo()]
    marks = {True: "ok", False: "BROKEN", None: ""}
    table(("", "", ""), [(finding.what, finding.value, marks[finding.ok]) for finding in findings])
    broken = [finding.what for finding in findings if finding.ok is False]
    say(f"\nbroken: {', '.join(broken)}" if broken else "\nEverything that training needs is here.")
    return 1 if broken else 0


def _versions() -> Iterator[Finding]:
    yield Finding("python", platform.python_version(), sys.version_info >= (3, 11))
    for name in REQUIRED:
        version = _version(name)
        yield Finding(name, version or "missing", version is not None)
    for name in OPTIONAL:
        yield Finding(name, _version(name) or "not installed (optional)")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("import torch", " ".join(str(error).split()), False)
        return
    if not torch.cuda.is_available():
        yield Finding("CUDA", "none: training runs on the CPU")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        major, minor = device.major, device.minor
        yield Finding(f"CUDA {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, capability {major}.{minor}")


def _machine() -> Iterator[Finding]:
    yield Finding("CPU cores", str(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else str(os.cpu_count()))
    try:
        import psutil

        memory = psutil.virtual_memory()
        yield Finding("memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")
    except ImportError:
        pass  # reported among the versions
    disk = shutil.disk_usage(".")
    yield Finding("disk here", f"{disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB free", disk.free > 2**30)


def _gloo() -> Finding:
    """Two processes add up a tensor over gloo."""
    import tempfile

    what = "processes talk (gloo)"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", GLOO_TEST]
        pair = [
            subprocess.Popen([*command, str(rank), f"{folder}/store"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for rank in range(2)
        ]
        try:
            complaints = [process.communicate(timeout=GLOO_TIMEOUT_S)[1].decode(errors="replace") for process in pair]
        except subprocess.TimeoutExpired:
            return Finding(what, f"no answer within {GLOO_TIMEOUT_S} s", False)
        finally:
            for process in pair:
                process.kill()
                process.wait()
    for process, complaint in zip(pair, complaints, strict=True):
        if process.returncode:
            lines = complaint.strip().splitlines()
            return Finding(what, lines[-1] if lines else f"exit status {process.returncode}", False)
    return Finding(what, "2 processes added up a tensor", True)
