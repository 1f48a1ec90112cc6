"""From a user's config to one of the same shape that a laptop can prove: same pattern, layout and options, small numbers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

from lctrain.config.schema import TrainConfig
from lctrain.config.verify import LayoutVerifyConfig
from lctrain.models.pattern import CUT, parse_pattern, pipeline_cuts

WIDTH, HEAD, MOST_HEADS, MOST_EXPERTS, CHUNK = 64, 8, 64, 16, 16
VOCABULARY, DIVISIBLE = 256, 120
"""A larger vocabulary shrinks to one of 120 to 239 that leaves the same rest by 2, 3, 4, 5, 6 and 8 tensor-parallel ranks."""
Tree = dict[str, Any]


def shrink(config: TrainConfig, options: LayoutVerifyConfig) -> tuple[TrainConfig, list[str]]:
    """The config to run, and in words what of the user's layout had to be made smaller.

    Heads, groups and flags stay, because divisibility is half of what can go wrong; widths, depth and length go down. AdamW
    gets a large epsilon: with the usual one its first steps turn rounding in a near-zero gradient into a full-size update.
    """
    tree = config.model_dump()
    tree["launcher"] = {"processes": config.processes}  # wherever the run will be launched, the proof runs here
    notes = _shrink_grid(tree, options.processes)
    _shrink_model(tree["model"], tree["parallel"], options.length)
    if config.engine.dtype != "fp32":
        notes.append(f"engine.dtype {config.engine.dtype} -> fp32, in which rounding hides no mistake")
    tree["engine"] |= {"dtype": "fp32", "device": "cpu"}
    rows, dp = min(config.trainer.micro_batch, 2), _data_parallel(tree)
    tree["trainer"] |= {
        "seq_len": options.length,
        "stages": (),
        "steps": options.steps,
        "micro_batch": rows,
        "global_batch": rows * dp * max(2, 4 // dp, tree["parallel"]["pp"]),
        "loss_chunk": max(1, options.length // 3),
        "seed": options.seed,
        "eval_every": 0,
    }
    clip = None if config.optim.clip_norm is None else 0.25
    tree["optim"] |= {"lr": 1e-2, "eps": 1e-3, "clip_norm": clip, "schedule": {"kind": "constant", "warmup_steps": 0}}
    tree["probe"] = {}
    tree["data"] |= {"prefetch": 1, "workers": 1}
    return TrainConfig.model_validate(tree), notes


def reference_of(config: TrainConfig) -> TrainConfig:
    """The same training on one process, by the torch engine."""
    tree = config.model_dump()
    tree["parallel"] = {"layout": "contiguous"}
    tree["engine"] = {"device": "cpu"}
    tree["launcher"] |= {"processes": 1}
    return TrainConfig.model_validate(tree)


def _data_parallel(tree: Tree) -> int:
    parallel = tree["parallel"]
    return int(tree["launcher"]["processes"] // (parallel["cp"] * parallel["tp"] * parallel["pp"]))


def _shrink_grid(tree: Tree, most: int) -> list[str]:
    """Halve what is largest, data parallelism first, until the grid fits; dimensions that were used stay used."""
    parallel = tree["parallel"]
    names = ("dp", "cp", "tp", "pp")
    sizes = {name: parallel[name] for name in names} | {"dp": _data_parallel(tree)}
    before = dict(sizes)
    while math.prod(sizes.values()) > most:
        name = "dp" if sizes["dp"] > 2 else max(names, key=lambda name: sizes[name])
        if sizes[name] <= 2:
            name = "dp" if sizes["dp"] > 1 else max(names, key=lambda name: sizes[name])
        sizes[name] = max(1, sizes[name] // 2)
    parallel |= sizes
    processes = tree["launcher"]["processes"] = math.prod(sizes.values())
    stage = processes // sizes["pp"]
    for name, whole in (("etp", stage), ("ep", stage), ("ulysses", sizes["cp"]), ("node_size", sizes["cp"])):
        wanted = parallel[name]
        if name == "ep":
            whole //= parallel["etp"]
        if wanted is not None and whole % wanted:
            before[name] = wanted
            sizes[name] = parallel[name] = max(n for n in range(1, min(wanted, whole) + 1) if whole % n == 0)
    return [f"parallel.{name} {before[name]} -> {sizes[name]}" for name in sizes if before[name] != sizes[name]]


def _shrink_model(model: Tree, parallel: Tree, length: int) -> None:
    model["pattern"] = _short_pattern(model["pattern"], parallel)
    vocabulary = model["vocab_size"]
    if vocabulary > VOCABULARY:
        vocabulary = DIVISIBLE + vocabulary % DIVISIBLE
    model |= {"d_model": WIDTH, "vocab_size": vocabulary, "init_std": 0.08}
    attention = model["attention"]
    while attention["n_heads"] > MOST_HEADS and attention["n_kv_heads"] % 2 == 0:
        attention["n_heads"] //= 2
        attention["n_kv_heads"] //= 2
    attention["head_dim"] = HEAD
    if attention["window"] is not None:
        attention["window"] = min(attention["window"], max(1, length // 5))
    model["mlp"]["d_ff"] = WIDTH
    latent = model["latent_attention"]
    latent |= {"n_heads": min(latent["n_heads"], MOST_HEADS), "kv_lora_rank": 24, "q_lora_rank": latent["q_lora_rank"] and 16}
    latent |= {"qk_nope_head_dim": HEAD, "qk_rope_head_dim": HEAD, "v_head_dim": HEAD}
    mamba, linear = model["mamba"], model["linear_attention"]
    heads = max(1, 8 // mamba["n_groups"]) * mamba["n_groups"]
    mamba |= {"d_inner": heads * HEAD, "head_dim": HEAD, "d_state": 2 * HEAD, "chunk": CHUNK}
    linear |= {"n_heads": min(linear["n_heads"], MOST_HEADS), "head_dim": HEAD, "chunk": CHUNK}
    _shrink_experts(model["moe"])


def _shrink_experts(moe: Tree) -> None:
    """Fewer experts where there are many, as long as groups and choices still have room."""
    groups, router = moe["router"]["groups"], moe["router"]
    least = max(moe["top_k"] * groups // router["top_groups"], 2 * groups, MOST_EXPERTS)
    if moe["n_experts"] > least and least % groups == 0:
        moe["n_experts"] = least
    moe |= {"d_ff": WIDTH // 2, "shared_d_ff": min(moe["shared_d_ff"], WIDTH // 2)}


def _short_pattern(pattern: str, parallel: Tree) -> str:
    """The first two sublayers of every kind, or as many more as stages need; of a pattern with cuts, one per kind and stage."""
    symbols = [layer.symbol for layer in parse_pattern(pattern)]
    stages, cuts = parallel["pp"] * parallel["virtual_stages"], pipeline_cuts(pattern)
    if stages > 1 and len(cuts) + 1 == stages:
        pieces = itertools.pairwise((0, *cuts, len(symbols)))
        return CUT.join("".join(dict.fromkeys(symbols[start:end])) for start, end in pieces)
    for each in range(2, len(symbols) + 1):
        seen: Counter[str] = Counter()
        kept = []
        for symbol in symbols:
            seen[symbol] += 1
            if seen[symbol] <= each:
                kept.append(symbol)
        if len(kept) >= 2 * stages or len(kept) == len(symbols):
            return "".join(kept)
    return "".join(symbols)
