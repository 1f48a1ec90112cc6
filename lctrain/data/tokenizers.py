"""Text or bytes to token ids and back: raw bytes, single nucleotides, or any Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np

from lctrain.data.indexed import token_dtype
from lctrain.errors import UserError

_EOD_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<EOS>",
    "<|endofdocument|>",
    "<eod>",
    "[EOS]",
    "[SEP]",
)


class Tokenizer(Protocol):
    """name: the spec it was loaded from. fingerprint: equal for two tokenizers that give equal ids, wherever they lie.
    vocab_size: all ids are below it. eod: the id that ends every document; encode does not add it."""

    name: str
    fingerprint: str
    vocab_size: int
    eod: int

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids [n] in the smallest dtype that a corpus of this vocabulary is stored in. Adds no special tokens."""

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Text of ids; end-of-document and ids outside the vocabulary give nothing, broken UTF-8 gives U+FFFD."""


class ByteTokenizer:
    """One token per byte of UTF-8: nothing to learn, nothing to download, nothing that cannot be written."""

    name = fingerprint = "bytes"
    vocab_size = 257
    eod = 256

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(token_dtype(self.vocab_size))

    def decode(self, ids: np.ndarray | list[int]) -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")


class DnaTokenizer:
    """One token per nucleotide: A C G T N in either case; U is read as T, the IUPAC codes of several bases as N.

    Blanks and line ends are dropped; any other character is refused, as it means that the file is no sequence.
    """

    name = fingerprint = "dna"
    letters = "ACGTN"
    vocab_size = 6
    eod = 5
    _drop, _bad = 254, 255

    def __init__(self) -> None:
        table = np.full(256, self._bad, np.uint8)
        table[list(b" \t\r\n")] = self._drop
        for letters, read_as in (("ACGTN", "ACGTN"), ("U", "T"), ("RYSWKMBDHVX", "N" * 11)):
            for letter, meaning in zip(letters, read_as, strict=True):
                table[[ord(letter), ord(letter.lower())]] = self.letters.index(meaning)
        self._table = table

    def encode(self, text: str | bytes) -> np.ndarray:
        data = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)
        ids = self._table[data]
        if (bad := np.flatnonzero(ids == self._bad)).size:
            raise UserError(
                f"{chr(data[bad[0]])!r} is not a nucleotide code: the dna tokenizer reads A C G T U N and the IUPAC codes"
                " (for FASTA, name the file .fa, .fna or .fasta)"
            )
        return ids[ids != self._drop]

    def decode(self, ids: np.ndarray | list[int]) -> str:
        return "".join(self.letters[i] for i in ids if 0 <= i < len(self.letters))


class HuggingFaceTokenizer:
    """A tokenizer.json, read by the `tokenizers` library."""

    def __init__(self, spec: str, path: str, eod: str | None) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            text = Path(path).read_bytes()
            self._backend = Backend.from_str(text.decode())
        except OSError as error:
            raise UserError(
                f"tokenizer {path!r} cannot be read ({error.strerror}): give bytes, dna or a tokenizer.json"
            ) from None
        except Exception as error:  # the library raises bare Exception for a file it cannot parse
            raise UserError(f"{path} is not a Hugging Face tokenizer.json ({error})") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.eod, eod_name = _find_eod(path, eod, vocabulary)
        self.name = spec
        self.fingerprint = f"hf:{hashlib.sha256(text).hexdigest()[:16]}:{eod_name}"
        self.vocab_size = max(vocabulary.values()) + 1

    def encode(self, text: str | bytes) -> np.ndarray:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, token_dtype(self.vocab_size))

    def decode(self, ids: np.ndarray | list[int]) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.eod]
        return self._backend.decode(known, skip_special_tokens=False)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer named `bytes`, `dna`, `<path>/tokenizer.json` or `<path>/tokenizer.json:eod=<token>`.

    Raises UserError if the file is missing or broken, or if it has no end-of-document token under a usual name.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec == "dna":
        return DnaTokenizer()
    path, _, eod = spec.partition(":eod=")
    if Path(path).is_dir():
        path = str(Path(path) / "tokenizer.json")
    return HuggingFaceTokenizer(spec, path, eod or None)


def _find_eod(path: str, wanted: str | None, vocabulary: dict[str, int]) -> tuple[int, str]:
    if wanted is not None and wanted not in vocabulary:
        raise UserError(f"{path} has no token {wanted!r}: name one of its tokens after `:eod=`")
    for name in (wanted,) if wanted is not None else _EOD_NAMES:
        if name in vocabulary:
            return vocabulary[name], name
    raise UserError(f"{path} has no end-of-document token under a usual name: name it, as in tokenizer='{path}:eod=<token>'")
