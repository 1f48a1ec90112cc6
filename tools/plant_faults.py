"""Plant classic faults of parallel training, one by one; see `lctrain verify layout` catch each: the table of docs/verify.md.

python tools/plant_faults.py [PART OF A NAME]

Exit status 1 if a layout fails before a fault is planted, or a planted fault goes unnoticed.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from lctrain.config.verify import LayoutVerifyConfig
from lctrain.console import progress, table
from lctrain.verify.layout.prove import Prover
from lctrain.verify.layout.report import LayoutReport
from lctrain.verify.layout.shrink import shrink
from lctrain.verify.layout.standard import DENSE, load_layout

HYBRID = "model=hybrid_tiny"
MOE = "model=hybrid_tiny model.pattern=*E*E model.moe.balance.switch=0.1"

Fault = Callable[[], contextlib.AbstractContextManager[object]]


class Planted(NamedTuple):
    """A fault: the layout that has it, and what plants it in this process and those it forks."""

    layout: str
    plant: Fault


def around(module: str, target: str, change: Callable[..., Any]) -> Fault:
    """Replace a module's `function` or `Class.function` by change(original, *arguments)."""

    @contextlib.contextmanager
    def planted() -> Iterator[None]:
        owner = importlib.import_module(module)
        *path, name = target.split(".")
        for part in path:
            owner = getattr(owner, part)
        original = getattr(owner, name)

        def changed(*args: Any, **kwargs: Any) -> Any:
            return change(original, *args, **kwargs)

        with patch.object(owner, name, changed):
            yield

    return planted


def _drop_documents(mask: Any, seq: Any, window: int | None = None) -> Any:
    from lctrain.parallel.mask import AttentionMask

    return AttentionMask(tuple((0, seq.layout.length) for _ in seq.documents), causal=True, window=window)


def _average_over_dp(forward: Any, engine: Any, micro: Any) -> Any:
    sums = forward(engine, micro)
    return sums._replace(objective=sums.objective * engine.mesh.dp / engine.mesh.size)


def _double_experts(reduce: Any, cut: Any) -> None:
    reduce(cut)
    for parameter in cut.parameters.values():
        parameter.grad.mul_(2)


def _shift_each_shard(shard: Any, loader: Any, samples: Any) -> Any:
    import dataclasses

    from lctrain.parallel.layout import IGNORE

    micro = shard(loader, samples)
    labels = torch.roll(micro.tokens, -1, dims=1)
    labels[:, -1] = IGNORE
    return dataclasses.replace(micro, labels=torch.where(micro.labels == IGNORE, IGNORE, labels))


def _local_positions(shard: Any, loader: Any, samples: Any) -> Any:
    import dataclasses

    micro = shard(loader, samples)
    return dataclasses.replace(micro, positions=torch.arange(micro.positions.shape[1]).expand_as(micro.positions).contiguous())


def _count_twice(reduce: Any, *args: Any, **kwargs: Any) -> None:
    reduce(*args, **kwargs)
    reduce(*args, **kwargs)


def _no_resets(starts: Any, seq: Any) -> Any:
    return torch.zeros_like(starts(seq))


def _side_loss_per_micro_batch(init: Any, seq: Any, *args: Any, **kwargs: Any) -> None:
    init(seq, *args, **kwargs)
    seq.side_loss_scale *= 4


def _norm_without_experts(norm: Any, model: Any, parallel: Any) -> Any:
    from lctrain.models.place import Family, parameter_places

    places = parameter_places(model)
    kept = {name: parameter.grad for name, parameter in model.named_parameters() if places[name].family is Family.EXPERT}
    for name in kept:
        model.get_parameter(name).grad = None
    found = norm(model, parallel)
    for name, grad in kept.items():
        model.get_parameter(name).grad = grad
    return found


FAULTS: dict[str, Planted] = {
    "document mask dropped": Planted(
        f"{DENSE} parallel.cp=2", around("lctrain.parallel.sequence", "SequenceMeta.mask", _drop_documents)
    ),
    "gradient averaged over dp, not dp x cp": Planted(
        f"{DENSE} parallel.cp=2", around("lctrain.engines.torch_engine", "TorchEngine._forward", _average_over_dp)
    ),
    "expert gradient doubled": Planted(
        f"{MOE} parallel.cp=2 parallel.ep=2", around("lctrain.engines.cut", "CutParameters.reduce_gradients", _double_experts)
    ),
    "labels shifted in each shard": Planted(
        f"{DENSE} parallel.cp=2", around("lctrain.data.loader", "Loader._shard", _shift_each_shard)
    ),
    "positions counted in each shard": Planted(
        f"{DENSE} parallel.cp=2", around("lctrain.data.loader", "Loader._shard", _local_positions)
    ),
    "norm weight not summed over tensor-parallel ranks": Planted(
        f"{DENSE} engine.name=megatron parallel.tp=2",
        around("lctrain.models.megatron_layers", "sum_gradient", lambda _, group, weight: weight),
    ),
    "tied embedding summed twice": Planted(
        f"{DENSE} model.tie_embeddings=true engine.name=megatron parallel.pp=2",
        around("megatron.core.distributed.finalize_model_grads", "_allreduce_word_embedding_grads", _count_twice),
    ),
    "state of Mamba leaks between documents": Planted(
        f"{HYBRID} parallel.cp=2", around("lctrain.models.mamba", "document_starts", _no_resets)
    ),
    "side loss counted once per micro-batch": Planted(
        f"{MOE} parallel.cp=2 parallel.ep=2",
        around("lctrain.parallel.sequence", "SequenceMeta.__init__", _side_loss_per_micro_batch),
    ),
    "gradient norm without experts": Planted(
        f"{MOE} parallel.cp=2 parallel.ep=2", around("lctrain.engines.torch_engine", "global_grad_norm", _norm_without_experts)
    ),
}


def try_fault(prover: Prover, fault: Planted, name: str) -> tuple[LayoutReport, LayoutReport]:
    """Verdicts on the layout without the fault and with it. The single process that both are compared with is sound."""
    config = load_layout(fault.layout)
    sound = prover.prove(name, config)
    prover.reference(shrink(config, prover.options)[0])  # while nothing is planted
    with fault.plant():
        return sound, prover.prove(name, config)


def main() -> int:
    """Print what caught each fault."""
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = {name: fault for name, fault in FAULTS.items() if part in name}
    if not chosen:
        sys.exit(f"no fault has {part!r} in its name; there are: {', '.join(FAULTS)}")
    rows, missed = [], 0
    with progress("faults", len(chosen)) as advance, Prover(LayoutVerifyConfig()) as prover:
        for name, fault in chosen.items():
            sound, faulty = try_fault(prover, fault, name)
            caught = [check.name for check in faulty.checks if not check.passed] or (
                ["a rank raised"] if faulty.problem else []
            )
            missed += not sound.passed or not caught
            rows.append((name, "passes" if sound.passed else "FAILS", ", ".join(caught) or "NOT CAUGHT"))
            advance(1)
    table(("fault", "without it", "caught by"), rows)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
