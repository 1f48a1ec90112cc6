"""Multi-query associative recall (MQAR, Arora et al. 2023, arXiv 2312.04927): a hybrid solves it, pure Mamba-2 does not.

python tools/recall.py [--pairs 32] [--steps 1200] [--seed 0] [--out docs/benchmarks/recall.md]

A sequence lists `pairs` different keys, each followed by its value, and then asks for every key again in another order; right
after a key the model has to name its value. A recurrent state of fixed size cannot hold all pairs; attention looks them up, but
only once something has put each key and its value into one place, which Mamba-2's convolution does.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lctrain.config.mamba import MambaConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.optim import OptimConfig, ScheduleConfig
from lctrain.models.init import initialise
from lctrain.models.model import LanguageModel
from lctrain.optim import learning_rate, make_adamw
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import IGNORE, SequenceLayout, document_positions
from lctrain.parallel.sequence import SequenceMeta

D_MODEL, HEADS, STATE = 64, 2, 8
KEYS = VALUES = 64
"""Tokens that can be keys, and those that can be values."""
BATCH, TEST_BATCHES = 64, 8
SOLVED = 0.99
"""Share of right answers from which a model is said to solve the task."""


class Contender(NamedTuple):
    """A name for people, and the model."""

    name: str
    config: ModelConfig


def contenders() -> list[Contender]:
    """The hybrid's second mixer is attention; its MLPs are wider by what attention has fewer parameters than Mamba-2."""
    attention = AttentionConfig(n_heads=HEADS, n_kv_heads=HEADS)
    mamba = MambaConfig(head_dim=32, d_state=STATE, chunk=32)
    common = {"d_model": D_MODEL, "vocab_size": KEYS + VALUES, "attention": attention, "mamba": mamba, "init_std": 0.1}
    pure = ModelConfig(name="pure Mamba-2", pattern="M-M-", mlp=MlpConfig(d_ff=128), **common)
    hybrid = ModelConfig(name="hybrid", pattern="M-*-", mlp=MlpConfig(d_ff=153), **common)
    return [Contender(model.name, model) for model in (hybrid, pure)]


