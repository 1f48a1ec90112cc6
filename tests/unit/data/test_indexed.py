"""The .bin/.idx files: our reader and writer, and megatron-core's."""

from pathlib import Path

import numpy as np
import pytest

from lctrain.data import indexed
from lctrain.data.indexed import IndexedDataset, IndexedWriter, corpus_exists, token_dtype
from lctrain.data.sidecar import read_sidecar
from lctrain.errors import UserError

LENGTHS = [3, 0, 1, 500, 12]


def write(prefix, documents, vocab):
    with IndexedWriter(str(prefix), vocab) as writer:
        for document in documents:
            writer.append(document)
            writer.end_document()
        writer.finish("{}")
    return str(prefix)


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(6, "uint8"), (256, "uint8"), (257, "uint16"), (65_499, "uint16"), (65_500, "int32")]
)
def test_what_is_written_is_read(tmp_path, vocab, dtype):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab, n) for n in LENGTHS]
    data = IndexedDataset(write(tmp_path / "c", documents, vocab))
    assert token_dtype(vocab) == data.dtype == dtype
    assert len(data) == 5
    assert data.lengths.tolist() == LENGTHS
    assert data.tokens == sum(LENGTHS)
    assert data.max_id() == max(int(document.max()) for document in documents if len(document))
    for number, document in enumerate(documents):
        assert data.document(number).tolist() == document.tolist()
    assert data.document(3, 10, 20).tolist() == documents[3][10:20].tolist()
    assert data.document(3, 490, 9999).tolist() == documents[3][490:].tolist()
    assert data.document(3, 500).tolist() == []


def test_a_corpus_without_tokens(tmp_path):
    for documents in ([], [np.empty(0, int)]):
        data = IndexedDataset(write(tmp_path / "c", documents, 300))
        assert (len(data), data.tokens, data.max_id()) == (len(documents), 0, -1)


def test_a_document_longer_than_a_sequence_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "_MAX_SEQUENCE", 100)
    documents = [np.arange(n) for n in (100, 101, 350, 7)]
    data = IndexedDataset(write(tmp_path / "c", documents, 400))
    assert data.lengths.tolist() == [100, 101, 350, 7]
    assert data.document(2).tolist() == list(range(350))


def test_parts_of_a_document_are_joined(tmp_path):
    with IndexedWriter(str(tmp_path / "c"), 300) as writer:
        for part in ([1, 2], [], [3]):
            writer.append(np.array(part, np.int64))
        writer.end_document()
        writer.finish("{}")
    assert IndexedDataset(str(tmp_path / "c")).document(0).tolist() == [1, 2, 3]


def test_nothing_stays_of_an_unfinished_corpus(tmp_path):
    with IndexedWriter(str(tmp_path / "c"), 300) as writer:
        writer.append(np.arange(10))
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_replacement_leaves_the_old_corpus(tmp_path):
    prefix = write(tmp_path / "c", [np.arange(5)], 300)
    with IndexedWriter(prefix, 300) as writer:
        writer.append(np.arange(10))
    assert IndexedDataset(prefix).lengths.tolist() == [5]


def test_damaged_files_are_named(tmp_path):
    prefix = write(tmp_path / "c", [np.arange(5), np.arange(9)], 300)
    whole_bin, whole_idx = Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.bin").write_bytes(whole_bin[:-2])
    with pytest.raises(UserError, match=r"damaged.*28 bytes.*has 26"):
        IndexedDataset(prefix)
    Path(f"{prefix}.bin").write_bytes(whole_bin)
    Path(f"{prefix}.idx").write_bytes(whole_idx[:-1])
    with pytest.raises(UserError, match="cut short"):
        IndexedDataset(prefix)
    for broken in (b"", b"MMIDIDX", b"nonsense" * 20, whole_idx[:9] + b"\2" + whole_idx[10:]):
        Path(f"{prefix}.idx").write_bytes(broken)
        with pytest.raises(UserError, match="not a Megatron index"):
            IndexedDataset(prefix)
    Path(f"{prefix}.idx").unlink()
    assert not corpus_exists(prefix)
    with pytest.raises(UserError, match="lctrain data prepare"):
        IndexedDataset(prefix)


def test_a_broken_sidecar_is_named(tmp_path):
    assert read_sidecar(str(tmp_path / "c")) is None
    for text in ("{", "{}", "[1]", '{"sources": [], "more": 1}'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(UserError, match=r"c\.json does not describe"):
            read_sidecar(str(tmp_path / "c"))


@pytest.fixture(scope="module")
def megatron():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vocab", [6, 257, 100_000])
def test_megatron_reads_ours(megatron, tmp_path, vocab):
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, vocab, n) for n in LENGTHS]
    theirs = megatron.IndexedDataset(write(tmp_path / "c", documents, vocab))
    assert len(theirs) == len(documents)
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    assert theirs.sequence_lengths.tolist() == LENGTHS
    for number, document in enumerate(documents):
        assert theirs[number].tolist() == document.tolist()
    assert theirs.get(3, offset=4, length=6).tolist() == documents[3][4:10].tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_we_read_megatrons(megatron, tmp_path, dtype):
    import torch

    rng = np.random.default_rng(2)
    documents = [rng.integers(0, 100, n) for n in (4, 1, 77)]
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=dtype)
    builder.add_document(torch.tensor(documents[0]), [4])
    builder.add_document(torch.tensor(documents[1]), [1])
    builder.add_document(torch.tensor(documents[2]), [70, 7])  # two sequences, one document
    builder.finalize(str(tmp_path / "c.idx"))
    ours = IndexedDataset(str(tmp_path / "c"))
    assert len(ours) == 3
    for number, document in enumerate(documents):
        assert ours.document(number).tolist() == document.tolist()


@pytest.mark.filterwarnings("ignore")
def test_files_are_the_same_byte_for_byte(megatron, tmp_path):
    import torch

    documents = [np.arange(n) for n in LENGTHS]
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "m.idx"))
    write(tmp_path / "c", documents, 1000)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"c.{ending}").read_bytes() == (tmp_path / f"m.{ending}").read_bytes()
