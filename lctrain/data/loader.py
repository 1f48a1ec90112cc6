"""Step batches of one rank, prepared by background threads ahead of the step that needs them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lctrain.attention_plans import Prepare, make_preparation
from lctrain.config.schema import DataConfig, TrainConfig, TrainerConfig
from lctrain.data.batch import MicroBatch, PackedSample, StepBatch
from lctrain.data.digest import DIGEST_BITS, sample_digest
from lctrain.models.pattern import parse_pattern
from lctrain.parallel.deal import make_layout
from lctrain.parallel.layout import IGNORE, SequenceLayout, count_targets, document_positions, shift_labels
from lctrain.parallel.mesh import ProcessMesh

CPU = torch.device("cpu")


class Samples(Protocol):
    """Packed samples by number: a pure function of it. pad_id: the token that fills shards up."""

    pad_id: int

    def sample(self, index: int) -> PackedSample:
        """Sample `index` of the run."""
        ...


def make_loader(
    config: TrainConfig,
    mesh: ProcessMesh,
    source: Samples,
    start: int,
    end: int | None = None,
    device: torch.device = CPU,
    gradients: bool = True,
) -> Loader:
    """The loader of this rank for steps start .. end-1 (None: to the end of the run).

    device: where the model computes. gradients: whether these batches are trained on, not only evaluated.
    """
    return Loader(
        source,
        config.parallel.layout,
        mesh.cp_rank,
        mesh.cp,
        mesh.dp_rank,
        mesh.dp,
        config.trainer,
        config.data,
        start_step=start,
        stop_step=end,
        pin_memory=device.type == "cuda",
        window=shared_window(config),
        prepare=make_preparation(config, mesh, device, gradients),
    )


def shared_window(config: TrainConfig) -> int | None:
    """The window of all attention layers; None where there are others: their work outweighs that of windowed ones."""
    symbols = {layer.symbol for layer in parse_pattern(config.model.pattern)}
    return config.model.attention.window if "W" in symbols and not symbols & {"*", "+"} else None


class Loader:
    """Iterates the StepBatches of steps start_step .. stop_step-1 (default: to the end of the run).

    Step t takes samples t*global_batch .. (t+1)*global_batch - 1 of the source; micro-batch m of data-parallel rank d has in
    row j the sample (m*dp_size + d)*micro_batch + j of these. The ranks of one context-parallel group read the same rows and
    keep their own share of the tokens. For evaluation: a source of split "valid" and stop_step=trainer.eval_batches.

    window: tokens that a query sees if all attention layers have this window, else None; the layout "balanced" evens out each
        micro-batch's work for it.
    prepare: makes the attention plans that micro-batches bring; None: they bring none.
    wait_s: seconds that the consumer waited for the latest batch; near 0 while the threads keep up.
    An exception in a thread is raised by `next`, in the order of the steps. Use as a context manager or call `close`.
    """

    def __init__(
        self,
        source: Samples,
        layout_kind: str,
        cp_rank: int,
        cp_size: int,
        dp_rank: int,
        dp_size: int,
        trainer: TrainerConfig,
        data: DataConfig,
        start_step: int = 0,
        stop_step: int | None = None,
        pin_memory: bool = False,
        window: int | None = None,
        prepare: Prepare | None = None,
    ) -> None:
        assert trainer.global_batch % (dp_size * trainer.micro_batch) == 0, "global batch not divisible over the ranks"
        self._source = source
        self._layout = (layout_kind, cp_size)
        self._window = window
        self._prepare_plans = prepare
        self._cp_rank = cp_rank
        self._dp = (dp_rank, dp_size)
        self._trainer = trainer
        self._pin = pin_memory
        self._stop_step = trainer.steps if stop_step is None else stop_step
        self.wait_s = 0.0
        self._changed = threading.Condition()
        self._ready: dict[int, StepBatch | BaseException] = {}
        self._wanted = start_step  # step that the consumer takes next
        self._claimed = start_step  # step that a thread prepares next
        self._ahead = data.prefetch
        self._closed = False
        workers = min(data.workers, data.prefetch)
        self._threads = [threading.Thread(target=self._work, name=f"loader-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        started = time.perf_counter()
        with self._changed:
            if self._closed or self._wanted >= self._stop_step:
                raise StopIteration
            step = self._wanted
            self._changed.wait_for(lambda: step in self._ready or self._closed)
            if self._closed:
                raise StopIteration
            result = self._ready.pop(step)
            self._wanted += 1
            self._changed.notify_all()
        self.wait_s = time.perf_counter() - started
        if isinstance(result, BaseException):
            self.close()
            raise result
        return result

    def close(self) -> None:
        """Stop the threads. A thread inside a read ends after it; none keeps the process alive."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._claimed < self._wanted + self._ahead)
                if self._closed or self._claimed >= self._stop_step:
                    return
                step = self._claimed
                self._claimed += 1
            try:
                result: StepBatch | BaseException = self._prepare(step)
            except BaseException as error:  # handed to the consumer, which raises it
                result = error
            with self._changed:
                if not self._closed:
                    self._ready[step] = result
                self._changed.notify_all()

    def _prepare(self, step: int) -> StepBatch:
        dp_rank, dp_size = self._dp
        rows, batch = self._trainer.micro_batch, self._trainer.global_batch
        consumed = step * batch
        digest = 0
        micro_batches = []
        for number in range(batch // (dp_size * rows)):
            first = consumed + (number * dp_size + dp_rank) * rows
            samples = [self._source.sample(index) for index in range(first, first + rows)]
            digest += sum(map(sample_digest, samples))
            micro_batches.append(self._shard(samples))
        return StepBatch(step, consumed, tuple(micro_batches), digest % 2**DIGEST_BITS)

    def _shard(self, samples: list[PackedSample]) -> MicroBatch:
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
        borders = tuple(sample.borders for sample in samples)
        kind, cp_size = self._layout
        layout = make_layout(kind, cp_size, tokens.shape[1], borders, self._window)
        # The shift comes before the cut: a shard's last token has its target on another rank.
        labels = shift_labels(tokens, borders, [sample.next_token for sample in samples])
        positions = document_positions(borders, tokens.shape[1])
        return MicroBatch(
            tokens=self._mine(layout, tokens, self._source.pad_id),
            labels=self._mine(layout, labels, IGNORE),
            positions=self._mine(layout, positions, 0),
            borders=borders,
            layout=layout,
            targets=count_targets(labels),
            samples=tuple(sample.index for sample in samples),
            spans=tuple(sample.spans for sample in samples),
            plans=() if self._prepare_plans is None else self._prepare_plans(layout, borders),
        )

    def _mine(self, layout: SequenceLayout, rows: Tensor, pad: int) -> Tensor:
        shard = layout.shard(rows, self._cp_rank, dim=1, pad=pad)
        return shard.pin_memory() if self._pin else shard