def draw(pairs: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and labels, int64 [rows, 3 * pairs]: keys and values in turn, then the keys in a new order; these have labels."""
    keys = torch.rand(rows, KEYS, generator=generator).argsort(dim=1)[:, :pairs]
    values = KEYS + torch.randint(0, VALUES, (rows, pairs), generator=generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(dim=1)
    listed = torch.stack([keys, values], dim=2).flatten(1)
    tokens = torch.cat([listed, keys.gather(1, order)], dim=1)
    labels = torch.full_like(tokens, IGNORE)
    labels[:, 2 * pairs :] = values.gather(1, order)
    return tokens, labels


def whole(rows: int, length: int) -> SequenceMeta:
    """Every row one document, on one process."""
    documents = ((0, length),) * rows
    return SequenceMeta(SequenceLayout("contiguous", 1, length), RankGroup(), document_positions(documents, length), documents)


@torch.no_grad()
def accuracy(model: LanguageModel, pairs: int, seed: int) -> float:
    """Share of queries that are answered with the right value."""
    generator = torch.Generator().manual_seed(seed)
    right = asked = 0
    for _ in range(TEST_BATCHES):
        tokens, labels = draw(pairs, BATCH, generator)
        hidden = model.hidden(tokens, whole(*tokens.shape))[:, 2 * pairs :]
        answers = (hidden @ model.output_weight.t()).argmax(-1)
        right += int((answers == labels[:, 2 * pairs :]).sum())
        asked += answers.numel()
    return right / asked


class Result(NamedTuple):
    """accuracies: after every so many steps."""

    name: str
    pattern: str
    parameters: int
    accuracies: list[tuple[int, float]]
    loss: float
    seconds: float


def train(contender: Contender, pairs: int, steps: int, seed: int, lr: float) -> Result:
    """Train one model from scratch; the same sequences for all."""
    model = LanguageModel(contender.config)
    initialise(model, seed)
    parameters = sum(p.numel() for p in model.parameters())
    config = OptimConfig(lr=lr, weight_decay=0.1, schedule=ScheduleConfig(warmup_steps=steps // 20, min_ratio=0.05))
    optimizer, generator, begin = make_adamw(model, config), torch.Generator().manual_seed(seed + 1), time.monotonic()
    sizes = [max(1, pairs >> halvings) for halvings in range(4)]
    accuracies: list[tuple[int, float]] = []
    loss = float("nan")
    for step in range(1, steps + 1):
        listed = sizes[step % len(sizes)]
        tokens, labels = draw(listed, BATCH, generator)
        sums = model(tokens, labels, whole(*tokens.shape))
        (sums.objective / (BATCH * listed)).backward()
        loss = float(sums.cross_entropy) / (BATCH * listed)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step - 1, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(1, steps // 8) == 0 or step == steps:
            accuracies.append((step, accuracy(model, pairs, seed=12345)))
            print(f"{contender.name:12}  step {step:5}  loss {loss:.4f}  right {accuracies[-1][1]:7.2%}", flush=True)
    return Result(contender.name, contender.config.pattern, parameters, accuracies, loss, time.monotonic() - begin)


def page(results: list[Result], options: argparse.Namespace) -> str:
    """docs/benchmarks/recall.md."""
    command = f"python tools/recall.py --pairs {options.pairs} --steps {options.steps} --seed {options.seed}"
    steps = " | ".join(f"step {step}" for step, _ in results[0].accuracies)
    rows = []
    for result in results:
        shares = " | ".join(f"{share:.1%}" for _, share in result.accuracies)
        rows.append(f"| {result.name} | `{result.pattern}` | {result.parameters:,} | {shares} | {result.seconds:.0f} |")
    numbers = 2 * D_MODEL * STATE
    threads = torch.get_num_threads()
    lines = [
        "# Associative recall: why hybrids",
        "",
        "Multi-query associative recall (MQAR, Arora et al. 2023, arXiv 2312.04927): a sequence lists"
        f" {options.pairs} keys, each followed by its value, then asks for all of them in another order. Both models are"
        " trained from scratch on the same generated sequences (with as many pairs, and a half, a quarter and an eighth of"
        " them, in turn) and asked about new ones.",
        "",
        f"    {command}",
        "",
        f"| model | pattern | parameters | {steps} | seconds |",
        "|---|---|---|" + "---|" * (len(results[0].accuracies) + 1),
        *rows,
        "",
        f"Right answers on {TEST_BATCHES * BATCH} unseen sequences; naming any of the values listed would be right in"
        f" {1 / options.pairs:.1%}. Width {D_MODEL}, Mamba-2 state of {numbers:,} numbers a layer, {HEADS} attention heads,"
        f" sequences of {3 * options.pairs} tokens, {BATCH} a step, AdamW, peak learning rate {options.lr:g}.",
        "",
        "The pure model has to keep all pairs in a recurrent state of fixed size. The hybrid's attention layer looks a key up"
        " among all tokens, after the Mamba-2 layer below it has put each key and its value into one place. What the table"
        " shows is these sizes and this many steps: a pure model that is trained for longer gets further.",
        "",
        f"torch {torch.__version__}, one process, {threads} thread{'s' if threads > 1 else ''}, seed {options.seed}.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Train both, print and write the table; 1 if the effect does not show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32, help=f"pairs per sequence, at most {KEYS}")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    options = parser.parse_args(arguments)
    if not 1 <= options.pairs <= KEYS:
        parser.error(f"--pairs {options.pairs}: there are {KEYS} keys")
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: at least one")
    results = [train(contender, options.pairs, options.steps, options.seed, options.lr) for contender in contenders()]
    if options.out:
        options.out.write_text(page(results, options))
        print(f"table in {options.out}")
    hybrid, pure = (result.accuracies[-1][1] for result in results)
    shown = hybrid >= SOLVED > pure
    print("the hybrid solves it, the pure model does not" if shown else f"NOT SHOWN: hybrid {hybrid:.2%}, pure {pure:.2%}")
    return 0 if shown else 1


if __name__ == "__main__":
    sys.exit(main())
