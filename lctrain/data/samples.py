"""Training samples as a pure function of (config, seed, sample number).

Nothing here knows ranks, workers, steps or what was read before. So any sample can be made anywhere, at any time, by any
number of processes, and a resumed run sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

import bisect
import itertools
import threading

import numpy as np

from lctrain.config.schema import DataConfig, TrainerConfig
from lctrain.data.batch import DocumentSpan, PackedSample
from lctrain.data.blend import Blend
from lctrain.data.documents import Documents, Pieces, split_documents
from lctrain.data.indexed import IndexedDataset
from lctrain.data.packing import Packer, Windows
from lctrain.data.shuffle import make_key
from lctrain.data.sidecar import read_sidecar
from lctrain.data.streaming import StreamCutter
from lctrain.data.tokenizers import load_tokenizer
from lctrain.errors import UserError

_ORDER, _SHUFFLE, _WINDOWS = 1, 2, 3


class SampleSource:
    """Samples 0, 1, 2, ... of a split.

    train: sample i belongs to optimizer step i // global_batch and has that step's sequence length. A later stage continues
    in every corpus where the stage before ended. valid: samples of trainer.seq_len from the held-out documents, the same for
    every seed, so that runs can be compared.

    pad_id: token of padding positions (the end-of-document id).
    Raises UserError for a missing, damaged or empty corpus and if no document is in the split.
    """

    def __init__(self, data: DataConfig, trainer: TrainerConfig, vocab_size: int, split: str) -> None:
        if split not in ("train", "valid"):
            raise ValueError(f"split is 'train' or 'valid', not {split!r}")
        self._data = data
        self._vocab_size = vocab_size
        self._key = make_key(trainer.seed) if split == "train" else 0
        stages = trainer.stages if split == "train" else ()
        self._seq_lens = [*(stage.seq_len for stage in stages), trainer.seq_len]
        self._firsts = [0, *itertools.accumulate(stage.steps * trainer.global_batch for stage in stages)]
        self._documents = {}
        for number, corpus in enumerate(data.corpora):
            dataset = IndexedDataset(corpus.prefix)
            if not dataset.tokens:
                raise UserError(f"corpus {corpus.prefix} has no tokens: prepare it from files that have text")
            train, valid = split_documents(len(dataset), number, data.valid_fraction)
            documents = Documents(dataset, train if split == "train" else valid, make_key(self._key, number, _ORDER))
            if documents.epoch_tokens:
                self._documents[number] = documents
        if not self._documents:
            raise UserError(
                f"no document is held out for evaluation with data.valid_fraction={data.valid_fraction}:"
                " raise it, or set trainer.eval_every=0 and probe.every=0"
                if split == "valid"
                else f"data.valid_fraction={data.valid_fraction} leaves no document with tokens for training: lower it"
            )
        self._numbers = list(self._documents)
        self._blend = Blend([data.corpora[number].weight for number in self._numbers])
        self._parts: dict[tuple[int, int], StreamCutter | Packer] = {}
        self._lock = threading.RLock()
        sidecar = read_sidecar(data.corpora[0].prefix)
        self.pad_id = sidecar.eod if sidecar else load_tokenizer(data.tokenizer).eod

    def seq_len(self, index: int) -> int:
        """Tokens of sample `index`."""
        return self._seq_lens[self._stage(index)]

    def sample(self, index: int) -> PackedSample:
        """Sample `index` >= 0. UserError if it holds a token id that the model has no embedding for."""
        stage = self._stage(index)
        slot, count = self._blend.locate(index)
        before = self._blend.counts(self._firsts[stage])[slot]
        return self._read(index, self._numbers[slot], self._part(slot, stage).pieces(count - before), self._seq_lens[stage])

    def padding_share(self) -> float:
        """Expected share of padding after the stages: 0 if documents may be split."""
        if self._data.split_documents:
            return 0.0
        weights = [self._data.corpora[number].weight for number in self._numbers]
        packers = [self._part(slot, len(self._seq_lens) - 1) for slot in range(len(weights))]
        shares = [packer.padding_share() for packer in packers if isinstance(packer, Packer)]
        return float(np.average(shares, weights=weights))

    def _stage(self, index: int) -> int:
        return bisect.bisect_right(self._firsts, index) - 1

    def _part(self, slot: int, stage: int) -> StreamCutter | Packer:
        """What makes the samples of one corpus in one stage; needs the stage before to know where to start."""
        with self._lock:
            if (slot, stage) not in self._parts:
                self._parts[slot, stage] = self._make_part(slot, stage)
            return self._parts[slot, stage]

    def _make_part(self, slot: int, stage: int) -> StreamCutter | Packer:
        number = self._numbers[slot]
        documents, seq_len, window = self._documents[number], self._seq_lens[stage], self._data.shuffle_window
        key = make_key(self._key, number, _SHUFFLE, stage)
        previous = self._part(slot, stage - 1) if stage else None
        if self._data.split_documents:
            start = previous.end() if isinstance(previous, StreamCutter) else 0
            samples = self._samples_in(slot, stage) if stage + 1 < len(self._firsts) else None
            return StreamCutter(documents, seq_len, window, key, start, samples)
        if isinstance(previous, Packer):
            visit, carried = previous.rest(self._samples_in(slot, stage - 1))
            return Packer(previous.windows, seq_len, key, visit, carried)
        order_key = make_key(self._key, number, _WINDOWS)
        return Packer(Windows(documents, max(self._seq_lens), window, order_key), seq_len, key, 0, None)

    def _samples_in(self, slot: int, stage: int) -> int:
        return self._blend.counts(self._firsts[stage + 1])[slot] - self._blend.counts(self._firsts[stage])[slot]

    def _read(self, index: int, number: int, pieces: Pieces, seq_len: int) -> PackedSample:
        dataset = self._documents[number].dataset
        borders = [0, *np.cumsum(pieces.lengths).tolist()]
        spans = tuple(
            DocumentSpan(number, document, offset)
            for document, offset in zip(pieces.documents.tolist(), pieces.offsets.tolist(), strict=True)
        )
        tokens = np.full(seq_len, self.pad_id, np.int64)
        for (_, document, offset), begin, end in zip(spans, borders, borders[1:], strict=False):
            tokens[begin:end] = dataset.document(document, offset, offset + end - begin)
        if (largest := int(tokens.max())) >= self._vocab_size:
            raise UserError(
                f"corpus {dataset.prefix} holds token id {largest}, but the model's vocabulary has {self._vocab_size}:"
                f" set model.vocab_size to at least {largest + 1}"
            )
        last = spans[-1]
        following = dataset.document(last.document, last.offset + borders[-1] - borders[-2])[:1]
        return PackedSample(index, tokens, tuple(borders), int(following[0]) if len(following) else None, spans)
