"""Which strategy each kind of attention layer uses: the one that the config names, or with `parallel.attention=auto` the one
that the simulator finds fastest on the cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from lctrain.config.cluster import ClusterConfig
from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.config.strict import Strict
from lctrain.devices import DTYPES
from lctrain.models.latent_attention import head_size, travel_bytes
from lctrain.models.pattern import parse_pattern
from lctrain.parallel.choice import Candidate, rank_strategies
from lctrain.parallel.deal import make_layout
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.simulator import Cluster
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


Kind = int | str | None
"""A kind of attention layer: a window, None for those without, "+" for latent attention."""


def attention_strategies(config: TrainConfig, device: torch.device) -> Mapping[Kind, Strategy]:
    """By kind, the strategy of its layers. Equal on all ranks whose devices are alike."""
    parallel, kinds = config.parallel, _kinds(config)
    if parallel.attention != "auto":
        named = Strategy(parallel.attention, parallel.ulysses, parallel.ring, parallel.nesting, parallel.node_size)
        return dict.fromkeys(kinds, named)
    if config.cp == 1:  # nothing travels
        return dict.fromkeys(kinds, Strategy())
    return {kind: candidates[0].strategy for kind, candidates in _ranked(config, device).items()}


def announce_choice(config: TrainConfig, device: torch.device, tracker: Tracker) -> None:
    """Tell what `parallel.attention=auto` chose, and from what: the best few in a message, all in an event; and what travels
    for latent attention."""
    if config.cp > 1 and "+" in _kinds(config):
        _announce_travel(config, attention_strategies(config, device)["+"], tracker)
    if config.parallel.attention != "auto" or config.cp == 1:
        return
    cluster = cluster_of(config, device)
    for window, candidates in _ranked(config, device).items():
        names: dict[Kind, str] = {None: "full-attention layers", "+": "latent-attention layers"}
        layers = names.get(window, f"layers with a window of {window}")
        best = "; ".join(
            f"{describe_strategy(c.strategy)} {c.seconds * 1e3:.4g} ms, {c.bytes / 1e6:.4g} MB" for c in candidates[:SHOWN]
        )
        tracker.message(f"attention of {layers}, simulated on {cluster.name}, forward and backward of one: {best}")
        tracker.event("attention", window=window, cluster=cluster.name, candidates=[_row(c) for c in candidates])


def attention_shapes(config: TrainConfig) -> dict[Kind, AttentionShape]:
    """By kind, the heads that a rank has in its layers before any exchange, and how large they are."""
    return {kind: _shape(config, kind) for kind in _kinds(config)}


def attention_kinds(config: TrainConfig) -> dict[str, Kind]:
    """Symbol -> kind, of the attention layers that the model has."""
    symbols = {layer.symbol for layer in parse_pattern(config.model.pattern)}
    kinds: dict[str, Kind] = {"*": None, "W": config.model.attention.window, "+": "+"}
    return {symbol: kind for symbol, kind in kinds.items() if symbol in symbols}


def _kinds(config: TrainConfig) -> list[Kind]:
    return list(attention_kinds(config).values())


def _announce_travel(config: TrainConfig, strategy: Strategy, tracker: Tracker) -> None:
    settings, cp = config.model.latent_attention, config.cp
    heads = settings.n_heads // config.parallel.tp
    sent = travel_bytes(settings, heads, strategy, cp, config.trainer.seq_len, DTYPES[config.engine.dtype])
    latent = settings.travel == "latent" or (settings.travel == "auto" and sent.latent < sent.heads)
    tracker.message(
        f"latent attention: {'latents' if latent else 'keys and values of all heads'} travel with"
        f" {describe_strategy(strategy)};"
        f" per layer and sequence, forward and backward, all ranks: latents {sent.latent / 1e6:.4g} MB,"
        f" heads {sent.heads / 1e6:.4g} MB"
    )
    tracker.event("latent_attention", travel="latent" if latent else "heads", **sent._asdict())


def cluster_of(config: TrainConfig, device: torch.device) -> ClusterConfig:
    """The config's cluster, or the preset for a device."""
    if config.cluster is not None:
        return config.cluster
    if device.type != "cuda":
        return preset("cpu_gloo")
    name = torch.cuda.get_device_name(device)
    return preset(next((choice for part, choice in PRESETS.items() if part in name), "h100"))


def seen_by_cp(config: TrainConfig, cluster: ClusterConfig) -> Cluster:
    """The cluster as the ranks of one sequence see it: neighbours among them are tp ranks apart."""
    built = cluster.build()
    return dataclasses.replace(built, topology=built.topology.every(config.parallel.tp))


def costliest_case(config: TrainConfig, kind: Kind) -> tuple[SequenceLayout, AttentionMask, AttentionShape]:
    """What a kind of layer works on if every sample is one document."""
    length = config.trainer.seq_len
    layout = make_layout(config.parallel.layout, config.cp, length, ((0, length),))
    return layout, AttentionMask.dense(length, window=kind if isinstance(kind, int) else None), _shape(config, kind)


def _ranked(config: TrainConfig, device: torch.device) -> dict[Kind, tuple[Candidate, ...]]:
    cluster = seen_by_cp(config, cluster_of(config, device))
    return {kind: rank_strategies(*costliest_case(config, kind), cluster) for kind in _kinds(config)}


def _shape(config: TrainConfig, kind: Kind) -> AttentionShape:
    batch, dtype, tp = config.trainer.micro_batch, DTYPES[config.engine.dtype], config.parallel.tp
    if kind == "+":
        latent = config.model.latent_attention
        heads = latent.n_heads // tp
        width = None if latent.travel == "heads" else latent.kv_lora_rank + latent.qk_rope_head_dim
        return AttentionShape(batch, heads, heads, head_size(latent), dtype, width)
    attention = config.model.attention
    head_dim = attention.head_dim or config.model.d_model // attention.n_heads
    return AttentionShape(batch, attention.n_heads // tp, max(1, attention.n_kv_heads // tp), head_dim, dtype)


def describe_strategy(strategy: Strategy) -> str:
    """Name and degrees, for people."""
    if strategy.name == "usp":
        return f"usp (ulysses={strategy.ulysses}, ring={strategy.ring}, nesting={strategy.nesting})"
    return f"double_ring (node_size={strategy.node})" if strategy.name == "double_ring" else strategy.name


def _row(candidate: Candidate) -> dict[str, object]:
    times = {"forward_s": candidate.forward_s, "backward_s": candidate.backward_s, "bytes": candidate.bytes}
    return {"strategy": describe_strategy(candidate.strategy), **times}
