"""Live tiles of a masked layout, and what a schedule says about itself."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lctrain.parallel.layout import KINDS, SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.schedule import Chunk, Item, Schedule, Step, Tile, TileMap, Transfer


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), world=st.integers(1, 5), length=st.integers(1, 50), causal=st.booleans(), data=st.data())
def test_a_tile_is_live_if_its_mask_has_an_entry(kind: str, world: int, length: int, causal: bool, data) -> None:
    ends = data.draw(st.sets(st.integers(1, length), min_size=1, max_size=4))
    mask = AttentionMask(((0, *sorted(ends)),), causal, data.draw(st.none() | st.integers(1, length)))
    layout = SequenceLayout(kind, world, length)
    live, whole = TileMap(layout, mask), mask.live(length)[0]

    def positions(chunk: Chunk) -> list[int]:
        size = layout.chunk_length
        every = layout.indices(chunk.owner)[chunk.part * size : (chunk.part + 1) * size].tolist()
        return [position for position in every if position < length]

    chunks = tuple(chunk for rank in range(world) for chunk in live.chunks_of(rank))
    wanted = {Tile(q, k) for q in chunks for k in chunks if whole[positions(q)][:, positions(k)].any()}
    assert set(live.tiles(chunks, chunks)) == wanted
    twice = live.every_tile(2)
    assert len(twice) == 2 * len(wanted)
    assert set(twice) == {tile._replace(heads=heads) for tile in wanted for heads in (0, 1)}


def test_maps_are_equal_where_the_same_tiles_are_live() -> None:
    """Batches whose documents differ inside chunks share their schedules."""
    layout = SequenceLayout("contiguous", 4, 64)
    one, same, other = (TileMap(layout, AttentionMask((borders,))) for borders in ((0, 5, 64), (0, 9, 64), (0, 16, 64)))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other


def test_sends_are_counted_by_kind_and_heads() -> None:
    item = Item("kv", Chunk(0, 1), 1)
    steps = (Step(sends=(Transfer(item, 1, 0), Transfer(item._replace(heads=0), 1, 0))), Step(sends=(Transfer(item, 2, 1),)))
    schedule = Schedule("made up", "forward", (steps, (Step(), Step()), (Step(), Step())), 2, 1)
    assert schedule.world_size == 3
    assert schedule.sends(0) == {("kv", 1): 2, ("kv", 0): 1}
    assert schedule.sends(1) == {}
