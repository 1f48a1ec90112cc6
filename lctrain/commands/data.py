"""Prepare corpora from files, and look into them.

usage: lctrain data {prepare,info,show} [name=value ...]

  lctrain data prepare input=texts/ output=corpora/mine tokenizer=bytes
  lctrain data info prefix=corpora/mine
  lctrain data show prefix=corpora/mine document=3
"""

from __future__ import annotations

from lctrain.subcommands import subcommands


def main(args: list[str]) -> int:
    """Run the command."""
    return subcommands("data", {"prepare": _prepare, "info": _info, "show": _show}, args)


def _prepare(args: list[str]) -> int:
    """Turn files into a corpus of token ids.

    usage: lctrain data prepare input=INPUT output=PREFIX [tokenizer=bytes|dna|PATH] [name=value ...]

      lctrain data prepare input=python: output=corpora/python
      lctrain data prepare input=genome.fna.gz output=corpora/genome tokenizer=dna
      lctrain data prepare 'input=[books/, "more/*.jsonl.gz"]' output=corpora/books tokenizer=tokenizer.json
    """
    import signal
    import sys

    from lctrain.config.data import PrepareConfig
    from lctrain.config.load import load
    from lctrain.console import say
    from lctrain.data.prepare import prepare

    config = load(PrepareConfig, "data_prepare", args)
    # A batch system ends jobs with SIGTERM; as an exception it lets the writer remove its partial files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    inputs = (config.input,) if isinstance(config.input, str) else config.input
    made = prepare(inputs, config.output, config.tokenizer, config.workers, config.text_key, config.overwrite)
    empty = f", {made.skipped:,} empty ones left out" if made.skipped else ""
    say(f"{config.output}: {made.documents:,} documents{empty}, {made.tokens:,} tokens, vocabulary {made.vocab_size:,}")
    return 0


def _info(args: list[str]) -> int:
    """Show how many documents a corpus has and how long they are.

    usage: lctrain data info prefix=PREFIX
    """
    from lctrain.config.data import InfoConfig
    from lctrain.config.load import load
    from lctrain.console import table
    from lctrain.data.describe import describe_corpus

    config = load(InfoConfig, "data_info", args)
    facts, lengths = describe_corpus(config.prefix)
    table(("corpus", config.prefix), facts)
    table(("documents longer than", "documents", "their share of all tokens"), lengths, align="rrr")
    return 0


def _show(args: list[str]) -> int:
    """Print a document as text.

    usage: lctrain data show prefix=PREFIX [document=N] [start=N] [tokens=N]
    """
    import sys

    from lctrain.config.data import ShowConfig
    from lctrain.config.load import load
    from lctrain.data.describe import document_text

    config = load(ShowConfig, "data_show", args)
    text = document_text(config.prefix, config.document, config.start, config.tokens, config.tokenizer)
    sys.stdout.write(text + ("" if text.endswith("\n") else "\n"))
    return 0
