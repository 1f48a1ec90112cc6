"""Settings of `lctrain data`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lctrain.config.strict import NonNegative, Positive, Strict


class PrepareConfig(Strict):
    """`lctrain data prepare`: files to a corpus of token ids."""

    input: str | Annotated[tuple[str, ...], Field(min_length=1)]
    """File, folder, glob or a list of these: text, JSONL, FASTA, each also as .gz; a folder means all text below it; `python:`
    is the sources and documentation of the running Python."""
    output: str
    """Path without ending: writes <output>.bin, .idx (Megatron's format) and .json."""
    tokenizer: str = "bytes"
    """`bytes`, `dna`, or the path of a tokenizer.json, with `:eod=<token>` behind it if its end-of-document token has an
    unusual name."""
    workers: Positive | None = None
    """Processes that tokenize; null: one per core. The corpus does not depend on it."""
    text_key: str = "text"
    """JSONL: key of each line's text."""
    overwrite: bool = False
    """Replace an existing corpus."""


class InfoConfig(Strict):
    """`lctrain data info`: what a corpus holds."""

    prefix: str
    """Path of the corpus without ending."""


class ShowConfig(Strict):
    """`lctrain data show`: a document as text."""

    prefix: str
    """Path of the corpus without ending."""
    document: NonNegative = 0
    """Number of the document, from 0."""
    start: NonNegative = 0
    """First token to show."""
    tokens: Positive | None = None
    """Tokens to show; null: to the end of the document."""
    tokenizer: str | None = None
    """Needed if the corpus has no .json, or the tokenizer's file has moved; null: the one it was prepared with."""
