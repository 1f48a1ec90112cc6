"""Text to ids and back."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lctrain.data.tokenizers import load_tokenizer
from lctrain.errors import UserError


@pytest.fixture
def hf_file(tmp_path):
    """hf_file(special tokens...): path of a small byte-level BPE tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    def make(*special):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(["the cat sat on the mat, the end of the cat"] * 5, trainer)
        if special:  # as many published tokenizers do: a first token that training does not want
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{special[0]} $A", special_tokens=[(special[0], tokenizer.token_to_id(special[0]))]
            )
        tokenizer.enable_truncation(4)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return str(tmp_path / "tokenizer.json")

    return make


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.encode(b"\xff\x00").tolist() == [255, 0]
    assert tokenizer.encode("a").dtype == np.uint16
    assert tokenizer.encode("").tolist() == []
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.decode([0xC3, 97, 256, 98, 9999, -1]) == "\ufffdab"


def test_dna():
    tokenizer = load_tokenizer("dna")
    assert tokenizer.encode("ACGTNacgtn").tolist() == [0, 1, 2, 3, 4] * 2
    assert tokenizer.encode(b"uU").tolist() == [3, 3]
    assert set(tokenizer.encode("RYSWKMBDHVXryswkmbdhvx").tolist()) == {4}
    assert tokenizer.encode("A C\r\nG\tT\n").tolist() == [0, 1, 2, 3]
    assert tokenizer.encode("A").dtype == np.uint8
    assert tokenizer.decode([0, 1, 2, 3, 4, 5, 77]) == "ACGTN"
    with pytest.raises(UserError, match=r"'>' is not a nucleotide"):
        tokenizer.encode(">chr1")


def test_hugging_face(hf_file):
    tokenizer = load_tokenizer(hf_file("<s>", "</s>"))
    text = "the cat sat\n  on the mät \U0001f40d"
    ids = tokenizer.encode(text)
    assert len(ids) > 4  # the file's own truncation must not cut documents
    assert ids.dtype == np.uint16
    assert 0 not in ids  # no <s> in front
    assert tokenizer.eod == 1
    assert tokenizer.decode(ids) == tokenizer.decode([*ids, 1, 999_999]) == text
    assert tokenizer.encode(text.encode()).tolist() == ids.tolist()
    assert ids.max() < tokenizer.vocab_size


def test_end_of_document_of_unusual_name(hf_file, tmp_path):
    path = hf_file("<done>")
    with pytest.raises(UserError, match=r"no end-of-document token.*:eod=<token>"):
        load_tokenizer(path)
    named = load_tokenizer(f"{path}:eod=<done>")
    assert named.eod == 0
    assert named.name == f"{path}:eod=<done>"
    with pytest.raises(UserError, match="no token '<nope>'"):
        load_tokenizer(f"{path}:eod=<nope>")
    assert load_tokenizer(f"{tmp_path}:eod=<done>").eod == 0  # the folder of a model


def test_fingerprint_follows_the_content_and_not_the_place(hf_file, tmp_path):
    path = hf_file("</s>", "<other>")
    copy = tmp_path / "copy.json"
    copy.write_bytes(Path(path).read_bytes())
    assert load_tokenizer(path).fingerprint == load_tokenizer(str(copy)).fingerprint
    assert load_tokenizer(path).fingerprint != load_tokenizer(f"{path}:eod=<other>").fingerprint


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.json' cannot be read \(No such file"):
        load_tokenizer(str(tmp_path / "nowhere.json"))
    for content in (b"{}", b"\xff\xfe", b"[]", b""):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UserError, match=r"bad.json is not a Hugging Face tokenizer"):
            load_tokenizer(str(tmp_path / "bad.json"))
