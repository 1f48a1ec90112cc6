"""A mixture of experts over gloo ranks against one process, fp64: outputs, all gradients, side losses, statistics."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.launch.ranks import run_ranks
from lctrain.models.moe.stats import forget_statistics, gather_statistics, update_biases
from lctrain.models.parallel import ModelParallel
from lctrain.models.place import parameter_places
from lctrain.parallel.deal import balanced_layout
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mesh import ProcessMesh
from tests.unit.moe.problem import D_MODEL, make_moe, sequence, settings

DOCUMENTS = ((0, 7, 8, 21), (0, 17), (0, 3, 23), (0, 23))
"""Four rows, of which some end in padding; documents cross every cut of the sequence."""
LENGTH = 23
BALANCE = {"switch": 0.3, "sequence": 0.2, "z_loss": 0.05, "bias_rate": 0.01}
EVERYTHING = {
    "router": {"score": "sigmoid", "scale": 2.5, "groups": 4, "top_groups": 2, "tasks": 2, "jitter": 0.2},
    "balance": {**BALANCE, "global_batch": 0.4},
    "shared_d_ff": 8,
    "shared_gate": True,
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """dp rows of ranks, each with len(DOCUMENTS) / dp sequences, over cp ranks each; experts over ep x etp of all of them."""

    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    layout: str = "zigzag"

    @property
    def size(self) -> int:
        return self.dp * self.cp * self.tp


def inputs(documents: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output, [rows, LENGTH, D_MODEL]; the gradient is 0 on padding."""
    generator = torch.Generator().manual_seed(1)
    x, dout = (torch.randn(len(documents), LENGTH, D_MODEL, dtype=torch.float64, generator=generator) for _ in range(2))
    for row, borders in enumerate(documents):
        dout[row, borders[-1] :] = 0
    return x, dout


