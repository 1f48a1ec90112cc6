"""ModelParallel: over which ranks the matrices of a model are cut."""

from __future__ import annotations

import dataclasses

from lctrain.parallel.group import RankGroup


@dataclasses.dataclass(frozen=True)
class ModelParallel:
    """The groups whose ranks hold different parts of one model: tensor-, expert- and, within experts, tensor-parallel.

    dp_cp: ranks that hold the same parts and other tokens; what a layer counts over the whole batch is summed over them.
    """

    tp: RankGroup = dataclasses.field(default_factory=RankGroup)
    ep: RankGroup = dataclasses.field(default_factory=RankGroup)
    etp: RankGroup = dataclasses.field(default_factory=RankGroup)
    dp_cp: RankGroup = dataclasses.field(default_factory=RankGroup)

    def group(self, dimension: str) -> RankGroup:
        """The group named `tp`, `ep` or `etp`, as in Place.cuts."""
        group = getattr(self, dimension)
        assert isinstance(group, RankGroup), dimension
        return group
