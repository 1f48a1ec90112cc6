"""The matrix: which problems are computed in which ways, and the command that computes one of them alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from lctrain.config.verify import AttentionVerifyConfig
from lctrain.errors import UserError
from lctrain.parallel.strategies import STRATEGIES
from lctrain.parallel.strategy import NAMES, Strategy
from lctrain.verify.problem import Problem

QUICK_PROBLEMS, QUICK_VARIANTS, QUICK_LENGTH = 11, 5, 200
"""`quick` takes every so-manieth problem and variant (primes, so that no two settings go in step), and not more tokens."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem in one way. variant: a strategy with its degrees, by a name that `strategies=` takes."""

    problem: Problem
    cp: int
    variant: str
    layout: str

    @property
    def strategy(self) -> Strategy:
        """The variant as a Strategy."""
        return VARIANTS[self.variant]

    def command(self) -> str:
        """A command that runs this case alone."""
        p = self.problem
        return (
            f"lctrain verify attention strategies={self.variant} cp={self.cp} layouts={self.layout} masks={p.mask}"
            f" heads={p.heads} lengths={p.length} dtypes={p.dtype} batch={p.batch} seed={p.seed}"
        )


def _variants() -> dict[str, Strategy]:
    found = {name: Strategy(name) for name in NAMES if name not in ("usp", "double_ring")}
    for size in (1, 2, 3, 4):
        found[f"double_ring-{size}"] = Strategy("double_ring", node=size)
    for size, ring, nesting in itertools.product((1, 2, 3, 4), STRATEGIES, ("inner", "outer")):
        found[f"usp-{size}-{ring}-{nesting}"] = Strategy("usp", ulysses=size, ring=ring, nesting=nesting)
    return found


VARIANTS = _variants()


def variants(config: AttentionVerifyConfig, cp: int) -> list[str]:
    """The chosen variants that make sense on `cp` ranks: 2-D strategies take proper divisors where there are any."""
    chosen = config.strategies or NAMES
    unknown = [name for name in chosen if name not in VARIANTS and name not in NAMES]
    if unknown:
        raise UserError(f"strategies={unknown[0]}: there are {', '.join(NAMES)}, or exact variants such as usp-2-ring-outer")
    sizes = [n for n in range(2, cp) if cp % n == 0] or [1]
    fitting = []
    for variant, strategy in VARIANTS.items():
        size = strategy.node if strategy.name == "double_ring" else strategy.ulysses
        named = variant in chosen and (size is None or cp % size == 0)
        if named or (strategy.name in chosen and (size is None or (size in sizes and _distinct(strategy, cp)))):
            fitting.append(variant)
    return fitting


def _distinct(strategy: Strategy, cp: int) -> bool:
    """Without a proper divisor a usp is its ring alone: one kind stands for all."""
    return strategy.name != "usp" or strategy.ulysses != 1 or (strategy.ring, strategy.nesting) == ("ring", "inner")


def problems(config: AttentionVerifyConfig) -> list[Problem]:
    """Every combination; neighbours share masks, whose schedules are then made once."""
    lengths = [min(length, QUICK_LENGTH) for length in config.lengths] if config.quick else config.lengths
    product = itertools.product(config.masks, lengths, config.batch, config.heads, config.dtypes)
    every = [Problem(*settings, seed=config.seed) for settings in product]
    return every[::QUICK_PROBLEMS] if config.quick else every


def cases(config: AttentionVerifyConfig, index: int, problem: Problem, cp: int) -> Iterator[Case]:
    """The ways to compute problem number `index` on `cp` ranks; layouts in turn, the same for both dtypes."""
    every = variants(config, cp)
    turn = index // len(config.dtypes)
    if config.quick:
        every = every[index % QUICK_VARIANTS :: QUICK_VARIANTS]
    for place, variant in enumerate(every):
        layouts = config.layouts if config.cross_layouts else (config.layouts[(turn + place) % len(config.layouts)],)
        for layout in layouts[:1] if cp == 1 else layouts:  # on one rank all layouts are the same
            yield Case(problem, cp, variant, layout)
