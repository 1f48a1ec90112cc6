"""Which strategy each kind of attention layer uses: the one that the config names, or with `parallel.attention=auto` the one
that the simulator finds fastest on the cluster."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lctrain.config.cluster import ClusterConfig
from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.config.strict import Strict
from lctrain.devices import DTYPES
from lctrain.models.pattern import parse_pattern
from lctrain.parallel.choice import Candidate, rank_strategies
from lctrain.parallel.deal import make_layout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.strategy import Strategy
from lctrain.tracking.tracker import Tracker

SHOWN = 4
"""Candidates in the message; the event has all."""
PRESETS = {"H200": "h200", "H100": "h100", "A100": "a100_pcie", "A10": "a10_pcie"}
"""Cluster preset by what the device's name contains; the first that fits."""


class _ClusterChoice(Strict):
    """A cluster alone, to load a preset by name."""

    cluster: ClusterConfig


def preset(name: str) -> ClusterConfig:
    """configs/cluster/<name>.yaml."""
    return load(_ClusterChoice, "cluster", [f"cluster={name}"]).cluster


def attention_strategies(config: TrainConfig, device: torch.device) -> Mapping[int | None, Strategy]:
    """By window (None: layers without), the strategy of its layers. Equal on all ranks whose devices are alike."""
    parallel, windows = config.parallel, _windows(config)
    if parallel.attention != "auto":
        named = Strategy(parallel.attention, parallel.ulysses, parallel.ring, parallel.nesting, parallel.node_size)
        return dict.fromkeys(windows, named)
    if parallel.cp == 1:  # nothing travels
        return dict.fromkeys(windows, Strategy())
    return {window: candidates[0].strategy for window, candidates in _ranked(config, device).items()}


def announce_choice(config: TrainConfig, device: torch.device, tracker: Tracker) -> None:
    """Tell what `parallel.attention=auto` chose, and from what: the best few in a message, all in an event."""
    if config.parallel.attention != "auto" or config.parallel.cp == 1:
        return
    cluster = _cluster(config, device)
    for window, candidates in _ranked(config, device).items():
        layers = f"layers with a window of {window}" if window else "full-attention layers"
        best = "; ".join(f"{_described(c)} {c.seconds * 1e3:.4g} ms, {c.bytes / 1e6:.4g} MB" for c in candidates[:SHOWN])
        tracker.message(f"attention of {layers}, simulated on {cluster.name}, forward and backward of one: {best}")
        tracker.event("attention", window=window, cluster=cluster.name, candidates=[_row(c) for c in candidates])


def _windows(config: TrainConfig) -> list[int | None]:
    kinds = {layer.symbol for layer in parse_pattern(config.model.pattern)}
    return [window for symbol, window in (("*", None), ("W", config.model.attention.window)) if symbol in kinds]


def _cluster(config: TrainConfig, device: torch.device) -> ClusterConfig:
    if config.cluster is not None:
        return config.cluster
    if device.type != "cuda":
        return preset("cpu_gloo")
    name = torch.cuda.get_device_name(device)
    return preset(next((choice for part, choice in PRESETS.items() if part in name), "h100"))


def _ranked(config: TrainConfig, device: torch.device) -> dict[int | None, tuple[Candidate, ...]]:
    """Each kind of layer on one document as long as a sample, the costliest case."""
    attention, length = config.model.attention, config.trainer.seq_len
    layout = make_layout(config.parallel.layout, config.parallel.cp, length, ((0, length),))
    head_dim = attention.head_dim or config.model.d_model // attention.n_heads
    dtype = DTYPES[config.engine.dtype]
    shape = AttentionShape(config.trainer.micro_batch, attention.n_heads, attention.n_kv_heads, head_dim, dtype)
    cluster = _cluster(config, device).build()
    return {w: rank_strategies(layout, AttentionMask.dense(length, window=w), shape, cluster) for w in _windows(config)}


def _described(candidate: Candidate) -> str:
    strategy = candidate.strategy
    if strategy.name == "usp":
        return f"usp (ulysses={strategy.ulysses}, ring={strategy.ring}, nesting={strategy.nesting})"
    return f"double_ring (node_size={strategy.node})" if strategy.name == "double_ring" else strategy.name


def _row(candidate: Candidate) -> dict[str, object]:
    times = {"forward_s": candidate.forward_s, "backward_s": candidate.backward_s, "bytes": candidate.bytes}
    return {"strategy": _described(candidate), **times}
