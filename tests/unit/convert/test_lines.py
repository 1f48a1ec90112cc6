"""Rules carried out on lines, in blocks of any size, give what they give on whole tensors, in both directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lctrain.convert import lines
from lctrain.convert.lines import line_shape, recipes
from lctrain.convert.rules import GroupedHeads, Joined, Operation, Reordered, Same, Stacked, partial_rotation, rotated_pairs
from lctrain.convert.stream import Info

CASES: dict[str, tuple[Operation, list[tuple[int, ...]]]] = {
    "same": (Same(), [(7, 5)]),
    "same, one dimension": (Same(), [(9,)]),
    "same, a number": (Same(), [()]),
    "same, no rows": (Same(), [(0, 4)]),
    "taps": (Joined(taps=True), [(6, 4), (2, 4), (2, 4)]),
    "biases": (Joined(), [(6,), (2,)]),
    "gate and up": (Joined(), [(6, 5), (6, 5)]),
    "gate and up of experts": (Joined(axis=1), [(3, 4, 5), (3, 4, 5)]),
    "experts": (Stacked(), [(3, 4, 5)]),
    "latent": (Reordered(2, rotated_pairs(4, 6)), [(20, 3)]),
    "qkv": (GroupedHeads(2), [(16, 5), (4, 5), (4, 5)]),
    "qkv of one key head": (GroupedHeads(1, partial_rotation(4, 2)), [(12, 5), (4, 5), (4, 5)]),
    "qkv biases": (GroupedHeads(2, partial_rotation(4, 2)), [(16,), (8,), (8,)]),
}


class Tensors:
    """A Source that counts the lines that it has read."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = {str(i): x for i, x in enumerate(tensors)}
        self.infos = {name: Info(x.shape, x.dtype) for name, x in self.tensors.items()}
        self.count = 0

    def read(self, name: str, lines: slice | None = None) -> torch.Tensor:
        info = self.infos[name]
        first, last = info.span(lines)
        self.count += last - first
        return info.shaped(self.tensors[name].reshape(info.lines, info.width)[first:last], lines)


def carried_out(operation, tensors, shapes):
    """What an operation makes of tensors, line by line: in blocks, whole, and some lines from the middle."""
    source = Tensors(tensors)
    infos = list(source.infos.values())
    wanted = operation(tensors)
    for recipe, x in zip(recipes(operation, list(source.infos), shapes, infos), wanted, strict=True):
        info = Info(x.shape, x.dtype)
        assert torch.equal(recipe.read(source, info, None), x)
        blocks = list(recipe.blocks(source, info))
        found = torch.cat(blocks) if blocks else x
        assert torch.equal(found.reshape(x.shape), x)
        some = slice(info.lines // 3, info.lines // 3 + 2)
        assert torch.equal(recipe.read(source, info, some), info.shaped(x.reshape(info.lines, info.width)[some], some))
    return wanted


@pytest.mark.parametrize("block_bytes", [1, 50, 10**6])
@pytest.mark.parametrize("name", CASES)
def test_both_directions(name, block_bytes, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    operation, shapes = CASES[name]
    ours = [torch.randn(shape) for shape in shapes]
    sizes = [x.shape for x in ours]
    theirs = carried_out(operation.to_theirs, ours, sizes)

    def back(tensors):
        wide = all(x.shape == there.shape for x, there in zip(tensors, theirs, strict=True))
        return operation.to_ours(tensors, sizes if wide else [line_shape(size) for size in sizes])

    again = carried_out(back, list(theirs), [x.shape for x in theirs])
    assert all(torch.equal(x, y) for x, y in zip(again, ours, strict=True))


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(9)), st.integers(1, 100), st.integers(0, 4))
def test_any_order(order, block_bytes, more):
    """Of the lines of two tensors, of which more are asked for than there are."""
    tensors = [torch.randn(4, 3), torch.randn(5, 3).to(torch.bfloat16)]
    source = Tensors(tensors)
    whole = [Info(x.shape, x.dtype) for x in tensors]
    (recipe,) = recipes(lambda x: [torch.cat(x)[list(order)]], ["0", "1"], [x.shape for x in tensors], whole)
    recipe = recipe.lengthened(9 + more)
    wanted = torch.cat([torch.cat([tensors[0], tensors[1].float()])[list(order)], torch.zeros(more, 3)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block_bytes)
        found = torch.cat(list(recipe.blocks(source, Info(wanted.shape, torch.float32))))
    assert torch.equal(found, wanted)


def test_far_apart_lines_are_read_without_what_lies_between():
    heads, size = 8, 16
    shapes = [torch.Size([6 * heads * size, 2]), torch.Size([heads * size, 2]), torch.Size([heads * size, 2])]
    (fused,) = GroupedHeads(heads).to_theirs([torch.randn(shape) for shape in shapes])
    source = Tensors([fused])
    made = recipes(
        lambda x: GroupedHeads(heads).to_ours(x, [line_shape(shape) for shape in shapes]),
        ["0"],
        [fused.shape],
        [source.infos["0"]],
    )
    made[1].read(source, Info(shapes[1], torch.float32), None)
    assert source.count == heads * size
