"""`lctrain verify layout`: run one process and the layout on this machine, compare, report."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.config.verify import LayoutVerifyConfig
from lctrain.console import progress, say
from lctrain.engines.base import StepResult
from lctrain.engines.quiet import quiet_libraries
from lctrain.errors import UserError
from lctrain.launch.ranks import RankError, RankPool
from lctrain.models.build import build_model
from lctrain.models.place import parameter_places
from lctrain.run_dir import RunDir
from lctrain.verify.layout.judge import Check, judge, leak
from lctrain.verify.layout.rank import CPU, Findings, load_checkpoint, prove
from lctrain.verify.layout.report import LayoutReport, check_place, print_matrix, print_one, store
from lctrain.verify.layout.samples import MadeSamples
from lctrain.verify.layout.shrink import reference_of, shrink
from lctrain.verify.layout.standard import MATRIX, QUICK, grid_of, load_layout


def verify_layout(overrides: list[str], options: LayoutVerifyConfig) -> int:
    """Prove the user's config, a model over a grid of layouts, or the standard matrix; returns 1 if anything fails."""
    if options.all:
        if overrides:
            raise UserError(f"--all proves the standard matrix, so {overrides[0]} has no place; drop one of them")
        names = [name for name in (QUICK if options.quick else MATRIX) if (options.only or "") in name]
        layouts = {name: load_layout(MATRIX[name]) for name in names}
        if not layouts:
            raise UserError(f"verify.only={options.only}: no layout has that in its name; there are {', '.join(MATRIX)}")
        check_place(options, None)
        return _many(layouts, options, None)
    config = load(TrainConfig, "train", overrides)
    run = RunDir(config.run_dir).path
    check_place(options, run)
    if config.processes > 1:
        with progress("verify layout", 1, "layouts") as advance, Prover(options) as prover:
            report = prover.prove(_name(config), config)
            advance(1)
        print_one(report)
        store([report], options, run)
        return int(not report.passed)
    grid = {name: load(TrainConfig, "train", [*overrides, *words]) for name, words in grid_of(config).items()}
    say(f"one process is no layout: {config.model.name} is proved on {len(grid)} layouts of up to 4 processes")
    return _many(grid, options, run)


def _many(layouts: dict[str, TrainConfig], options: LayoutVerifyConfig, run: Path | None) -> int:
    reports = []
    with progress("verify layout", len(layouts), "layouts") as advance, Prover(options) as prover:
        for name, config in layouts.items():
            reports.append(prover.prove(name, config))
            advance(1)
    print_matrix(reports)
    store(reports, options, run)
    return int(not all(report.passed for report in reports))


@dataclasses.dataclass(frozen=True)
class _Reference:
    """One process: its findings, what its checkpoint holds, and the verdict of its own leak probe."""

    found: Findings
    loaded: tuple[dict[str, Any], StepResult]
    leak: Check


class Prover:
    """Runs layouts; those of the same model and training share one reference. A context manager: it has a temporary folder."""

    def __init__(self, options: LayoutVerifyConfig) -> None:
        self.options = options
        self._references: dict[str, _Reference] = {}

    def __enter__(self) -> Prover:
        self._folder = Path(tempfile.mkdtemp(prefix="lctrain-verify-"))
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def prove(self, name: str, asked: TrainConfig) -> LayoutReport:
        """Verdict on one layout; a rank that raises or hangs is a failure like any other."""
        began = time.monotonic()
        config, notes = shrink(asked, self.options)
        samples = _samples(config)
        changed = _document_to_change(samples, config.trainer.global_batch)
        checks: list[Check] = []
        problem = None
        try:
            reference = self.reference(config)
            pinned = reference.found.rankings
            found = self._run(config.processes, prove, config, changed, self._new_folder(), pinned)[0]
            one = reference_of(config)
            loaded = self._run(1, load_checkpoint, one, found.checkpoint, pinned)[0]
            places = parameter_places(build_model(one))
            checks = judge(found, reference.found, loaded, reference.loaded, places, changed, samples)
            checks.append(reference.leak)
        except RankError as error:
            problem = str(error).strip()
        return LayoutReport(name, config, notes, checks, problem, time.monotonic() - began)

    def reference(self, config: TrainConfig) -> _Reference:
        """What one process finds for a config that has been shrunk."""
        one = reference_of(config)
        samples = _samples(one)
        changed = _document_to_change(samples, one.trainer.global_batch)
        key = json.dumps(one.model_dump(exclude={"run_dir", "cluster"}), sort_keys=True, default=str)
        if key not in self._references:
            found = self._run(1, prove, one, changed, self._new_folder(), None)[0]
            loaded = self._run(1, load_checkpoint, one, found.checkpoint, found.rankings)[0]
            probe = leak(found, changed, samples, 0.0)._replace(name="leak probe, one process")
            self._references[key] = _Reference(found, loaded, probe)
        return self._references[key]

    def _new_folder(self) -> str:
        return tempfile.mkdtemp(dir=self._folder)

    def _run(self, processes: int, function: Any, config: TrainConfig, *arguments: Any) -> list[Any]:
        with _pool(processes, config.engine.name) as pool:
            return pool.run(function, config, *arguments, timeout_s=self.options.timeout_s)


@contextmanager
def _pool(processes: int, engine: str) -> Iterator[RankPool]:
    """Fresh processes: the engines' libraries keep state of their own that a second layout must not meet.

    What this process has imported they need not import again, so the libraries come first.
    """
    if engine != "torch":
        quiet_libraries()
    if engine == "megatron":
        import lctrain.engines.megatron.engine  # noqa: F401
    if engine == "deepspeed":
        from lctrain.engines.deepspeed.start import import_deepspeed

        import_deepspeed(CPU)
    pool = RankPool(processes)
    try:
        yield pool
    finally:
        pool.close()


def _name(config: TrainConfig) -> str:
    parallel = config.parallel
    sizes = {name: config.grid[name] for name in ("dp", "cp", "tp", "pp")} | {"ep": parallel.ep, "etp": parallel.etp}
    shown = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
    return f"{config.model.name} {config.engine.name} {shown} {parallel.attention} {parallel.layout}"


def _samples(config: TrainConfig) -> MadeSamples:
    return MadeSamples(config.trainer.seed, config.trainer.seq_len, config.model.vocab_size)


def _document_to_change(samples: MadeSamples, count: int) -> tuple[int, int]:
    """The longest document that has others before and after it in its row."""
    candidates = []
    for sample in range(count):
        borders = samples.borders(sample)
        for document in range(1, len(borders) - 2):
            candidates.append((borders[document + 1] - borders[document], sample, document))
    _, sample, document = max(candidates)
    return sample, document
