"""The recall probe: how much of a passage's loss the model saves where it has seen the passage before, by depth and length.

A needle in a haystack (Kamradt 2023) made of nothing but held-out text, asked for without generation: the passage comes again
at the end, as in the repeated sequences that show induction heads (Olsson et al. 2022, arXiv 2209.11895). Its loss there is
compared with that in the same text without the passage before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lctrain.config.schema import TrainConfig
from lctrain.data.loader import make_loader
from lctrain.data.samples import SampleSource
from lctrain.engines.base import Engine
from lctrain.parallel.mesh import ProcessMesh
from lctrain.probe.contexts import UNSCORED, ProbeTexts

DIGITS = 4


class RecallProbe:
    """Asks the same of every engine and layout, at every time the same: metrics of steps and of runs can be compared.

    source: of the split "valid".
    """

    def __init__(self, config: TrainConfig, mesh: ProcessMesh, engine: Engine, source: SampleSource) -> None:
        self._config, self._mesh, self._engine = config, mesh, engine
        self._texts = ProbeTexts(config.probe, config.trainer.seq_len, source)

    def due(self, step: int) -> bool:
        """Whether to run after step `step`, counted from 1."""
        return step % self._config.probe.every == 0 or step == self._config.trainer.steps

    def run(self) -> dict[str, Any]:
        """Metrics. Collective.

        recall_<length>: by depth, from the beginning of the context to its end, the share of the passage's loss that having
        seen it saves: 1 - loss with / loss without. 1: copied without doubt; 0: no use. recall: mean over all.
        """
        losses = self._losses() / (self._texts.scored * self._config.probe.passages)
        saved = 1 - losses[:, :-1] / losses[:, -1:].clamp(min=1e-9)
        tables = {f"recall_{n}": _short(row.tolist()) for n, row in zip(self._texts.lengths, saved, strict=True)}
        return {"recall": _short([float(saved.mean())])[0], **tables}

    def _losses(self) -> torch.Tensor:
        """Summed over the scored tokens of every cell, fp64 [lengths, depths + 1]."""
        lengths, columns = self._texts.cells
        sums = torch.zeros(lengths * columns, dtype=torch.float64)
        steps = -(-self._texts.rows // self._config.trainer.global_batch)
        with make_loader(self._config, self._mesh, self._texts, 0, steps) as batches:
            micro_batches = [micro for batch in batches for micro in batch.micro_batches]
        found = self._engine.token_losses(micro_batches)  # nothing on pipeline stages before the last
        if found and self._mesh.tp_rank == 0:  # tensor-parallel ranks have the same
            for micro, per_token in zip(micro_batches, found, strict=True):
                place = micro.layout.indices(self._mesh.cp_rank)
                for index, row in zip(micro.samples, per_token.cpu().double(), strict=True):
                    cells = torch.from_numpy(self._texts.cells_of(index))
                    mine = micro.layout.pad(cells, 0, UNSCORED)[place]
                    here = mine != UNSCORED
                    sums.index_add_(0, mine[here], row[here])
        if self._mesh.size > 1:
            dist.all_reduce(sums)
        return sums.view(lengths, columns)


def _short(values: list[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
