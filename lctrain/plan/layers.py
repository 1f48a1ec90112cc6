"""What each pipeline stage holds: its sublayers, and how many parameters a rank of it has a part in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property

from lctrain.config.deepspeed import zero_stage
from lctrain.config.schema import TrainConfig
from lctrain.models.build import build_model
from lctrain.models.model import LanguageModel
from lctrain.models.pattern import parse_pattern
from lctrain.models.piece import piece_ranges
from lctrain.models.place import Family, parameter_places
from lctrain.parallel.mesh import ProcessMesh
from lctrain.plan.cost import FP32, StaticMemory


@dataclasses.dataclass(frozen=True)
class Stage:
    """A pipeline stage.

    pieces: the parts of each of its pieces in order, as rehearse() names them: several if the schedule is interleaved.
    """

    index: int
    pieces: tuple[tuple[str, ...], ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """Of all pieces."""
        return tuple(part for piece in self.pieces for part in piece)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameters of a stage's weights, of a rank's tp, ep and etp part, before data parallelism divides them.

    root: those of embedding and head, which FSDP gathers once and keeps until the end of the backward pass.
    largest: those of the largest sublayer.
    """

    dense: int
    expert: int
    root: int
    largest: int


class Layers:
    """The model of a config, without storage, cut into stages."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.model: LanguageModel = build_model(config)
        self.mesh: ProcessMesh = config.mesh(0, config.processes)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All pipeline stages in order."""
        pp, pieces = self.config.parallel.pp, self.config.parallel.pp * self.config.parallel.virtual_stages
        symbols = [layer.symbol for layer in parse_pattern(self.config.model.pattern)]
        ranges = piece_ranges(self.config, self.model, pieces) if pieces > 1 else [range(len(symbols))]
        parts: list[tuple[str, ...]] = []
        for place, layers in enumerate(ranges):
            first = ("embedding",) if place == 0 else ()
            last = ("loss",) if place == pieces - 1 else ()
            parts.append((*first, *(symbols[i] for i in layers), *last))
        return tuple(Stage(index, tuple(parts[index::pp])) for index in range(pp))

    def parameters(self, stage: Stage, static: StaticMemory) -> Parameters:
        """From what a rank of the stage holds: its engine knows best what it is divided over."""
        config, mesh = self.config, self.mesh
        experts = sum(self._experts[part] for part in stage.parts if part in self._experts) // (mesh.ep * mesh.etp)
        copies = mesh.dp * mesh.cp
        if config.engine.name == "megatron":
            held = static.gradients // FP32
        elif config.engine.name == "deepspeed" and zero_stage(config) == 3:
            whole = mesh.tp * mesh.ep * mesh.etp == 1
            held = (
                static.weights // FP32 * copies if whole else experts + (static.weights // FP32 - experts // mesh.edp) * copies
            )
        elif config.engine.data_parallel == "fsdp":
            apart = experts if mesh.ep > 1 else 0
            held = apart + (static.weights // FP32 - apart // mesh.edp) * copies
        else:
            held = static.weights // FP32
        root = sum(config.model.vocab_size * config.model.d_model // mesh.tp for part in stage.parts if part in self._ends)
        largest = max(self._numel[part] for part in set(stage.parts) & set(self._numel)) // mesh.tp
        return Parameters(max(0, held - experts), experts, root, largest)

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return ("loss",) if self.config.model.tie_embeddings else ("embedding", "loss")

    @cached_property
    def _numel(self) -> Mapping[str, int]:
        """Parameters of a whole sublayer, by symbol, without its experts."""
        found = {}
        for spec, layer in zip(parse_pattern(self.config.model.pattern), self.model.layers, strict=True):
            found[spec.symbol] = sum(p.numel() for p in layer.parameters()) - self._experts.get(spec.symbol, 0)
        return found

    @cached_property
    def _experts(self) -> Mapping[str, int]:
        """Parameters of all experts of a sublayer, by symbol."""
        places, found = parameter_places(self.model), dict[str, int]()
        named = dict(self.model.named_parameters())
        seen = set()
        for index, spec in enumerate(parse_pattern(self.config.model.pattern)):
            if spec.symbol in seen:
                continue
            seen.add(spec.symbol)
            prefix = f"layers.{index}."
            found[spec.symbol] = sum(
                p.numel() for n, p in named.items() if n.startswith(prefix) and places[n].family is Family.EXPERT
            )
        return found