def run_rank(rank: int, size: int, grid: Grid, fields: dict, documents: tuple[tuple[int, ...], ...], aligned: bool) -> dict:
    """This rank's part of one optimizer step on all rows. aligned: all rows of a data-parallel rank in one micro-batch."""
    mesh = ProcessMesh(rank, grid.dp, grid.cp, grid.tp, ep=grid.ep, etp=grid.etp)
    groups = mesh.make_groups()
    parallel = ModelParallel(tp=groups.tp, ep=groups.ep, etp=groups.etp, dp_cp=groups.dp_cp)
    layer = make_moe(settings(**fields), parallel=parallel)
    x, dout = inputs(documents)
    if grid.layout == "balanced":
        layout = balanced_layout(grid.cp, LENGTH, documents, smallest_block=2)
    else:
        layout = SequenceLayout(grid.layout, grid.cp, LENGTH)
    own = torch.arange(len(documents)).chunk(grid.dp)[mesh.dp_rank].tolist()
    outs, dxs = [], []
    for rows in [own] if aligned else [[row] for row in own]:
        meta = sequence(
            tuple(documents[row] for row in rows),
            LENGTH,
            layout,
            groups.cp,
            side_loss_scale=len(rows) / len(documents),
            samples=tuple(100 + row for row in rows),
            tasks=tuple(tuple((row + i) % 2 for i in range(len(documents[row]) - 1)) for row in rows),
        )
        share = [layout.shard(t[rows], groups.cp.rank, dim=1) for t in (x, dout)]
        part = -(-layout.local_length // grid.tp)
        share = [F.pad(t, (0, 0, 0, part * grid.tp - t.shape[1])).split(part, dim=1)[mesh.tp_rank] for t in share]
        leaf = share[0].requires_grad_()
        out = layer(leaf, meta)
        out.backward(share[1])
        for kept, tensor in ((outs, out.detach()), (dxs, leaf.grad)):
            kept.append(torch.cat(list(groups.tp.all_gather("test", tensor)), dim=1)[:, : layout.local_length])
    extra = gather_statistics(layer, parallel)
    update_biases(layer)
    forget_statistics(layer)
    return {
        "rows": own,
        "cp_rank": mesh.cp_rank,
        "out": torch.cat(outs),
        "dx": torch.cat(dxs),
        "gradients": {name: p.grad for name, p in layer.named_parameters()},
        "places": {name: dict(place.cuts) for name, place in parameter_places(layer).items()},
        "at": {name: (mesh.place(name), getattr(grid, name)) for name in ("tp", "ep", "etp")},
        "tp_rank": mesh.tp_rank,
        "bias": None if layer.balancer.bias is None else layer.balancer.bias.clone(),
        "extra": extra,
        "sent": {name: dict(getattr(groups, name).sent) for name in ("ep", "etp")},
        "layout": layout,
    }


def run(grid: Grid, fields: dict, documents=DOCUMENTS, aligned: bool = False) -> dict:
    """What all ranks computed, put together."""
    ranks = run_ranks(run_rank, grid.size, grid, fields, documents, aligned)
    whole: dict = {"extra": ranks[0]["extra"], "bias": ranks[0]["bias"], "sent": [rank["sent"] for rank in ranks]}
    assert all(rank["extra"] == whole["extra"] for rank in ranks)
    for name in ("out", "dx"):
        rows: dict[int, list[Tensor]] = {}
        for rank in ranks:
            if rank["tp_rank"] == 0:
                for row, tensor in zip(rank["rows"], rank[name], strict=True):
                    rows.setdefault(row, []).append(tensor)
        whole[name] = torch.stack([ranks[0]["layout"].unshard(rows[row], dim=0) for row in sorted(rows)])
    for name in ranks[0]["gradients"]:
        cuts = ranks[0]["places"][name]
        total: Tensor | float = 0.0
        for rank in ranks:
            if "tp" not in cuts and "ep" not in cuts and rank["tp_rank"]:
                continue  # summed over tp ranks already
            total = total + embed(rank["gradients"][name], cuts, rank["at"])
        whole[name] = total
    return whole


def embed(gradient: Tensor, cuts: dict[str, int], at: dict[str, tuple[int, int]]) -> Tensor:
    """A part's gradient at its place in zeros of the whole shape."""
    for dimension, axis in reversed(cuts.items()):
        index, count = at[dimension]
        parts = [torch.zeros_like(gradient)] * count
        parts[index] = gradient
        gradient = torch.cat(parts, dim=axis)
    return gradient


def compare(one: dict, many: dict, tolerance: float = 1e-11) -> None:
    for name in one.keys() - {"extra", "sent", "bias"}:
        scale = float(one[name].norm())
        assert scale > 0, name
        error = float((one[name] - many[name]).norm()) / scale
        assert error < tolerance, f"{name}: {error:.1e}"
    assert one["extra"].keys() == many["extra"].keys()
    for name, values in one["extra"].items():
        assert torch.allclose(torch.tensor(many["extra"][name]), torch.tensor(values), rtol=1e-3), name
    if one["bias"] is not None:
        assert torch.equal(one["bias"], many["bias"])


GRIDS = [
    Grid(cp=2),
    Grid(cp=2, ep=2, layout="contiguous"),
    Grid(cp=3, layout="striped"),
    Grid(cp=4, ep=4),
    Grid(cp=4, ep=2, etp=2, layout="balanced"),
    Grid(cp=3, etp=3, layout="contiguous"),
    Grid(dp=2, ep=2),
    Grid(dp=2, cp=2, ep=4),
    Grid(dp=2, cp=2, ep=2),
    Grid(dp=4, ep=2, etp=2),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equal_to_one_process(grid: Grid) -> None:
    """Micro-batches of one sequence each; the global-batch loss only where passes over all ranks agree."""
    fields = EVERYTHING if grid.dp == 1 else {**EVERYTHING, "balance": BALANCE}
    fields = {**fields, "d_ff": 12, "n_experts": 8}
    one, many = run(Grid(), fields), run(grid, fields)
    assert one["extra"]["moe_balance_loss"][0] > 0
    compare(one, many)
    moved = [sum(sent["ep"].values()) for sent in many["sent"]]
    assert (grid.ep > 1) == any(moved)


@pytest.mark.parametrize("grid", [Grid(dp=2, cp=2, ep=4), Grid(dp=4), Grid(dp=2, ep=2)], ids=str)
def test_global_batch_loss_over_data_parallel_ranks(grid: Grid) -> None:
    """All rows in one pass, whoever holds them."""
    fields = {"balance": {"global_batch": 0.4}}
    compare(run(Grid(), fields, aligned=True), run(grid, fields, aligned=True))


@pytest.mark.parametrize("grid", [Grid(cp=2, ep=2), Grid(cp=4, ep=4, layout="contiguous"), Grid(cp=3)], ids=str)
def test_capacity_drops_the_same_choices(grid: Grid) -> None:
    fields = {"capacity_factor": 0.8, "balance": BALANCE}
    one = run(Grid(), fields)
    assert one["extra"]["moe_dropped"][0] > 0.05
    compare(one, run(grid, fields))


@pytest.mark.parametrize("grid", [Grid(cp=4, ep=4, layout="contiguous"), Grid(dp=4, ep=2, etp=2)], ids=str)
def test_ranks_without_tokens_and_experts_without_tokens(grid: Grid) -> None:
    """Three tokens: with contiguous shards most ranks have only padding, and at most six of eight experts have work."""
    documents = ((0, 3), (0,), (0,), (0,))
    compare(run(Grid(), {"balance": BALANCE}, documents), run(grid, {"balance": BALANCE}, documents))


@pytest.mark.parametrize("grid", [Grid(tp=2), Grid(tp=2, ep=2), Grid(cp=2, tp=2, ep=2, etp=2)], ids=str)
def test_tensor_parallel_ranks_divide_the_tokens(grid: Grid) -> None:
    pytest.importorskip("megatron.core")
    fields = {"balance": BALANCE, "router": {"tasks": 2}, "capacity_factor": 1.0}
    compare(run(Grid(), fields), run(grid, fields))


def test_bytes_of_the_way_to_the_experts() -> None:
    """Every choice of an expert elsewhere moves d_model numbers there and back, forward and backward; nothing else is large."""
    many = run(Grid(dp=2, ep=2), {})
    load = sum(sent["ep"]["tokens"] for sent in many["sent"])
    back = sum(sent["ep"]["dtokens"] for sent in many["sent"])
    assert load == back
    assert load % (2 * D_MODEL * 8) == 0
    choices = 2 * sum(borders[-1] for borders in DOCUMENTS)
    assert 0 < load // (2 * D_MODEL * 8) < choices
    assert sum(sent["ep"]["expert_counts"] for sent in many["sent"]) == len(DOCUMENTS) * 4 * 8
