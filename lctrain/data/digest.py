"""Digests of the samples of a step: what a run really trained on, in 16 hexadecimal digits.

A digest is a sum of hashes, so it is the same for every layout of processes, and a pure function of step and corpus: what was
recorded while training can be computed again at any time.
"""

from __future__ import annotations

import hashlib

import numpy as np

from lctrain.data.batch import PackedSample
from lctrain.data.samples import SampleSource

DIGEST_BITS = 62


def sample_digest(sample: PackedSample) -> int:
    """62 bits over a sample's number and tokens; sums of them do not depend on how samples are dealt to ranks."""
    content = hashlib.blake2b(sample.index.to_bytes(8, "little"), digest_size=8)
    content.update(sample.tokens.astype(np.int32).data)
    return int.from_bytes(content.digest(), "little") >> 2


def digest_text(total: int) -> str:
    """The sum over a global batch as metrics.jsonl shows it."""
    return f"{total % 2**DIGEST_BITS:016x}"


def step_digest(source: SampleSource, step: int, global_batch: int) -> str:
    """What metrics.jsonl should say of step `step`, counted from 1."""
    samples = step_samples(step, global_batch)
    return digest_text(sum(sample_digest(source.sample(index)) for index in samples))


def step_samples(step: int, global_batch: int) -> range:
    """Numbers of the samples of step `step`, counted from 1."""
    return range((step - 1) * global_batch, step * global_batch)


def step_documents(source: SampleSource, step: int, global_batch: int) -> list[tuple[int, int]]:
    """(corpus, document) of all that step `step` holds a piece of, each once, in order of appearance."""
    spans = (span for index in step_samples(step, global_batch) for span in source.sample(index).spans)
    return list(dict.fromkeys((span.corpus, span.document) for span in spans))
