"""`lctrain bench convert`: conversions beside a plain copy of the same files, and the memory that they take."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from lctrain.bench.child import Child
from lctrain.bench.memory import forget_peak, peak_resident_mib, resident_mib
from lctrain.bench.report import introduce_machine
from lctrain.config.convert import ConvertBenchConfig
from lctrain.console import progress, say, table
from lctrain.errors import UserError
from lctrain.whole_file import write_json

CONVERSIONS = (("hf", "lctrain"), ("lctrain", "hf"), ("lctrain", "megatron"), ("megatron", "lctrain"))
WIDTH, HIDDEN, VOCABULARY = 2048, 5632, 32000


class Converter:
    """Makes, converts and copies models in a process of its own."""

    def make(self, folder: str, gb: float, family: str, dtype: str) -> int:
        """A model folder of Hugging Face with random numbers; returns its bytes."""
        import torch

        from lctrain.convert.families import family_named
        from lctrain.convert.mapping import WeightMap
        from lctrain.convert.safetensors import SafetensorsWriter
        from lctrain.convert.stream import Info
        from lctrain.devices import DTYPES

        table = family_named(family)
        config = _model(family, 1)
        one = sum(info.shape.numel() for info in WeightMap.of(config, None).ours.values())
        two = sum(info.shape.numel() for info in WeightMap.of(_model(family, 2), None).ours.values())
        layers = max(1, round((gb * 1e9 / DTYPES[dtype].itemsize - one) / (two - one)) + 1)
        config = _model(family, layers)
        mapping = WeightMap.of(config, table.rules(config))
        infos = mapping.their_infos({name: Info(info.shape, DTYPES[dtype]) for name, info in mapping.ours.items()})
        place = Path(folder)
        place.mkdir()
        writer = SafetensorsWriter(place, infos, 2 * 10**9, {})
        for name, info in infos.items():
            writer.write(name, [torch.randn(info.shape).to(info.dtype)])
        writer.close()
        (place / "config.json").write_text(json.dumps(table.hf_config(config)))
        return sum(path.stat().st_size for path in place.iterdir())

    def convert(self, source: str, output: str, to: str) -> tuple[float, float]:
        """Seconds, and MiB of resident memory beyond what there was before."""
        from lctrain.config.convert import ConvertConfig
        from lctrain.convert.run import convert

        options = ConvertConfig(to=to, input=source, output=output, verify=False)
        os.sync()  # what was removed before is not to slow down what is measured now
        forget_peak()
        before, begin = resident_mib(), time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            convert(options)
        return time.perf_counter() - begin, peak_resident_mib() - before

    def copy(self, source: str, output: str) -> float:
        """Seconds of a plain copy, on disk."""
        os.sync()
        begin = time.perf_counter()
        shutil.copytree(source, output)
        for path in Path(output).iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        return time.perf_counter() - begin


def bench_convert(config: ConvertBenchConfig) -> int:
    """Measure, print, store; returns 0."""
    if config.output is not None and not Path(config.output).absolute().parent.is_dir():
        raise UserError(f"output={config.output}: not a file in an existing folder")
    machine = introduce_machine()
    with tempfile.TemporaryDirectory(dir=config.folder) as folder, Child(Converter, 1) as child:
        results = _measure(config, Path(folder), child)
    rows = [
        (r["what"], *(f"{r[key]:.2f}" for key in ("fastest_s", "of_copy", "median_s", "median_of_copy")), _mib(r["extra_mib"]))
        for r in results
    ]
    table(("what", "fastest, s", "of a copy", "median, s", "of a copy", "extra memory"), rows, align="lrrrrr")
    if config.output is not None:
        content = {"benchmark": "convert", "settings": config.model_dump(mode="json", exclude={"output"})}
        write_json(Path(config.output), {**content, "machine": machine, "results": results})
        say(f"results in {config.output}")
    return 0


def _measure(config: ConvertBenchConfig, folder: Path, child: Child) -> list[dict[str, Any]]:
    original = folder / "hf"
    size = child.call("make", str(original), config.gb, config.family, config.dtype)
    say(f"{config.family}, {config.dtype}, {size / 1e9:.2f} GB, {config.repeats} runs each")
    child.call("convert", str(original), str(folder / "lctrain"), "lctrain")  # imports, and the inputs of the others
    child.call("convert", str(folder / "lctrain"), str(folder / "megatron"), "megatron")
    found: dict[str, list[tuple[float, float | None]]] = {}
    kinds = [("copy", str(original), ""), *((f"{a} -> {b}", str(folder / a), b) for a, b in CONVERSIONS)]
    with progress("bench convert", config.repeats * len(kinds), "runs") as advance:
        for repeat in range(config.repeats):
            # In another order each time: what one leaves to the kernel to do, the next one waits for.
            for what, source, to in random.Random(repeat).sample(kinds, len(kinds)):
                output = folder / "output"
                if to:
                    result = child.call("convert", source, str(output), to)
                else:
                    result = (child.call("copy", source, str(output)), None)
                found.setdefault(what, []).append(result)
                shutil.rmtree(output)
                advance(1)
    seconds = {what: [run[0] for run in runs] for what, runs in found.items()}
    results = []
    for what, _, _ in kinds:
        extra = [run[1] for run in found[what] if run[1] is not None]
        results.append(
            {
                "what": what,
                "gb": size / 1e9,
                "fastest_s": min(seconds[what]),
                "of_copy": min(seconds[what]) / min(seconds["copy"]),
                "median_s": median(seconds[what]),
                "median_of_copy": median(seconds[what]) / median(seconds["copy"]),
                "extra_mib": max(extra) if extra else None,
                "runs": seconds[what],
            }
        )
    return results


def _model(family: str, layers: int) -> Any:
    from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
    from lctrain.config.moe import MoeConfig

    pattern = f"(*{'E' if family == 'mixtral' else '-'}){{{layers}}}"
    attention = AttentionConfig(n_heads=16, n_kv_heads=4, head_dim=128)
    return ModelConfig(
        pattern=pattern,
        d_model=WIDTH,
        vocab_size=VOCABULARY,
        attention=attention,
        mlp=MlpConfig(d_ff=HIDDEN),
        moe=MoeConfig(n_experts=8, d_ff=HIDDEN),
    )


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} MiB"
