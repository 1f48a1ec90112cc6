"""Device: how long the attention kernel takes for a call of a given size."""

from __future__ import annotations

import bisect
import dataclasses
import math

from lctrain.parallel.cost import PRODUCTS, Call
from lctrain.parallel.schedule import Direction


@dataclasses.dataclass(frozen=True)
class Rates:
    """FLOP/s of calls by size: flops[i][j] for rows[i] queries against columns[j] keys.

    Between sizes it is linear in the logarithms of both; beyond the table it stays as at its border.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    flops: tuple[tuple[float, ...], ...]

    def at(self, rows: float, columns: float) -> float:
        """FLOP/s of a call."""
        above, below, down = _between(self.rows, rows)
        left, right, along = _between(self.columns, columns)
        near, far = ((1 - along) * line[left] + along * line[right] for line in (self.flops[above], self.flops[below]))
        return (1 - down) * near + down * far


@dataclasses.dataclass(frozen=True)
class Device:
    """Rates on live entries, of full rectangles and of causal squares' halves, in both directions.

    call_s: fixed seconds of a call. pass_s: of one direction of a layer, however many calls it makes. pass_s_per_byte: seconds
    of one direction for every byte of a rank's queries: making room for results, adding up, converting.
    """

    forward: Rates
    backward: Rates
    causal_forward: Rates
    causal_backward: Rates
    call_s: float
    pass_s: float = 0.0
    pass_s_per_byte: float = 0.0

    def seconds(self, call: Call, direction: Direction, head_dim: int) -> float:
        """Time of one kernel call. A band with dead corners counts as half a causal square with as many live entries a row."""
        full = call.entries == call.rows * call.columns
        rates = getattr(self, direction if full else f"causal_{direction}")
        columns = call.columns if full else 2 * call.entries / call.rows
        return self.call_s + 2 * PRODUCTS[direction] * head_dim * call.entries * call.heads / rates.at(call.rows, columns)


def _between(sizes: tuple[int, ...], size: float) -> tuple[int, int, float]:
    """Indices of the sizes below and above, and how far, in logarithms, `size` is from one to the other."""
    if size <= sizes[0]:
        return 0, 0, 0.0
    if size >= sizes[-1]:
        return len(sizes) - 1, len(sizes) - 1, 0.0
    above = bisect.bisect_right(sizes, size)
    return above - 1, above, math.log(size / sizes[above - 1]) / math.log(sizes[above] / sizes[above - 1])
